"""Words of the drawn world, their splits, and how texts are drawn of them."""

import functools
import importlib.resources
import zlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Option = TypeVar("Option")
LETTERS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
_MISSPELT = 6  # of 100 lines


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


class Picks:
  """Choices drawn for one record, the same on every platform.

  numpy keeps the raw stream of a bit generator, unlike a Generator's methods,
  the same in every version.
  """

  def __init__(self, index: int, name: str):
    """Of record `index` of the source called `name`."""
    key = np.array([index, zlib.crc32(name.encode())], np.uint64)
    self.bits = np.random.Philox(key=key)

  def __call__(self, options: Sequence[Option]) -> Option:
    """One of the options, each as likely."""
    return options[int(self.bits.random_raw()) % len(options)]


@functools.cache
def words_of(split: str, longest: int = 6) -> tuple[str, ...]:
  """Words of at most `longest` characters that make a text of a split."""
  wanted = ("validation", "test") if split == "held-out" else (split,)
  return tuple(
    word
    for word in words()
    if len(word) <= longest and word_split(word) in wanted
  )


def draw_code(pick: Picks, length: int) -> str:
  """Letters and digits in any order, such as "B7" or "44KS2".

  No character tells what stands next to it: a tokenizer that is to read them
  has to tell S from 5 by their looks.
  """
  while True:
    code = "".join(pick(pick((LETTERS, DIGITS))) for _ in range(length))
    if word_split(code) == "train":
      return code


def misspell(line: str, pick: Picks) -> str:
  """A line as a careless painter writes it.

  Of 100 lines 6 have one character that is another, a letter for a letter, a
  digit for a digit. It makes no held-out word.
  """
  if pick(range(100)) >= _MISSPELT:
    return line
  while True:
    at = pick([k for k, character in enumerate(line) if character != " "])
    wrong = pick(DIGITS if line[at].isdigit() else LETTERS)
    painted = line[:at] + wrong + line[at + 1 :]
    splits = {word_split(word) for word in painted.split()}
    if painted != line and splits == {"train"}:
      return painted
