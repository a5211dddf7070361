"""Rewards of painted images: asked for in the background, added up by all.

A process asks for the images that it holds. What it hears is gathered from all
processes, so that each of them computes the same rewards.
"""

import collections
import concurrent.futures
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from xomni_jax.data.prompts import Prompt
from xomni_jax.reward_config import CombineConfig, RewardConfig
from xomni_jax.rewards import combine, ledger, wire
from xomni_jax.rewards.open import open_scorer

# What can go wrong with a score, by number, so that it can be gathered.
_KINDS = (
  *("", wire.ABSENT, "other", "timeout", "http", "bad_reply", "parse_failed"),
  *("bad_image", "bad_request", "too_large", "engine", "circuit_open"),
  "not_recorded",
)


class Asked(NamedTuple):
  """Scores on their way.

  Attributes:
    images: {row: u8[H, W, 3]} of this process.
    prompts: of all rows.
    futures: {reward's name: its scores of `images`, in their order}.
  """

  images: Mapping[int, np.ndarray]
  prompts: Sequence[Prompt]
  futures: Mapping[str, concurrent.futures.Future]


class Heard(NamedTuple):
  """What the rewards said.

  Attributes:
    combined: of all processes.
    scores: {reward's name: {row: Score}} of this process.
    seconds: waited.
    warnings: lines.
  """

  combined: combine.Combined
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
  ):
    """Opens all rewards.

    Args:
      folder: of the ledgers.
    Raises:
      InputError: a reward can't be opened.
    """
    self._rewards, self._cfg, self._group_size = rewards, cfg, group_size
    self._scorers = {reward.name: open_scorer(reward) for reward in rewards}
    self._ledger = ledger.Ledger(folder, jax.process_index())
    self._history = combine.History([], [])
    # A thread a reward: each has its own server, or its own engine.
    self._pool = concurrent.futures.ThreadPoolExecutor(len(rewards))

  def ask(
    self, step: int, prompts: Sequence[Prompt], images: Mapping[int, np.ndarray]
  ) -> Asked:
    """Starts asking for the images of a rollout.

    Args:
      step: of the run, under which the ledger keeps what is said.
      prompts: of all rows, those of a group adjacent.
      images: {row: u8[H, W, 3]} that this process asks for.
    """
    group = self._group_size
    keys = [
      ledger.Key(step, f"{row // group}:{prompts[row].key}", row % group)
      for row in images
    ]
    items = [
      wire.Item(str(row), image, *_item(prompts[row]))
      for row, image in images.items()
    ]
    futures = {
      name: self._pool.submit(
        ledger.score_once, self._ledger, name, scorer, keys, items
      )
      for name, scorer in self._scorers.items()
    }
    return Asked(images, prompts, futures)

  def hear(self, asked: Asked, *, watch: bool = True) -> Heard:
    """Waits for the scores; all processes call it alike.

    Args:
      watch: count failures and look for drifts.
    Raises:
      RunError: too many scores failed.
    """
    start = time.perf_counter()
    scores = {
      name: dict(zip(asked.images, future.result()[0], strict=True))
      for name, future in asked.futures.items()
    }
    seconds = time.perf_counter() - start
    count = len(asked.prompts)
    table = gathered(np.stack([_table(s, count) for s in scores.values()]))
    columns = {
      name: _column(rows) for name, rows in zip(scores, table, strict=True)
    }
    found = combine.combine(
      columns, self._rewards, self._group_size, self._cfg.quorum
    )
    warnings: Sequence[str] = ()
    if watch:
      self._history, warnings = combine.watch(
        self._history, found, self._rewards, self._cfg
      )
    return Heard(found, scores, seconds, warnings)

  def close(self) -> None:
    """Waits for nothing."""
    self._pool.shutdown(wait=False, cancel_futures=True)


def _item(prompt: Prompt):
  return prompt.text, prompt.targets, prompt.lang


def _table(scores: Mapping[int, wire.Score], count: int) -> np.ndarray:
  """f32[count, 4]: whether it is here, score, kind, how far engines differ."""
  table = np.full((count, 4), np.nan, np.float32)
  table[:, 0] = 0
  for row, score in scores.items():
    kind = score.error_kind or ""
    raw = score.raw if isinstance(score.raw, dict) else {}
    table[row] = (
      1,
      np.nan if score.score is None else score.score,
      _KINDS.index(kind if kind in _KINDS else "other"),
      raw.get("apart", np.nan) if score.ok else np.nan,
    )
  return table


def gathered(table: np.ndarray) -> np.ndarray:
  """f32[R, N, 4] of all processes; each row comes from the one that has it."""
  if jax.process_count() == 1:
    return table
  parts = multihost_utils.process_allgather(table)  # [processes, R, N, 4]
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
  )
