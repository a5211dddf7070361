"""`xomni recipe`: the tiny model that ships, from nothing.

Runs every stage with its tiny config, each as a process of its own, and puts
what they leave together. A stage that is done is not run again, and one that
was stopped goes on from its newest checkpoint.
"""

import argparse
import json
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

from xomni_jax.errors import InputError, RunError
from xomni_jax.inference import shipped

_CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
_LOG = "recipe.log"
# Of images that become codes, of each level: {split: (whole, quick)}.
_CODES = {
  "signs": {"train": (20_000, 1_200), "held-out": (1_000, 100)},
  "posters": {"train": (10_000, 300), "held-out": (500, 50)},
}
_SHARD = 1024
# Where a stage starts: {setting: what another stage left}.
_STARTS = {
  "vae": {},
  "tokenizer": {},
  "decoder": {"model": "tokenizer/model", "flux": "vae/model"},
  "pretrain": {"model": "decoder/model"},
  "sft": {"model": "pretrain/model"},
  "grpo": {"model": "sft/model", "flux": "decoder/flux1"},
}
# {stage: settings} that make it a try of about a minute.
_QUICK = {
  "vae": (
    "phases.1_crops.steps=280",
    "phases.2_whole.steps=20",
    "phases.2_whole.warmup_steps=0",
  ),
  "tokenizer": (
    # Posters take longer: of them it only sees that they go through.
    "phases.1_signs.steps=340",
    "phases.2_all.steps=10",
    "phases.2_all.warmup_steps=5",
    "eval_data.sources=({'path': 'world:signs:held-out', 'task': 'image'},)",
    "options.quantise_from=150",
    "options.revive_until=300",
  ),
  "pretrain": (
    "phases.1_vision.steps=30",
    "phases.2_read.steps=20",
    "phases.3_draw.steps=100",
    "phases.4_all.steps=30",
    "phases.5_anneal.steps=30",
  ),
  "sft": ("phases.1_answer.steps=10", "phases.2_all.steps=30"),
  "decoder": ("phases.1_all.steps=180",),
  "grpo": ("phases.1_all.steps=2", "phases.1_all.warmup_steps=0"),
}
_RL = ("grpo",)  # what --base leaves to be trained
_CONTROL_SEED = 1000  # added: other records, in another order, than before
_POLL = 0.5  # s
_SAY = 30.0  # s between lines where there is no terminal


class Job(NamedTuple):
  """A process of the recipe.

  Attributes:
    name: of it.
    argv: arguments of `xomni`.
    leaves: what is under runs/ when it is done.
  """

  name: str
  argv: tuple[str, ...]
  leaves: str


def main(argv: list[str]) -> int:
  """Runs what is not done yet; returns the exit status.

  Raises:
    InputError: bad arguments, or no configs to go by.
    RunError: a stage failed.
  """
  parser = argparse.ArgumentParser(
    prog="xomni recipe",
    description="Train the tiny model that ships: autoencoder, tokenizer, "
    "pretraining, fine-tuning, diffusion decoder, reinforcement learning. "
    "What was stopped goes on by the same command.",
  )
  parser.add_argument(
    "--out", default=".", help="folder in which runs/ gets a folder a stage"
  )
  parser.add_argument(
    "--quick", action="store_true", help="minutes: to see that all of it runs"
  )
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--control",
    action="store_true",
    help="at the end also fine-tune on for as long as reinforcement learning "
    "took: what that is compared with",
  )
  parser.add_argument(
    "--base",
    metavar="RUNS",
    help="runs/ of a recipe that is done: its models before reinforcement "
    "learning are taken, and only what comes after is trained",
  )
  args = parser.parse_args(argv)
  if not _CONFIGS.is_dir():
    raise InputError(
      f"{_CONFIGS}: no such folder; run the recipe from a clone of the "
      "repository, whose configs/ it follows"
    )
  out = pathlib.Path(args.out).resolve()
  base = pathlib.Path(args.base).resolve() if args.base else out / "runs"
  if args.base:
    _check_base(base)
  (out / "runs").mkdir(parents=True, exist_ok=True)
  codes = out / "runs" / "codes"
  if args.base and not codes.exists():
    codes.symlink_to(base / "codes")  # which configs name as runs/codes
  # A stop asked for politely reaches the stage, which saves.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  start = time.monotonic()
  todo = jobs(args.quick, args.seed, base if args.base else None)
  count = len(todo) + args.control
  for i, job in enumerate(todo, 1):
    if not (out / "runs" / job.leaves).exists():
      run(job, out, f"[{i}/{count}]", start)
  made = out / "runs" / "tiny"
  if not made.exists():
    assemble(base, out / "runs" / "grpo" / "model", made)
  if args.control and not (out / "runs" / "control" / "model").exists():
    job = _control(base, out / "runs" / "grpo", args.seed)
    run(job, out, f"[{count}/{count}]", start)
  minutes, seconds = divmod(round(time.monotonic() - start), 60)
  print(f"{made}: the model; {minutes} min {seconds:02d} s")
  return 0


def _check_base(base):
  """Raises InputError where what comes after has nothing to start from."""
  for left in ("codes", *_STARTS["grpo"].values()):
    if not (base / left).is_dir():
      raise InputError(
        f"--base {base} has no {left}, expected the runs/ of a recipe that is "
        "done as far as reinforcement learning; let `xomni recipe` make it"
      )


def jobs(quick: bool, seed: int, base: pathlib.Path | None = None) -> list[Job]:
  """What is run, in order.

  Args:
    base: runs/ whose models before reinforcement learning are taken.
  """
  if base:
    return [_stage(stage, quick, seed, base) for stage in _RL]
  found = []
  for stage in _STARTS:
    if stage == "pretrain":
      found += [
        _codes(level, split, counts[quick])
        for level, splits in _CODES.items()
        for split, counts in splits.items()
      ]
    found.append(_stage(stage, quick, seed))
  return found


def _codes(level: str, split: str, count: int) -> Job:
  out = f"codes/{level}/{split}"
  shards = -(-count // _SHARD)
  return Job(
    f"codes of {level}, {split}",
    ("tokenize-dataset", "--model", "runs/tokenizer/model",
     "--source", f"world:{level}:{split}", "--count", str(count),
     "--shard-size", str(_SHARD), "--out", f"runs/{out}"),
    # Shards are made in order, each whole or not at all.
    f"{out}/codes-{shards - 1:05d}-of-{shards:05d}.array_record",
  )  # fmt: skip


def _control(base: pathlib.Path, rl: pathlib.Path, seed: int) -> Job:
  """Fine-tuning that goes on for as long as reinforcement learning took.

  The time of both is that of their steps, of GRPO's with drawing, painting and
  rewards in it. The rate falls over the whole of it, as in the stage `sft`.

  Args:
    base: runs/ with the models that both start from.
    rl: reinforcement learning's run.
  """
  step = statistics.median(_step_seconds(base / "sft"))
  steps = max(1, round(sum(_step_seconds(rl)) / step))
  job = _stage("sft", False, seed + _CONTROL_SEED)
  return Job(
    "control",
    (
      *(a for a in job.argv if "workdir" not in a and "init.model" not in a),
      "--workdir=runs/control",
      f"--config.init.model={base}/sft/model",
      # Drawing is compared, not answering; a phase has a step at least.
      "--config.phases.1_answer.steps=1",
      "--config.phases.1_answer.warmup_steps=0",
      f"--config.phases.2_all.steps={steps}",
    ),
    "control/model",
  )


def _step_seconds(run: pathlib.Path) -> list[float]:
  """Of each step of a run; those between two lines of its log are alike."""
  found, before = [], 0
  for line in (run / "metrics.jsonl").read_text().splitlines():
    row = json.loads(line)
    if "time/step_seconds" in row:
      found += [row["time/step_seconds"]] * (row["step"] - before)
      before = row["step"]
  return found


def _stage(
  stage: str, quick: bool, seed: int, base: pathlib.Path | str = "runs"
) -> Job:
  settings = [f"init.{n}={base}/{left}" for n, left in _STARTS[stage].items()]
  settings.append(f"seed={seed}")
  if quick:
    steps = [s for s in _QUICK[stage] if ".steps=" in s]
    total = sum(int(s.rpartition("=")[2]) for s in steps)
    settings += _QUICK[stage]
    settings += [
      f"{name}={total}"
      for name in (
        "report.eval_every",
        "report.preview_every",
        "checkpoint.every",
      )
    ]
  return Job(
    stage,
    (
      "train",
      f"--config={_CONFIGS}/{stage}.py:tiny",
      f"--workdir=runs/{stage}",
      *(f"--config.{setting}" for setting in settings),
    ),
    f"{stage}/model",
  )


def run(job: Job, out: pathlib.Path, label: str, start: float) -> None:
  """Runs a job in a folder and shows how far it is.

  Raises:
    RunError: it failed; what it said is in the log.
  """
  log = out / "runs" / _LOG
  with log.open("ab") as file:
    file.write(f"\n{label} {job.name}\n".encode())
    file.flush()
    seen = file.tell()
    command = [sys.executable, "-m", "xomni_jax", *job.argv]
    child = subprocess.Popen(command, cwd=out, stdout=file, stderr=file)
    try:
      _watch(child, log, seen, f"{label} {job.name}", start)
    finally:
      # An interrupt or SIGTERM: training saves before it ends.
      if child.poll() is None:
        child.terminate()
        child.wait()
  if child.returncode:
    raise RunError(
      f"{job.name} failed (exit status {child.returncode}): "
      f"{_last_line(log, seen)}; all of it is in {log}"
    )


def _watch(child, log, seen, label, start):
  """Shows the last line of the log until the child ends."""
  live, said = sys.stderr.isatty(), 0.0
  while child.poll() is None:
    time.sleep(_POLL)
    now = time.monotonic()
    if not live and now - said < _SAY:
      continue
    said = now
    minutes, seconds = divmod(int(now - start), 60)
    line = f"{label}, {minutes}:{seconds:02d}: {_last_line(log, seen)}"
    if live:
      width = shutil.get_terminal_size().columns - 1
      print(f"\r{line[:width]:<{width}}", end="", file=sys.stderr, flush=True)
    else:
      print(line, file=sys.stderr, flush=True)
  if live:
    print(file=sys.stderr)


def _last_line(log, seen):
  """The last line that a job wrote, or of a progress bar its last state."""
  with log.open("rb") as file:
    end = file.seek(0, 2)
    file.seek(max(seen, end - 2000))
    text = file.read().decode("utf-8", "replace")
  lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
  return next((line for line in reversed(lines) if line), "starting")


def assemble(
  runs: pathlib.Path, model: pathlib.Path, out: pathlib.Path
) -> None:
  """Puts what the stages left together, as the package has it, in bfloat16.

  Args:
    runs: folder of the stages' folders.
    model: what reinforcement learning left.
    out: a new folder; see inference/shipped.py.
  """
  from xomni_jax.checkpoints import released
  from xomni_jax.inference import checkpoint, flux1, fresh
  from xomni_jax.mesh import make_mesh

  dtype, mesh = "bfloat16", make_mesh()
  opened = flux1.open_flux1(runs / "decoder" / "flux1")
  parts = {
    name: released.load(part, mesh, "float32")
    for name, part in flux1.parts_of(opened).items()
  }
  before = checkpoint.open_checkpoint(runs / "sft" / "model")
  with released.staged(out) as folder:
    checkpoint.export(model, folder / shipped.MODEL, dtype, "safetensors")
    fresh.replace_flux1(
      opened.folder, folder / shipped.FLUX1, parts, dtype=dtype
    )
    (folder / shipped.SFT).mkdir()
    released.write_safetensors(
      folder / shipped.SFT,
      checkpoint.STEM,
      released.read_tensors(before.parts["ar"], dtype),
    )
