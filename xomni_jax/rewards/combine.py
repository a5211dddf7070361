"""From the scores of several rewards to one reward for each sample."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from xomni_jax.errors import RunError
from xomni_jax.reward_config import CombineConfig, RewardConfig, parse_source


class Column(NamedTuple):
  """One reward's scores of a rollout's samples, the G of a prompt adjacent.

  Attributes:
    values: f64[B*G]; NaN where failed or absent.
    absent: bool[B*G]: the reward does not apply.
    apart: how far several engines disagree, on average; NaN: just one.
    reasons: error_kind -> how many failed with it.
    lines: f64[B*G, K, 3]: score, top and bottom of each target line, see
      `rewards.text_lines`; NaN: there is none. None: not asked for.
  """

  values: np.ndarray
  absent: np.ndarray
  apart: float
  reasons: Mapping[str, int]
  lines: np.ndarray | None = None


class Combined(NamedTuple):
  """The rewards of a rollout.

  Attributes:
    rewards: f64[B*G], since advantages are small differences of them; NaN
      where masked.
    metrics: "reward/...", all finite; one without a value is left out.
    means: reward's name -> mean of its scores.
    asked, failed: scores of optimised rewards, absent ones not counted.
    reasons: "reward: error_kind" -> how many of the optimised ones failed.
  """

  rewards: np.ndarray
  metrics: dict[str, float]
  means: dict[str, float]
  asked: int
  failed: int
  reasons: Mapping[str, int]


class History(NamedTuple):
  """What `watch` remembers of the last rollouts; plain JSON.

  Attributes:
    failures: [asked, failed] of each rollout.
    means: {reward's name: mean} of each rollout, as many as drifts need.
  """

  failures: list
  means: list


def joined(parts: Sequence[Mapping[str, Column]]) -> dict[str, Column]:
  """The columns of several rollouts as those of one."""
  out = {}
  for name in parts[0]:
    columns = [part[name] for part in parts]
    apart = [c.apart for c in columns if math.isfinite(c.apart)]
    out[name] = Column(
      np.concatenate([c.values for c in columns]),
      np.concatenate([c.absent for c in columns]),
      float(np.mean(apart)) if apart else math.nan,
      sum(
        (collections.Counter(c.reasons) for c in columns),
        start=collections.Counter(),
      ),
    )
  return out


def combine(
  columns: Mapping[str, Column],
  rewards: Sequence[RewardConfig],
  group_size: int,
  quorum: float,
) -> Combined:
  """The weighted sum of the rewards that apply, sample by sample.

  A sample that one of its optimised rewards failed on is masked: without it
  the sum would be another reward. An absent one is left out, and the weights
  of the others grow so that they have the same sum: a prompt without target
  text then counts as much as one with it, and curves of the mean compare.
  Where nothing applies there is nothing to learn, and the sample is masked.
  Rewards of weight 0 change nothing but metrics.

  Args:
    columns: by the rewards' names.
    group_size: G, at least 2.
    quorum: groups with fewer unmasked samples than this share, or than two,
      are masked as a whole.
  Raises:
    ValueError: G < 2, or G does not divide the number of samples.
  """
  count = len(next(iter(columns.values())).values)
  if group_size < 2 or count % group_size:
    raise ValueError(
      f"{count} samples do not make groups of {group_size}, expected groups "
      "of 2 or more"
    )
  optimised = [reward for reward in rewards if reward.weight > 0]
  total, weight = np.zeros(count), np.zeros(count)
  for reward in optimised:
    here = columns[reward.name]
    values = _normalised(here.values, reward, group_size)
    total += np.where(here.absent, 0, reward.weight * values)
    weight += np.where(here.absent, 0, reward.weight)
  with np.errstate(invalid="ignore", divide="ignore"):
    total *= sum(reward.weight for reward in optimised) / weight
  total[weight == 0] = np.nan
  groups = total.reshape(-1, group_size)  # a view: masking it masks `total`
  kept = np.isfinite(groups).sum(1)
  # 0.56 of 25 is 14, not the 14.000000000000002 that floats make of it.
  dropped = kept < max(2, math.ceil(quorum * group_size - 1e-9))
  groups[dropped] = np.nan
  asked = {r.name: int((~columns[r.name].absent).sum()) for r in optimised}
  failed = {r.name: columns[r.name].reasons for r in optimised}
  return Combined(
    total,
    _metrics(columns, groups, dropped),
    {
      name: float(np.nanmean(c.values))
      for name, c in columns.items()
      if np.isfinite(c.values).any()
    },
    sum(asked.values()),
    sum(sum(reasons.values()) for reasons in failed.values()),
    {f"{n}: {kind}": k for n, r in failed.items() for kind, k in r.items()},
  )


def watch(
  history: History,
  combined: Combined,
  rewards: Sequence[RewardConfig],
  cfg: CombineConfig,
  causes: Mapping[str, str],
) -> tuple[History, list[str]]:
  """The history with one more rollout, and warnings, each one line.

  It warns when an optimised reward has risen while a shadow has fallen: the
  policy then learns what pleases the former and not what both stand for. It
  does not repeat that while it stays so; `drift_metrics` do.

  Args:
    causes: "reward: error_kind" -> what one of those that failed said.
  Raises:
    RunError: more than `cfg.max_failure_rate` of the scores of `cfg.window`
      rollouts failed, or will have even if all to come succeed.
  """
  failures = [*history.failures, [combined.asked, combined.failed]]
  failures = failures[-cfg.window :]
  asked, failed = map(sum, zip(*failures, strict=True))
  rollouts = len(failures)
  if failed > cfg.max_failure_rate * asked * cfg.window / rollouts:
    reasons = sorted(combined.reasons.items(), key=lambda r: -r[1])[:3]
    said = [f"; one says: {causes[r]}" for r, _ in reasons if r in causes][:1]
    failing = {reason.partition(":")[0] for reason, _ in reasons}
    asked_of = [
      source.kind
      for reward in rewards
      if reward.name in failing
      for source in parse_source(reward.source)
    ]
    mend = "see to their servers" if "http" in asked_of else "mend that"
    raise RunError(
      f"{failed} of {asked} scores of rewards failed in the last {rollouts} "
      f"rollouts, expected at most {cfg.max_failure_rate:.0%} over "
      f"{cfg.window} ({', '.join(f'{r} {n}' for r, n in reasons)}"
      f"{''.join(said)}); {mend}, then start the run again: it goes on"
    )
  if not cfg.drift_window:
    return History(failures, []), []
  means = [*history.means, combined.means][-2 * cfg.drift_window - 1 :]
  before = _drifts(means[:-1], rewards, cfg)
  drifts = _drifts(means, rewards, cfg)
  warnings = [line for pair, line in drifts.items() if pair not in before]
  return History(failures, means), warnings


def drift_metrics(
  history: History, rewards: Sequence[RewardConfig], cfg: CombineConfig
) -> dict[str, float]:
  """{"drift/NAME": 1 while shadow NAME falls and a reward rises, else 0}."""
  if not cfg.drift_window:
    return {}
  fallen = {shadow for _, shadow in _drifts(history.means, rewards, cfg)}
  return {
    f"drift/{r.name}": float(r.name in fallen) for r in rewards if r.weight == 0
  }


def _normalised(values, reward, group_size):
  if reward.normalise == "none":
    return values
  if reward.normalise == "range":
    return np.clip((values - reward.low) / (reward.high - reward.low), 0, 1)
  groups = values.reshape(-1, group_size)
  there = np.isfinite(groups)
  count = np.maximum(there.sum(1, keepdims=True), 1)
  mean = np.where(there, groups, 0).sum(1, keepdims=True) / count
  square = np.where(there, (groups - mean) ** 2, 0).sum(1, keepdims=True)
  deviation = np.sqrt(square / count)
  return ((groups - mean) / np.maximum(deviation, reward.floor)).reshape(-1)


def _metrics(columns, groups, dropped):
  metrics = {}
  for name, here in columns.items():
    there = ~here.absent
    if np.isfinite(here.values).any():
      metrics[name] = np.nanmean(here.values)
    if there.any():
      metrics[f"{name}_failed"] = np.isnan(here.values[there]).mean()
    metrics[f"{name}_absent"] = here.absent.mean()
    metrics[f"{name}_apart"] = here.apart
  if not dropped.all():
    metrics["total"] = np.nanmean(groups)
    metrics["spread"] = np.nanstd(groups[~dropped], axis=1).mean()
  metrics["masked"] = np.isnan(groups).mean()
  metrics["groups_dropped"] = dropped.mean()
  return {
    f"reward/{name}": float(value)
    for name, value in metrics.items()
    if np.isfinite(value)
  }


def _drifts(means, rewards, cfg):
  """{(rising reward, falling shadow): a line}; sizes are shares of ranges."""
  window = cfg.drift_window
  if len(means) < 2 * window:
    return {}
  rise, now = {}, {}
  for reward in rewards:
    before, after = (
      [m[reward.name] for m in part if reward.name in m]
      for part in (means[-2 * window : -window], means[-window:])
    )
    if before and after:
      now[reward.name] = float(np.mean(after))
      moved = now[reward.name] - float(np.mean(before))
      rise[reward.name] = moved / (reward.high - reward.low)
  up = [r.name for r in rewards if r.weight > 0]
  down = [r.name for r in rewards if r.weight == 0]
  return {
    (a, b): (
      f"rewards drift apart: in {window} rollouts {a} rose by {rise[a]:.1%} of "
      f"its range to {now[a]:.3f} while the shadow {b} fell by {-rise[b]:.1%} "
      f"to {now[b]:.3f}"
    )
    for a in up
    for b in down
    if rise.get(a, 0) >= cfg.drift_rise and -rise.get(b, 0) >= cfg.drift_fall
  }
