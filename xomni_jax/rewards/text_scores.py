"""How well a text that was read matches the text that was asked for.

Plain Python, so that a server of rewards, the client and an evaluation all
count the same, whatever else they have installed.
"""

import collections
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

# What OneIG-Bench and LongText-Bench keep of a text: common Chinese, ASCII
# letters and digits, white space, and the accented letters of French.
KEPT = "\u4e00-\u9fa5a-zA-Z0-9àâäéèêëîïôöùûüçÀÂÄÉÈÊËÎÏÔÖÙÛÜÇ"
_DROPPED = re.compile(rf"[^{KEPT}\s]")
_SPACE = re.compile(r"\s+")
# A text loops if something of at most _UNIT characters stands _REPEATS times
# in a row, over most of it, and the text is this much longer than the target.
_UNIT, _REPEATS, _LOOP_LENGTH = 32, 4, 1.5


class TextScore(NamedTuple):
  """What `text_reward` found.

  Attributes:
    score: in [0, 1]; 1 is the target, character by character.
    recall: share of the target's characters that were read.
    distance: edits between the two texts.
    looped: the text repeats itself; its score is 0.
    target, read: the texts as they were compared.
  """

  score: float
  recall: float
  distance: int
  looped: bool
  target: str
  read: str


def text_reward(
  read: str, targets: Sequence[str], lang: str, spaces: bool = True
) -> TextScore | None:
  """The reward of a text that was read in an image; None: does not apply.

  score = 0.5 overlap + 0.5 (1 - min(1, distance / length of the target)).
  The overlap is the recall of characters, without regard to their order, as
  long as the text is no longer than the target. Beyond that it falls with the
  text's length: otherwise all letters of the alphabet, or the whole prompt,
  written into an image would earn half of the reward.

  Args:
    read: lines joined by anything that is white space.
    targets: the lines that the image should show.
    lang: "en", "zh" or another; see `normalize`.
    spaces: whether white space counts. Engines put it between letters that
      stand far apart, as those of the drawn world do.
  Returns:
    None if nothing of the targets is left to compare with.
  """
  wanted = normalize(" ".join(targets), lang)
  return forms_reward(normalize(read, lang), wanted, spaces)


def closed(text: str) -> str:
  """The text without white space."""
  return _SPACE.sub("", text)


def forms_reward(
  read: str, target: str, spaces: bool = True
) -> TextScore | None:
  """`text_reward` of texts that are normalised already."""
  if not spaces:
    target, read = closed(target), closed(read)
  if not target:
    return None
  distance = edit_distance(target, read)
  matched, wanted, found = _overlap(target, read)
  looped = len(read) >= _LOOP_LENGTH * len(target) and loops(read)
  overlap = matched / max(wanted, found)
  score = 0.5 * overlap + 0.5 * (1 - min(1.0, distance / len(target)))
  return TextScore(
    0.0 if looped else score, matched / wanted, distance, looped, target, read
  )


def normalize(text: str, lang: str) -> str:
  """The text as a reward compares it.

  Compatibility forms become plain ones (NFKC: full-width letters are ASCII).
  Then "en" and "zh" follow LongText-Bench: "en" in lower case, "zh" without
  white space; other languages keep every letter, mark and digit, case folded.
  """
  text = unicodedata.normalize("NFKC", text)
  if lang in ("en", "zh"):
    return longtext_form(text, lang)
  kept = "".join(
    c if unicodedata.category(c)[0] in "LMN" else " " if c.isspace() else ""
    for c in text
  )
  return _SPACE.sub(" ", kept).strip().casefold()


def normalize_all(texts: Sequence[str], langs: Sequence[str]) -> list[str]:
  """`normalize` of each text in its language."""
  return [normalize(t, lang) for t, lang in zip(texts, langs, strict=True)]


def longtext_form(text: str, lang: str) -> str:
  """The text as LongText-Bench compares it, lang "en" or "zh".

  Source: X-Omni's textbench/summary_scores.py, `preprocess_string`.
  """
  text = _DROPPED.sub("", text)
  if lang == "zh":
    return _SPACE.sub("", text)
  return _SPACE.sub(" ", text).strip().lower()


def _overlap(target, read):
  """Common characters, those of the target, those of the text; no spaces."""
  wanted = collections.Counter(_SPACE.sub("", target))
  found = collections.Counter(_SPACE.sub("", read))
  return (wanted & found).total(), wanted.total(), found.total()


def edit_distance(a: str, b: str) -> int:
  """Insertions, deletions and substitutions that make one text the other.

  Bit-parallel: a column of the table is one integer, so that a thousand
  characters take a millisecond. Source: Myers, J. ACM 46(3), 1999, in the form
  of Hyyro, 2001.
  """
  if not a:
    return len(b)
  places: dict[str, int] = {}
  for i, c in enumerate(a):
    places[c] = places.get(c, 0) | 1 << i
  full, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
  # Bits: whether the table rises (up) or falls (down) to the next row.
  up, down, distance = full, 0, len(a)
  for c in b:
    match = places.get(c, 0)
    diagonal = (((match & up) + up) ^ up) | match | down
    right_up = down | (~(diagonal | up) & full)
    right_down = up & diagonal
    distance += bool(right_up & last) - bool(right_down & last)
    right_up = (right_up << 1 | 1) & full
    right_down = right_down << 1 & full
    up = right_down | (~(diagonal | right_up) & full)
    down = right_up & diagonal
  return distance


def loops(text: str) -> bool:
  """Whether most of a text is one short piece over and over."""
  for unit in range(1, min(_UNIT, len(text) // _REPEATS) + 1):
    same = 0
    for i in range(unit, len(text)):
      same = same + 1 if text[i] == text[i - unit] else 0
      covered = same + unit
      if covered >= _REPEATS * unit and 2 * covered > len(text):
        return True
  return False
