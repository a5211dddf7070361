"""`xomni plan`: compiles for hardware that is not there, and says what fits.

XLA's TPU compiler comes with libtpu and needs no TPU: programs are lowered for
the devices of a named slice, with abstract arrays that carry the shardings the
real ones would have, and the compiled program tells its bytes per device.
"""

import argparse
import dataclasses
import json
import pathlib

import jax

from xomni_jax import checks
from xomni_jax.config_files import load_architecture
from xomni_jax.errors import ArgumentParser, InputError
from xomni_jax.plan.compiling import LIBTPU, Plan, Target, mesh_of, open_target
from xomni_jax.plan.inference import plan_decode, plan_flux

__all__ = ["LIBTPU", "Plan", "Target", "main", "mesh_of", "open_target"]


def main(argv: list[str]) -> int:
  """Compiles the programs that are asked for and prints their plans.

  Raises:
    InputError: bad arguments, no libtpu, or a program that does not fit.
  """
  args = _parse(argv)
  if args.json:
    checks.file_to_write("--json", args.json)
  programs = _train(args) if args.program == "train" else _inference(args)
  # Compiled anew whatever a cache holds, so that the seconds are true.
  jax.config.update("jax_enable_compilation_cache", False)
  plans = []
  for compile_it in programs:
    plans.append(compile_it())
    print(plans[-1], flush=True)
  if args.json:
    text = json.dumps([dataclasses.asdict(p) for p in plans], indent=2)
    pathlib.Path(args.json).write_text(text + "\n")
  return 0


def _train(args):
  """A training step, of a config that names a stage."""
  # Here, since it brings all of training along.
  from xomni_jax.plan.rollout import plan_rollout
  from xomni_jax.plan.training import plan_train
  from xomni_jax.training import configure

  if args.config is None:
    raise InputError(
      "--program train needs --config, such as configs/pretrain.py:7b"
    )
  config = configure.read(args.config)
  target = open_target(args.target)
  mesh = mesh_of(target, args.mesh) if args.mesh else None
  programs = [lambda: plan_train(config, target, mesh)]
  if config.get("stage") == "grpo":
    programs += plan_rollout(config, target, mesh)
  return programs


def _inference(args):
  """The programs of inference, of a config that has the sizes of a model."""
  arch = load_architecture(args.config)
  cell = 2 * arch.vae.factor
  if min(args.batch, args.cache) < 1 or args.size < cell or args.size % cell:
    raise InputError(
      f"batch {args.batch}, cache {args.cache} and size {args.size} px: "
      f"expected at least 1, 1 and a multiple of {cell}"
    )
  grid = (args.size // cell, args.size // cell)
  target = open_target(args.target)
  mesh = mesh_of(target, args.mesh) if args.mesh else None
  programs = {
    "decode": lambda: plan_decode(
      arch.ar, target, mesh, batch=args.batch, cache=args.cache
    ),
    "flux": lambda: plan_flux(arch.flux, target, mesh, grid=grid),
  }
  return [
    run for name, run in programs.items() if args.program in (name, "all")
  ]


def _parse(argv):
  parser = ArgumentParser(
    prog="xomni plan",
    description="Compile for TPUs without one; print bytes per device.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add("--config", metavar="FILE[:SIZE]", help="default: configs/model.py:7b")
  add("--target", default="v5e:2x4", help="TPU slice, or cpu:COUNT")
  add("--program", choices=("decode", "flux", "all", "train"), default="all")
  add("--batch", type=int, default=64, help="sequences of a decoding step")
  add("--cache", type=int, default=6000, help="positions of its cache")
  add("--size", type=int, default=1152, help="side of the painted image, px")
  add(
    "--mesh",
    metavar="data=N,fsdp=N,tensor=N",
    help="default: what was measured best; of `train` its config's",
  )
  add("--json", metavar="FILE", help="write the plans there too")
  return parser.parse_args(argv)
