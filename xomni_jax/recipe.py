"""`xomni recipe`: the tiny model that ships, from nothing.

Runs every stage with its tiny config, each as a process of its own, and puts
what they leave together. A stage that is done is not run again, and one that
was stopped goes on from its newest checkpoint.
"""

import contextlib
import fcntl
import json
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time
from typing import IO, NamedTuple

from xomni_jax.errors import ArgumentParser, InputError, RunError
from xomni_jax.inference import shipped

_CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
_LOG, _ASKED = "recipe.log", "recipe.json"
# Of images that become codes, of each level: {split: (whole, quick)}.
_CODES = {
  "signs": {"train": (20_000, 2_000), "validation": (1_000, 100)},
  "posters": {"train": (10_000, 300), "validation": (500, 50)},
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
# {stage: settings} that make it a try of half a minute: losses fall, no more.
# Signs alone: programs are compiled for one size.
_SIGNS = "{}.sources=({{'path': 'world:signs:{}', 'task': '{}'}},)"
_QUICK_DATA = (
  _SIGNS.format("data", "train", "image"),
  _SIGNS.format("eval_data", "validation", "image"),
)
_QUICK = {
  "vae": (
    *_QUICK_DATA,
    "phases.1_crops.steps=130",
    "phases.2_whole.steps=10",
    "phases.2_whole.warmup_steps=0",
  ),
  "tokenizer": (
    *_QUICK_DATA,
    "phases.1_signs.steps=140",
    "phases.2_all.steps=20",
    "phases.2_all.warmup_steps=5",
    "options.quantise_from=90",
    "options.revive_until=130",
  ),
  "decoder": (*_QUICK_DATA, "phases.1_all.steps=80"),
  "pretrain": (
    "phases.1_vision.steps=20",
    "phases.2_read.steps=10",
    "phases.2_read.warmup_steps=5",
    "phases.3_draw.steps=60",
    "phases.4_all.steps=20",
    "phases.5_anneal.steps=10",
  ),
  "sft": (
    "phases.1_answer.steps=10",
    "phases.1_answer.warmup_steps=0",
    "phases.2_all.steps=20",
  ),
  "grpo": (
    _SIGNS.format("data", "train", "prompt"),
    _SIGNS.format("eval_data", "validation", "prompt"),
    "options.sizes=((96, 96),)",
    "options.prompt_len=32",
    "phases.1_all.steps=2",
    "phases.1_all.warmup_steps=0",
  ),
}
_RL = ("grpo",)  # what --base leaves to be trained
SHIPPED = shipped.NAMES[1]  # the --base that comes with the package
_TIMED = 60  # steps of fine-tuning that tell how long one takes
_CONTROL_SEED = 1000  # added: other records, in another order, than before
_POLL, _PATIENCE = 0.5, 10.0  # s
_SAY = 30.0  # s between lines where there is no terminal


class Wanted(NamedTuple):
  """Which recipe: what a folder of runs is of.

  Attributes:
    quick: minutes, to see that all of it runs.
    seed: of every stage.
    base: runs/ whose models before reinforcement learning are taken; SHIPPED:
      those of the package; None: they are made here.
    rl_steps: of reinforcement learning; None: as its config says.
  """

  quick: bool = False
  seed: int = 0
  base: pathlib.Path | str | None = None
  rl_steps: int | None = None


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
  parser = ArgumentParser(
    prog="xomni recipe",
    description="Train the tiny model that ships: autoencoder, tokenizer, "
    "diffusion decoder, pretraining, fine-tuning, reinforcement learning. "
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
    "learning are taken, and only what comes after is trained; "
    f"{SHIPPED}: the model that ships",
  )
  parser.add_argument(
    "--rl-steps",
    type=int,
    metavar="N",
    help="of reinforcement learning, instead of those of its config",
  )
  args = parser.parse_args(argv)
  if args.rl_steps is not None and args.rl_steps < 1:
    raise InputError(f"--rl-steps is {args.rl_steps}, expected 1 or more")
  if not _CONFIGS.is_dir():
    raise InputError(
      f"{_CONFIGS}: no such folder; run the recipe from a clone of the "
      "repository, whose configs/ it follows"
    )
  out = pathlib.Path(args.out).resolve()
  runs = out / "runs"
  base = args.base
  if base and base != SHIPPED:
    base = pathlib.Path(base).resolve()
    _check_base(base, runs)
  wanted = Wanted(args.quick, args.seed, base, args.rl_steps)
  with _claim(runs, wanted) as log:
    if base and base != SHIPPED and not (runs / "codes").is_symlink():
      # Which configs name as runs/codes.
      (runs / "codes").symlink_to(base / "codes")
    _run_all(wanted, args.control, out, log)
  return 0


def _run_all(wanted, control, out, log):
  """All jobs that are not done yet."""
  # A stop asked for politely reaches the stage, which saves.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  start = time.monotonic()
  runs = out / "runs"
  todo = jobs(wanted, control)
  count = len(todo) + control
  for i, job in enumerate(todo, 1):
    if not (runs / job.leaves).exists():
      run(job, out, log, f"[{i}/{count}]", start)
  made = runs / "tiny"
  if not made.exists():
    before = [_left(wanted, runs, of) for of in _STARTS["grpo"].values()]
    assemble(*before, runs / "grpo" / "model", made)
  if control and not (runs / "control" / "model").exists():
    job = _control(wanted, runs)
    run(job, out, log, f"[{count}/{count}]", start)
  minutes, seconds = divmod(round(time.monotonic() - start), 60)
  print(f"{made}: the model; {minutes} min {seconds:02d} s")


def _check_base(base, runs):
  """Raises InputError where what comes after has nothing to start from."""
  if base == runs:
    raise InputError(
      f"--base {base} is what this recipe writes to; name another --out"
    )
  for left in ("codes", "sft/metrics.jsonl", *_STARTS["grpo"].values()):
    if not (base / left).exists():
      raise InputError(
        f"--base {base} has no {left}, expected the runs/ of a recipe that is "
        "done as far as reinforcement learning; let `xomni recipe` make it"
      )


@contextlib.contextmanager
def _claim(runs: pathlib.Path, wanted: Wanted):
  """Makes the folder of runs ours, for what is wanted; yields its log.

  Raises:
    InputError: it holds what something else made, or a process still writes.
  """
  ours = json.loads(json.dumps(wanted._asdict(), default=str))
  path = runs / _ASKED
  there = json.loads(path.read_text()) if path.exists() else None
  names = {job.leaves.split("/")[0] for job in jobs(Wanted())}
  if there is None and any((runs / name).exists() for name in names):
    raise InputError(
      f"{runs} holds runs that no recipe made; name another --out"
    )
  if there not in (None, ours):
    raise InputError(
      f"{runs} holds the recipe of {json.dumps(there)}, not of "
      f"{json.dumps(ours)}; name another --out"
    )
  runs.mkdir(parents=True, exist_ok=True)
  with (runs / _LOG).open("ab") as log:
    # Jobs inherit it: a recipe killed alone leaves its stage running.
    if not _lock(log):
      raise InputError(
        f"{runs} is being written to by another recipe, or by a stage that one "
        "left running; wait for it or stop it"
      )
    if there is None:
      path.write_text(json.dumps(ours) + "\n")
    yield log


def _lock(file: IO[bytes]) -> bool:
  """Whether nobody else has it, or soon gives it up: a stage that is killed
  lives on for a moment."""
  end = time.monotonic() + _PATIENCE
  while True:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      if time.monotonic() > end:
        return False
      time.sleep(_POLL)
    else:
      return True


def jobs(wanted: Wanted, control: bool = False) -> list[Job]:
  """What is run, in order, up to the model after reinforcement learning.

  Args:
    control: what the control needs besides is made too.
  """
  if wanted.base:
    found = [_stage(stage, wanted) for stage in _RL]
    if control and wanted.base == SHIPPED:
      found += [*_codes(wanted, SHIPPED), _timing(wanted)]
    return found
  found = []
  for stage in _STARTS:
    if stage == "pretrain":
      found += _codes(wanted, "runs/tokenizer/model")
    found.append(_stage(stage, wanted))
  return found


def _codes(wanted: Wanted, model: str) -> list[Job]:
  """Images of the drawn world as codes of a model."""
  return [
    _codes_of(level, split, counts[wanted.quick], model)
    for level, splits in _CODES.items()
    for split, counts in splits.items()
  ]


def _codes_of(level, split, count, model):
  out = f"codes/{level}/{split}"
  shards = -(-count // _SHARD)
  return Job(
    f"codes of {level}, {split}",
    ("tokenize-dataset", "--model", model,
     "--source", f"world:{level}:{split}", "--count", str(count),
     "--shard-size", str(_SHARD), "--out", f"runs/{out}"),
    # Shards are made in order, each whole or not at all.
    f"{out}/codes-{shards - 1:05d}-of-{shards:05d}.array_record",
  )  # fmt: skip


def _timing(wanted: Wanted) -> Job:
  """A little fine-tuning, where nobody knows how long its steps take."""
  job = _stage("sft", wanted._replace(quick=False))
  return _tuning(job, "timing", SHIPPED, _TIMED)


def _control(wanted: Wanted, runs: pathlib.Path) -> Job:
  """Fine-tuning that goes on for as long as reinforcement learning took.

  The time of both is that of their steps, of GRPO's with drawing, painting and
  rewards in it. The rate falls over the whole of it, as in the stage `sft`.

  Args:
    wanted: the recipe; both start from the same model.
    runs: folder of its runs.
  """
  timed = runs / "timing"
  if wanted.base != SHIPPED:
    timed = pathlib.Path(wanted.base or runs) / "sft"
  each = statistics.median(_step_seconds(timed))
  all_ = _step_seconds(runs / "grpo")
  # Medians leave compilation out.
  steps = max(1, round(len(all_) * statistics.median(all_) / each))
  job = _stage("sft", Wanted(seed=wanted.seed + _CONTROL_SEED))
  return _tuning(job, "control", _left(wanted, runs, "sft/model"), steps)


def _tuning(job: Job, name: str, model: str | pathlib.Path, steps: int) -> Job:
  """The stage `sft` from another model, for so many steps."""
  return Job(
    name,
    (
      *(a for a in job.argv if "workdir" not in a and "init.model" not in a),
      f"--workdir=runs/{name}",
      f"--config.init.model={model}",
      # Drawing is compared, not answering; a phase has a step at least.
      "--config.phases.1_answer.steps=1",
      "--config.phases.1_answer.warmup_steps=0",
      f"--config.phases.2_all.steps={steps}",
    ),
    f"{name}/model",
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


def _stage(stage: str, wanted: Wanted) -> Job:
  settings = [
    f"init.{name}={_left(wanted, pathlib.Path('runs'), left)}"
    for name, left in _STARTS[stage].items()
  ]
  settings.append(f"seed={wanted.seed}")
  if wanted.quick:
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
  if stage in _RL and wanted.rl_steps:
    settings.append(f"phases.1_all.steps={wanted.rl_steps}")
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


def _left(wanted: Wanted, runs: pathlib.Path, left: str) -> pathlib.Path | str:
  """What a stage before reinforcement learning left, or the package has."""
  if wanted.base == SHIPPED:
    return SHIPPED
  return pathlib.Path(wanted.base or runs) / left


def run(
  job: Job, out: pathlib.Path, log: IO[bytes], label: str, start: float
) -> None:
  """Runs a job in a folder and shows how far it is.

  Args:
    log: open for more; what the job says.
    label: of the lines that are shown.
    start: time.monotonic() of the recipe.
  Raises:
    RunError: it failed; what it said is in the log.
  """
  path = pathlib.Path(log.name)
  log.write(f"\n{label} {job.name}\n".encode())
  log.flush()
  seen = log.seek(0, 2)
  command = [sys.executable, "-m", "xomni_jax", *job.argv]
  child = subprocess.Popen(command, cwd=out, stdout=log, stderr=log)
  try:
    _watch(child, path, seen, f"{label} {job.name}", start)
  finally:
    # An interrupt or SIGTERM: training saves before it ends.
    if child.poll() is None:
      child.terminate()
      child.wait()
  if child.returncode:
    raise RunError(
      f"{job.name} failed (exit status {child.returncode}): "
      f"{_last_line(path, seen)}; all of it is in {path}"
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
  sft: pathlib.Path | str,
  flux: pathlib.Path | str,
  model: pathlib.Path,
  out: pathlib.Path,
) -> None:
  """Puts what the stages left together, as the package has it, in bfloat16.

  Args:
    sft: the model before reinforcement learning.
    flux: the decoder's FLUX.1-dev folder.
    model: what reinforcement learning left.
    out: a new folder; see inference/shipped.py.
  """
  from xomni_jax.checkpoints import released
  from xomni_jax.inference import checkpoint, flux1, fresh
  from xomni_jax.mesh import make_mesh

  dtype, mesh = "bfloat16", make_mesh()
  opened = flux1.open_flux1(flux)
  parts = {
    name: released.load(part, mesh, "float32")
    for name, part in flux1.parts_of(opened).items()
  }
  before = checkpoint.open_checkpoint(sft)
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
