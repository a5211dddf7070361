"""`xomni recipe`: the tiny model that ships, from nothing.

Runs every stage with its tiny config, each as a process of its own, and puts
what they leave together. A stage that is done is not run again, and one that
was stopped goes on from its newest checkpoint.
"""

import pathlib
import signal
import sys
import time

from xomni_jax.errors import ArgumentParser, InputError
from xomni_jax.inference import shipped
from xomni_jax.recipe import jobs, running
from xomni_jax.recipe.jobs import CONFIGS, SHIPPED, STARTS, Wanted


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
    f"{SHIPPED}: those that ship",
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
  if args.base == "":
    raise InputError(
      "--base is empty, expected the runs/ of a recipe that is done, or "
      f"{SHIPPED}"
    )
  if not 0 <= args.seed < 2**31:
    raise InputError(f"--seed is {args.seed}, expected 0 to 2^31 - 1")
  if not CONFIGS.is_dir():
    raise InputError(
      f"{CONFIGS}: no such folder; run the recipe from a clone of the "
      "repository, whose configs/ it follows"
    )
  out = pathlib.Path(args.out).resolve()
  runs = out / "runs"
  base = args.base
  if base and base != SHIPPED:
    base = pathlib.Path(base).resolve()
    _check_base(base, runs)
  wanted = Wanted(args.quick, args.seed, base, args.rl_steps)
  with running.claim(runs, wanted) as log:
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
  todo = jobs.in_order(wanted, control)
  count = len(todo) + control
  for i, job in enumerate(todo, 1):
    if not (runs / job.leaves).exists():
      running.run(job, out, log, f"[{i}/{count}]", start)
  made = runs / "tiny"
  if not made.exists():
    before = [jobs.left_by(wanted, runs, of) for of in STARTS["grpo"].values()]
    assemble(*before, runs / "grpo" / "model", made)
  if control and not (runs / "control" / "model").exists():
    job = jobs.control(wanted, runs)
    running.run(job, out, log, f"[{count}/{count}]", start)
  minutes, seconds = divmod(round(time.monotonic() - start), 60)
  print(f"{made}: the model; {minutes} min {seconds:02d} s")


def _check_base(base, runs):
  """Raises InputError where what comes after has nothing to start from."""
  if base == runs:
    raise InputError(
      f"--base {base} is what this recipe writes to; name another --out"
    )
  for left in ("codes", *STARTS["grpo"].values()):
    if not (base / left).exists():
      raise InputError(
        f"--base {base} has no {left}, expected the runs/ of a recipe that is "
        "done as far as reinforcement learning; let `xomni recipe` make it"
      )


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
