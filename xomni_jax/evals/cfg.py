"""Guidance, temperature and min-p before and after reinforcement learning.

All settings are drawn for validation prompts. The plain one, temperature 1
without guidance and filters, and of the others the one with the most exact
images there are drawn for test prompts: its gain over the plain one is a
paired difference, free of the luck of the choice. Each engine makes its own
choice. The plain one can't be chosen even where it is the best: a gain over
itself, which is 0 without any interval, would say nothing.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xomni_jax.evals import stats
from xomni_jax.evals.asked import Asked
from xomni_jax.evals.measure import Setting
from xomni_jax.evals.reading import Readings
from xomni_jax.evals.rows import METRICS, Key, score_table
from xomni_jax.inference.sampling import Sampling

NAME = "cfg"
VALIDATION, TEST = "validation", "test"
SCALES, TEMPERATURES, MIN_PS = (1.0, 1.5, 3.0), (1.0, 0.7), (0.0, 0.03)
BASE = "CFG 1, T 1"


def grid() -> dict[str, Sampling]:
  """{name: setting}, the plainest first.

  Greedy drawing has no min-p: what it keeps always has the likeliest code.
  """
  found = {}
  for scale in SCALES:
    for temperature, min_p in itertools.product(TEMPERATURES, MIN_PS):
      name = f"CFG {scale:g}, T {temperature:g}"
      name += f", min-p {min_p:g}" if min_p else ""
      found[name] = Sampling(temperature, min_p=min_p, cfg_scale=scale)
    found[f"CFG {scale:g}, greedy"] = Sampling(greedy=True, cfg_scale=scale)
  return found


def validation_settings(identity: Mapping[str, Any]) -> list[Setting]:
  """All settings of all models, for validation prompts."""
  return [
    _setting(VALIDATION, model, name, identity["validation"], 1)
    for model in identity["models"]
    for name in grid()
  ]


def test_settings(
  identity: Mapping[str, Any], chosen: Mapping[str, Mapping[str, str]]
) -> list[Setting]:
  """What is drawn for test prompts: the plain setting and the chosen ones.

  Args:
    chosen: {model: {engine: setting}}.
  """
  return [
    _setting(TEST, model, name, identity["source"], identity["samples"])
    for model, of in chosen.items()
    for name in grid()
    if name == BASE or name in of.values()
  ]


def _setting(split, model, name, source, samples):
  how = grid()[name]
  samples = 1 if how.greedy else samples
  return Setting(f"{split} {model} {name}", model, source, samples, how)


def choose(
  identity: Mapping[str, Any],
  rows: Mapping[Key, Readings],
  asked: Sequence[Asked],
) -> dict[str, dict[str, str]]:
  """{model: {engine: the best of the settings that are not plain}}.

  Args:
    asked: validation prompts; rows of test prompts are not looked at.
  Raises:
    InputError: rows are missing.
  """
  others = [name for name in grid() if name != BASE]
  found: dict[str, dict[str, str]] = {}
  for model in identity["models"]:
    for engine in identity["engines"]:
      lines = _lines(identity, rows, asked, VALIDATION, model, engine, others)
      # Of equal ones the first, which is the plainest.
      best = max(others, key=lambda k, of=lines["exact"]: _mean(of[k]))
      found.setdefault(model, {})[engine] = best
  return found


def _mean(values):
  known = values[np.isfinite(values)]
  return known.mean() if len(known) else 0.0


def _lines(identity, rows, asked, split, model, engine, names):
  """{metric: {setting: f64[prompts]}}."""
  found: dict[str, dict] = {metric: {} for metric in METRICS}
  samples = 1 if split == VALIDATION else identity["samples"]
  for name in names:
    setting = _setting(split, model, name, "", samples)
    table = score_table(rows, setting.name, setting.samples, asked, engine)
    for metric in METRICS:
      found[metric][name] = stats.mean_of(table[metric])
  return found


def summary(
  identity: Mapping[str, Any],
  rows: Mapping[Key, Readings],
  validation: Sequence[Asked],
  test: Sequence[Asked],
) -> dict[str, Any]:
  """All figures of a measurement, as JSON.

  Returns:
    identity: the argument.
    chosen: {model: {engine: setting}}, see `choose`.
    validation: {model: {engine: {metric: {setting: {"all": Estimate}}}}}.
    test: the same of the plain and the chosen setting, and by kind of text.
    gain: {model: {engine: {metric: {kind: Estimate}}}}, the chosen setting
      minus the plain one; the interval's `high` is its upper bound.
  Raises:
    InputError: rows are missing.
  """
  chosen = choose(identity, rows, validation)
  first, second = {}, {}
  for model, of in chosen.items():
    for engine, best in of.items():
      at = (model, engine)
      lines = _lines(identity, rows, validation, VALIDATION, *at, grid())
      for metric, line in lines.items():
        first |= {(*at, metric, name): x for name, x in line.items()}
      lines = _lines(identity, rows, test, TEST, *at, [BASE, best])
      for metric, line in lines.items():
        second |= {("test", *at, metric, k): x for k, x in line.items()}
        second["gain", *at, metric] = line[best] - line[BASE]
  return {
    "identity": dict(identity),
    "chosen": chosen,
    "validation": stats.by_kind(first, [""] * len(validation)),
    **stats.by_kind(second, [a.kind for a in test], signed=("gain",)),
  }
