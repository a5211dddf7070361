"""Means, paired differences and their intervals; numpy alone.

All intervals are 95 % intervals of the percentile bootstrap over prompts: the
prompts are drawn anew, with replacement, as many as there are, `RESAMPLES`
times from a fixed seed; the interval goes from the 2.5th to the 97.5th
percentile of the means. Several images of a prompt are averaged first: prompts
are taken as independent, which images of one are not. Differences are paired:
of each prompt one difference, and then as above.

Where all prompts have the same value there is nothing to draw anew. Then one
that has another is as rare as P, the largest share of which `n` prompts show
none in 2.5 % of cases, 1 - 0.025^(1/n); the interval is what the mean could be.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES, SEED = 10_000, 0
_AT_ONCE = 2**22  # prompts drawn at once, for the memory's sake


class Estimate(NamedTuple):
  """A mean with its interval.

  Attributes:
    mean: over prompts; None: there is none.
    low, high: of the 95 % interval.
    prompts: how many it is of.
  """

  mean: float | None
  low: float | None
  high: float | None
  prompts: int


def estimates(
  values: np.ndarray,
  resamples: int = RESAMPLES,
  seed: int = SEED,
  lowest: Sequence[float] | float = 0.0,
) -> list[Estimate]:
  """Means of columns over prompts, with their intervals (see above).

  Args:
    values: f[prompts, columns]; NaN: not known, and left out of its column.
    resamples: how often prompts are drawn; all columns see the same draws.
    seed: of the draws.
    lowest: that a value of each column can be, 0 of shares and -1 of their
      differences; the highest is 1.
  """
  values = np.asarray(values, np.float64)
  count, columns = values.shape
  there = np.isfinite(values)
  known = there.sum(0)
  filled = np.where(there, values, 0.0)
  if not count:
    return [Estimate(None, None, None, 0)] * columns
  rng = np.random.default_rng(seed)
  means = []
  each = max(1, _AT_ONCE // count)
  for first in range(0, resamples, each):
    n = min(each, resamples - first)
    drawn = rng.integers(0, count, (n, count))
    drawn += np.arange(n)[:, None] * count
    times = np.bincount(drawn.ravel(), minlength=n * count)
    times = times.reshape(n, count).astype(np.float64)
    with np.errstate(invalid="ignore"):  # a draw that has nothing of a column
      of = count if there.all() else times @ there.astype(np.float64)
      means.append(times @ filled / of)
  found = np.where(known, np.concatenate(means), 0.0)
  # The one that minds NaN takes columns one by one.
  cut = np.nanpercentile if np.isnan(found).any() else np.percentile
  low, high = cut(found, (2.5, 97.5), axis=0)
  least = np.where(there, values, np.inf).min(0)
  alike = least == np.where(there, values, -np.inf).max(0)
  least = np.where(alike, least, 0.0)
  rare = 1 - 0.025 ** (1 / np.maximum(known, 1))
  low = np.where(alike, least - rare * (least - lowest), low)
  high = np.where(alike, least + rare * (1 - least), high)
  return [
    Estimate(
      *(
        _figure(x) if known[c] else None
        for x in (filled[:, c].sum() / max(1, known[c]), low[c], high[c])
      ),
      int(known[c]),
    )
    for c in range(columns)
  ]


def _figure(x: float) -> float:
  """`x` to 6 decimals, the same on every machine.

  Processors add up in different orders, so what lies half way between two
  figures comes out a little (1e-16) above or below: the first rounding puts
  it back.
  """
  return round(round(float(x), 12), 6)


def best_of(rank: np.ndarray, judged: np.ndarray, n: int) -> np.ndarray:
  """What the best of n images is worth, f64[prompts].

  It is the mean over all ways to choose n of a prompt's images, each with the
  one that ranks highest: the image of place r, from 0, of M is the best of
  C(M - 1 - r, n - 1) of the C(M, n) ways. For n = 1 this is the mean, for
  n = M the best of all. Images that rank alike keep their order, which knows
  nothing of the judge.

  Args:
    rank: f[prompts, M], by which the best is chosen; NaN: never chosen.
    judged: f[prompts, M], what it is worth; NaN: left out of the mean.
    n: 1 to M.
  Returns:
    NaN where nothing is left.
  """
  rank, judged = np.asarray(rank, np.float64), np.asarray(judged, np.float64)
  M = rank.shape[1]
  if not 1 <= n <= M:
    raise ValueError(f"best of {n} of {M} images, expected 1 to {M}")
  order = np.argsort(np.where(np.isnan(rank), np.inf, -rank), 1, kind="stable")
  judged = np.take_along_axis(judged, order, 1)
  chosen = np.take_along_axis(rank, order, 1)
  ways = [math.comb(M - 1 - r, n - 1) / math.comb(M, n) for r in range(M)]
  known = np.isfinite(judged) & np.isfinite(chosen)
  weight = np.where(known, ways, 0.0)
  total = weight.sum(1)
  value = (weight * np.where(known, judged, 0.0)).sum(1)
  return np.where(total > 0, value / np.where(total > 0, total, 1.0), np.nan)


def mean_of(judged: np.ndarray) -> np.ndarray:
  """The mean of each prompt's images, f64[prompts]; NaN as in `best_of`."""
  return best_of(np.zeros_like(judged), judged, 1)


def by_kind(
  columns: Mapping[tuple[str, ...], np.ndarray],
  kinds: Sequence[str],
  signed: Collection[str] = (),
  **how,
) -> dict[str, Any]:
  """The names of columns as nested mappings, {kind: Estimate} innermost.

  "all" is the first of the kinds, the others follow by name. All columns go
  through the bootstrap together: drawing takes longer than adding up.

  Args:
    columns: {(name, name within it, ...): f[prompts]}.
    kinds: of the prompts; "": of no kind.
    signed: first names of columns that are differences.
    how: see `estimates`.
  """
  kinds = np.array(kinds)
  values = np.stack([*columns.values()], 1)
  lowest = [-1.0 if first in signed else 0.0 for first, *_ in columns]
  groups = {"all": np.ones(len(kinds), bool)} | {
    str(k): kinds == k for k in sorted(set(kinds.tolist()) - {""})
  }
  found: dict[str, Any] = {}
  for group, rows in groups.items():
    made = estimates(values[rows], lowest=lowest, **how)
    for names, estimate in zip(columns, made, strict=True):
      place = found
      for name in names:
        place = place.setdefault(name, {})
      place[group] = estimate
  return found


def largest_beaten(differences: Mapping[int, Estimate]) -> int:
  """The largest N whose difference is above 0, and that of all N below it.

  A difference is above 0 if its whole interval is.

  Args:
    differences: {N: of the model minus the best of N}.
  Returns:
    0: not even the smallest.
  """
  beaten = 0
  for n in sorted(differences):
    low = differences[n].low
    if low is None or low <= 0:
      break
    beaten = n
  return beaten
