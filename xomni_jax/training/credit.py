"""Which codes of an image have earned its reward: GRPO's advantages.

As a rule all of them, alike. With `GRPOOptions.line_advantages` the codes of a
line learn from how that line was read, in comparison with the same line in the
group's other images: an image of five lines with one letter wrong then tells
which fifth of it was wrong.

Shape letters: B images, K lines, h rows of codes.
"""

from collections.abc import Mapping

import numpy as np

from xomni_jax.rewards import combine
from xomni_jax.stage_options import GRPOOptions
from xomni_jax.training.policy import group_advantages


def advantages(
  rewards: np.ndarray,
  columns: Mapping[str, combine.Column],
  options: GRPOOptions,
  grid: tuple[int, int],
) -> tuple[np.ndarray, dict[str, float]]:
  """f32[B, h * w] and metrics.

  A code belongs to a line if its row does, see `rows_of_lines`; a code of no
  line, or of a line that was not read, learns from the whole image. A line's
  reward is the image's with that line's score in the place of the whole text's,
  other rewards as they are.

  Args:
    rewards: f[B] of images, the samples of a prompt adjacent; NaN: none.
    columns: what they were combined from. Lines are those of the first
      optimised reward that tells of any.
    grid: h and w.
  """
  in_groups = lambda rewards: group_advantages(
    rewards, options.group_size, normalise=options.normalise
  )
  h, w = grid
  found_Bh = np.repeat(in_groups(rewards)[:, None], h, axis=1)
  name = _telling(columns, options)
  if not name:
    return np.repeat(found_Bh, w, axis=1), {}
  column = columns[name]
  scores_BK, spans_BK2 = column.lines[..., 0], column.lines[..., 1:]
  line_Bh = rows_of_lines(spans_BK2, h)
  for k, scores_B in enumerate(scores_BK.T):
    values = np.where(np.isfinite(scores_B), scores_B, column.values)
    of_line = combine.combine(
      {**columns, name: column._replace(values=values)},
      options.rewards,
      options.group_size,
      options.combine.quorum,
    ).rewards
    found_Bh = np.where(line_Bh == k, in_groups(of_line)[:, None], found_Bh)
  told = np.isfinite(scores_BK)
  placed = np.isfinite(spans_BK2).all(-1) & told
  metrics = {"reward/lines_found": float(placed.sum() / told.sum())}
  return np.repeat(found_Bh, w, axis=1), metrics


def rows_of_lines(spans_BK2: np.ndarray, h: int) -> np.ndarray:
  """i[B, h]: the line that stands in each row of codes; -1: none.

  It covers at least half of the row, or has at least half of itself there. Of
  several lines it is the one with most of the row.

  Args:
    spans_BK2: top and bottom, as shares of the height; NaN: not known.
  """
  top, bottom = np.nan_to_num(spans_BK2[..., None] * h).transpose(2, 0, 1, 3)
  row = np.arange(h)
  shared = np.clip(np.minimum(bottom, row + 1) - np.maximum(top, row), 0, None)
  enough = 2 * shared >= np.minimum(1.0, np.maximum(bottom - top, 1e-6))
  shared = np.where(enough, shared, 0)
  return np.where(shared.max(1) > 0, shared.argmax(1), -1)


def _telling(columns, options) -> str:
  """Name of the reward that tells lines apart; "": none does."""
  for reward in options.rewards if options.line_advantages else ():
    lines = columns[reward.name].lines
    told = lines is not None and np.isfinite(lines[..., 0]).any()
    if reward.weight > 0 and told:
      return reward.name
  return ""
