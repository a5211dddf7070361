"""A step of `configs/grpo.py:tiny` by its parts, with and without overlap.

Weights are random, so that there is nothing to learn; every part does what it
does in a run: drawing, painting, OCR in this process, log-probs, the update.
The decoder reads prompts as long as those that `configs/decoder.py:tiny` has
trained one for.
"""

import contextlib
import io
import json
import pathlib
import statistics
import tempfile
from typing import Any

import jax
from ml_collections import ConfigDict

from xomni_jax.bench import measure
from xomni_jax.inference import fresh
from xomni_jax.training import build, configure, loop

# {part: metric}; the update is what is left of a step.
PARTS = {
  "draw codes": "time/rollout_seconds",
  "log-probs": "time/logp_seconds",
  "paint": "time/paint_seconds",
  "wait for rewards": "time/reward_wait_seconds",
}
UPDATE, STEP = "update", "whole step"
_SIGNS = ({"path": "world:signs:train", "task": "prompt"},)
_WARM_UP = 2  # steps that compile


def compare(config: ConfigDict, repeats: int, text_len: int) -> dict[str, Any]:
  """Seconds of a step by part, medians of `repeats` steps.

  Args:
    config: of the run; names no files.
    repeats: steps.
    text_len: T5 tokens of a prompt that the decoder reads.
  Returns:
    seconds: {"overlap 0" | "overlap 1": {part: seconds}}; hidden: share of the
    wait for rewards that overlap takes away; images: of a step.
  """
  seconds = {}
  for overlap in (0, 1):
    name = f"overlap {overlap}"
    measure.say(f"grpo: {name} ...")
    seconds[name] = _parts(config, overlap, repeats, text_len)
  wait = [seconds[f"overlap {i}"]["wait for rewards"] for i in (0, 1)]
  return {
    "seconds": seconds,
    "hidden": 1 - wait[1] / wait[0],
    "images": config.global_batch,
  }


def _parts(config, overlap, repeats, text_len) -> dict[str, float]:
  config = ConfigDict(config.to_dict())
  steps = _WARM_UP + repeats
  configure.override(
    config,
    [
      # Steps of one size have one duration.
      f"data.sources={_SIGNS!r}",
      f"options.overlap={overlap}",
      f"phases.1_all.steps={steps + overlap}",
      "phases.1_all.warmup_steps=0",
      "report.eval_every=0",
      "report.preview_every=0",
      "report.log_every=1",
      f"checkpoint.every={steps + 2}",
      "checkpoint.export=False",
    ],
  )
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder)
    _write_start(config, workdir, text_len)
    cfg, arch = configure.parse(config, "config")
    stage = build.stage(cfg, arch, config, workdir)
    with contextlib.redirect_stdout(io.StringIO()):  # lines of progress
      loop.train(cfg, stage, workdir, settings=config.to_dict())
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
  # With overlap the last step draws nothing.
  rows = [json.loads(line) for line in lines][_WARM_UP:steps]
  median = lambda name: statistics.median(row[name] for row in rows)
  found = {part: median(name) for part, name in PARTS.items()}
  whole = median("time/step_seconds")
  return {**found, UPDATE: whole - sum(found.values()), STEP: whole}


def _write_start(config: ConfigDict, folder: pathlib.Path, text_len) -> None:
  """Writes fresh model folders and names them in the config."""
  _, arch = configure.parse(config, "config")
  section = lambda name, kind: configure.section(config, name, kind, "config")
  xomni, flux1, ours = (folder / n for n in ("xomni", "flux1-512", "flux1"))
  fresh.write_fresh(
    xomni,
    flux1,
    arch,
    jax.random.key(config.seed),
    transform=section("transform", "TransformConfig"),
    decoder=section("decoder", "DecoderConfig"),
  )
  fresh.replace_flux1(flux1, ours, {}, text_len=text_len)
  configure.override(config, [f"init.model={xomni}", f"init.flux={ours}"])


def table(report: dict[str, Any]) -> str:
  """The report for people."""
  ways = list(report["seconds"])
  rows = [
    [part, *(f"{report['seconds'][way][part]:.2f} s" for way in ways)]
    for part in (*PARTS, UPDATE, STEP)
  ]
  return "\n".join(
    [
      measure.table(["a step", *ways], rows),
      f"{report['images']} images a step; overlap hides "
      f"{report['hidden']:.0%} of the wait for rewards",
    ]
  )
