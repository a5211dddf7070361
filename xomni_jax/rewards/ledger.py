"""What rewards have said in a run: nothing is scored or counted twice.

A run that was killed draws the same images again and finds their scores here.
Failures are not kept: a run that was stopped because its server was down asks
again when it goes on.
"""

import concurrent.futures
import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from xomni_jax.errors import InputError
from xomni_jax.rewards import wire
from xomni_jax.rewards.journal import Journal, read_journal
from xomni_jax.rewards.wire import Item, Score

Scorer = Callable[[Sequence[Item]], list[Score]]


class Key(NamedTuple):
  """Which sample of a run an image is.

  Attributes:
    step: of the run.
    prompt: the prompt's id.
    sample: its index in the prompt's group.
  """

  step: int
  prompt: str
  sample: int


class Ledger:
  """The scores of a run, by reward, sample and what was asked; for threads."""

  def __init__(self, folder: str | os.PathLike, process: int = 0):
    """Opens a folder of ledgers, one file for each process of the run.

    All are read, whatever number of processes wrote them; this process only
    writes to its own.

    Raises:
      InputError: a file is no ledger.
    """
    self._journal = Journal(Path(folder) / f"scores-{process}.jsonl")
    self._lock = threading.Lock()
    self._scores: dict[tuple, Score] = {}
    for path in sorted(Path(folder).glob("scores-*.jsonl")):
      self._scores |= dict(_entries(path))

  def __len__(self) -> int:
    return len(self._scores)

  def find(self, reward: str, key: Key, asked: str) -> Score | None:
    """The score of exactly this question (`asked_hash`), if it was added."""
    return self._scores.get((reward, *key, asked))

  def add(
    self,
    reward: str,
    keys: Sequence[Key],
    asked: Sequence[str],
    scores: Sequence[Score],
  ) -> None:
    """Adds scores; not failures, nor what is there already.

    Where they can't be written they are here all the same, and a run that is
    resumed asks for them again.
    """
    lines = []
    with self._lock:
      for key, question, score in zip(keys, asked, scores, strict=True):
        place = (reward, *key, question)
        if score.ok and place not in self._scores:
          self._scores[place] = score
          lines.append([*place, score._asdict()])
      self._journal.try_add(lines)


def score_once(
  ledger: Ledger,
  reward: str,
  scorer: Scorer,
  keys: Sequence[Key],
  items: Sequence[Item],
  size: int = 0,
  together: bool = False,
  about: str = "",
) -> tuple[list[Score], int]:
  """(scores, how many were found in the ledger); asks for the others only.

  Args:
    size: items of a call of the scorer, whose scores are in the ledger as soon
      as it is over; 0: all.
    together: make all calls at once, each in a thread.
    about: settings that scores depend on: with others they are asked anew.
  """
  hashes = [asked_hash(item, about) for item in items]
  found = [
    ledger.find(reward, key, asked)
    for key, asked in zip(keys, hashes, strict=True)
  ]
  missing = [i for i, score in enumerate(found) if score is None]

  def ask(part):
    new = [wire.checked(score) for score in scorer([items[i] for i in part])]
    ledger.add(reward, [keys[i] for i in part], [hashes[i] for i in part], new)
    for i, score in zip(part, new, strict=True):
      found[i] = score

  size = size or len(missing) or 1
  parts = [missing[i : i + size] for i in range(0, len(missing), size)]
  if together and len(parts) > 1:
    with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
      list(pool.map(ask, parts))
  else:
    for part in parts:
      ask(part)
  # The id is the caller's of this time.
  scores = [
    score._replace(id=item.id) for score, item in zip(found, items, strict=True)
  ]
  return scores, len(items) - len(missing)


def asked_hash(item: Item, about: str = "") -> str:
  """32 hex digits of all that a score depends on."""
  image = wire.image_hash(item.image)
  asked = [image, item.prompt, [*item.targets], item.lang, about]
  return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


def _entries(path):
  for number, line in enumerate(read_journal(path), 1):
    match line:
      case [str(), int(), str(), int(), str(), {"id": str()} as entry]:
        score = wire.score_from_dict(entry)
        if score.ok:  # what a disk has spoilt is asked for again
          yield tuple(line[:5]), score
      case _:
        raise InputError(
          f"{path}, line {number} is no score of a reward, expected a file "
          "that only a run has written to; restore it or move it away"
        )
