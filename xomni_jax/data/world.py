"""The drawn world: signs and posters, without end, functions of their index.

Level "signs" has one or two words in colour on a coloured board, sometimes
with a shape; level "posters" 4 to 6 lines; level "signs-zh" signs in Chinese.
Every character fills one fixed cell of 16 px, the size of an image token, so
that even the smallest model can learn to read and write them.

As on the web, training signs and posters are not always what was asked for: 6 %
of their lines have one character wrong. Captions and answers tell what is
there. A model that learns from them alone misspells as often, so that guidance
and rewards have something to mend.
"""

import dataclasses
from typing import Any

from PIL import Image

from xomni_jax.data import world_posters, world_signs, world_signs_zh
from xomni_jax.data.world_paint import COLOURS, SHAPES
from xomni_jax.data.world_posters import Poster
from xomni_jax.data.world_signs import Sign
from xomni_jax.data.world_words import Picks, word_split, words
from xomni_jax.errors import InputError

__all__ = [
  "COLOURS",
  "LEVELS",
  "SHAPES",
  "SPLITS",
  "Poster",
  "Sign",
  "World",
  "kind",
  "open_world",
  "word_split",
  "words",
]

_LEVELS = {
  "signs": world_signs,
  "posters": world_posters,
  "signs-zh": world_signs_zh,
}
LEVELS = tuple(_LEVELS)
# Words are told apart by their checksum modulo 16, see `word_split`.
SPLITS = ("train", "validation", "test", "held-out")


@dataclasses.dataclass(frozen=True)
class World:
  """A source of records, by index; `open_world` makes one.

  Attributes:
    level: one of LEVELS.
    split: one of SPLITS.
  """

  level: str
  split: str

  @property
  def lang(self) -> str:
    """Of what images say, "en" or "zh"."""
    return _LEVELS[self.level].LANG

  def __len__(self) -> int:
    return 2**31 - 1

  def name(self, i: int) -> str:
    """What a message calls record i."""
    return f"{self.level}/{self.split}/{i}"

  def size(self, i: int) -> tuple[int, int]:
    """(width, height) of image i in px, known without drawing it."""
    self._check(i)
    return _LEVELS[self.level].SIZE

  def __getitem__(self, i: int) -> dict[str, Any]:
    """Record i.

    Returns:
      key: `name(i)`.
      image: PIL RGB, 96 x 96 px of a sign, 128 x 208 of a poster.
      text: a caption with everything there is.
      prompt: a wording that asks for `sign(i)`, which may leave colours out.
      qa: [question, answer] pairs, many of them about single characters.
      boxes: [line, x0, y0, x1, y1], the cells of each line in px.
      width, height: in px.
    """
    level = _LEVELS[self.level]
    wanted, pick = self._draw(i)
    shown = wanted
    if self.split == "train":
      shown = level.misspelt(wanted, Picks(i, f"{self.level}/misspelt"))
    width, height = level.SIZE
    return {
      "key": self.name(i),
      "image": level.paint(shown),
      "text": level.caption(shown),
      "prompt": level.prompt(wanted, pick),
      "qa": level.questions(shown),
      "boxes": level.boxes(shown),
      "width": width,
      "height": height,
    }

  def sign(self, i: int) -> Sign | Poster:
    """What prompt i asks for; its `lines` are what a reader should find.

    In split "train" the image may be misspelt.
    """
    return self._draw(i)[0]

  def picture(self, i: int) -> Image.Image:
    """The image of `sign(i)`, never misspelt."""
    return _LEVELS[self.level].paint(self.sign(i))

  def prompt(self, i: int) -> str:
    """The prompt of record i, without its image."""
    return _LEVELS[self.level].prompt(*self._draw(i))

  def _draw(self, i):
    """What prompt i asks for, and the choices that are left."""
    self._check(i)
    pick = Picks(i, f"{self.level}/{self.split}")
    return _LEVELS[self.level].draw(pick, self.split), pick

  def _check(self, i):
    if not 0 <= i < len(self):
      raise IndexError(
        f"record {i} of {self.level}, expected 0 to {len(self) - 1}"
      )


def kind(shown: Sign | Poster) -> str:
  """The group in which results are reported.

  Returns:
    Of a sign "one word", "two words", or "with digits", which wins; of a poster
    "4 lines", "5 lines" or "6 lines".
  """
  level = world_signs if isinstance(shown, Sign) else world_posters
  return level.kind(shown)


def colours(shown: Sign | Poster) -> list[str]:
  """Of the lines of an image, as its `boxes`."""
  level = world_signs if isinstance(shown, Sign) else world_posters
  return level.colours(shown)


def open_world(level: str, split: str = "train") -> World:
  """The drawn world as a source of records.

  Args:
    level: "signs", "posters", or "signs-zh".
    split: "train"; "validation" and "test", whose texts each have a word that
      "train" never shows; "held-out" has the texts of both.
  Raises:
    InputError: no such level or split. A record raises it, once it is drawn,
      where the font is not installed.
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
