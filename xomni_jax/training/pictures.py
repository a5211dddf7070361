"""Pictures of samples: grids with captions, as PNG files."""

import functools
import io
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from xomni_jax.errors import InputError
from xomni_jax.training.stage import Picture

_WIDTH = 240  # px at least, so that a caption has room; small images grow
_GAP, _FONT, _LINE, _LINES = 8, 13, 17, 10
_PAPER, _INK = "white", "black"


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
        draw.text((left, base + j * _LINE), line, _INK, font=_font())
    top += height
  return page


def curves(metrics: Iterable[Mapping[str, Any]], prefix: str) -> Image.Image:
  """Metrics over steps, a line each.

  Args:
    metrics: one mapping a step, with "step" among its names.
    prefix: of the names that are drawn.
  """
  import matplotlib.figure

  lines: dict[str, list[tuple[int, float]]] = {}
  for values in metrics:
    for name, value in values.items():
      if name.startswith(prefix) and value is not None:
        lines.setdefault(name, []).append((values["step"], value))
  # Without pyplot, which keeps every figure that it makes.
  figure = matplotlib.figure.Figure((8, 5), layout="constrained")
  axes = figure.add_subplot()
  for name, points in sorted(lines.items()):
    axes.plot(*zip(*points, strict=True), label=name.removeprefix(prefix))
  axes.set_xlabel("step")
  axes.grid(alpha=0.3)
  if lines:
    axes.legend()
  page = io.BytesIO()
  figure.savefig(page, format="png", dpi=100)
  return Image.open(page).convert("RGB")


def save(workdir, step: int, tag: str, image: Image.Image) -> pathlib.Path:
  """Writes `<workdir>/pictures/<tag>-<step>.png`, all of it or nothing.

  Raises:
    InputError: the disk takes no more.
  """
  path = pathlib.Path(workdir) / "pictures" / f"{tag}-{step:07d}.png"
  temporary = path.with_suffix(".tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(temporary, "PNG")
    temporary.replace(path)
  except OSError as e:
    temporary.unlink(missing_ok=True)
    raise InputError(
      f"picture {path} cannot be written: {e.strerror or e}; make room there"
    ) from None
  return path


def _enlarged(image):
  factor = math.ceil(_WIDTH * 2 / 3 / image.width)
  size = (image.width * factor, image.height * factor)
  return image.resize(size, Image.Resampling.NEAREST) if factor > 1 else image


@functools.cache
def _font():
  """DejaVu, which has more letters than PIL's own font; it is matplotlib's."""
  import matplotlib

  folder = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
  return ImageFont.truetype(str(folder / "DejaVuSans.ttf"), _FONT)


def _wrapped(text: str, width: int) -> list[str]:
  """Lines that fit into `width` px; broken at spaces where there are any."""
  fits = lambda line: _font().getlength(line) <= width
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
