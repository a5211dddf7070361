"""Batches: what a step trains on, as a function of config, seed and step.

A batch never depends on what was read before it, so a run goes on anywhere,
on any number of processes. A record that can't be used leaves a masked row, or
a gap in a packed one: it never shifts the rows behind it.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from xomni_jax.data import protocol
from xomni_jax.train_config import DataConfig

Arrays = dict[str, np.ndarray]


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


@dataclasses.dataclass(frozen=True)
class Batches:
  """Batches by step; `packed` and `images` make them.

  Attributes:
    rows: step -> Rows, a pure function.
    workers: processes that prepare batches ahead; 0: threads.
    warm: step -> None, done once before batches from that step are made.
  """

  rows: Callable[[int], Rows]
  workers: int
  warm: Callable[[int], None]

  def __getitem__(self, step: int) -> Rows:
    """The rows of a step, from 0."""
    return self.rows(step)

  def iterate(self, first: int = 0) -> Iterator[Rows]:
    """Rows of steps `first`, `first` + 1, ... without end, prepared ahead.

    Close the iterator (or leave its scope) to end its workers.
    """
    raise NotImplementedError


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
  raise NotImplementedError


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
  raise NotImplementedError


class BadRecords:
  """Counts records that were passed over, and stops a run at too many.

  Attributes:
    bad, total: since the start.
  """

  def __init__(self, max_rate: float, log: Callable[[str], None]):
    """
    Args:
      max_rate: of bad records among the last 200 or more.
      log: gets a line for each bad record.
    """
    raise NotImplementedError

  def add(self, bad: Sequence[str], good: int) -> None:
    """Counts `rows.bad` and `rows.good`; raises InputError above the rate."""
    raise NotImplementedError
