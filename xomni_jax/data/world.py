"""The drawn world: signs, without end, each a function of its index.

A sign is one or two words in colour on a coloured board, sometimes with a
shape. Every character fills one fixed cell of 16 px, the size of an image
token, so that even the smallest model can learn to read and write them.
"""

import dataclasses
import functools
import importlib.resources
import itertools
import pathlib
import zlib
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from xomni_jax.errors import InputError

LEVELS = ("signs",)
# Words are told apart by their checksum modulo 16, see `word_split`.
SPLITS = ("train", "validation", "test", "held-out")
CELL, CELLS = 16, 6
SIDE = CELL * CELLS
COLOURS = {
  "red": (200, 30, 40),
  "green": (0, 110, 60),
  "blue": (20, 60, 170),
  "black": (20, 20, 24),
  "white": (246, 246, 242),
  "yellow": (250, 205, 30),
}
# One of each on a sign, either way round: every pair can be read.
_DARK, _LIGHT = ("red", "green", "blue", "black"), ("white", "yellow")
SHAPES = ("circle", "square", "triangle", "star")
_SCALE = 8  # shapes are drawn this much larger, and averaged down
# Rows of cells of the first and the second word; both begin at column 0.
_ROWS = (2, 4)
_LETTERS, _DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
_LONGEST = 8  # characters of a text, the space included


class Sign(NamedTuple):
  """What a sign shows.

  Attributes:
    words: one or two, one a line, of at most 6 characters.
    colour, board: of the text and of what it stands on, keys of COLOURS.
    shape: one of SHAPES, in the text's colour; "": none.
    place: of the shape, "above" the text or "beside" the first word.
  """

  words: tuple[str, ...]
  colour: str
  board: str
  shape: str
  place: str

  @property
  def text(self) -> str:
    """The words with a space between them."""
    return " ".join(self.words)


def word_split(word: str) -> str:
  """The split that a word occurs in besides others: "train" or a held-out one.

  Words of two or more letters whose checksum is a multiple of 8 never occur in
  "train": of these, multiples of 16 are "validation", the others "test".
  """
  checksum = zlib.crc32(word.upper().encode())
  if sum(c.isalpha() for c in word) < 2 or checksum % 8:
    return "train"
  return "test" if checksum % 16 else "validation"


@functools.cache
def words() -> tuple[str, ...]:
  """Every word of `words.txt`, upper case, in its order."""
  file = importlib.resources.files("xomni_jax.data") / "words.txt"
  lines = file.read_text(encoding="utf-8").split("\n")
  return tuple(line for line in lines if line and not line.startswith("#"))


@dataclasses.dataclass(frozen=True)
class World:
  """A source of records, by index; `open_world` makes one.

  Attributes:
    level: one of LEVELS.
    split: one of SPLITS.
  """

  level: str
  split: str

  def __len__(self) -> int:
    return 2**31 - 1

  def name(self, i: int) -> str:
    """What a message calls record i."""
    return f"{self.level}/{self.split}/{i}"

  def size(self, i: int) -> tuple[int, int]:
    """(width, height) of image i in px, known without drawing it."""
    self._check(i)
    return SIDE, SIDE

  def lengths(self, task: str) -> None:
    """None: how many tokens a record has is not known beforehand."""
    del task

  def __getitem__(self, i: int) -> dict[str, Any]:
    """Record i.

    Returns:
      key: `name(i)`.
      image: PIL RGB of 96 x 96 px.
      text: a caption with everything there is.
      prompt: a wording that asks for the image, which may leave colours out.
      qa: [question, answer] pairs, many of them about single characters.
      boxes: [word, x0, y0, x1, y1], the cells of each word in px.
      width, height: in px.
    """
    self._check(i)
    pick = _Picks(i, f"{self.level}/{self.split}")
    sign = _draw_sign(pick, self.split)
    return {
      "key": self.name(i),
      "image": paint(sign),
      "text": _caption(sign),
      "prompt": _prompt(sign, pick),
      "qa": _questions(sign),
      "boxes": [
        [word, 0, CELL * row, CELL * len(word), CELL * (row + 1)]
        for word, row in zip(sign.words, _ROWS, strict=False)
      ],
      "width": SIDE,
      "height": SIDE,
    }

  def sign(self, i: int) -> Sign:
    """What image i shows."""
    self._check(i)
    return _draw_sign(_Picks(i, f"{self.level}/{self.split}"), self.split)

  def prompt(self, i: int) -> str:
    """The prompt of record i, without its image."""
    self._check(i)
    pick = _Picks(i, f"{self.level}/{self.split}")
    return _prompt(_draw_sign(pick, self.split), pick)

  def _check(self, i):
    if not 0 <= i < len(self):
      raise IndexError(f"record {i} of {self.level}, expected 0 to {len(self)}")


def open_world(level: str, split: str = "train") -> World:
  """The drawn world as a source of records.

  Args:
    level: "signs".
    split: "train"; "validation" and "test", whose texts each have a word that
      "train" never shows; "held-out" has the texts of both.
  Raises:
    InputError: no such level or split.
  """
  for what, value, known in (
    ("level", level, LEVELS),
    ("split", split, SPLITS),
  ):
    if value not in known:
      raise InputError(
        f"the drawn world has no {what} {value!r}, expected one of "
        f"{', '.join(known)}"
      )
  return World(level, split)


class _Picks:
  """Choices drawn for one record, the same on every platform.

  numpy keeps the raw stream of a bit generator, unlike a Generator's methods,
  the same in every version.
  """

  def __init__(self, index, name):
    key = np.array([index, zlib.crc32(name.encode())], np.uint64)
    self.bits = np.random.Philox(key=key)

  def __call__(self, options):
    return options[int(self.bits.random_raw()) % len(options)]


@functools.cache
def _words_of(split):
  """Words that make a text of a split."""
  wanted = ("validation", "test") if split == "held-out" else (split,)
  return tuple(word for word in words() if word_split(word) in wanted)


@functools.cache
def _short_words_of(split, longest):
  return tuple(w for w in _words_of(split) if len(w) <= longest)


def _draw_sign(pick, split):
  light, dark = pick(_LIGHT), pick(_DARK)
  colour, board = pick(((light, dark), (dark, light)))
  text = _draw_words(pick, split)
  shape = pick(("", *SHAPES))
  # Beside it there is room for the shape if the word leaves two cells.
  places = ("above", "beside") if len(text[0]) <= CELLS - 2 else ("above",)
  return Sign(text, colour, board, shape, pick(places) if shape else "")


def _draw_words(pick, split):
  kind = pick(range(10))
  if split == "train" and kind < 3:
    # Every character at every place, which words alone do not give.
    first = _code(pick, pick(range(2, CELLS + 1)))
  else:
    first = pick(_words_of(split))
  longest = min(_LONGEST - 1 - len(first), CELLS)
  if kind % 2:
    return (first,)
  if kind == 4 or longest < 2:
    return first, pick(_DIGITS[1:])
  if kind == 6:
    return first, str(pick(range(10, 100)))
  second = pick(_short_words_of("train", longest))
  return (second, first) if kind == 8 else (first, second)


def _code(pick, length):
  """Letters and digits in turn, such as "B7" or "4K2": they spell no word."""
  kinds = pick(((_LETTERS, _DIGITS), (_DIGITS, _LETTERS)))
  while True:
    code = "".join(pick(kinds[i % 2]) for i in range(length))
    if word_split(code) == "train":
      return code


def paint(sign: Sign) -> Image.Image:
  """The image of a sign, RGB of 96 x 96 px."""
  ink = np.zeros((SIDE + CELL, SIDE), np.uint8)
  for word, row in zip(sign.words, _ROWS, strict=False):
    for column, character in enumerate(word):
      y, x = CELL * row, CELL * column
      # Two cells high: the tail of a Q reaches below the first.
      ink[y : y + 2 * CELL, x : x + CELL] = _glyph(character)
  if sign.shape:
    x, y = ((2 * CELL, 0), (4 * CELL, 2 * CELL))[sign.place == "beside"]
    ink[y : y + 2 * CELL, x : x + 2 * CELL] = _shape(sign.shape)
  return Image.fromarray(_ramp(sign.board, sign.colour)[ink[:SIDE]])


@functools.cache
def _ramp(board, colour):
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
def _glyph(character):
  """u8[32, 16] of ink, the capital's body in the upper cell."""
  image = Image.new("L", (CELL, 2 * CELL))
  ImageDraw.Draw(image).text(
    (CELL // 2, CELL - 1), character, fill=255, font=_font(), anchor="ms"
  )
  return np.asarray(image)


@functools.cache
def _shape(name):
  """u8[32, 32] of ink."""
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


def _with_shape(sign):
  if not sign.shape:
    return ""
  return f", with a {sign.shape} {sign.place} it"


def _caption(sign):
  return (
    f'A {sign.board} sign that says "{sign.text}" in {sign.colour}'
    f"{_with_shape(sign)}."
  )


def _prompt(sign, pick):
  text, colour, board = f'"{sign.text}"', sign.colour, sign.board
  shape = _with_shape(sign)
  return pick(
    (
      f"A {board} sign that says {text}{shape}.",
      f"A {board} sign with the {colour} text {text}{shape}.",
      f"A sign with {text} in {colour} on {board}{shape}.",
      f"Draw a {board} board that reads {text} in {colour}{shape}.",
      f"{text} written in {colour} on a {board} sign{shape}.",
      f"Please make a sign that says {text}, {colour} on {board}{shape}.",
    )
  )


def _questions(sign):
  """[question, answer] pairs; those on single characters come last."""
  text = sign.text.replace(" ", "")
  spelled = " / ".join(" ".join(word) for word in sign.words)
  pairs = [
    ["What does the sign say?", sign.text],
    ["Spell the text.", spelled],
    ["Which colour is the text?", sign.colour],
    ["Which colour is the board?", sign.board],
    ["Which shape is on the sign?", sign.shape or "none"],
    ["How many characters does the text have?", str(len(text))],
  ]
  for (line, word), column in itertools.product(
    enumerate(sign.words, 1), range(1, CELLS + 1)
  ):
    if column <= len(word):
      of = f" of line {line}" if len(sign.words) > 1 else ""
      pairs.append(
        [f"Which character stands in column {column}{of}?", word[column - 1]]
      )
  return pairs
