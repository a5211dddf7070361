"""What rows of every kind are made from: a mixture of opened sources."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from xomni_jax.data import plan, records
from xomni_jax.errors import InputError
from xomni_jax.train_config import DataConfig

Arrays = dict[str, np.ndarray]

# One place of the mixture takes as long to find as all of these.
_BLOCK = 256


class Rows(NamedTuple):
  """This process's contiguous rows of a global batch.

  Attributes:
    arrays: all with the rows as first axis.
    bad: a line for each record that was passed over.
  """

  arrays: Arrays
  bad: list[str]

  @property
  def good(self) -> int:
    """Records in these rows."""
    if "segments" in self.arrays:
      return int(self.arrays["segments"].max(axis=1).sum())
    return int(self.arrays["real"].sum())


class Feed:
  """The records of a mixture by place, and their generators."""

  def __init__(self, data: DataConfig, seed: int):
    self.sources = [records.open_source(s) for s in data.sources]
    self.tasks = [s.task for s in data.sources]
    self._seed = seed
    firsts, counts = [], []
    for cfg, source in zip(data.sources, self.sources, strict=True):
      if cfg.first + max(cfg.count, 1) > len(source):
        raise InputError(
          f"{cfg.path} has {len(source)} records, expected more than first "
          f"{cfg.first} + count {cfg.count}; lower them"
        )
      firsts.append(cfg.first)
      counts.append(cfg.count or len(source) - cfg.first)
    weights = tuple(s.weight for s in data.sources)
    self.mixture = plan.Mixture(
      tuple(firsts), tuple(counts), weights, seed, data.shuffle
    )

  def use(self, place: int, make: Callable[..., Any]) -> Any:
    """make(record, task, rng) of the record at a place of the mixture.

    Raises:
      InputError: from reading or from `make`, with the record's shard and key.
    """
    block, i = divmod(place, _BLOCK)
    source, epoch, record = (int(x[i]) for x in _picks(self.mixture, block))
    rng = np.random.default_rng([self._seed, source, epoch, record])
    name = self.sources[source].name(record)
    try:
      got = self.sources[source][record]
      name = f"{name} ({got['key']})"
      return make(got, self.tasks[source], rng)
    except InputError as e:
      raise InputError(f"{name}: {e}") from None


@functools.lru_cache(256)
def _picks(mixture: plan.Mixture, block: int) -> plan.Picks:
  return mixture.picks(np.arange(block * _BLOCK, (block + 1) * _BLOCK))


def own_rows(global_batch, process):
  """(first, count) of this process's rows in a global batch."""
  index, count = process
  if global_batch % count:
    raise InputError(
      f"global_batch {global_batch} is not a multiple of {count} processes; "
      f"try {max(1, global_batch // count) * count}"
    )
  return index * (global_batch // count), global_batch // count


def place_ids(places):
  return (np.asarray(places, np.int64) % 2**31).astype(np.int32)
