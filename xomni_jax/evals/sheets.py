"""Sheets of images with what was asked and what was read, for people."""

import functools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from xomni_jax.errors import InputError

_COLUMNS, _GAP, _LINE, _SIZE = 8, 8, 15, 11
_WIDTH = 144  # px at least, so that lines have room


class Cell(NamedTuple):
  """One image.

  Attributes:
    image: u8[H, W, 3].
    lines: beneath it; each is cut to the image's width.
  """

  image: np.ndarray
  lines: Sequence[str]


def sheet(cells: Sequence[Cell]) -> Image.Image:
  """Images in rows of eight, small ones enlarged by a whole factor."""
  images = [_enlarged(Image.fromarray(cell.image)) for cell in cells]
  width = max(image.width for image in images)
  height = max(image.height for image in images)
  text = _LINE * max(len(cell.lines) for cell in cells)
  columns = min(_COLUMNS, len(cells))
  rows = -(-len(cells) // columns)
  step = width + _GAP, height + text + 2 * _GAP
  size = columns * step[0] + _GAP, rows * step[1] + _GAP
  page = Image.new("RGB", size, "white")
  draw = ImageDraw.Draw(page)
  for i, (cell, image) in enumerate(zip(cells, images, strict=True)):
    row, column = divmod(i, columns)
    left, top = _GAP + column * step[0], _GAP + row * step[1]
    page.paste(image, (left, top))
    for j, line in enumerate(cell.lines):
      place = left, top + height + _GAP // 2 + j * _LINE
      draw.text(place, _cut(line, width), "black", font=_font())
  return page


def save(path: pathlib.Path, image: Image.Image) -> None:
  """Writes a PNG, all of it or nothing; InputError if it can't."""
  temporary = path.with_suffix(".tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(temporary, "PNG")
    temporary.replace(path)
  except OSError as e:
    raise InputError(f"{path} can't be written ({e.strerror or e})") from None


def _enlarged(image):
  factor = -(-_WIDTH // image.width)
  size = image.width * factor, image.height * factor
  return image.resize(size, Image.Resampling.NEAREST) if factor > 1 else image


def _cut(line, width):
  if _font().getlength(line) <= width:
    return line
  while line and _font().getlength(line + "…") > width:
    line = line[:-1]
  return line + "…"


@functools.cache
def _font():
  """DejaVu, which has more letters than PIL's own font; it is matplotlib's."""
  import matplotlib

  folder = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf")
  return ImageFont.truetype(str(folder / "DejaVuSans.ttf"), _SIZE)
