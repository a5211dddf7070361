"""How well each line of a text was read, and where it stands.

A poster of five lines, one of them misspelt, has one score. Told by lines it
has five, and a policy learns which of its codes were wrong.
"""

from collections.abc import Sequence

from xomni_jax.rewards import text_scores


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
  found: list[list[float | None]] = [
    [0.0 if text_scores.forms_reward("", t, spaces) else None, None, None]
    for t in targets
  ]
  for i, j in _paired(targets, read):
    said = text_scores.forms_reward(read[j], targets[i], spaces)
    top, bottom = spans[j]
    found[i] = [said.score, round(top, 4), round(bottom, 4)]
  return found


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
