"""How well each line of a text was read, and where it stands.

A poster of five lines, one of them misspelt, has one score. Told by lines it
has five, and a policy learns which of its codes were wrong.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from xomni_jax.rewards import text_scores

NAME = "lines"  # of these scores in a Score's `raw`


def line_scores(
  targets: Sequence[str],
  read: Sequence[str],
  spans: Sequence[tuple[float, float]],
  spaces: bool = True,
) -> list[list[float | None]]:
  """[score, top, bottom] of each target, by the line that it was read as.

  Targets and lines are paired in their order, so that as many characters as
  possible agree. A target that nothing was read for has a score of 0 and no
  place; one without letters has no score either.

  Args:
    targets: normalised, see `text_scores.normalize`.
    read: lines from the top, normalised.
    spans: (top, bottom) of each line, as shares of the image's height.
    spaces: whether white space counts.
  """
  if not spaces:
    targets, read = ([*map(text_scores.closed, x)] for x in (targets, read))
  found: list[list[float | None]] = [
    [0.0 if text_scores.forms_reward("", t, spaces) else None, None, None]
    for t in targets
  ]
  for i, j in _paired(targets, read):
    said = text_scores.forms_reward(read[j], targets[i], spaces)
    top, bottom = spans[j]
    found[i] = [said.score, round(top, 4), round(bottom, 4)]
  return found


def told(raw: Any) -> np.ndarray:
  """f32[K, 3] of what a Score's `raw` says of lines, NaN for None.

  A server may say anything: what are no lines is f32[0, 3].
  """
  lines = raw.get(NAME) if isinstance(raw, dict) else None
  try:
    return np.array(lines or [], np.float32).reshape(-1, 3)  # None is NaN
  except (TypeError, ValueError, OverflowError):
    return np.zeros((0, 3), np.float32)


def combined(
  tables: Sequence[np.ndarray],
  scores: Sequence[float],
  how: Callable[[Sequence[float]], float],
) -> list[list[float | None]]:
  """`line_scores` of several engines as one; []: none tells of lines.

  Args:
    tables: of each engine, as `told`. One that tells of no lines has read each
      as well as all of them.
    scores: of each engine, of the whole text.
    how: the mean or the least of several scores.
  """
  count = max(map(len, tables))
  whole = zip(tables, scores, strict=True)
  tables = [
    t if len(t) == count else np.array([[s, np.nan, np.nan]] * count)
    for t, s in whole
  ]
  found = []
  for rows in zip(*tables, strict=True):
    known = [float(row[0]) for row in rows if np.isfinite(row[0])]
    placed = [row[1:].tolist() for row in rows if np.isfinite(row).all()]
    found.append([how(known) if known else None, *next(iter(placed), _NOWHERE)])
  return found


_NOWHERE = (None, None)


def _paired(targets, read):
  """(target, line) pairs, in order, that agree in most characters."""
  agree = [[_agreeing(t, line) for line in read] for t in targets]
  # best[i][j]: characters that agree in the first i targets and j lines.
  best = [[0] * (len(read) + 1) for _ in range(len(targets) + 1)]
  for i in range(1, len(targets) + 1):
    for j in range(1, len(read) + 1):
      both = best[i - 1][j - 1] + agree[i - 1][j - 1]
      best[i][j] = max(both, best[i - 1][j], best[i][j - 1])
  pairs, i, j = [], len(targets), len(read)
  while i and j:
    if best[i][j] == best[i - 1][j]:
      i -= 1
    elif best[i][j] == best[i][j - 1]:
      j -= 1
    else:
      i, j = i - 1, j - 1
      pairs.append((i, j))
  return pairs[::-1]


def _agreeing(target, line):
  longest = max(len(target), len(line))
  return longest - text_scores.edit_distance(target, line)
