"""What the drawn world is painted with: colours, characters and shapes.

All are amounts of ink in cells of 16 px, see world.py.
"""

import functools
import pathlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from xomni_jax.errors import InputError

CELL = 16  # px, the size of an image token
COLOURS = {
  "red": (200, 30, 40),
  "green": (0, 110, 60),
  "blue": (20, 60, 170),
  "black": (20, 20, 24),
  "white": (246, 246, 242),
  "yellow": (250, 205, 30),
}
# One of each in an image, either way round: every pair can be read.
DARK, LIGHT = ("red", "green", "blue", "black"), ("white", "yellow")
SHAPES = ("circle", "square", "triangle", "star")
_SCALE = 8  # shapes are drawn this much larger, and averaged down


@functools.cache
def ramp(board: str, colour: str) -> np.ndarray:
  """u8[256, 3]: the colour of each amount of ink."""
  amount = np.linspace(0, 1, 256)[:, None]
  ends = np.array(COLOURS[board]), np.array(COLOURS[colour])
  return np.rint(ends[0] * (1 - amount) + ends[1] * amount).astype(np.uint8)


@functools.cache
def _font():
  # Found without matplotlib's font manager, which would look through every
  # font of the machine first.
  try:
    import matplotlib
  except ImportError:
    raise InputError(
      "the drawn world needs the fonts in matplotlib's wheel; install it: "
      "pip install matplotlib"
    ) from None
  fonts = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf")
  path = fonts / "DejaVuSansMono-Bold.ttf"
  # Capitals of 15 px in a cell of 16, letters 12 px wide.
  return ImageFont.truetype(path, 20, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _chinese_font():
  try:
    import pylopdf_fonts_zh_cn
  except ImportError:
    raise InputError(
      "Chinese signs need the font in the package pylopdf-fonts-zh-cn; install "
      "it: pip install pylopdf-fonts-zh-cn"
    ) from None
  path = pylopdf_fonts_zh_cn.sans_path()
  return ImageFont.truetype(path, 15, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def glyph_ink(character: str) -> np.ndarray:
  """u8[32, 16] of ink, the capital's body in the upper cell."""
  image = Image.new("L", (CELL, 2 * CELL))
  if character.isascii():
    place, font, anchor = (CELL // 2, CELL - 1), _font(), "ms"
  else:
    place, font, anchor = (CELL // 2, CELL - 3), _chinese_font(), "ms"
  ImageDraw.Draw(image).text(
    place, character, fill=255, font=font, anchor=anchor
  )
  return np.asarray(image)


@functools.cache
def shape_ink(name: str) -> np.ndarray:
  """u8[32, 32] of ink, of one of SHAPES."""
  size = 2 * CELL * _SCALE
  image = Image.new("L", (size, size))
  draw = ImageDraw.Draw(image)
  middle, radius = size / 2, 0.42 * size
  if name == "circle":
    draw.circle((middle, middle), radius * 0.92, fill=255)
  else:
    corners, inner, turn = {
      "square": (4, 1, np.pi / 4),
      "triangle": (3, 1, 0),
      "star": (5, 0.4, 0),
    }[name]
    # Points of a star alternate with its inner corners.
    count = corners if inner == 1 else 2 * corners
    angles = turn - np.pi / 2 + 2 * np.pi * np.arange(count) / count
    away = radius * np.where(np.arange(count) % 2, inner, 1)
    draw.polygon(
      [
        (middle + r * np.cos(a), middle + r * np.sin(a))
        for r, a in zip(away, angles, strict=True)
      ],
      fill=255,
    )
  return np.asarray(image.reduce(_SCALE))
