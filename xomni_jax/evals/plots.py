"""Plots of measurements, as PNG."""

import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xomni_jax.evals import reading
from xomni_jax.evals.best_of_n import CEILINGS, CONTROL, best_name

# Lines across the plot: (name, colour, style).
_ACROSS = (
  ("rl T=1", "tab:red", "-"),
  (f"{CONTROL} T=1", "tab:green", "-"),
  ("sft T=0.7", "tab:blue", ":"),
  ("sft greedy", "tab:blue", "--"),
  (CEILINGS[0], "black", "--"),
  (CEILINGS[1], "gray", "--"),
)
_DPI = 120


def best_of_n(runs: Mapping[str, Mapping[str, Any]]) -> bytes:
  """Exact images over N: the curve of SFT, and what it is held against.

  A panel an engine; thin lines are seeds, thick ones their mean.

  Args:
    runs: {seed's name: figures}.
  """
  identity = next(iter(runs.values()))["identity"]
  numbers = identity["n"]
  figure, panels = _figure(identity)
  for axes, engine in panels:
    scores = [run["scores"][engine]["exact"] for run in runs.values()]
    curves = np.array(
      [[s[best_name(n)]["all"][0] for n in numbers] for s in scores], float
    )
    how = {"color": "tab:blue", "label": "sft best of N", "marker": "o"}
    _lines(functools.partial(axes.plot, numbers), curves, **how)
    for name, colour, style in _ACROSS:
      if all(name in s for s in scores):
        levels = np.array([s[name]["all"][0] for s in scores], float)
        how = {"color": colour, "linestyle": style, "label": name}
        _lines(axes.axhline, levels, **how)
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [str(n) for n in numbers])
    axes.set_xlabel("N")
    axes.set_ylabel("exact, %")
  # Below, where it hides no line; both panels have the same lines.
  handles, names = axes.get_legend_handles_labels()
  columns = min(len(names), 4 * len(panels))
  figure.legend(
    handles, names, loc="outside lower center", ncols=columns, fontsize=8
  )
  return _png(figure)


def cfg_gains(runs: Mapping[str, Mapping[str, Any]]) -> bytes:
  """Gains of the best settings over the plain one, with their intervals."""
  identity = next(iter(runs.values()))["identity"]
  figure, panels = _figure(identity)
  for axes, engine in panels:
    labels = []
    for model in identity["models"]:
      for seed, run in runs.items():
        gain = run["gain"][model][engine]["exact"]["all"]
        mean, low, high = (100 * (x or 0.0) for x in gain[:3])
        axes.errorbar(
          mean,
          len(labels),
          xerr=[[max(0.0, mean - low)], [max(0.0, high - mean)]],
          fmt="o",
          capsize=3,
          color="tab:red" if model == "rl" else "tab:blue",
        )
        labels.append(f"{model}, {seed}: {run['chosen'][model][engine]}")
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("gain in exact, points")
  return _png(figure)


def _figure(identity):
  """A figure and (panel, engine) of the engines that there are."""
  import matplotlib.figure

  engines: Sequence[str] = [
    e for e in reading.ENGINES if e in identity["engines"]
  ]
  # Without pyplot, which would look for a display.
  figure = matplotlib.figure.Figure(
    (6 * len(engines), 4.5), layout="constrained"
  )
  axes = figure.subplots(1, len(engines), squeeze=False)[0]
  panels = [*zip(axes, engines, strict=True)]
  for axes, engine in panels:
    axes.set_title(f"{identity['source']}, read by {engine}", fontsize=10)
    axes.grid(alpha=0.3)
  return figure, panels


def _lines(draw, values, **how):
  """Seeds' lines f[seeds, ...] and their mean."""
  if len(values) > 1:
    for one in values:
      thin = {"alpha": 0.3, "linewidth": 0.8, "label": None, "marker": None}
      draw(100 * one, **how | thin)
  draw(100 * values.mean(0), **how, linewidth=1.8)


def _png(figure) -> bytes:
  page = io.BytesIO()
  figure.savefig(page, format="png", dpi=_DPI)
  return page.getvalue()
