"""Best-of-N of a fine-tuned model against reinforcement learning at N = 1.

The fine-tuned model (SFT) draws several images a prompt, the best by the
reward is taken, and judged by an engine that the reward does not know, and by
the reward itself. Beside them stand an SFT model of equal compute, SFT at
lower temperatures, and what nothing can pass: the true drawings, and what the
decoder makes of their codes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xomni_jax.errors import InputError
from xomni_jax.evals import stats
from xomni_jax.evals.asked import Asked, has_images
from xomni_jax.evals.measure import Setting
from xomni_jax.evals.reading import REWARD, Readings
from xomni_jax.evals.rows import METRICS, Key, score_table
from xomni_jax.inference.sampling import Sampling

NAME = "best-of-n"
TEST = "test"
SFT, RL, CONTROL = "sft", "rl", "control"
TRUE, REPAINTED = "true drawings", "decoder on true codes"
CEILINGS = (TRUE, REPAINTED)
_MANY, _RL = "sft T=1", "rl T=1"
_PLAIN, _COOL, _GREEDY = Sampling(), Sampling(0.7), Sampling(greedy=True)


def settings(identity: Mapping[str, Any]) -> list[Setting]:
  """All that is drawn, those of a model adjacent.

  Args:
    identity: "models" has "sft", "rl", and perhaps "control"; "n" the numbers
      of images that the best is chosen from; "samples" the images a prompt of
      what is not chosen from; "source" the prompts.
  """
  source, samples = identity["source"], identity["samples"]
  found = []
  if has_images(source):
    found.append(Setting(TRUE, "", source))
    found.append(Setting(REPAINTED, SFT, source))
  found += [
    Setting("sft greedy", SFT, source, 1, _GREEDY),
    Setting("sft T=0.7", SFT, source, samples, _COOL),
    Setting(_MANY, SFT, source, max(identity["n"]), _PLAIN),
  ]
  found += [
    Setting(f"{model} T=1", model, source, samples, _PLAIN)
    for model in (CONTROL, RL)
    if model in identity["models"]
  ]
  return found


def best_name(n: int) -> str:
  """What the line of the best of n is called."""
  return f"sft best of {n}"


def summary(
  identity: Mapping[str, Any],
  rows: Mapping[Key, Readings],
  asked: Sequence[Asked],
) -> dict[str, Any]:
  """All figures of a measurement, as JSON.

  Returns:
    identity: the argument.
    scores: {engine: {metric: {line: {kind: Estimate}}}}; lines are "sft best
      of N", "rl T=1", ...; an engine that is not installed is left out.
    differences: the same, of "rl T=1" minus each line.
    beaten: {engine: {metric: the largest N that RL beats}}.
    failed: {engine: images that it failed on}.
  Raises:
    InputError: rows are missing.
  """
  made = settings(identity)
  tables = {
    engine: {
      s.name: score_table(rows, s.name, s.samples, asked, engine) for s in made
    }
    for engine in identity["engines"]
  }
  rank = tables[REWARD][_MANY]["reward"]
  lines = {}
  for engine, of in tables.items():
    for metric in METRICS:
      judged = of[_MANY][metric]
      for n in identity["n"]:
        best = stats.best_of(rank, judged, n)
        lines[engine, metric, best_name(n)] = best
      for name in (name for name in of if name != _MANY):
        lines[engine, metric, name] = stats.mean_of(of[name][metric])
  gains = {
    (engine, metric, name): lines[engine, metric, _RL] - line
    for (engine, metric, name), line in lines.items()
    if name != _RL
  }
  columns = {("scores", *k): x for k, x in lines.items()}
  columns |= {("differences", *k): x for k, x in gains.items()}
  kinds = [a.kind for a in asked]
  found = stats.by_kind(columns, kinds, signed=("differences",))
  beaten = lambda of: stats.largest_beaten(
    {n: of[best_name(n)]["all"] for n in identity["n"]}
  )
  return {
    "identity": dict(identity),
    **found,
    "beaten": {
      engine: {metric: beaten(of) for metric, of in metrics.items()}
      for engine, metrics in found["differences"].items()
    },
    "failed": {
      engine: int(sum(np.isnan(t["exact"]).sum() for t in of.values()))
      for engine, of in tables.items()
    },
  }


def check_numbers(n: Sequence[int]) -> None:
  """InputError unless these are numbers to choose the best from."""
  if not n or min(n) < 1 or sorted(set(n)) != list(n) or n[0] != 1:
    raise InputError(
      f"n is {','.join(map(str, n))}, expected rising numbers from 1, such as "
      "1,2,4,8,16"
    )
