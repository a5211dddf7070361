"""Rows of one record each, as a stage prepares it; batches by bucket."""

import dataclasses
from collections.abc import Callable, Hashable

import numpy as np

from xomni_jax.data import plan, records
from xomni_jax.data.feed import Arrays, Feed, Rows, place_ids
from xomni_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class BucketWindow:
  """Window -> its global batches, each (bucket, places of the mixture)."""

  feed: Feed
  bucket_of: Callable[[int, int], Hashable]
  size: int
  global_batch: int

  def __call__(self, w: int) -> plan.Window:
    mixture = self.feed.mixture
    first = w * self.size
    picks = mixture.picks(np.arange(first, first + self.size))
    pairs = zip(picks.source.tolist(), picks.record.tolist(), strict=True)
    buckets = [self._bucket(*pair) for pair in pairs]
    batches, bad, dropped = plan.bucket(buckets, self.global_batch)
    if mixture.shuffle:
      batches = plan.shuffled(batches, mixture.seed, w)
    units = [(name, [first + n for n in batch]) for name, batch in batches]
    return plan.Window(units, [first + n for n in bad], dropped)

  def _bucket(self, source, record):
    try:
      return self.bucket_of(*self.feed.sources[source].size(record))
    except InputError:
      return None


@dataclasses.dataclass(frozen=True)
class ImageRows:
  """Step -> rows of one record each."""

  feed: Feed
  prepare: Callable[[dict, np.random.Generator, Hashable], Arrays]
  blank: Callable[[Hashable], Arrays]
  windows: plan.Windows | None
  global_batch: int
  own: tuple[int, int]

  def __call__(self, step: int) -> Rows:
    first, count = self.own
    if self.windows is None:
      bucket, also = None, []
      start = step * self.global_batch
      places = range(start, start + self.global_batch)
    else:
      (bucket, places), also = self.windows.unit(step)
    places = places[first : first + count]
    bad, rows, real = [], [], []
    for place in places:
      row = self._row(place, bucket, bad)
      real.append(row is not None)
      rows.append(self.blank(bucket) if row is None else row)
    if first == 0:  # told once, by the process of the first rows
      for place in also:
        self._told(place, bad)
    arrays = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
    real = np.array(real, np.float32)
    return Rows(arrays | {"id": place_ids(places), "real": real}, bad)

  def dropped(self, step: int) -> int:
    """Records left over up to a step."""
    return 0 if self.windows is None else self.windows.dropped(step)

  def _row(self, place, bucket, bad):
    """Arrays of the record at a place, or None and a line in `bad`."""
    make = lambda record, task, rng: self.prepare(record, rng, bucket)
    try:
      return self.feed.use(place, make)
    except InputError as e:
      bad.append(str(e))
      return None

  def _told(self, place, bad):
    """Adds to `bad` why a record has no bucket."""
    bucket_of = self.windows.make.bucket_of
    make = lambda record, task, rng: bucket_of(*records.size_of(record))
    try:
      self.feed.use(place, make)
    except InputError as e:
      bad.append(str(e))
