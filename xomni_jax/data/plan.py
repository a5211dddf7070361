"""Which records a step trains on: pure functions of seed and place.

The mixture is an endless line of picks (source, epoch, record); a window of
it is packed into rows or sorted into batches, and these units are numbered
through all windows. Everything here is integer arithmetic of its own, so that
no library's next version gives a run that is resumed other data.
"""

import bisect
import collections
import dataclasses
import hashlib
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from xomni_jax.errors import InputError

_ROUNDS = 6  # of the Feistel network
# Weights are multiples of this share, and places stay below 2**42: their
# product fits 63 bits.
_SHARES = 2**20
_CACHED_WINDOWS = 8
# So many windows in a row without a unit are a mistake in the settings.
_EMPTY_WINDOWS = 64


class Picks(NamedTuple):
  """Records of a stretch of the mixture, i64[n] each.

  Attributes:
    source: number of the source.
    epoch: how often all its records came before.
    record: number within the source.
  """

  source: np.ndarray
  epoch: np.ndarray
  record: np.ndarray


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Sources mixed by weight, each in a new order every epoch.

  Attributes:
    firsts, counts: records first .. first + count - 1 of each source are used.
    weights: shares of the sources, relative to each other.
    seed: of the orders.
    shuffle: False: in the order of their numbers.
  """

  firsts: tuple[int, ...]
  counts: tuple[int, ...]
  weights: tuple[float, ...]
  seed: int
  shuffle: bool

  def picks(self, places) -> Picks:
    """The records at these places i64[n] of the mixture, from 0."""
    source, place = interleave(np.asarray(places, np.int64), self.weights)
    epoch, record = np.empty_like(place), np.empty_like(place)
    for s, (first, count) in enumerate(
      zip(self.firsts, self.counts, strict=True)
    ):
      mine = source == s
      epoch[mine], within = np.divmod(place[mine], count)
      if self.shuffle:
        within = permute(within, count, _hash(self.seed, s), epoch[mine])
      record[mine] = first + within
    return Picks(source, epoch, record)


def interleave(places: np.ndarray, weights: Sequence[float]):
  """(source, place within it) i64[n] of places in a mixture.

  Of the first k places source s has k * weight / sum(weights) of those that
  the sources before it left, give or take one: no chance is involved.
  """
  total = sum(weights)
  shares = [max(1, round(w / total * _SHARES)) for w in weights]
  source = np.full(places.shape, -1, np.int64)
  out = np.empty_like(places)
  rest, left = places.copy(), sum(shares)
  for s, share in enumerate(shares):
    before = rest * share // left
    takes = (rest + 1) * share // left > before
    here = takes & (source < 0)
    source[here], out[here] = s, before[here]
    rest, left = rest - before, left - share
  return source, out


def permute(values: np.ndarray, count: int, key: int, epoch=0) -> np.ndarray:
  """A permutation of 0 .. count - 1, another for each key and epoch.

  Args:
    values: i64[n] below `count`.
    count: at least 1.
    key: below 2**64.
    epoch: i64[n] or one number.
  Returns:
    i64[n].
  """
  # A Feistel network permutes the numbers of 2 * half bits; what falls out of
  # the range goes through it again until it is back inside.
  half = max(1, (int(count - 1).bit_length() + 1) // 2)
  mask = np.uint64(2**half - 1)
  epochs = np.broadcast_to(np.asarray(epoch, np.uint64), values.shape)
  keys = _mix(epochs ^ np.uint64(key))
  out = values.astype(np.uint64)
  todo = np.arange(len(out))
  while len(todo):
    x, k = out[todo], keys[todo]
    left, right = x >> np.uint64(half), x & mask
    for r in range(_ROUNDS):
      left, right = right, left ^ (_mix(right ^ (k + np.uint64(r))) & mask)
    out[todo] = (left << np.uint64(half)) | right
    todo = todo[out[todo] >= count]
  return out.astype(np.int64)


def _mix(x):
  """splitmix64's finaliser: 64 well-mixed bits of each."""
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def _hash(*values) -> int:
  """64 bits of these values."""
  text = "/".join(map(str, values)).encode()
  return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class Window(NamedTuple):
  """What is made of a window of the mixture.

  Attributes:
    units: rows or batches, in order.
    bad: places of records that fit nowhere, for a reason to be told.
    dropped: records that were good, but left over.
  """

  units: list[Any]
  bad: list[int]
  dropped: int = 0


def pack(lengths: np.ndarray, width: int) -> tuple[list[list[int]], list[int]]:
  """Records packed into rows, the longest first, each where it fits best.

  Args:
    lengths: i64[n] in tokens.
    width: of a row, in tokens.
  Returns:
    (rows, bad): rows of record numbers, ascending; bad are those of length 0
    or above the width. Every record is in one of them, once.
  """
  good = (lengths > 0) & (lengths <= width)
  order = np.argsort(-lengths, kind="stable")
  order = order[good[order]]
  rows: list[list[int]] = []
  room: list[tuple[int, int]] = []  # (tokens left, row), ascending
  for n, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
    at = bisect.bisect_left(room, (length, -1))
    if at == len(room):
      left, row = width, len(rows)
      rows.append([])
    else:
      left, row = room.pop(at)
    rows[row].append(n)
    if left > length:
      bisect.insort(room, (left - length, row))
  return [sorted(row) for row in rows], np.flatnonzero(~good).tolist()


def bucket(
  buckets: Sequence[Hashable], batch: int
) -> tuple[list[tuple[Hashable, list[int]]], list[int], int]:
  """Records sorted into batches of one bucket each.

  Args:
    buckets: of each record; None: it fits none.
    batch: records of a batch.
  Returns:
    (batches, bad, dropped): (bucket, record numbers) in the order in which
    they fill up; records that fit no bucket; how many are left over.
  """
  filling = collections.defaultdict(list)
  batches, bad = [], []
  for n, name in enumerate(buckets):
    if name is None:
      bad.append(n)
      continue
    filling[name].append(n)
    if len(filling[name]) == batch:
      batches.append((name, filling.pop(name)))
  return batches, bad, sum(map(len, filling.values()))


class Windows:
  """The units of all windows, numbered through."""

  def __init__(self, make: Callable[[int], Window], hint: str):
    """
    Args:
      make: window -> what is made of it, a pure function.
      hint: what to change where windows give nothing.
    """
    self.make, self._hint = make, hint
    self._ends: list[int] = []  # units up to the end of each window
    self._dropped: list[int] = []
    self._cache: collections.OrderedDict[int, Window] = (
      collections.OrderedDict()
    )
    self._lock = threading.RLock()

  def __getstate__(self):
    cache = collections.OrderedDict()
    return self.__dict__ | {"_lock": None, "_cache": cache}

  def __setstate__(self, state):
    self.__dict__.update(state, _lock=threading.RLock())

  def unit(self, n: int) -> tuple[Any, list[int]]:
    """Unit n, and the bad places to report with it.

    Those come with the first unit of their window, or of the next window that
    has any.

    Raises:
      InputError: windows upon windows hold no unit.
    """
    with self._lock:
      self._reach(n)
      w = bisect.bisect_right(self._ends, n)
      first = self._ends[w - 1] if w else 0
      unit = self._window(w).units[n - first]
      if n > first:
        return unit, []
      bad = list(self._window(w).bad)
      while w and self._ends[w - 1] == (self._ends[w - 2] if w > 1 else 0):
        w -= 1
        bad = self._window(w).bad + bad
      return unit, bad

  def dropped(self, n: int) -> int:
    """Records left over in all windows up to unit n's."""
    with self._lock:
      self._reach(n)
      return self._dropped[bisect.bisect_right(self._ends, n)]

  def _reach(self, n):
    """Counts the units of windows up to the one that holds unit n."""
    empty = 0
    while not self._ends or self._ends[-1] <= n:
      window = self._window(len(self._ends))
      empty = 0 if window.units else empty + 1
      if empty == _EMPTY_WINDOWS:
        raise InputError(
          f"{empty} windows of records in a row give no batch "
          f"({len(window.bad)} records of the last are bad, "
          f"{window.dropped} left over); {self._hint}"
        )
      dropped = self._dropped[-1] if self._dropped else 0
      end = self._ends[-1] if self._ends else 0
      self._ends.append(end + len(window.units))
      self._dropped.append(dropped + window.dropped)

  def _window(self, w):
    if w not in self._cache:
      self._cache[w] = self.make(w)
      while len(self._cache) > _CACHED_WINDOWS:
        self._cache.popitem(last=False)
    self._cache.move_to_end(w)
    return self._cache[w]


def shuffled(units: list, seed: int, window: int) -> list:
  """The units of a window in an order drawn for it."""
  if not units:
    return units
  order = permute(
    np.arange(len(units)), len(units), _hash(seed, "units"), window
  )
  return [units[i] for i in order]
