"""Figures of several training seeds side by side: Markdown and plots."""

import decimal
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from xomni_jax.errors import InputError
from xomni_jax.evals import best_of_n, cfg, plots, reading
from xomni_jax.evals.best_of_n import best_name
from xomni_jax.evals.rows import METRICS, drawings
from xomni_jax.evals.stats import Estimate, largest_beaten

Runs = Mapping[str, Mapping[str, Any]]  # {seed's name: figures}
# {seed's name: {line: {kind: Estimate as JSON}}}
Lines = Mapping[str, Mapping[str, Mapping[str, Sequence]]]

_TITLES = {
  "exact": "Exact, %",
  "characters": "Characters, %",
  "reward": "Mean text reward, x 100",
}

_ROLES = {
  reading.REWARD: "the reward",
  reading.JUDGE: "the independent judge",
}
# What runs that are compared have in common.
_SAME = (
  *("source", "prompts", "n", "seed", "steps", "samples"),
  *("engines", "validation"),
)


def write(
  out: pathlib.Path, found: Mapping[str, Runs]
) -> Sequence[pathlib.Path]:
  """Writes the report; returns its files, `report.md` first.

  Args:
    out: a folder.
    found: {measurement: its runs}, at least one.
  Raises:
    InputError: runs that do not compare.
  """
  text, made = [], [out / "report.md"]
  names = dict.fromkeys(name for runs in found.values() for name in runs)
  try:
    out.mkdir(parents=True, exist_ok=True)
    for name, plot, table in (
      (best_of_n.NAME, plots.best_of_n, best_of_n_text),
      (cfg.NAME, plots.cfg_gains, cfg_text),
    ):
      if runs := found.get(name):
        _check_same(runs)
        made.append(out / f"{name}.png")
        made[-1].write_bytes(plot(runs))
        text.append(table(runs))
        if lacking := [name for name in names if name not in runs]:
          text.append(f"Not measured: {', '.join(lacking)}.\n")
    made[0].write_text("\n".join(text), encoding="utf-8")
  except OSError as e:
    raise InputError(f"{out} can't be written ({e.strerror})") from None
  return made


def _check_same(runs: Runs) -> None:
  (first, one), *others = runs.items()
  for name, other in others:
    for key in (*_SAME, "models"):
      a, b = one["identity"].get(key), other["identity"].get(key)
      if key == "models":  # which there are; each seed has its own
        a, b = sorted(a), sorted(b)
      if a != b:
        raise InputError(
          f"{first} and {name} do not compare: {key} is {json.dumps(a)} and "
          f"{json.dumps(b)}, expected the same"
        )


def best_of_n_text(runs: Runs) -> str:
  """The tables of best-of-N, Markdown."""
  identity = _any(runs)["identity"]
  parts = ["# Best of N", "", _about(runs), "", "![](best-of-n.png)", ""]
  for engine, title in _engines(identity):
    parts += [f"## {title}", ""]
    if engine in identity["engines"]:
      parts += _best_of_n_part(runs, engine)
    else:
      parts += ["absent: it was not installed", ""]
  return "\n".join(parts)


def _best_of_n_part(runs, engine) -> list[str]:
  """What one engine says."""
  numbers, parts = _any(runs)["identity"]["n"], []
  scores, gains = (
    {
      metric: {name: run[what][engine][metric] for name, run in runs.items()}
      for metric in METRICS
    }
    for what in ("scores", "differences")
  )
  for metric in METRICS:
    parts += [f"### {_TITLES[metric]}", "", _table(scores[metric]), ""]
  parts += ["### Exact, %, by kind of text, mean over seeds", ""]
  parts += [_kinds(scores["exact"]), ""]
  for metric in METRICS:
    parts += [
      f"### RL at N = 1 minus each, paired: {metric}, points",
      "",
      _table(gains[metric], signed=True, without=best_of_n.CEILINGS),
      "",
      f"Largest N that RL at N = 1 beats: {_beaten(gains[metric], numbers)}.",
      "",
    ]
  return parts + _ratios(scores["exact"])


def _beaten(gains: Lines, numbers) -> str:
  found = []
  for name, lines in gains.items():
    by_n = {n: Estimate(*lines[best_name(n)]["all"]) for n in numbers}
    found.append(f"{largest_beaten(by_n) or 'none'} ({name})")
  return ", ".join(found)


def _ratios(scores: Lines) -> list[str]:
  """How near the models come to what nothing can pass."""
  lines = []
  for above, below in (
    (best_of_n.REPAINTED, best_of_n.TRUE),
    ("rl T=1", best_of_n.REPAINTED),
  ):
    if below not in _any(scores):
      continue
    found = []
    for name, of in scores.items():
      a, b = (of[line]["all"][0] for line in (above, below))
      found.append(f"{a / b:.3f} ({name})" if a and b else f"- ({name})")
    lines.append(f"- exact, {above} / {below}: {', '.join(found)}")
  return [*lines, ""] if lines else []


def cfg_text(runs: Runs) -> str:
  """The tables of guidance and filters, Markdown."""
  identity = _any(runs)["identity"]
  parts = ["# Guidance and filters", "", _about(runs), ""]
  parts += ["![](cfg.png)", ""]
  for engine, title in _engines(identity):
    parts += [f"## {title}", ""]
    if engine not in identity["engines"]:
      parts += ["absent: it was not installed", ""]
      continue
    parts += [
      "### Gain over the plain setting on test prompts, paired: exact, points",
      "",
      f"Plain is {cfg.BASE}, no filter; of the others, the best on validation "
      "prompts.",
      "",
      _gains(runs, engine),
      "",
    ]
    for model in identity["models"]:
      scores = {
        name: run["validation"][model][engine]["exact"]
        for name, run in runs.items()
      }
      parts += [f"### {model}, validation prompts: exact, %", ""]
      parts += [_table(scores), ""]
  return "\n".join(parts)


def _gains(runs, engine):
  heads = ("model", "seed", "best other setting", "it", "plain", "gain")
  rows = [[*heads, "upper bound"]]
  for model in _any(runs)["identity"]["models"]:
    for name, run in runs.items():
      best = run["chosen"][model][engine]
      scores = run["test"][model][engine]["exact"]
      gain = run["gain"][model][engine]["exact"]["all"]
      rows.append(
        [
          *(model, name, best),
          *(_percent(scores[line]["all"]) for line in (best, cfg.BASE)),
          _percent(gain, signed=True),
          _percent([gain[2]], signed=True),
        ]
      )
  return _markdown(rows)


def _any(of):
  return next(iter(of.values()))


def _about(runs) -> str:
  identity = _any(runs)["identity"]
  prompts = ", ".join(
    f"{count} {split} prompts"
    for split, (count, _) in identity["prompts"].items()
  )
  kept = all(_same_keys(run["identity"]) for run in runs.values())
  same = ", under the same random keys" if kept else ""
  return (
    f"{identity['source']}: {prompts}, {identity['steps']} steps of denoising. "
    "In brackets 95 % intervals: bootstrap over prompts, 10,000 resamples, the "
    f"2.5th and 97.5th percentile; differences are paired by prompt{same}."
  )


def _same_keys(identity) -> bool:
  """Whether a key made the same draws in all rows."""
  version, *others = drawings(identity)
  return version > 0 and not others


def _engines(identity):
  for name in reading.ENGINES:
    rev = identity["engines"].get(name, name)
    yield name, f"Read by {rev}, {_ROLES[name]}"


def _table(of: Lines, *, signed=False, without=()) -> str:
  """Lines by seeds, and the mean over seeds; of all prompts."""
  several = len(of) > 1
  rows = [["", *of, *(["mean"] if several else [])]]
  for line in _any(of):
    if line in without:
      continue
    found = [lines[line]["all"] for lines in of.values()]
    cells = [line, *(_percent(x, signed=signed) for x in found)]
    if several:
      cells.append(_percent([mean_over(found)], signed=signed))
    rows.append(cells)
  return _markdown(rows)


def _kinds(of: Lines) -> str:
  """Lines by kinds of text, mean over seeds; in brackets, prompts."""
  kinds = next(iter(_any(of).values()))
  rows = [["", *(f"{kind} ({e[3]})" for kind, e in kinds.items())]]
  for line in _any(of):
    means = [mean_over([x[line][kind] for x in of.values()]) for kind in kinds]
    rows.append([line, *(_percent([mean]) for mean in means)])
  return _markdown(rows)


def _markdown(rows) -> str:
  rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def mean_over(found: Sequence[Sequence]) -> float | None:
  """The mean of seeds' means; None where a seed has none."""
  means = [estimate[0] for estimate in found]
  if None in means:
    return None
  # Of what half way is left above or below by the sum, as in `stats`.
  return round(sum(means) / len(means), 9)


def _percent(estimate: Sequence, *, signed: bool = False) -> str:
  mean, *interval = estimate
  if mean is None:
    return "-"
  # Half up, as people round; JSON has decimals, which binary floats do not.
  points = lambda x: (
    decimal.Decimal(repr(x))
    .scaleb(2)
    .quantize(decimal.Decimal("0.1"), decimal.ROUND_HALF_UP)
  )
  show = lambda x: f"{points(x):{'+' if signed else ''}}"
  if len(interval) < 2:
    return show(mean)
  return f"{show(mean)} [{show(interval[0])}, {show(interval[1])}]"
