"""Replies of rewards on record, and scorers that repeat them."""

import os
import threading
from collections.abc import Callable, Sequence

from xomni_jax.errors import InputError
from xomni_jax.rewards import wire
from xomni_jax.rewards.journal import Journal, read_journal
from xomni_jax.rewards.wire import Item, Score

Scorer = Callable[[Sequence[Item]], list[Score]]


def record(scorer: Scorer, path: str | os.PathLike, reward: str) -> Scorer:
  """The scorer, whose every reply is also appended to a file.

  Raises:
    InputError: the file can't be written.
  """
  journal, lock = Journal(path), threading.Lock()

  def score(items: Sequence[Item]) -> list[Score]:
    scores = [wire.checked(score) for score in scorer(items)]
    lines = [
      [*_key(reward, item), score._asdict()]
      for item, score in zip(items, scores, strict=True)
    ]
    with lock:
      journal.try_add(lines)
    return scores

  return score


def open_replay(path: str | os.PathLike, reward: str) -> Scorer:
  """A scorer that repeats what `record` wrote of this reward.

  An image, prompt and targets that were recorded more than once get the last
  reply; those that were not are failures, "not_recorded".

  Raises:
    InputError: no such file, it is no record, or has nothing of this reward.
  """
  replies = {}
  for number, line in enumerate(read_journal(path), 1):
    match line:
      case [str(), str(), str(), list(), {"id": str()} as entry]:
        replies[_hashable(line[:4])] = wire.score_from_dict(entry)
      case _:
        raise InputError(
          f"{path}, line {number} is no reply of a reward, expected a file "
          "that `record` of a reward's config has made"
        )
  if not any(key[0] == reward for key in replies):
    raise InputError(
      f"{path} holds no reply of reward {reward!r}, expected one of "
      f"{', '.join(sorted({key[0] for key in replies})) or 'an empty file'}"
    )

  def score(items: Sequence[Item]) -> list[Score]:
    scores = []
    for item in items:
      found = replies.get(_hashable(_key(reward, item)))
      if found is None:
        found = wire.failed(item.id, "not_recorded", f"not in {path}")
      scores.append(found._replace(id=item.id))
    return scores

  return score


def _key(reward, item):
  image_hash = wire.image_hash(item.image)
  return [reward, image_hash, item.prompt, [*item.targets]]


def _hashable(key):
  return (*key[:3], tuple(key[3]))
