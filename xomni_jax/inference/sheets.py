"""Sheets of images with lines under them, for people."""

import functools
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from xomni_jax.checks import make_folder, replacing

_WIDTH = 240  # px at least, so that a caption has room; small images grow
_GAP, _FONT, _LINE, _LINES = 8, 13, 17, 10
_PAPER, _INK = "white", "black"


class Picture(NamedTuple):
  """An image and the lines under it."""

  image: Image.Image
  caption: str


def grid(pictures: Sequence[Picture], columns: int = 4) -> Image.Image:
  """Pictures in rows of at most `columns`, with their captions under them.

  Small images are shown larger by a whole factor, pixel by pixel. Captions are
  broken into lines, and cut after the tenth.
  """
  images = [_enlarged(p.image.convert("RGB")) for p in pictures]
  columns = min(columns, len(images))
  width = max(_WIDTH, *(image.width for image in images))
  captions = [_wrapped(p.caption, width) for p in pictures]
  rows = [slice(i, i + columns) for i in range(0, len(images), columns)]
  heights = [
    max(image.height for image in images[row])
    + _LINE * max(len(lines) for lines in captions[row])
    + 2 * _GAP
    for row in rows
  ]
  size = (columns * (width + _GAP) + _GAP, sum(heights) + _GAP)
  page = Image.new("RGB", size, _PAPER)
  draw = ImageDraw.Draw(page)
  top = _GAP
  for row, height in zip(rows, heights, strict=True):
    base = top + max(image.height for image in images[row]) + _GAP // 2
    cells = zip(images[row], captions[row], strict=True)
    for i, (image, lines) in enumerate(cells):
      left = _GAP + i * (width + _GAP)
      page.paste(image, (left, top))
      for j, line in enumerate(lines):
        draw.text((left, base + j * _LINE), line, _INK, font=_font(line))
    top += height
  return page


def save(path: pathlib.Path, image: Image.Image) -> None:
  """Writes a PNG, all of it or nothing.

  Raises:
    InputError: the disk takes no more.
  """
  make_folder(path.parent)
  with replacing(path) as temporary:
    image.save(temporary, "PNG")


def _enlarged(image):
  factor = math.ceil(_WIDTH * 2 / 3 / image.width)
  size = (image.width * factor, image.height * factor)
  return image.resize(size, Image.Resampling.NEAREST) if factor > 1 else image


def _font(text: str):
  """DejaVu; for a line with Chinese in it a Chinese font, if there is one."""
  latin, chinese = _fonts()
  return chinese if any("\u2e80" <= c <= "\uffef" for c in text) else latin


@functools.cache
def _fonts():
  """DejaVu, which has more letters than PIL's own font; it is matplotlib's.

  And the font of the drawn world's Chinese signs; without its package DejaVu.
  """
  import matplotlib

  folder = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
  latin = ImageFont.truetype(str(folder / "DejaVuSans.ttf"), _FONT)
  try:
    import pylopdf_fonts_zh_cn
  except ImportError:
    return latin, latin
  path = pylopdf_fonts_zh_cn.sans_path()
  return latin, ImageFont.truetype(str(path), _FONT)


def _wrapped(text: str, width: int) -> list[str]:
  """Lines that fit into `width` px; broken at spaces where there are any."""
  fits = lambda line: _font(line).getlength(line) <= width
  lines = []
  for paragraph in text.splitlines():
    line = ""
    for word in paragraph.split():
      if line and fits(f"{line} {word}"):
        line = f"{line} {word}"
        continue
      if line:
        lines.append(line)
      line = ""
      for letter in word:  # of a long word, or of a language without spaces
        if line and not fits(line + letter):
          lines.append(line)
          line = ""
        line += letter
    lines.append(line)
  if len(lines) > _LINES:
    lines = [*lines[: _LINES - 1], lines[_LINES - 1][:-1] + "…"]
  return lines
