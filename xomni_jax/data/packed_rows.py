"""Rows of token sequences: several records each, packed by windows."""

import contextlib
import dataclasses

import numpy as np

from xomni_jax.data import plan, protocol, records, sequences
from xomni_jax.data.feed import Feed, Rows, place_ids
from xomni_jax.errors import InputError
from xomni_jax.train_config import DataConfig


@dataclasses.dataclass(frozen=True)
class PackWindow:
  """Window -> its rows, each a list of places of the mixture."""

  feed: Feed
  tokenizer: protocol.Tokenizer
  data: DataConfig

  def __call__(self, w: int) -> plan.Window:
    size, mixture = self.data.window, self.feed.mixture
    first = w * size
    picks = mixture.picks(np.arange(first, first + size))
    rows, bad = plan.pack(self._lengths(first, picks), self.data.seq_len)
    if mixture.shuffle:
      rows = plan.shuffled(rows, mixture.seed, w)
    rows = [[first + n for n in row] for row in rows]
    return plan.Window(rows, [first + n for n in bad])

  def _lengths(self, first, picks):
    """i64[n] tokens; 0 where a record is bad, which reading it will show."""
    out = np.zeros(len(picks.record), np.int64)
    for s, source in enumerate(self.feed.sources):
      mine = np.flatnonzero(picks.source == s)
      task = self.feed.tasks[s]
      known = records.known_lengths(source, task)
      if known is not None and not self._of_turns(task):
        out[mine] = known[picks.record[mine]]
        continue
      for n in mine.tolist():
        with contextlib.suppress(InputError):
          out[n] = self.feed.use(first + n, self._length)
    return out

  def _length(self, record, task, rng):
    if not self._of_turns(task):
      return sequences.lengths(record, self.tokenizer).get(task, 0)
    # The row is made with the same generator.
    return len(_made(record, task, rng, self.tokenizer, self.data).tokens)

  def _of_turns(self, task):
    """Whether it is a chat of several turns, for which no length is stored."""
    return task == "chat" and self.data.turns > 1


@dataclasses.dataclass(frozen=True)
class PackedRows:
  """Step -> packed rows."""

  feed: Feed
  tokenizer: protocol.Tokenizer
  data: DataConfig
  windows: plan.Windows
  global_batch: int
  own: tuple[int, int]

  def __call__(self, step: int) -> Rows:
    first, count = self.own
    shape = (count, self.data.seq_len)
    arrays = {
      "tokens": np.full(shape, self.tokenizer.pad_id, np.int32),
      "segments": np.zeros(shape, np.int32),
      "positions": np.zeros(shape, np.int32),
      "weights": np.zeros(shape, np.float32),
    }
    ids, bad = [], []
    for b in range(count):
      places, also = self.windows.unit(step * self.global_batch + first + b)
      ids.append(places[0])
      self._fill({k: v[b] for k, v in arrays.items()}, places, bad)
      for place in also:
        self._sample(place, self.data.seq_len, bad)
    return Rows(arrays | {"id": place_ids(ids)}, bad)

  def dropped(self, step: int) -> int:
    """Counts up to a step. No record is left over where rows are packed."""
    return self.windows.dropped(step * self.global_batch)

  def _fill(self, row, places, bad):
    """Writes records into a row, one after the other."""
    at, segment = 0, 0
    for place in places:
      sample = self._sample(place, self.data.seq_len - at, bad)
      if sample is None:
        continue
      segment += 1
      span = slice(at, at + len(sample.tokens))
      row["tokens"][span] = sample.tokens
      row["weights"][span] = sample.weights
      row["segments"][span] = segment
      row["positions"][span] = np.arange(len(sample.tokens))
      at = span.stop

  def _sample(self, place, room, bad):
    """The sequence at a place, or None and a line in `bad`."""

    def make(record, task, rng):
      sample = _made(record, task, rng, self.tokenizer, self.data)
      if len(sample.tokens) > room:
        raise InputError(
          f"too long: {len(sample.tokens)} tokens as {task}, expected at most "
          f"{room}; raise data.seq_len, or store its lengths anew"
        )
      return sample

    try:
      return self.feed.use(place, make)
    except InputError as e:
      bad.append(str(e))
      return None


def _made(record, task, rng, tokenizer, data):
  return sequences.sample(
    record,
    task,
    tokenizer,
    rng,
    prompt_dropout=data.prompt_dropout,
    turns=data.turns,
    room=data.seq_len,
  )
