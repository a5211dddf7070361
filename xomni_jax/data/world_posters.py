"""Posters of the drawn world: 4 to 6 short lines, with a shape or two.

A poster has 8 columns and 13 rows of cells. Line k, from 0, stands in row
1 + 2 k from column 1; the rows between are for the tails of Q. A shape below
the text fills the two last rows, one beside a line the two last columns.
"""

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
COLUMNS, ROWS = 8, 13
SIZE = (CELL * COLUMNS, CELL * ROWS)
_COUNTS = (4, 5, 6)  # of lines
_LONGEST = 6  # characters of a line, the space included
# A shape below needs the rows of the last line, one beside those columns that
# a line of this many characters leaves.
_MOST_ABOVE, _SHORT = 5, 3
_WORDS = ("word", "word", "word", "two words", "word and number")
_KINDS = (*_WORDS, "number")  # of lines
# Codes have every character at every place. Held-out posters have none, for
# Tesseract misreads a third of them.
_TRAIN_KINDS = (*_KINDS, "code", "code")
_SHAPES = ("", "", "", *world_paint.SHAPES)  # a third of posters has none


class Poster(NamedTuple):
  """What a poster shows.

  Attributes:
    lines: 4 to 6, each of one or two words, of at most 6 characters.
    colour, board: of the text and of what it stands on, keys of COLOURS.
    title: colour of the first line, as dark or light as `colour`.
    beside: a shape of SHAPES to the right of line `beside_line`; "": none.
    below: one below the last line; "": none. Shapes have the text's colour.
  """

  lines: tuple[str, ...]
  colour: str
  board: str
  title: str
  beside: str
  below: str

  @property
  def text(self) -> str:
    """The lines with " / " between them."""
    return " / ".join(self.lines)

  @property
  def beside_line(self) -> int:
    """Number, from 1, of the line that has room for a shape; 0: none has."""
    short = (k for k, s in enumerate(self.lines, 1) if len(s) <= _SHORT)
    return next(short, 0)


def draw(pick: Picks, split: str) -> Poster:
  """What the poster of a record shows."""
  light, dark = pick(world_paint.LIGHT), pick(world_paint.DARK)
  colour, board = pick(((light, dark), (dark, light)))
  like = world_paint.LIGHT if colour == light else world_paint.DARK
  title = pick((colour, pick(like)))
  count = pick(_COUNTS)
  lines = _draw_lines(pick, split, count)
  poster = Poster(lines, colour, board, title, "", "")
  beside, below = pick(_SHAPES), pick(_SHAPES)
  return poster._replace(
    beside=beside if poster.beside_line else "",
    below=below if count <= _MOST_ABOVE else "",
  )


def _draw_lines(pick, split, count):
  """One line has a word of the split for certain, others often do."""
  certain = pick(range(count))
  kinds = _TRAIN_KINDS if split == "train" else _KINDS
  lines = []
  for k in range(count):
    kind = pick(_WORDS if k == certain else kinds)
    of = split if k == certain else pick((split, "train"))
    lines.append(_draw_line(pick, kind, of))
  return tuple(lines)


def _draw_line(pick, kind, split):
  if kind == "code":
    return draw_code(pick, pick(range(1, _LONGEST + 1)))
  if kind == "number":
    more = range(pick(range(1, _LONGEST)))
    return pick(DIGITS[1:]) + "".join(pick(DIGITS) for _ in more)
  if kind == "word":
    return pick(words_of(split))
  if kind == "word and number":
    number = str(pick((pick(range(1, 10)), pick(range(10, 100)))))
    word = pick(words_of(split, _LONGEST - 1 - len(number)))
    return f"{word} {number}"
  first = pick(words_of(split, 3))
  second = pick(words_of("train", _LONGEST - 1 - len(first)))
  return " ".join(pick(((first, second), (second, first))))


def misspelt(poster: Poster, pick: Picks) -> Poster:
  """The poster as a careless painter writes it."""
  return poster._replace(lines=tuple(misspell(x, pick) for x in poster.lines))


def paint(poster: Poster) -> Image.Image:
  """The image of a poster, RGB of 128 x 208 px."""
  title, ink = np.zeros((2, *SIZE[::-1]), np.uint8)
  for k, line in enumerate(poster.lines):
    for column, character in enumerate(line, 1):
      if character != " ":
        y, x = CELL * _row(k), CELL * column
        # Two cells high: the tail of a Q reaches below the first.
        cells = (ink if k else title)[y : y + 2 * CELL, x : x + CELL]
        cells[:] = world_paint.glyph_ink(character)
  for name, row, column in (
    (poster.beside, _row(poster.beside_line - 1), COLUMNS - 2),
    (poster.below, ROWS - 2, (COLUMNS - 2) // 2),
  ):
    if name:
      y, x = CELL * row, CELL * column
      ink[y : y + 2 * CELL, x : x + 2 * CELL] = world_paint.shape_ink(name)
  return Image.fromarray(
    np.where(
      title[..., None] > 0,
      world_paint.ramp(poster.board, poster.title)[title],
      world_paint.ramp(poster.board, poster.colour)[ink],
    )
  )


def boxes(poster: Poster) -> list[list]:
  """[line, x0, y0, x1, y1], the cells of each line in px."""
  return [
    [line, CELL, CELL * _row(k), CELL * (1 + len(line)), CELL * (_row(k) + 1)]
    for k, line in enumerate(poster.lines)
  ]


def colours(poster: Poster) -> list[str]:
  """Of each of `boxes`."""
  return [poster.title, *[poster.colour] * (len(poster.lines) - 1)]


def kind(poster: Poster) -> str:
  """Either "4 lines", "5 lines" or "6 lines"."""
  return f"{len(poster.lines)} lines"


def _row(k):
  return 1 + 2 * k


def caption(poster: Poster) -> str:
  """A caption with everything there is."""
  lines = f"the lines {_quoted(poster)} in {poster.colour}"
  parts = _listed([lines, *_title(poster), *_shapes(poster)])
  return f"A {poster.board} poster with {parts}."


def prompt(poster: Poster, pick: Picks) -> str:
  """One of the wordings that ask for the poster."""
  lines, colour, board = _quoted(poster), poster.colour, poster.board
  count, shapes = len(poster.lines), _shapes(poster)
  more = [*_title(poster), *shapes]
  plus = f", with {_listed(more)}" if more else ""
  plain = _listed([f"the lines {lines}", *shapes])
  whole = _listed([f"the lines {lines} in {colour}", *more])
  return pick(
    (
      f"A {board} poster with {plain}.",
      f"A {board} poster with {whole}.",
      f"A poster on {board} with {whole}.",
      f"Draw a {board} poster that reads {lines} in {colour}{plus}.",
      f"{lines}, one below the other, in {colour} on a {board} poster{plus}.",
      f"Please make a {board} poster of {count} lines, {lines}, in {colour}"
      f"{plus}.",
    )
  )


def _quoted(poster):
  return ", ".join(f'"{line}"' for line in poster.lines)


def _title(poster):
  if poster.title == poster.colour:
    return []
  return [f"the first line in {poster.title}"]


def _shapes(poster):
  found = []
  if poster.beside:
    found.append(f"a {poster.beside} beside line {poster.beside_line}")
  if poster.below:
    found.append(f"a {poster.below} below")
  return found


def _listed(parts):
  """Either "a", "a and b", or "a, b and c"."""
  *first, last = parts
  return f"{', '.join(first)} and {last}" if first else last


def questions(poster: Poster) -> list[list[str]]:
  """[question, answer] pairs; those on single characters come last."""
  lines = list(enumerate(poster.lines, 1))
  where = str(poster.beside_line) if poster.beside else "none"
  pairs = [
    ["What does the poster say?", poster.text],
    ["What does it say?", poster.text],
    ["How many lines does the poster have?", str(len(lines))],
    ["Which colour is the text?", poster.colour],
    ["Which colour is the first line?", poster.title],
    ["Which colour is the board?", poster.board],
    ["What colour is it?", poster.board],
    ["Which shape is below the text?", poster.below or "none"],
    ["Which shape is beside the text?", poster.beside or "none"],
    ["Which line is the shape beside?", where],
  ]
  for k, line in lines:
    spelled = " / ".join(" ".join(word) for word in line.split())
    pairs.append([f"What does line {k} say?", line])
    pairs.append([f"Spell line {k}.", spelled])
  for (k, line), column in itertools.product(lines, range(_LONGEST)):
    # Between two words nothing stands.
    if line[column : column + 1].strip():
      question = f"Which character stands in column {column + 1} of line {k}?"
      pairs.append([question, line[column]])
  return pairs
