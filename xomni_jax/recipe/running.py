"""Runs jobs as processes of their own, in a folder that is ours alone."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO, NamedTuple

from xomni_jax.errors import InputError, RunError
from xomni_jax.recipe import jobs
from xomni_jax.recipe.jobs import Job, Wanted

_LOCK, _ASKED, _LOGS = "recipe.lock", "recipe.json", "logs"
_POLL, _PATIENCE = 0.5, 10.0  # s
_SAY = 30.0  # s between lines where there is no terminal


@contextlib.contextmanager
def claim(runs: pathlib.Path, wanted: Wanted):
  """Makes the folder of runs ours, for what is wanted; yields its lock.

  Raises:
    InputError: it holds what something else made, or a process still writes.
  """
  ours = json.loads(json.dumps(wanted._asdict(), default=str))
  path = runs / _ASKED
  there = json.loads(path.read_text()) if path.exists() else None
  whole = [*jobs.before_rl(Wanted()), *jobs.rl(Wanted())]
  names = {job.leaves.split("/")[0] for job in whole}
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
  with (runs / _LOCK).open("ab") as lock:
    # Jobs inherit it: a recipe killed alone leaves its stages running.
    if not _taken(lock):
      raise InputError(
        f"{runs} is being written to by another recipe, or by a stage that one "
        "left running; wait for it or stop it"
      )
    if there is None:
      path.write_text(json.dumps(ours) + "\n")
    yield lock


def _taken(file: IO[bytes]) -> bool:
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


class _Going(NamedTuple):
  """A job that runs: what it writes to and from where, and its CPUs."""

  label: str
  child: subprocess.Popen
  log: pathlib.Path
  seen: int
  cpus: frozenset[int]


def run(
  todo: Sequence[tuple[str, Job]],
  out: pathlib.Path,
  lock: IO[bytes],
  start: float,
  at_once: int = 1,
) -> None:
  """Runs jobs, each as soon as what it needs is there, and shows how far.

  Args:
    todo: (label of the lines that are shown, job).
    out: the folder they run in; runs/ is there, with a log of each.
    lock: of runs/, which they inherit.
    start: time.monotonic() of the recipe.
    at_once: jobs; each has its own part of the CPUs, always equally large, so
      that a result does not depend on what ran beside it.
  Raises:
    RunError: one failed; what it said is in its log. The others are told to
      stop, and save.
  """
  waiting, free = list(todo), _parts(at_once)
  going: list[_Going] = []
  try:
    while waiting or going:
      ready = [(label, job) for label, job in waiting if _ready(job, out)]
      for label, job in ready[: len(free)]:
        waiting.remove((label, job))
        going.append(_begin(label, job, out, lock, free.pop()))
      if not going:
        label, job = waiting[0]
        raise RunError(
          f"{label} needs {', '.join(job.needs)} in {out / 'runs'}, which no "
          "other job leaves; it was there before: start anew in another --out"
        )
      _watch(going, start)
      for done in [g for g in going if g.child.poll() is not None]:
        going.remove(done)
        free.append(done.cpus)
        if done.child.returncode:
          raise RunError(
            f"{done.label} failed (exit status {done.child.returncode}): "
            f"{_last_line(done)}; all of it is in {done.log}"
          )
  finally:
    # An interrupt or SIGTERM: training saves before it ends.
    for one in going:
      one.child.terminate()
    for one in going:
      one.child.wait()


def _ready(job, out):
  return all((out / "runs" / need).exists() for need in job.needs)


def _parts(count):
  """The CPUs of this process in so many parts, one that is left out."""
  cpus = sorted(os.sched_getaffinity(0))
  each = max(1, len(cpus) // count)
  return [
    frozenset(cpus[i * each : (i + 1) * each]) or frozenset(cpus)
    for i in range(count)
  ]


def _begin(label, job, out, lock, cpus) -> _Going:
  path = out / "runs" / _LOGS / f"{job.leaves.replace('/', '-')}.log"
  path.parent.mkdir(exist_ok=True)
  with path.open("ab") as log:
    log.write(f"\n{label}\n".encode())
    log.flush()
    seen = log.seek(0, 2)
    child = subprocess.Popen(
      [sys.executable, "-m", "xomni_jax", *job.argv],
      cwd=out,
      stdout=log,
      stderr=log,
      pass_fds=(lock.fileno(),),
    )
  os.sched_setaffinity(child.pid, cpus)
  return _Going(label, child, path, seen, cpus)


def _watch(going, start):
  """Shows the last lines of the logs until a job ends."""
  live, said = sys.stderr.isatty(), 0.0
  while all(one.child.poll() is None for one in going):
    time.sleep(_POLL)
    now = time.monotonic()
    if not live and now - said < _SAY:
      continue
    said = now
    minutes, seconds = divmod(int(now - start), 60)
    clock = f"{minutes}:{seconds:02d}"
    lines = [f"{one.label}, {clock}: {_last_line(one)}" for one in going]
    if live:
      room = shutil.get_terminal_size().columns - 1
      each = room // len(lines) - 1
      line = " ".join(f"{line[:each]:<{each}}" for line in lines)
      print(f"\r{line}", end="", file=sys.stderr, flush=True)
    else:
      print("\n".join(lines), file=sys.stderr, flush=True)
  if live:
    print(file=sys.stderr)


def _last_line(job: _Going) -> str:
  """The last line that a job wrote, or of a progress bar its last state."""
  with job.log.open("rb") as file:
    end = file.seek(0, 2)
    file.seek(max(job.seen, end - 2000))
    text = file.read().decode("utf-8", "replace")
  lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
  return next((line for line in reversed(lines) if line), "starting")
