"""Runs jobs as processes of their own, in a folder that is ours alone."""

import contextlib
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import IO

from xomni_jax.checks import lock, make_folder, replacing
from xomni_jax.errors import InputError, RunError
from xomni_jax.recipe import jobs
from xomni_jax.recipe.jobs import Job, Wanted

_LOG, _ASKED = "recipe.log", "recipe.json"
_POLL = 0.5  # s
_SAY = 30.0  # s between lines where there is no terminal


@contextlib.contextmanager
def claim(runs: pathlib.Path, wanted: Wanted):
  """Makes the folder of runs ours, for what is wanted; yields its log.

  Raises:
    InputError: it holds what something else made, or a process still writes.
  """
  make_folder(runs)
  try:
    log = (runs / _LOG).open("ab")
  except OSError as e:
    raise InputError(
      f"{runs} can't be written to ({e.strerror}); name another --out"
    ) from None
  with log:
    # Jobs inherit it: a recipe killed alone leaves its stage running.
    if not lock(log):
      raise InputError(
        f"{runs} is being written to by another recipe, or by a stage that one "
        "left running; wait for it or stop it"
      )
    _check_asked(runs, wanted)
    yield log


def _check_asked(runs, wanted):
  """Keeps what is wanted, or compares it with what was."""
  ours = json.loads(json.dumps(wanted._asdict(), default=str))
  path = runs / _ASKED
  there = _asked(path) if path.exists() else None
  names = {job.leaves.split("/")[0] for job in jobs.in_order(Wanted())}
  if there is None and any((runs / name).exists() for name in names):
    raise InputError(
      f"{runs} holds runs that no recipe made; name another --out"
    )
  if there not in (None, ours):
    raise InputError(
      f"{runs} holds the recipe of {json.dumps(there)}, not of "
      f"{json.dumps(ours)}; name another --out"
    )
  if there is None:
    with replacing(path) as temporary:
      temporary.write_text(json.dumps(ours) + "\n")


def _asked(path):
  try:
    return json.loads(path.read_text("utf-8"))
  except (OSError, ValueError) as e:
    reason = " ".join(str(e).split())[:120]
    raise InputError(
      f"{path} can't be read ({reason}), expected what the recipe was asked "
      "for; name another --out"
    ) from None


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
    how, on = "failed", ""
    if child.returncode in (143, -signal.SIGTERM, -signal.SIGKILL):
      how, on = "was stopped", "; the same command goes on"
    raise RunError(
      f"{job.name} {how} (exit status {child.returncode}): "
      f"{_last_line(path, seen)}; all of it is in {path}{on}"
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
