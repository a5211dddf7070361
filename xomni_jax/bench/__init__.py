"""`xomni bench`: how fast the models are, beside the same in PyTorch.

Two kinds of run for inference:

- `xomni bench` takes about 100M parameters of either model on the CPU, with
  the same weights in JAX and in PyTorch, checks that both compute the same, and
  prints the ratio of their speeds.
- `xomni bench --size 7b` takes the full sizes with random bfloat16 weights on
  one GPU, every model and framework in its own process, and prints besides what
  share of the device's bandwidth or arithmetic is used. `--size tiny` is the
  same in small, on whatever there is, to see that it runs.

And of training:

- `xomni bench --train` times the step of `configs/pretrain.py:tiny`: packed
  rows beside padded ones, and both beside PyTorch.
- `xomni bench --grpo` takes a step of `configs/grpo.py:tiny` apart.

Speeds are medians of several calls, without the first, which compiles.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import tempfile
from typing import Any

import jax

from xomni_jax import checks
from xomni_jax.bench import (
  compare,
  grpo,
  measure,
  part,
  roofline,
  training,
  work,
)
from xomni_jax.config import Compute
from xomni_jax.config_files import load_architecture
from xomni_jax.errors import ArgumentParser, InputError
from xomni_jax.training import configure

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def main(argv: list[str]) -> int:
  """Runs the benchmark; 0, or 1 if a part of it failed.

  Raises:
    InputError: bad arguments, or `--size 7b` without a GPU.
  """
  args = _parse(argv)
  print(f"{measure.processor()}; {measure.versions()}", flush=True)
  if args.train:
    report = _train(args)
  elif args.grpo:
    report = _grpo(args)
  else:
    report = _small(args) if args.size == "100m" else _full(args)
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
  return int(any("failed" in p for p in report.get("parts", {}).values()))


def _parse(argv):
  parser = ArgumentParser(
    prog="xomni bench", description=__doc__.split("\n\n")[0]
  )
  add = parser.add_argument
  add(
    "--size",
    choices=tuple(work.LOADS),
    default="100m",
    help="100m: JAX and PyTorch on the CPU; 7b: full sizes on a GPU; tiny: "
    "like 7b, in small and without a GPU (default: %(default)s)",
  )
  add(
    "--model",
    choices=("ar", "flux"),
    help="only this one (default: both, the AR model first)",
  )
  add(
    "--train",
    action="store_true",
    help="the training step of the tiny pretrain config, on the CPU",
  )
  add(
    "--grpo",
    action="store_true",
    help="a step of the tiny GRPO config by its parts, on the CPU",
  )
  add(
    "--config",
    default=str(_ROOT / "configs" / "model.py"),
    metavar="FILE",
    help="sizes of 7b and tiny (default: configs/model.py of the clone)",
  )
  add(
    "--repeats",
    type=int,
    default=5,
    help="timed calls a figure (default: %(default)s)",
  )
  add(
    "--scan",
    action=argparse.BooleanOptionalAction,
    help="JAX runs the layers as a scan (default: yes, but not for 100m)",
  )
  add(
    "--bandwidth",
    type=float,
    metavar="TB/S",
    help="peak memory bandwidth, for a GPU not in the table or to override it",
  )
  add(
    "--flops",
    type=float,
    metavar="TFLOP/S",
    help="peak dense bfloat16 arithmetic, likewise",
  )
  add("--json", metavar="FILE", help="write the figures there too")
  args = parser.parse_args(argv)
  for name in ("repeats", "bandwidth", "flops"):
    value = getattr(args, name)
    if value is not None and not 0 < value < float("inf"):
      raise InputError(f"--{name} is {value}, expected a number above 0")
  if args.json:
    checks.file_to_write("--json", args.json)
  if (args.train or args.grpo) and (
    args.size != "100m" or args.model or args.scan or (args.train and args.grpo)
  ):
    raise InputError(
      "--train and --grpo have sizes of their own, and --train times the AR "
      "model with and without a scan; give one of them, without --size, "
      "--model and --scan"
    )
  args.models = (args.model,) if args.model else ("ar", "flux")
  if args.scan is None:
    args.scan = args.size != "100m"
  return args


def _small(args) -> dict[str, Any]:
  """The comparison on the CPU, printed; returns what `--json` writes."""
  # PyTorch's part runs there, whatever else this machine has.
  jax.config.update("jax_platforms", "cpu")
  if busy := measure.busy():
    print(busy, flush=True)
  configs = {"ar": compare.AR_100M, "flux": compare.FLUX_100M}
  configs = {name: configs[name] for name in args.models}
  load, compute = work.LOADS["100m"], Compute(scan_layers=args.scan)
  report = compare.compare(configs, load, compute, args.repeats)
  print(small_table(report))
  about = {"size": args.size, "device": measure.processor()}
  about |= {"versions": measure.versions(), "load": dataclasses.asdict(load)}
  about["busy"] = busy
  return about | report


def _train(args) -> dict[str, Any]:
  """The training step on the CPU, printed; returns what `--json` writes."""
  jax.config.update("jax_platforms", "cpu")
  if busy := measure.busy():
    print(busy, flush=True)
  spec = f"{_ROOT / 'configs' / 'pretrain.py'}:tiny"
  cfg, arch = configure.parse(configure.read(spec), spec)
  report = training.compare(cfg, arch, args.repeats)
  print(training.table(report))
  about = {"size": "tiny", "device": measure.processor(), "busy": busy}
  return about | {"versions": measure.versions()} | report


def _grpo(args) -> dict[str, Any]:
  """A step of reinforcement learning by part, printed."""
  jax.config.update("jax_platforms", "cpu")
  if busy := measure.busy():
    print(busy, flush=True)
  config, decoder = (
    configure.read(f"{_ROOT / 'configs' / name}.py:tiny")
    for name in ("grpo", "decoder")
  )
  report = grpo.compare(config, args.repeats, decoder.options.text_len)
  print(grpo.table(report))
  about = {"size": "tiny", "device": measure.processor(), "busy": busy}
  return about | {"versions": measure.versions()} | report


def small_table(report: dict[str, Any]) -> str:
  """The comparison, with a line above it about what was compared."""
  counts = report["parameters"]
  sizes = ", ".join(f"{name} {n / 1e6:.1f}M" for name, n in counts.items())
  lines = [f"float32 parameters: {sizes}; largest difference as a share of the"]
  lines += ["largest value; ratio is JAX / PyTorch, above 1 JAX is faster"]
  if report["absent"]:
    lines.append(f"not installed: {', '.join(report['absent'])}")
  rows = []
  for figure, entry in report["figures"].items():
    difference = entry["difference"]
    rows.append(
      [
        figure,
        measure.number(entry.get("jax")),
        measure.number(entry.get("torch")),
        measure.number(entry.get("ratio")),
        "-" if difference is None else f"{difference:.0e}",
      ]
    )
  header = ["", "JAX", "PyTorch", "ratio", "difference"]
  return "\n".join([*lines, measure.table(header, rows)])


def _full(args) -> dict[str, Any]:
  """The parts one after the other, printed; returns what `--json` writes."""
  # Fails before the first part.
  load_architecture(f"{args.config}:{args.size}")
  load = work.LOADS[args.size]
  parts = {}
  for model in args.models:
    for framework in ("jax", "torch"):
      parts[f"{model} {framework}"] = found = _run_part(args, model, framework)
      if "refused" in found:
        raise InputError(found["refused"])
  named = [p["device"] for p in parts.values() if "device" in p]
  device = named[0] if named else "unknown device"
  peak = roofline.peak(device, args.bandwidth, args.flops)
  print(full_table(parts, load, peak))
  return {
    "size": args.size,
    "device": device,
    "versions": measure.versions(),
    "load": dataclasses.asdict(load),
    "scan_layers": args.scan,
    "peak": dataclasses.asdict(peak),
    "parts": parts,
  }


def _run_part(args, model, framework) -> dict[str, Any]:
  """Results of one part (see `part.run`), run in its own process."""
  env = os.environ | {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "PYTHONPATH": os.pathsep.join(
      filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])
    ),
  }
  env.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / "results.json"
    task = part.Task(
      model=model,
      framework=framework,
      config=args.config,
      size=args.size,
      gpu=args.size != "tiny",
      scan=args.scan,
      repeats=args.repeats,
      out=str(out),
    )
    done = subprocess.run(
      part.command(task), env=env, stdout=subprocess.DEVNULL
    )
    found = json.loads(out.read_text()) if out.exists() else {"figures": {}}
  if done.returncode:  # killed, so it could not say why
    found["failed"] = f"exit status {done.returncode}"
  return found


def full_table(
  parts: dict[str, Any], load: work.Load, peak: roofline.Peak
) -> str:
  """All figures of both frameworks with their share of the peak."""
  sizes = ", ".join(
    f"{name} {found['parameters'] / 1e9:.3g}B"
    for name, found in parts.items()
    if "parameters" in found
  )
  lines = [f"{part.DTYPE} parameters: {sizes}; peak {peak.source};"]
  lines += ["ratio is of speeds, JAX / PyTorch; share is of the peak: decoding"]
  lines += ["of the bandwidth, denoising of the arithmetic"]
  rows = []
  for model, figures in load.figures().items():
    if f"{model} jax" not in parts:
      continue
    pair = [parts[f"{model} {framework}"] for framework in ("jax", "torch")]
    for figure in figures:
      speeds = [found["figures"].get(figure) for found in pair]
      needs = pair[0].get("needs", {}).get(figure)
      rate = peak.flops if figure == load.denoise else peak.bandwidth
      shares = [_share(speed, needs, rate) for speed in speeds]
      rows.append([figure, *_pair(speeds), *shares])
      if figure == load.denoise:
        seconds = [speed and 1 / speed for speed in speeds]
        shown = map(measure.number, seconds)
        rows.append([figure.replace("steps/s", "s/step"), *shown, "", "", ""])
    gib = [found.get("memory") for found in pair]
    gib = [size and size / 2**30 for size in gib]
    name = f"{model} peak memory, GiB"
    rows.append([name, *map(measure.number, gib), "", "", ""])
  header = ["", "JAX", "PyTorch", "ratio", "JAX share", "PyTorch share"]
  lines.append(measure.table(header, rows))
  for name, found in parts.items():
    lines += [
      f"{name} {word}: {found[word]}"
      for word in ("absent", "failed")
      if word in found
    ]
  return "\n".join(lines)


def _pair(speeds):
  """Both numbers and their ratio."""
  ratio = speeds[0] / speeds[1] if all(speeds) else None
  return [*map(measure.number, speeds), measure.number(ratio)]


def _share(speed, needs, rate) -> str:
  """Share of a peak rate that is in use; `needs` is a unit of the figure's."""
  if not (speed and needs and rate):
    return "-"
  return f"{100 * speed * needs / rate:.1f} %"
