"""Rows of a measurement: a line an image, kept as they are made.

The first line says what is measured. A command that was killed goes on behind
the last whole line; one that measures something else is refused.
"""

import functools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xomni_jax.checks import replacing
from xomni_jax.errors import InputError, RunError
from xomni_jax.evals import asked as asked_lib
from xomni_jax.evals.asked import Asked
from xomni_jax.evals.reading import Readings
from xomni_jax.rewards import text_scores
from xomni_jax.rewards.journal import Journal, read_journal

# Of the first line, what may be another when a command goes on, and besides
# where its rows are reused: an image has a key of its own.
_FREE = ("folders",)
_REUSED = (*_FREE, "models", "n", "samples", "batch", "drawing")
METRICS = ("exact", "characters", "reward")


class Key(NamedTuple):
  """Which image a row is about.

  Attributes:
    setting: its name.
    prompt: number of the prompt.
    sample: number of the image of this prompt.
  """

  setting: str
  prompt: int
  sample: int


class Rows:
  """A file of rows, open for more; {Key: Readings} are in `found`."""

  def __init__(self, path: pathlib.Path, identity: Mapping[str, Any]):
    """Opens or makes the file.

    Args:
      identity: what is measured, as JSON has it.
    Raises:
      InputError: the file has rows of something else, or can't be opened.
      RunError: it can't be written.
    """
    self._journal = Journal(path, alone=True)
    try:
      self._open(json.loads(json.dumps(identity)))
    except BaseException:
      self.close()
      raise

  def _open(self, identity):
    path = self._journal.path
    there, self.found = read_rows(path)
    if not there:
      self._write([identity])
      return
    names = sorted((there.keys() | identity.keys()) - set(_FREE))
    differ = [k for k in names if there.get(k) != identity.get(k)]
    if differ:
      changes = ", ".join(
        f"{k} {json.dumps(there.get(k))} -> {json.dumps(identity.get(k))}"
        for k in differ
      )
      raise InputError(
        f"{path} holds rows of another measurement ({changes}); use a new --out"
      )

  def add(self, rows: Iterable[tuple[Key, Readings]]) -> None:
    """Keeps rows, all that are not there yet.

    Raises:
      RunError: the file can't be written any more.
    """
    rows = [(key, read) for key, read in rows if key not in self.found]
    self._write(key._asdict() | {"ocr": read} for key, read in rows)
    self.found |= rows

  def _write(self, lines):
    try:
      self._journal.add(lines)
    except OSError as e:
      raise RunError(
        f"{self._journal.path} can't be written ({e.strerror}); make room "
        "there and start again: it goes on where it was"
      ) from None

  def close(self) -> None:
    """Nothing can be added any more."""
    self._journal.close()


def read_rows(path: pathlib.Path) -> tuple[dict, dict[Key, Readings]]:
  """(identity, rows) of a file; a torn last line is left out.

  Raises:
    InputError: it can't be read, or is no such file.
  """
  identity, *lines = read_journal(path) or [{}]
  try:
    rows = {
      Key(line["setting"], line["prompt"], line["sample"]): line["ocr"]
      for line in lines
    }
    if identity and "measures" not in identity:
      raise KeyError("measures")
  except (KeyError, TypeError, AttributeError) as e:
    raise InputError(
      f"{path} has lines that are no rows of a measurement ({e}), expected a "
      "file that `xomni eval` made"
    ) from None
  return identity, rows


class Reusable(NamedTuple):
  """Rows of another measurement.

  Attributes:
    rows: all of them.
    models: names of the models that are the same, "" (none at all) included.
    drawings: what drew them, see `drawings`.
  """

  rows: Mapping[Key, Readings]
  models: frozenset[str]
  drawings: tuple[int, ...]


def reusable(path: pathlib.Path, identity: Mapping[str, Any]) -> Reusable:
  """Rows of a measurement that differs in models and numbers of images only.

  Args:
    identity: of the measurement that they are for.
  Raises:
    InputError: the file can't be read, or it differs in more.
  """
  if not path.exists():
    raise InputError(
      f"--reuse: {path.parent} has no {path.name.removesuffix('.gz')}, packed "
      "or not; expected the --out of an earlier measurement of this kind"
    )
  there, found = read_rows(path)
  identity = json.loads(json.dumps(identity))
  names = (there.keys() | identity.keys()) - {*_REUSED}
  for key in sorted(names):
    a, b = there.get(key), identity.get(key)
    if a != b:
      raise InputError(
        f"--reuse: in {path} {key} is {json.dumps(a)}, here it is "
        f"{json.dumps(b)}; expected the same of all but "
        f"{', '.join(_REUSED[len(_FREE) :])}"
      )
  ours = identity["models"]
  theirs = there.get("models", {})
  same = {m for m, digest in theirs.items() if ours.get(m) == digest}
  return Reusable(found, frozenset({"", *same}), drawings(there))


def drawings(identity: Mapping[str, Any]) -> tuple[int, ...]:
  """Versions of the code that drew (`drawing.VERSION`); of old files, 0.

  Rows of two have no keys in common: they are paired by prompt alone.
  """
  return tuple(identity.get("drawing", (0,)))


def write_prompts(path: pathlib.Path, asked: Sequence[Asked]) -> None:
  """Keeps what was asked beside the rows, so that they can be scored alone."""
  lines = [json.dumps(asked_lib.as_json(a)) + "\n" for a in asked]
  with replacing(path) as temporary:
    temporary.write_text("".join(lines), encoding="utf-8")


def read_prompts(path: pathlib.Path) -> list[Asked]:
  """What `write_prompts` kept."""
  return [asked_lib.from_json(line) for line in read_journal(path)]


@functools.lru_cache(2**16)
def _scored(text, targets, lang):
  return text_scores.text_reward(text, targets, lang, spaces=False)


def score_table(
  rows: Mapping[Key, Readings],
  setting: str,
  samples: int,
  asked: Sequence[Asked],
  engine: str,
) -> dict[str, np.ndarray]:
  """{metric: f64[prompts, samples]} of a setting; NaN: the engine failed.

  The metrics, all without regard to case, punctuation and white space:
    exact: 1 where the text read is the target.
    characters: 1 - min(1, edit distance / length of the target).
    reward: `text_scores.text_reward`.

  Raises:
    InputError: rows are missing.
  """
  shape = len(asked), samples
  found = {name: np.full(shape, np.nan) for name in METRICS}
  for prompt, one in enumerate(asked):
    for sample in range(samples):
      readings = rows.get(Key(setting, prompt, sample))
      if readings is None:
        raise InputError(
          f"no row of {setting!r}, prompt {prompt}, sample {sample}; let the "
          "command that makes them run to its end"
        )
      if engine not in readings or "text" not in readings[engine]:
        continue
      text = readings[engine]["text"]
      score = _scored(text, one.targets, one.lang)
      if score is None:
        continue
      at = prompt, sample
      found["exact"][at] = score.distance == 0
      found["characters"][at] = 1 - min(1.0, score.distance / len(score.target))
      found["reward"][at] = score.score
  return found
