"""`xomni train`: from a command line to a run."""

import argparse
import contextlib
import pathlib
import re
import socket
import time

import jax

from xomni_jax import checks, cpu
from xomni_jax.errors import ArgumentParser, InputError
from xomni_jax.training import build, configure, loop, workdir

_PATIENCE = 300.0  # seconds in which process 0 has to start, as JAX has it


def main(argv: list[str]) -> int:
  """Trains what a config says.

  Returns:
    exit status: 0 when the run is done, 143 when it was stopped and saved.
  Raises:
    InputError: bad arguments, config, data or checkpoints, or another run in
      the folder.
    RunError: the loss is no longer finite, or too many scores failed.
  """
  args, changes = _parse(argv)
  if args.cpu_devices is not None:
    cpu.split(args.cpu_devices)
    cpu.keep_memory()
  connect(args.distributed)
  config = configure.read(args.config)
  configure.override(config, changes)
  cfg, arch = configure.parse(config, f"config {args.config}")
  is_main = jax.process_index() == 0
  with checks.alone(args.workdir) if is_main else contextlib.nullcontext():
    workdir.check(args.workdir, cfg)
    return loop.train(
      cfg,
      build.stage(cfg, arch, config, args.workdir),
      args.workdir,
      settings=config.to_dict(),
      resume=args.resume,
      allow_config_change=args.allow_config_change,
    )


def _parse(argv):
  parser = ArgumentParser(
    prog="xomni train",
    description="Train a stage. Settings of the config are changed by "
    "--config.SECTION.NAME=VALUE.",
  )
  add = parser.add_argument
  add("--config", required=True, metavar="FILE[:SIZE]")
  add("--workdir", required=True, metavar="DIR", type=_folder)
  add(
    "--resume",
    action=argparse.BooleanOptionalAction,
    default=True,
    help="go on from the newest good checkpoint (the default)",
  )
  add(
    "--allow-config-change",
    action="store_true",
    help="go on though the config is another than the run began with",
  )
  add(
    "--distributed",
    metavar="auto|HOST:PORT,COUNT,INDEX",
    help="one of several processes: as TPU pods, GKE or Slurm tell it, or by "
    "the address of process 0, their number and this one's",
  )
  add(
    "--cpu-devices",
    metavar="auto|N",
    help="devices that a CPU is split into, which share the batch: a tiny "
    "model hardly trains faster on several cores, and twice as fast on two "
    "devices; auto: one a core, a power of two, at most 8",
  )
  # Before argparse, which would read --config.x as an abbreviation.
  mark = "--config."
  changes = [a.removeprefix(mark) for a in argv if a.startswith(mark)]
  rest = [a for a in argv if not a.startswith(mark)]
  return parser.parse_args(rest), changes


def _folder(name):
  if "://" in name:  # pathlib would make folders of it here, "gs:" the first
    raise argparse.ArgumentTypeError(
      f"{name} is a URL, expected a folder; mount the bucket and name its "
      "folder, such as /mnt/runs"
    )
  return pathlib.Path(name)


def connect(how: str | None) -> None:
  """Joins the processes of a run; None: there is one alone.

  Raises:
    InputError: `how` is neither "auto" nor "HOST:PORT,COUNT,INDEX", or there
      is no process 0 at that address.
  """
  if how is None:
    return
  # Of CPU processes; elsewhere it is not looked at.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  found = re.fullmatch(r"([^,]+:[0-9]+),([0-9]+),([0-9]+)", how)
  if how != "auto" and not (found and int(found[3]) < int(found[2])):
    raise InputError(
      f"--distributed {how!r}: expected auto or HOST:PORT,COUNT,INDEX, such as "
      "10.0.0.2:1234,4,0, with an index from 0 to count - 1"
    )
  if found:
    _check_address(found[1], int(found[3]))
  try:
    if found:
      jax.distributed.initialize(found[1], int(found[2]), int(found[3]))
    else:
      jax.distributed.initialize()
  except ValueError as e:
    raise InputError(
      f"--distributed {how!r}: {' '.join(str(e).split())[:200]}; name "
      "HOST:PORT,COUNT,INDEX where nothing else tells of the processes"
    ) from None


def _check_address(address, index):
  """InputError where JAX would end the process, at best with a stack trace."""
  host, _, port = address.rpartition(":")
  if int(port) > 65535:
    raise InputError(f"--distributed: port is {port}, expected at most 65535")
  if index == 0:
    with socket.socket() as s:
      # What an earlier run's connections hold for a while is free to JAX.
      s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      try:
        s.bind(("", int(port)))
      except OSError as e:
        raise InputError(
          f"--distributed: port {port} can't be used ({e.strerror}); stop what "
          "uses it, or name another in all processes"
        ) from None
    return
  end = time.monotonic() + _PATIENCE
  while True:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
      return
    except OSError as e:
      if time.monotonic() >= end:
        raise InputError(
          f"--distributed: no process 0 at {address} in {_PATIENCE:.0f} s "
          f"({e.strerror or e}); start it there, or name where it is"
        ) from None
    time.sleep(0.2)
