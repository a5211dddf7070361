"""Batches: what a step trains on, as a function of config, seed and step.

A batch never depends on what was read before it, so a run goes on anywhere,
on any number of processes. A record that can't be used leaves a masked row, or
a gap in a packed one: it never shifts the rows behind it.
"""

import collections
import contextlib
import dataclasses
import os
import signal
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np

from xomni_jax.data import plan, protocol, sequences
from xomni_jax.data.feed import Arrays, Feed, Rows, own_rows
from xomni_jax.data.image_rows import BucketWindow, ImageRows
from xomni_jax.data.packed_rows import PackedRows, PackWindow
from xomni_jax.errors import InputError
from xomni_jax.train_config import DataConfig

__all__ = ["BadRecords", "Batches", "Rows", "images", "packed"]

# Records over which the rate of bad ones is taken, at least.
LAST = 200


@dataclasses.dataclass(frozen=True)
class Batches:
  """Batches by step; `packed` and `images` make them.

  Attributes:
    rows: step -> Rows, a pure function.
    workers: processes that prepare batches ahead; 0: threads.
    dropped: step -> records left over up to then, good but in no batch.
  """

  rows: Callable[[int], Rows]
  workers: int
  dropped: Callable[[int], int]

  def __getitem__(self, step: int) -> Rows:
    """The rows of a step, from 0."""
    return self.rows(step)

  def iterate(self, first: int = 0) -> Iterator[Rows]:
    """Rows of steps `first`, `first` + 1, ... without end, prepared ahead.

    Close the iterator, or drop it, to end its workers.
    """
    rows = self._ahead(first)
    # Before the program's end takes away the modules that closing needs.
    weakref.finalize(rows, _close, weakref.ref(rows))
    return rows

  def _ahead(self, first):
    import grain
    from absl import flags

    # Here and not in each worker: what lies before `first` is counted once,
    # and settings that do not fit are refused before workers start.
    self.dropped(first)
    steps = grain.MapDataset.source(_Steps(self, first))
    read = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    ahead = steps.to_iter_dataset(read)
    if self.workers:
      # Grain reads its flags for the workers, of which a program that is not
      # of absl's kind has parsed none: their defaults do.
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
      ahead = ahead.mp_prefetch(
        grain.MultiprocessingOptions(
          num_workers=self.workers, per_worker_buffer_size=2
        ),
        worker_init_fn=_start_worker,
      )
    with contextlib.closing(iter(ahead)) as iterator:
      for arrays, bad in iterator:
        # Copied out of the memory shared with workers, which is theirs.
        yield Rows({k: np.array(v) for k, v in arrays.items()}, bad)


def _close(reference):
  rows = reference()
  if rows is not None:
    rows.close()


@dataclasses.dataclass(frozen=True)
class _Steps:
  """Batches from a step on, as Grain wants its sources."""

  batches: Batches
  first: int

  def __len__(self) -> int:
    return 2**40

  def __getitem__(self, i: int) -> Rows:
    return self.batches[self.first + i]


def _start_worker(index, count):
  """In a worker process, before it reads anything."""
  import multiprocessing

  import jax

  # The accelerator belongs to the main process, should `prepare` use JAX.
  jax.config.update("jax_platforms", "cpu")
  # A signal to the whole group is for the main process to act on: it still
  # wants batches up to the checkpoint it saves, and then ends its workers.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)

  # One that is killed can't: its workers would wait for it for good.
  def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=end_with_parent, daemon=True).start()


def packed(
  data: DataConfig,
  tokenizer: protocol.Tokenizer,
  *,
  seed: int,
  global_batch: int,
  process: tuple[int, int] = (0, 1),
) -> Batches:
  """Rows of `data.seq_len` tokens, each holding whole records.

  Args:
    data: its sources' tasks are those of `sequences.sample`.
    tokenizer: of the AR model.
    seed: of order, dropout and choice of questions.
    global_batch: rows of a step, over all processes.
    process: (index, count) of this process.
  Returns:
    Batches of
      tokens i32[B, T]; padding is `tokenizer.pad_id`;
      segments i32[B, T], 1, 2, ... by record, 0 at padding;
      positions i32[B, T], from 0 in each record, 0 at padding;
      weights f32[B, T], of predicting token t from t - 1; 0 at a record's
        first token, where no loss is wanted, and at padding;
      id i32[B], the place of the row's first record in the mixture.
  Raises:
    InputError: sources that can't be opened, or settings that do not fit.
  """
  wrong = sorted({s.task for s in data.sources} - set(sequences.TASKS))
  if wrong or data.seq_len < 1:
    raise InputError(
      f"data of token sequences has seq_len {data.seq_len} and tasks "
      f"{', '.join(wrong) or 'that fit'}; expected above 0, and of "
      f"{', '.join(sequences.TASKS)}"
    )
  own = own_rows(global_batch, process)
  feed = Feed(data, seed)
  windows = plan.Windows(
    PackWindow(feed, tokenizer, data), "raise data.seq_len"
  )
  rows = PackedRows(feed, tokenizer, data, windows, global_batch, own)
  return Batches(rows, data.workers, rows.dropped)


def images(
  data: DataConfig,
  *,
  seed: int,
  global_batch: int,
  prepare: Callable[[dict, np.random.Generator, Hashable], Arrays],
  blank: Callable[[Hashable], Arrays],
  bucket_of: Callable[[int, int], Hashable] | None = None,
  process: tuple[int, int] = (0, 1),
) -> Batches:
  """A record a row, as the stage prepares it.

  Args:
    data: its sources have the task "image".
    seed: of order and of the generators that `prepare` gets.
    global_batch: rows of a step, over all processes.
    prepare: (record, rng, bucket) -> arrays of one row, of the shapes and
      dtypes of `blank(bucket)`; raises InputError if the record is no good.
      `rng` depends on seed, epoch and record only. Closures are fine: worker
      processes get them by cloudpickle.
    blank: bucket -> arrays of a masked row.
    bucket_of: (width, height) of an image in px -> bucket; each global batch
      is of one bucket, made of `data.window` records, whose left-overs are
      dropped. InputError: the record is no good. None: all rows are alike,
      and `prepare` and `blank` get None.
    process: (index, count) of this process.
  Returns:
    Batches of the arrays of `prepare`, stacked, and
      id i32[B], the place of the record in the mixture;
      real f32[B], 0 at masked rows, else 1.
  Raises:
    InputError: sources that can't be opened, or settings that do not fit.
  """
  wrong = sorted({s.task for s in data.sources} - {"image"})
  if wrong:
    raise InputError(
      f"data of images has the tasks {', '.join(wrong)}, expected image"
    )
  own = own_rows(global_batch, process)
  feed = Feed(data, seed)
  windows = None
  if bucket_of is not None:
    windows = plan.Windows(
      BucketWindow(feed, bucket_of, data.window, global_batch),
      f"raise data.window ({data.window}), or lower the number of buckets or "
      f"global_batch ({global_batch})",
    )
  rows = ImageRows(feed, prepare, blank, windows, global_batch, own)
  return Batches(rows, data.workers, rows.dropped)


class BadRecords:
  """Counts records that were passed over, and stops a run at too many.

  Attributes:
    bad, total: since the start.
  """

  def __init__(self, max_rate: float, log: Callable[[str], None]):
    """
    Args:
      max_rate: of bad records among the last `LAST` or more.
      log: gets a line for each bad record.
    """
    self.bad = self.total = 0
    self._max_rate, self._log = max_rate, log
    self._last = "see above"
    self._recent: collections.deque[tuple[int, int]] = collections.deque()

  def add(self, bad: Sequence[str], good: int) -> None:
    """`show` and `count` of `rows.bad` and `rows.good`."""
    self.show(bad)
    self.count(len(bad), good)

  def show(self, bad: Sequence[str]) -> None:
    """Logs a line for each bad record."""
    for line in bad:
      self._last = line
      self._log(f"bad record, passed over: {line}")

  def count(self, bad: int, good: int) -> None:
    """Counts records; raises InputError above the rate.

    It raises as soon as `LAST` records would be above it, were all of those
    still to come good.
    """
    self._recent.append((bad, bad + good))
    self.bad += bad
    self.total += bad + good
    total = sum(t for _, t in self._recent)
    while total - self._recent[0][1] >= LAST:
      total -= self._recent.popleft()[1]
    recent = sum(b for b, _ in self._recent)
    if recent > self._max_rate * max(total, LAST):
      raise InputError(
        f"{recent} of the last {total} records are bad, expected at most "
        f"{self._max_rate:.2%} of {max(total, LAST)} (data.max_bad_rate); "
        f"the last one: {self._last}"
      )
