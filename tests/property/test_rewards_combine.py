"""The combination of rewards, against a version that loops over samples."""

import json
import math
import re

import numpy as np
import pytest

from xomni_jax.config_files import read_config
from xomni_jax.errors import RunError
from xomni_jax.reward_config import CombineConfig, RewardConfig
from xomni_jax.rewards import wire
from xomni_jax.rewards.combine import (
  Column,
  Combined,
  History,
  combine,
  drift_metrics,
  joined,
  watch,
)
from xomni_jax.rewards.wire import Score
from xomni_jax.training import rewarding
from xomni_jax.training.policy import group_advantages


def _reward(name, weight=1.0, **kwargs):
  return RewardConfig(name, "local:ocr", weight, **kwargs)


def _column(values, absent=None):
  values = np.array(values, np.float64)
  absent = np.zeros(len(values), bool) if absent is None else np.array(absent)
  failed = int((np.isnan(values) & ~absent).sum())
  return Column(values, absent, math.nan, {"timeout": failed} if failed else {})


def _slow(columns, rewards, group_size, quorum):
  """What `combine` says it does, one sample after the other."""
  count = len(columns[rewards[0].name].values)
  full = sum(r.weight for r in rewards)
  out = []
  for first in range(0, count, group_size):
    group = list(range(first, first + group_size))
    totals = []
    for i in group:
      parts = []
      for r in rewards:
        c = columns[r.name]
        if r.weight == 0 or c.absent[i]:
          continue
        value = c.values[i]
        if r.normalise == "range":
          value = min(max((value - r.low) / (r.high - r.low), 0), 1)
        if r.normalise == "group":
          known = [v for v in c.values[group] if not math.isnan(v)]
          if known:
            mean = sum(known) / len(known)
            variance = sum((v - mean) ** 2 for v in known) / len(known)
            value = (value - mean) / max(math.sqrt(variance), r.floor)
        if math.isnan(c.values[i]):
          value = math.nan
        parts.append((r.weight, value))
      weight = sum(w for w, _ in parts)
      totals.append(
        full * sum(w * v for w, v in parts) / weight if parts else math.nan
      )
    kept = sum(not math.isnan(t) for t in totals)
    if kept < 2 or kept < quorum * group_size:
      totals = [math.nan] * group_size
    out += totals
  return out


@pytest.mark.parametrize("seed", range(20))
def test_combine_equals_a_loop_over_samples(seed):
  rng = np.random.default_rng(seed)
  groups, group_size = 5, int(rng.integers(2, 7))
  count = groups * group_size
  rewards = (
    _reward("ocr", 1.0),
    _reward("hps", 0.5, normalise="range", low=0.2, high=0.4),
    _reward("judge", 2.0, normalise="group", floor=0.1),
    _reward("shadow", 0.0),
  )
  columns = {}
  for reward in rewards:
    values = rng.uniform(0, 1, count)
    values[rng.uniform(size=count) < 0.15] = np.nan
    absent = np.repeat(rng.uniform(size=groups) < 0.3, group_size)
    values[absent] = np.nan
    columns[reward.name] = _column(values, absent)
  quorum = float(rng.uniform(0.2, 1))
  found = combine(columns, rewards, group_size, quorum)
  np.testing.assert_allclose(
    found.rewards, _slow(columns, rewards, group_size, quorum), rtol=1e-12
  )
  assert all(math.isfinite(value) for value in found.metrics.values())
  json.dumps(found.metrics)


def test_combine_masks_a_failed_sample_and_leaves_the_others():
  rewards = (_reward("ocr"), _reward("hps"))
  ocr, hps = _column([0.1, 0.2, 0.3, 0.4]), _column([1.0, math.nan, 0.5, 0.0])
  found = combine({"ocr": ocr, "hps": hps}, rewards, 4, 0.5)
  np.testing.assert_allclose(found.rewards, [1.1, np.nan, 0.8, 0.4], rtol=1e-6)
  assert found.metrics["reward/hps_failed"] == 0.25
  assert found.metrics["reward/masked"] == 0.25
  assert found.metrics["reward/total"] == pytest.approx((1.1 + 0.8 + 0.4) / 3)
  assert (found.asked, found.failed) == (8, 1)
  assert found.reasons == {"hps: timeout": 1}


def test_combine_leaves_an_absent_reward_out_and_keeps_the_scale():
  rewards = (_reward("ocr", 3.0), _reward("hps", 1.0))
  ocr = _column([0.5, 0.5, math.nan, math.nan], [False, False, True, True])
  hps = _column([0.5, 0.5, 0.5, 0.5])
  found = combine({"ocr": ocr, "hps": hps}, rewards, 2, 0.5)
  np.testing.assert_allclose(found.rewards, [2.0] * 4)
  assert found.metrics["reward/ocr_absent"] == 0.5
  assert found.metrics["reward/ocr_failed"] == 0
  assert found.failed == 0


def test_combine_masks_what_no_reward_applies_to_without_calling_it_failed():
  ocr = _column([math.nan] * 2 + [0.5, 0.7], [True, True, False, False])
  found = combine({"ocr": ocr}, (_reward("ocr"),), 2, 0.5)
  assert np.isnan(found.rewards).tolist() == [True, True, False, False]
  assert (found.asked, found.failed) == (2, 0)


def test_combine_drops_groups_under_the_quorum():
  nan = math.nan
  values = [0.1, 0.2, nan, nan, 0.3, nan, nan, nan, 0.1, 0.2, 0.3, nan]
  cases = ((0.5, [4, 0, 4]), (0.75, [0, 0, 4]), (0.01, [4, 0, 4]))
  for quorum, kept in cases:
    found = combine({"a": _column(values)}, (_reward("a"),), 4, quorum)
    there = np.isfinite(found.rewards).reshape(3, 4).sum(1)
    assert [(n > 0) * 4 for n in there] == kept
    assert found.metrics["reward/groups_dropped"] == kept.count(0) / 3


def test_group_with_exactly_the_quorum_is_kept():
  """0.56 x 25 is 14.000000000000002 in floats."""
  values = [*np.linspace(0, 1, 14), *[math.nan] * 11]
  found = combine({"a": _column(values)}, (_reward("a"),), 25, 0.56)
  assert np.isfinite(found.rewards).sum() == 14


def test_combine_lets_a_shadow_change_nothing():
  ocr = _column([0.1, 0.9])
  alone = combine({"ocr": ocr}, (_reward("ocr"),), 2, 0.5)
  for shadow in ([0.0, 1.0], [math.nan, math.nan]):
    rewards = (_reward("ocr"), _reward("hps", 0.0))
    both = combine({"ocr": ocr, "hps": _column(shadow)}, rewards, 2, 0.5)
    np.testing.assert_array_equal(both.rewards, alone.rewards)
    assert (both.asked, both.failed) == (2, 0)
  assert both.metrics["reward/hps_failed"] == 1


def test_group_normalisation_does_not_blow_up_noise():
  rewards = (_reward("hps", normalise="group", floor=0.05),)
  found = combine({"hps": _column([0.3, 0.3001])}, rewards, 2, 0.5)
  assert np.abs(found.rewards).max() < 0.01
  found = combine({"hps": _column([0.2, 0.4])}, rewards, 2, 0.5)
  np.testing.assert_allclose(found.rewards, [-1, 1], rtol=1e-6)


def test_combine_of_everything_failed_has_no_reward_and_no_mean():
  found = combine({"a": _column([math.nan] * 4)}, (_reward("a"),), 2, 0.5)
  assert np.isnan(found.rewards).all()
  assert "reward/total" not in found.metrics
  assert found.metrics["reward/masked"] == 1


def test_advantages_do_not_see_shifts_of_scores():
  """From the scores to the advantages, in float64 all the way."""
  rng = np.random.default_rng(0)
  rewards = (_reward("ocr", 1.0), _reward("judge", 0.5))
  scores = rng.uniform(0, 1, (2, 32))
  scores[0, 3] = np.nan
  for normalise in (True, False):

    def advantages(shift, normalise=normalise):
      columns = {"ocr": _column(scores[0] + shift), "judge": _column(scores[1])}
      found = combine(columns, rewards, 8, 0.5).rewards
      return group_advantages(found, 8, normalise=normalise)

    plain = advantages(0.0)
    assert np.abs(plain).max() > 0.1
    for shift in (-5.0, 1000.0):
      assert np.abs(advantages(shift) - plain).max() < 1e-6


def test_joined_columns_are_those_of_one_large_step():
  """Every sample counts alike, however many of its step have failed."""
  good, bad = _column([0.8] * 4), _column([math.nan] * 4)
  other = _column([0.2, math.nan, math.nan, 0.4], [False, True, False, False])
  steps = [
    {"ocr": c._replace(apart=a)}
    for c, a in ((good, 0.1), (bad, math.nan), (other, 0.3))
  ]
  (column,) = joined(steps).values()
  found = combine({"ocr": column}, (_reward("ocr"),), 4, 0.5)
  assert found.metrics["reward/ocr"] == pytest.approx((4 * 0.8 + 0.6) / 6)
  assert found.metrics["reward/ocr_failed"] == pytest.approx(5 / 11)
  assert found.metrics["reward/ocr_absent"] == pytest.approx(1 / 12)
  assert found.metrics["reward/ocr_apart"] == pytest.approx(0.2)
  assert found.metrics["reward/groups_dropped"] == pytest.approx(1 / 3)
  assert (found.asked, found.failed) == (11, 5)


@pytest.mark.parametrize("size", [1, 3])
def test_combine_refuses_groups_that_do_not_divide(size):
  with pytest.raises(ValueError, match="groups"):
    combine({"a": _column([0.1] * 4)}, (_reward("a"),), size, 0.5)


def test_column_tells_failed_from_absent():
  scores = [
    Score("a", True, 0.5, {"apart": 0.2}),
    wire.failed("b", "timeout", "late"),
    wire.absent("c"),
    Score("d", True, math.nan),  # a scorer's fault, not a score
    Score("e", True, 1, {"apart": 0.4}),
  ]
  scores = [wire.checked(score) for score in scores]
  table = rewarding._table(dict(enumerate(scores)), len(scores))
  found = rewarding._column(table)
  np.testing.assert_array_equal(found.values, [0.5, *[np.nan] * 3, 1.0])
  assert found.absent.tolist() == [False, False, True, False, False]
  assert found.apart == pytest.approx(0.3)
  assert found.reasons == {"timeout": 1, "engine": 1}


def _step(asked, failed, **means):
  return Combined(
    np.zeros(2), {}, means, asked, failed, {"ocr: timeout": failed}
  )


def _run(steps, cfg, rewards=()):
  """(steps survived, warnings); the history goes through JSON each time."""
  history, warnings = History([], []), []
  for n, step in enumerate(steps):
    try:
      history, new = watch(history, step, rewards, cfg, {})
    except RunError as e:
      assert "\n" not in str(e)
      return n, str(e)
    warnings += new
    history = History(**json.loads(json.dumps(history._asdict())))
  return len(steps), warnings


def test_watch_stops_above_the_failure_rate_of_its_window():
  cfg = CombineConfig(max_failure_rate=0.2, window=10)
  bad, good = _step(8, 8), _step(8, 0)
  # Two of ten may fail; with the third it can't get below any more.
  assert _run([bad, bad, *[good] * 20, bad, bad, *[good] * 5], cfg)[0] == 29
  survived, message = _run([good] * 4 + [bad] * 9, cfg)
  assert survived == 6
  assert "ocr: timeout 8" in message
  # Old failures leave the window.
  apart = [bad, *[good] * 9] * 5
  assert _run(apart, cfg)[0] == len(apart)


@pytest.mark.parametrize(
  ("source", "mend"),
  [("http://a:1/x", "see to their servers"), ("local:ocr", "mend that")],
)
def test_watch_says_what_failed_and_speaks_of_servers_where_there_are_some(
  source, mend
):
  said = {"ocr: timeout": "status 401: no token"}
  rewards = (RewardConfig("ocr", source), _reward("hps"))
  with pytest.raises(RunError) as error:
    watch(History([], []), _step(8, 8), rewards, CombineConfig(window=1), said)
  whole = (
    f"(ocr: timeout 8; one says: status 401: no token); {mend}, then start"
  )
  assert whole in str(error.value)


def test_watch_with_a_rate_of_0_stops_at_the_first_failure():
  cfg = CombineConfig(max_failure_rate=0.0, window=10)
  assert _run([_step(8, 0), _step(8, 0), _step(8, 1)], cfg)[0] == 2


def test_watch_with_a_rate_of_1_never_stops():
  cfg = CombineConfig(max_failure_rate=1.0, window=3)
  assert _run([_step(8, 8)] * 9, cfg)[0] == 9


def test_watch_warns_once_where_a_shadow_falls():
  rewards = (_reward("ocr"), _reward("hps", 0.0))
  cfg = CombineConfig(drift_window=5)
  apart = [_step(8, 0, ocr=0.01 * n, hps=0.9 - 0.01 * n) for n in range(24)]
  survived, warnings = _run(apart, cfg, rewards)
  assert survived == 24
  assert len(warnings) == 1
  assert "ocr rose by 5.0%" in warnings[0]
  assert "hps fell by 5.0% to 0.830" in warnings[0]
  together = [_step(8, 0, ocr=0.01 * n, hps=0.01 * n) for n in range(20)]
  assert _run(together, cfg, rewards) == (20, [])
  falling = [_step(8, 0, ocr=-0.1 * n, hps=-0.1 * n) for n in range(20)]
  assert _run(falling, cfg, rewards) == (20, [])
  silent = [_step(8, 8)] * 20  # no mean at all
  loose = CombineConfig(drift_window=5, max_failure_rate=1.0)
  assert _run(silent, loose, rewards) == (20, [])


def test_drifts_are_shares_of_each_reward_s_range():
  """A tenth of a range each, whatever the range is."""
  cfg = CombineConfig(drift_window=2, drift_rise=0.09, drift_fall=0.09)
  means = [(0.30, 3.0), (0.30, 3.0), (0.32, 2.6), (0.32, 2.6)]
  steps = [_step(8, 0, hps=a, judge=b) for a, b in means]
  hps = {"low": 0.2, "high": 0.4}
  judge = {"low": 1.0, "high": 5.0}
  rewards = (_reward("hps", **hps), _reward("judge", 0.0, **judge))
  assert len(_run(steps, cfg, rewards)[1]) == 1
  for changed in (hps, judge):
    wider = {**changed, "high": changed["high"] * 2}
    ranges = [wider if r is changed else r for r in (hps, judge)]
    rewards = (_reward("hps", **ranges[0]), _reward("judge", 0.0, **ranges[1]))
    assert _run(steps, cfg, rewards)[1] == []


def test_drift_is_a_metric_while_it_lasts():
  rewards = (_reward("ocr"), _reward("hps", 0.0), _reward("other", 0.0))
  cfg = CombineConfig(drift_window=3, drift_fall=0.015)
  history, seen, warned = History([], []), [], []
  for n in range(18):
    fall = min(0.01 * n, 0.08)
    step = _step(8, 0, ocr=0.01 * n, hps=0.9 - fall, other=0.5)
    history, warnings = watch(history, step, rewards, cfg, {})
    warned += [n] * len(warnings)
    seen.append(drift_metrics(history, rewards, cfg))
    if n == 6:  # a run that is resumed has the last steps alone
      history = History([], history.means[-6:])
  assert all(m.keys() == {"drift/hps", "drift/other"} for m in seen)
  assert not any(m["drift/other"] for m in seen)
  # From the first two windows on, until hps has stood for most of them.
  assert [n for n, m in enumerate(seen) if m["drift/hps"]] == [*range(5, 11)]
  assert warned == [5]
  off = CombineConfig(drift_window=0)
  assert drift_metrics(History([], []), rewards, off) == {}


def test_full_config_has_a_shadow_that_no_reward_is_an_engine_of():
  """Its servers are those of configs/sidecar.py."""
  served = read_config("configs/sidecar.py", "7b").applications
  engines = {
    app.port: app.settings.get("engine", app.reward) for app in served.values()
  }
  optimised, shadows = set(), set()
  for reward in read_config("configs/grpo.py", "7b").options.rewards:
    for port in re.findall(r":(\d+)", reward["source"]):
      kind = optimised if reward.get("weight", 1.0) else shadows
      kind.add(engines[int(port)])
  assert shadows and not shadows & optimised
