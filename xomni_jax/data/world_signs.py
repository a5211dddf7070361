"""Signs of the drawn world: one or two words, sometimes with a shape."""

import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image

from xomni_jax.data import world_paint
from xomni_jax.data.world_paint import CELL
from xomni_jax.data.world_words import (
  DIGITS,
  Picks,
  draw_code,
  misspell,
  words_of,
)

LANG = "en"
CELLS = 6
SIZE = (CELL * CELLS, CELL * CELLS)
# Rows of cells of the first and the second word; both begin at column 0.
_ROWS = (2, 4)
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
  def lines(self) -> tuple[str, ...]:
    """The text line by line: the words."""
    return self.words

  @property
  def text(self) -> str:
    """The words with a space between them."""
    return " ".join(self.words)


def draw(pick: Picks, split: str) -> Sign:
  """What the sign of a record shows."""
  light, dark = pick(world_paint.LIGHT), pick(world_paint.DARK)
  colour, board = pick(((light, dark), (dark, light)))
  text = _draw_words(pick, split)
  shape = pick(("", *world_paint.SHAPES))
  # Beside it there is room for the shape if the word leaves two cells.
  places = ("above", "beside") if len(text[0]) <= CELLS - 2 else ("above",)
  return Sign(text, colour, board, shape, pick(places) if shape else "")


def _draw_words(pick, split):
  kind = pick(range(10))
  if split == "train" and kind < 3:
    # Every character at every place, which words alone do not give.
    first = draw_code(pick, pick(range(2, CELLS + 1)))
  else:
    first = pick(words_of(split))
  longest = min(_LONGEST - 1 - len(first), CELLS)
  if kind % 2:
    return (first,)
  if kind == 4 or longest < 2:
    return first, pick(DIGITS[1:])
  if kind == 6:
    return first, str(pick(range(10, 100)))
  second = pick(words_of("train", longest))
  return (second, first) if kind == 8 else (first, second)


def misspelt(sign: Sign, pick: Picks) -> Sign:
  """The sign as a careless painter writes it."""
  return sign._replace(words=tuple(misspell(w, pick) for w in sign.words))


def paint(sign: Sign) -> Image.Image:
  """The image of a sign, RGB of 96 x 96 px."""
  ink = np.zeros((SIZE[1] + CELL, SIZE[0]), np.uint8)
  for word, row in zip(sign.words, _ROWS, strict=False):
    for column, character in enumerate(word):
      y, x = CELL * row, CELL * column
      # Two cells high: the tail of a Q reaches below the first.
      ink[y : y + 2 * CELL, x : x + CELL] = world_paint.glyph_ink(character)
  if sign.shape:
    x, y = ((2 * CELL, 0), (4 * CELL, 2 * CELL))[sign.place == "beside"]
    ink[y : y + 2 * CELL, x : x + 2 * CELL] = world_paint.shape_ink(sign.shape)
  return Image.fromarray(
    world_paint.ramp(sign.board, sign.colour)[ink[: SIZE[1]]]
  )


def boxes(sign: Sign) -> list[list]:
  """[word, x0, y0, x1, y1], the cells of each word in px."""
  return [
    [word, 0, CELL * row, CELL * len(word), CELL * (row + 1)]
    for word, row in zip(sign.words, _ROWS, strict=False)
  ]


def colours(sign: Sign) -> list[str]:
  """Of each of `boxes`."""
  return [sign.colour] * len(sign.words)


def kind(sign: Sign) -> str:
  """Either "one word" or "two words", or "with digits" in one of them."""
  if any(c.isdigit() for c in sign.text):
    return "with digits"
  return "two words" if len(sign.words) > 1 else "one word"


def _with_shape(sign):
  if not sign.shape:
    return ""
  return f", with a {sign.shape} {sign.place} it"


def caption(sign: Sign) -> str:
  """A caption with everything there is."""
  return (
    f'A {sign.board} sign that says "{sign.text}" in {sign.colour}'
    f"{_with_shape(sign)}."
  )


def prompt(sign: Sign, pick: Picks) -> str:
  """One of the wordings that ask for the sign."""
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


def questions(sign: Sign) -> list[list[str]]:
  """[question, answer] pairs; those on single characters come last."""
  text = sign.text.replace(" ", "")
  spelled = " / ".join(" ".join(word) for word in sign.words)
  pairs = [
    ["What does the sign say?", sign.text],
    ["What does it say?", sign.text],
    ["Spell the text.", spelled],
    ["Which colour is the text?", sign.colour],
    ["Which colour is the board?", sign.board],
    ["What colour is it?", sign.board],
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
