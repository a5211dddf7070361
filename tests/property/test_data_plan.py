"""Mixtures, packing and buckets: complete, deterministic, by weight."""

import collections
import pickle

import numpy as np
import pytest

from xomni_jax.data import plan
from xomni_jax.errors import InputError


def mixture(counts=(50, 7), weights=(3.0, 1.0), **changes):
  settings = {"firsts": (0, 100), "seed": 1, "shuffle": True} | changes
  return plan.Mixture(counts=counts, weights=weights, **settings)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_permute_visits_every_number_once(count):
  got = plan.permute(np.arange(count), count, 7, 3)
  assert sorted(got.tolist()) == list(range(count))
  # Place by place it is the same as all at once.
  some = np.array([count - 1, 0, count // 2])
  np.testing.assert_array_equal(plan.permute(some, count, 7, 3), got[some])


def test_permute_differs_by_key_and_epoch_and_looks_random():
  count = 1000
  orders = [
    plan.permute(np.arange(count), count, key, epoch)
    for key, epoch in ((1, 0), (1, 1), (2, 0), (2, 1))
  ]
  for i, a in enumerate(orders):
    # The number of fixed points and coincidences is Poisson of mean 1.
    assert (a == np.arange(count)).sum() < 10
    assert all((a == b).sum() < 10 for b in orders[:i])
    # Rank correlation of neighbours: deviation 1/sqrt(1000) = 0.03.
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.15


def test_permute_of_large_ranges_is_without_repetition():
  count = 2**31 - 1
  got = plan.permute(np.arange(100_000), count, 5)
  assert len(set(got.tolist())) == 100_000
  assert got.min() >= 0 and got.max() < count
  assert abs(got.mean() / count - 0.5) < 0.01  # deviation 0.0009


@pytest.mark.parametrize(
  "weights", [(1.0,), (3, 1), (0.7, 0.2, 0.1), (1, 1e-3)]
)
def test_interleave_follows_weights_and_skips_nothing(weights):
  n = 5000
  source, place = plan.interleave(np.arange(n), weights)
  for s, weight in enumerate(weights):
    expected = n * weight / sum(weights)
    mine = place[source == s]
    # Within one record of its share for each source before it.
    assert abs(len(mine) - expected) <= len(weights)
    np.testing.assert_array_equal(mine, np.arange(len(mine)))
  # At any place, and not only from the start on.
  some = np.array([4999, 17, 2048])
  np.testing.assert_array_equal(plan.interleave(some, weights)[0], source[some])


def test_mixture_takes_slices_and_each_record_once_an_epoch():
  mix = mixture(firsts=(10, 100))
  picks = mix.picks(np.arange(56))
  counts = collections.Counter(
    zip(
      picks.source.tolist(),
      picks.epoch.tolist(),
      picks.record.tolist(),
      strict=True,
    )
  )
  assert max(counts.values()) == 1
  one = picks.record[picks.source == 0]
  assert len(one) == 42 and one.min() >= 10 and one.max() < 60
  two = picks.record[picks.source == 1]
  assert sorted(two[:7]) == sorted(two[7:14]) == list(range(100, 107))
  assert two[:7].tolist() != two[7:14].tolist()
  assert picks.epoch[picks.source == 1].tolist() == [0] * 7 + [1] * 7


def test_mixture_in_order_counts_up():
  mix = mixture((5,), (1.0,), firsts=(3,), shuffle=False)
  assert mix.picks(np.arange(7)).record.tolist() == [3, 4, 5, 6, 7, 3, 4]


PINNED_ORDER = [5, 0, 6, 3, 4, 1, 2, 7]
PINNED_PICKS = [
  [1, 0, 0, 0, 1, 0],
  [35714285, 15000000, 15000000, 15000000, 35714285, 15000000],
  [105, 23, 19, 47, 101, 4],
]


def test_orders_are_pinned():
  """A run that is resumed after an update must get the same records."""
  assert plan.permute(np.arange(8), 8, 3, 1).tolist() == PINNED_ORDER
  picks = mixture().picks(np.arange(10**9, 10**9 + 6))
  assert [x.tolist() for x in picks] == PINNED_PICKS


def test_pack_places_every_record_once_within_the_width():
  rng = np.random.default_rng(0)
  for _ in range(50):
    lengths = rng.integers(0, 120, rng.integers(1, 300))
    rows, bad = plan.pack(lengths, 100)
    placed = sorted(n for row in rows for n in row)
    assert sorted(placed + bad) == list(range(len(lengths)))
    assert all(lengths[row].sum() <= 100 for row in rows)
    assert all(not 0 < lengths[n] <= 100 for n in bad)
    assert plan.pack(lengths, 100) == (rows, bad)
    # Best fit decreasing needs at most 11/9 of the best packing, plus one.
    least = np.ceil(lengths[placed].sum() / 100)
    assert len(rows) <= 11 / 9 * max(least, (lengths[placed] > 50).sum()) + 1


def test_pack_puts_a_record_where_it_fits_best():
  rows, bad = plan.pack(np.array([60, 70, 30, 40, 101, 100]), 100)
  assert rows == [[5], [1, 2], [0, 3]] and bad == [4]


def test_bucket_makes_full_batches_of_one_bucket():
  rng = np.random.default_rng(0)
  names = [(None, "a", "b", "c")[i] for i in rng.integers(0, 4, 103)]
  batches, bad, dropped = plan.bucket(names, 4)
  used = [n for _, batch in batches for n in batch]
  assert all(len(b) == 4 and {names[n] for n in b} == {k} for k, b in batches)
  assert len(set(used)) == len(used)
  assert bad == [n for n, name in enumerate(names) if name is None]
  assert len(used) + len(bad) + dropped == 103 and dropped < 3 * 4


def windows(sizes):
  def make(w):
    size = sizes[w % len(sizes)]
    return plan.Window([(w, i) for i in range(size)], [100 + w], dropped=1)

  return plan.Windows(make, "do better")


def test_windows_number_units_through_in_any_order():
  sizes = [2, 0, 3, 1, 0, 0]
  expected = [
    ((w, i), w) for w in range(30) for i in range(sizes[w % len(sizes)])
  ]
  lazy = windows(sizes)
  for n in (25, 3, 0, 24, 11, 4):
    assert lazy.unit(n)[0] == expected[n][0]
    assert lazy.dropped(n) == expected[n][1] + 1
  again = pickle.loads(pickle.dumps(plan.Windows(one_unit, "")))
  assert again.unit(3)[0] == 3


def one_unit(w):
  return plan.Window([w], [])


def test_windows_report_each_bad_place_once_even_of_empty_windows():
  lazy = windows([2, 0, 3, 1, 0, 0])
  bad = [place for n in range(20) for place in lazy.unit(n)[1]]
  assert bad == list(range(100, 100 + len(bad))) and len(bad) >= 15


def test_windows_without_units_are_refused():
  with pytest.raises(InputError, match=r"64 windows .*do better"):
    windows([0]).unit(0)
  assert windows([0] * 63 + [1]).unit(0)[0] == (63, 0)


def test_shuffled_keeps_units_and_differs_by_window():
  units = list(range(50))
  a, b = plan.shuffled(units, 0, 0), plan.shuffled(units, 0, 1)
  assert sorted(a) == sorted(b) == units
  assert a != b and units not in (a, b)
  assert plan.shuffled([], 0, 0) == []
