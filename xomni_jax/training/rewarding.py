"""Rewards of painted images: asked for by each process, added up by all.

There are two ways, which give the same numbers. On the host path images come
to the host, are asked for in threads, and what is heard is gathered from all
processes. On the fused path a callback asks inside the program that paints.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import threading
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import io_callback, multihost_utils

from xomni_jax.data.prompts import Prompt
from xomni_jax.errors import InputError, RunError
from xomni_jax.reward_config import (
  CombineConfig,
  RewardConfig,
  about,
  parse_source,
)
from xomni_jax.rewards import combine, journal, ledger, text_lines, wire
from xomni_jax.rewards.open import open_scorer

# What can go wrong with a score, by number, so that it can be gathered.
_KINDS = ("", wire.ABSENT, "other", *wire.FAILURES)


class Asked(NamedTuple):
  """Scores on their way.

  Attributes:
    step: of the run.
    images: {row: u8[H, W, 3]} of this process.
    prompts: of all rows; None: the row does not count.
    futures: {reward's name: its scores of `images`, in their order}.
    table: f32[R, N, 4 + 3 K] of all rows, see `_table`, where it is here
      already (the fused path).
  """

  step: int
  images: Mapping[int, np.ndarray]
  prompts: Sequence[Prompt | None]
  futures: Mapping[str, concurrent.futures.Future]
  table: np.ndarray | None = None


class Heard(NamedTuple):
  """What the rewards said.

  Attributes:
    combined: of all processes.
    columns: what it was combined from.
    scores: {reward's name: {row: Score}} of this process.
    seconds: waited.
    warnings: lines.
  """

  combined: combine.Combined
  columns: Mapping[str, combine.Column]
  scores: Mapping[str, Mapping[int, wire.Score]]
  seconds: float
  warnings: Sequence[str]


class Rewarder:
  """The rewards of a run."""

  def __init__(
    self,
    rewards: Sequence[RewardConfig],
    cfg: CombineConfig,
    group_size: int,
    folder,
    text_backend: str = "tokenizers",
    lines: int = 0,
  ):
    """Opens all rewards.

    Args:
      folder: of the ledgers.
      text_backend: see `open_scorer`.
      lines: K, of each image's lines that are told apart.
    Raises:
      InputError: a reward can't be opened.
    """
    self._rewards, self._cfg, self._group_size = rewards, cfg, group_size
    self._lines = lines
    self._over = threading.Event()
    self._scorers = {
      r.name: _reliable(open_scorer(_recorded(r), text_backend, self._over))
      for r in rewards
    }
    # Engines in this process are asked by one thread at a time.
    self._alone = {
      r.name: threading.Lock()
      for r in rewards
      if any(source.kind != "http" for source in parse_source(r.source))
    }
    self._at_once = {r.name: r.batch_items for r in rewards}
    self._about = {r.name: about(r) for r in rewards}
    self._ledger = ledger.Ledger(folder, jax.process_index())
    # What was seen of failures and drifts, by step; all processes read it.
    self._watched = pathlib.Path(folder) / "watched.jsonl"
    self._journal = None
    if jax.process_index() == 0:
      self._journal = journal.Journal(self._watched)
    self._history: combine.History | None = None
    self._told: set[str] = set()  # reasons of failures, each with its cause
    # A thread a reward: each has its own server, or its own engine.
    self._pool = concurrent.futures.ThreadPoolExecutor(len(rewards))
    self._fused: _Fused | None = None

  def ask(
    self,
    step: int,
    prompts: Sequence[Prompt | None],
    images: Mapping[int, np.ndarray],
  ) -> Asked:
    """Starts asking for the images of a rollout.

    Args:
      step: of the run, under which the ledger keeps what is said.
      prompts: of all rows, those of a group adjacent; None: no reward is asked
        for the row, all are absent.
      images: {row: u8[H, W, 3]} that this process asks for.
    """
    futures = {
      name: self._pool.submit(self._score, name, step, prompts, images)
      for name in self._scorers
    }
    return Asked(step, images, prompts, futures)

  def _score(self, name, step, prompts, images) -> dict[int, wire.Score]:
    """{row: score}; what the ledger has is not asked again.

    It never raises: on the fused path that would end the job without a word,
    and on the host path the other processes would wait for this one.
    """
    group = self._group_size
    asked = {row: x for row, x in images.items() if prompts[row] is not None}
    keys = [
      ledger.Key(step, f"{row // group}:{prompts[row].key}", row % group)
      for row in asked
    ]
    items = [
      wire.Item(str(row), image, *_item(prompts[row]))
      for row, image in asked.items()
    ]
    with self._alone.get(name, contextlib.nullcontext()):
      scores, _ = ledger.score_once(
        self._ledger,
        name,
        self._scorers[name],
        keys,
        items,
        size=self._at_once[name],
        together=name not in self._alone,
        about=self._about[name],
      )
    absent = {row: wire.absent(str(row)) for row in images}
    return absent | dict(zip(asked, scores, strict=True))

  def fused(
    self, step: int, prompts: Sequence[Prompt | None], mesh
  ) -> "_Fused":
    """What scores images inside a program: (images, rows) -> table.

    It is the same object in all calls, so that programs are compiled once.
    """
    if self._fused is None:
      names = tuple(self._scorers)
      self._fused = _Fused(self._score, names, mesh, self._lines)
    self._fused.step, self._fused.prompts = step, prompts
    self._fused.scores = {name: {} for name in self._scorers}
    self._fused.images = {}
    return self._fused

  def hear(self, asked: Asked, *, watch: bool = True) -> Heard:
    """Waits for the scores; all processes call it alike.

    Args:
      watch: count failures and look for drifts.
    Raises:
      RunError: too many scores failed.
    """
    start = time.perf_counter()
    count, table = len(asked.prompts), asked.table
    if table is None:
      scores = {name: f.result() for name, f in asked.futures.items()}
      table = gathered(
        np.stack([_table(s, count, self._lines) for s in scores.values()])
      )
    else:
      scores = self._fused.scores
    seconds = time.perf_counter() - start
    columns = {
      name: _column(rows) for name, rows in zip(scores, table, strict=True)
    }
    found = combine.combine(
      columns, self._rewards, self._group_size, self._cfg.quorum
    )
    warnings: Sequence[str] = ()
    if watch:
      causes = _causes(scores)
      found, drifts = self._watch(asked.step, found, causes)
      new = {k: line for k, line in causes.items() if k not in self._told}
      self._told |= new.keys()
      failures = [f"a score failed, {k}: {line}" for k, line in new.items()]
      warnings = [*failures, *drifts]
    return Heard(found, columns, scores, seconds, warnings)

  def _watch(self, step: int, found: combine.Combined, causes):
    """A step with drifts among its metrics, and warnings."""
    history, stopped = self._history, False
    if history is None:
      history, stopped = self._history_before(step)
    if stopped and self._is_mended(found.asked, found.failed):
      history = history._replace(failures=[])
    try:
      self._history, warnings = combine.watch(
        history, found, self._rewards, self._cfg, causes
      )
    except RunError:
      self._note({"stopped": step})
      raise
    drifts = combine.drift_metrics(self._history, self._rewards, self._cfg)
    failures = [found.asked, found.failed]
    self._note({"step": step, "failures": failures, "means": found.means})
    return found._replace(metrics={**found.metrics, **drifts}), warnings

  def _note(self, line):
    if self._journal:
      self._journal.try_add([line])

  def _is_mended(self, asked, failed):
    """Whether a first step after a stop shows that its cause is gone.

    Failures before the stop then count no more: they had used up what may
    fail, so that a single one would stop the run again.
    """
    return failed <= self._cfg.max_failure_rate * asked

  def _history_before(self, step: int) -> tuple[combine.History, bool]:
    """What a resumed run had seen up to there; whether that stopped it."""
    if not self._watched.exists():
      return combine.History([], []), False
    by_step, stopped = {}, False
    for number, line in enumerate(journal.read_journal(self._watched), 1):
      match line:
        case {"step": int(), "failures": [int(), int()], "means": dict()}:
          if stopped and self._is_mended(*line["failures"]):
            by_step = {k: v | {"failures": None} for k, v in by_step.items()}
          by_step[line["step"]], stopped = line, False
        case {"stopped": int()}:
          stopped = True
        case _:
          raise InputError(
            f"{self._watched}, line {number} is not about a step, expected a "
            "file that only a run has written to; restore it or move it away"
          )
    seen = [by_step[s] for s in sorted(by_step) if s < step]
    keep = max(self._cfg.window, 2 * self._cfg.drift_window)
    failures = [line["failures"] for line in seen[-keep:]]
    means = [line["means"] for line in seen[-keep:]]
    return combine.History([f for f in failures if f], means), stopped

  def close(self) -> None:
    """Waits for no server; Python waits for the pool's threads as it ends."""
    self._over.set()
    self._pool.shutdown(wait=False, cancel_futures=True)
    if self._journal:
      self._journal.close()


class _Fused:
  """A callback on all devices of a mesh, each with rows of its own.

  Sharded over fewer axes it would score images twice. Devices call at once,
  and each asks for all rewards at once: a server that hangs costs a pass of
  painting its deadline, not each device and reward one. `images` and `scores`
  are those of this process's devices.
  """

  def __init__(self, score, names, mesh, lines):
    self._score, self._names, self._mesh = score, names, mesh
    self._lines = lines
    self.step, self.prompts, self.scores = 0, (), {}
    self.images: dict[int, np.ndarray] = {}

  def __call__(self, images: jax.Array, rows: jax.Array) -> jax.Array:
    """f32[n, R, 4 + 3 K], see `_table`; for use inside `jit`.

    Args:
      images: u8[n, H, W, 3]; n is a multiple of the devices.
      rows: i32[n], of the rollout; -1: nobody's.
    """
    spec = jax.sharding.PartitionSpec(self._mesh.axis_names)
    shape = (len(self._names), 4 + 3 * self._lines)

    def ask(images, rows):
      out = jax.ShapeDtypeStruct((rows.shape[0], *shape), np.float32)
      return io_callback(self._ask, out, images, rows)

    return jax.shard_map(
      ask,
      mesh=self._mesh,
      in_specs=(spec, spec),
      out_specs=spec,
      check_vma=False,
    )(images, rows)

  def _ask(self, images, rows) -> np.ndarray:
    images, rows = np.asarray(images), np.asarray(rows)
    mine = {int(r): images[i] for i, r in enumerate(rows) if r >= 0}
    self.images.update(mine)

    def ask(name):
      found = self._score(name, self.step, self.prompts, mine)
      self.scores[name].update(found)
      by_place = {i: found[int(r)] for i, r in enumerate(rows) if r >= 0}
      return _table(by_place, len(rows), self._lines)

    with concurrent.futures.ThreadPoolExecutor(len(self._names)) as pool:
      return np.stack(list(pool.map(ask, self._names)), axis=1)


def _reliable(scorer):
  """A scorer that keeps what one promises: a Score of each item, no error."""

  def score(items):
    try:
      scores = [wire.checked(score) for score in scorer(items)]
      if len(scores) != len(items):
        raise ValueError(f"{len(scores)} scores of {len(items)} items")
      return scores
    except Exception as e:
      message = f"{type(e).__name__}: {e}"
      return [wire.failed(item.id, "client", message) for item in items]

  return score


def _recorded(reward: RewardConfig) -> RewardConfig:
  """Hosts that append to one file of a network may lose lines."""
  if not reward.record or jax.process_count() == 1:
    return reward
  path = pathlib.Path(reward.record)
  own = path.with_stem(f"{path.stem}-{jax.process_index()}")
  return dataclasses.replace(reward, record=str(own))


def _kind(score: wire.Score) -> str:
  """One of _KINDS."""
  kind = score.error_kind or ""
  return kind if kind in _KINDS else "other"


def _causes(scores) -> dict[str, str]:
  """{"reward: error_kind": what the first of this process's failures says}."""
  found: dict[str, str] = {}
  for name, by_row in scores.items():
    for score in by_row.values():
      reason = f"{name}: {_kind(score)}"
      if not score.ok and reason not in found:
        found[reason] = _cause(score.raw)
  return found


def _cause(raw) -> str:
  """One line of at most 200 characters; a server may say any JSON."""
  # Of several engines, the one that failed is told with what it said.
  while isinstance(raw, dict) and (inner := raw.keys() & {"error", "raw"}):
    raw = raw[min(inner)]
  text = raw if isinstance(raw, str) else json.dumps(raw)
  text = "".join(c if c.isprintable() else " " for c in text)
  return " ".join(text.split())[:200]


def _item(prompt: Prompt):
  return prompt.text, prompt.targets, prompt.lang


def _table(
  scores: Mapping[int, wire.Score], count: int, lines: int = 0
) -> np.ndarray:
  """f32[count, 4 + 3 lines].

  Whether it is here, score, kind, how far engines differ; of each of the first
  lines score, top and bottom.
  """
  table = np.full((count, 4 + 3 * lines), np.nan, np.float32)
  table[:, 0] = 0
  for row, score in scores.items():
    apart = score.raw.get("apart") if isinstance(score.raw, dict) else None
    there = score.ok and wire.is_finite_number(apart)  # a server may say any
    table[row, :4] = (
      1,
      np.nan if score.score is None else score.score,
      _KINDS.index(_kind(score)),
      apart if there else np.nan,
    )
    if lines and score.ok:
      of_lines = text_lines.told(score.raw)[:lines]
      table[row, 4 : 4 + of_lines.size] = of_lines.ravel()
  return table


def gathered(table: np.ndarray) -> np.ndarray:
  """f32[R, N, C] of all processes; each row comes from the one that has it.

  Rewards are combined on the host of every process, in a few kilobytes. An
  array of the rows that each process has would need their number to be alike
  (`jax.make_array_from_process_local_data`), which is not so where a device's
  rows are held by several processes, and would come to the hosts all the same.
  """
  if jax.process_count() == 1:
    return table
  parts = multihost_utils.process_allgather(table)  # [processes, R, N, C]
  has = np.argmax(parts[..., 0], axis=0)
  return np.take_along_axis(parts, has[None, ..., None], axis=0)[0]


def _column(rows: np.ndarray) -> combine.Column:
  """A reward's column out of its table."""
  kinds = [_KINDS[int(kind)] for kind in rows[:, 2]]
  apart = rows[:, 3][np.isfinite(rows[:, 3])]
  return combine.Column(
    rows[:, 1].astype(np.float64),
    np.array([kind == wire.ABSENT for kind in kinds]),
    float(apart.mean()) if len(apart) else float("nan"),
    collections.Counter(k for k in kinds if k not in ("", wire.ABSENT)),
    rows[:, 4:].reshape(len(rows), -1, 3).astype(np.float64),
  )
