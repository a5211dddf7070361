"""Best-of-N, means and intervals, on rows whose truth is known."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from xomni_jax.evals import stats
from xomni_jax.evals.stats import Estimate

PS, M = (0.1, 0.3, 0.8), 16


def _bernoulli(rng, p, prompts, samples=M):
  return (rng.random((prompts, samples)) < p).astype(float)


@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
def test_best_of_n_that_ranks_by_the_truth_has_the_closed_form(p, n):
  """1 - (1 - p)^N; the mean of 4000 prompts is within 4 standard errors."""
  exact = _bernoulli(np.random.default_rng(n), p, 4000)
  found = stats.best_of(exact, exact, n)
  expected = 1 - (1 - p) ** n
  error = max(found.std() / math.sqrt(len(found)), 1e-3)
  assert abs(found.mean() - expected) < 4 * error


def test_best_of_n_is_the_mean_over_all_choices():
  """Against every choice of n of 6, one by one; ranks have ties."""
  rng = np.random.default_rng(0)
  rank = rng.integers(0, 3, (20, 6)).astype(float)
  judged = rng.random((20, 6))
  for n in range(1, 7):
    for row in range(20):
      worth = []
      for choice in itertools.combinations(range(6), n):
        best = max(choice, key=lambda i: (rank[row, i], -i))
        worth.append(judged[row, best])
      found = stats.best_of(rank[row : row + 1], judged[row : row + 1], n)
      assert found[0] == pytest.approx(np.mean(worth), abs=1e-12)


def test_best_of_n_by_a_blind_reward_gains_nothing():
  rng = np.random.default_rng(1)
  exact = _bernoulli(rng, 0.3, 4000)
  rank = rng.random(exact.shape)
  for n in (1, 4, 16):
    assert stats.best_of(rank, exact, n).mean() == pytest.approx(0.3, abs=0.03)


def test_images_that_failed_are_left_out_of_the_best():
  nan = np.nan
  rank = np.array([[0.2, nan, 0.9], [0.1, 0.5, 0.3], [nan, nan, nan]])
  judged = np.array([[0.0, 1.0, 1.0], [1.0, nan, 0.0], [1.0, 1.0, 1.0]])
  best = stats.best_of(rank, judged, 3)
  assert best[0] == 1.0  # the unranked one is not chosen
  assert np.isnan(best[1]) and np.isnan(best[2])
  assert stats.mean_of(judged)[1] == 0.5
  with pytest.raises(ValueError, match="best of 4 of 3"):
    stats.best_of(rank, judged, 4)


def test_interval_is_nearly_the_normal_one():
  """Of 2000 prompts the two differ by less than a tenth of their width."""
  rng = np.random.default_rng(2)
  sft, rl = (_bernoulli(rng, p, 2000, 1)[:, 0] for p in (0.80, 0.86))
  values = np.stack([rl - sft, rl, rng.normal(3, 2, 2000)], 1)
  for column, found in zip(values.T, stats.estimates(values), strict=True):
    half = 1.96 * column.std(ddof=1) / math.sqrt(len(column))
    assert found.mean == pytest.approx(column.mean(), abs=1e-6)
    assert found.low == pytest.approx(column.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(column.mean() + half, abs=0.1 * half)
    assert found.prompts == 2000


def test_intervals_cover_the_truth_as_often_as_they_say():
  """Of 400 samples of a difference of 6 points, 95 % +- 3 hold it."""
  rng = np.random.default_rng(3)
  luck = rng.random((250, 400))  # shared: images under the same keys
  noise = rng.random((2, 250, 400)) < 0.1
  sft = (luck < 0.80) ^ noise[0]
  rl = (luck < 0.86) ^ noise[1]
  truth = (0.86 - 0.80) * 0.8
  found = stats.estimates(rl.astype(float) - sft, resamples=2000)
  covered = np.mean([e.low <= truth <= e.high for e in found])
  assert 0.92 <= covered <= 0.98


def test_intervals_are_the_same_every_time_and_leave_out_what_is_unknown():
  rng = np.random.default_rng(4)
  values = rng.random((50, 2))
  values[:7, 1] = np.nan
  first, second = (stats.estimates(values, resamples=500) for _ in range(2))
  assert first == second
  assert first[1].prompts == 43
  assert first[1].mean == pytest.approx(values[7:, 1].mean(), abs=1e-6)
  unknown = stats.estimates(np.full((5, 1), np.nan), resamples=10)[0]
  assert unknown == Estimate(None, None, None, 0)
  assert stats.estimates(np.zeros((0, 1)))[0] == Estimate(None, None, None, 0)


def test_what_lies_between_two_figures_is_rounded_alike_everywhere():
  """Sums differ by 1e-16 with the order a processor adds in."""
  tie = 0.8864125
  near = (np.nextafter(tie, 0), tie, np.nextafter(tie, 1))
  assert {stats.estimates(np.full((2, 1), x))[0].mean for x in near} == {
    0.886413
  }


def test_values_that_are_all_alike_still_have_an_interval():
  """An exact one: that of Clopper and Pearson."""
  n, zeros = 500, np.zeros((500, 1))
  rare = 1 - scipy.stats.beta.ppf(0.025, n, 1)
  of = lambda values, **how: stats.estimates(values, 99, **how)[0]
  assert of(zeros + 1) == Estimate(1.0, pytest.approx(1 - rare, abs=1e-6), 1, n)
  assert of(zeros) == Estimate(0.0, 0, pytest.approx(rare, abs=1e-6), n)
  low, high = of(zeros, lowest=-1.0)[1:3]
  assert -low == high == pytest.approx(rare, abs=1e-6)
  zeros[9] = np.nan
  assert of(zeros)[2] > rare
  found = stats.by_kind(
    {("scores",): zeros[:, 0], ("gain",): zeros[:, 0]},
    [""] * n,
    signed=("gain",),
    resamples=99,
  )
  assert found["scores"]["all"].low == 0 > found["gain"]["all"].low


def test_kinds_split_the_prompts():
  values = np.array([1.0, 0.0, 1.0, 1.0])
  kinds = ["one word", "two words", "one word", ""]
  found = stats.by_kind({("a", "b"): values}, kinds, resamples=100)["a"]["b"]
  assert {k: (e.mean, e.prompts) for k, e in found.items()} == {
    "all": (0.75, 4),
    "one word": (1.0, 2),
    "two words": (0.0, 1),
  }


@pytest.mark.parametrize(
  ("lows", "beaten"),
  [
    ((0.1, 0.05, 0.01), 4),
    ((0.1, 0.0, -0.1), 1),
    ((-0.01, 0.2, 0.2), 0),  # what does not beat one does not beat two
    ((0.1, None, 0.1), 1),
  ],
)
def test_largest_n_that_is_beaten(lows, beaten):
  by_n = {
    n: Estimate(0.2, low, 0.4, 9)
    for n, low in zip((1, 2, 4), lows, strict=True)
  }
  assert stats.largest_beaten(by_n) == beaten
