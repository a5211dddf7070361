"""Timing, and what a report says about where it was taken."""

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence

# Seconds between two calls: the threads of both frameworks spin on for a
# moment after their work, and on few cores would slow the other one down.
_REST = 0.1


def say(line: str) -> None:
  """One line of progress, on standard error."""
  print(line, file=sys.stderr, flush=True)


def cores() -> int:
  """Cores this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def processor() -> str:
  """The CPU's name and the cores that may be used."""
  info = pathlib.Path("/proc/cpuinfo")
  names = [platform.processor() or platform.machine()]
  if info.is_file():
    lines = info.read_text().splitlines()
    named = [x.split(":", 1)[1].strip() for x in lines if "model name" in x]
    names = named or names
  return f"{names[0]}, {cores()} cores"


def busy() -> str:
  """A warning if other programs use this machine's cores, else empty."""
  load = os.getloadavg()[0]
  if load < cores() / 2:
    return ""
  # Seen with 4 busy threads beside it on 2 cores: JAX took 2 to 4 times as
  # long, PyTorch, whose threads wait for one another at every operation, 10.
  return (
    f"load average {load:.1f} on {cores()} cores before the start: the ratios "
    "mean little, as other programs slow PyTorch down more than JAX"
  )


def absent(*packages: str) -> list[str]:
  """Those of the packages that are not installed."""
  return [p for p in packages if importlib.util.find_spec(p) is None]


def versions() -> str:
  """Python and the frameworks, one line."""
  packages = ("jax", "jaxlib", "flax", "torch", "transformers", "diffusers")
  found = [
    f"{p} {importlib.metadata.version(p)}" for p in packages if not absent(p)
  ]
  return ", ".join([f"Python {platform.python_version()}", *found])


def median_seconds(
  calls: Sequence[Callable[[], object]], repeats: int
) -> list[float]:
  """Median seconds of each call, which were made once before.

  The calls take turns, so that a machine that slows down or is shared with
  other programs does so to all of them alike.
  """
  times: list[list[float]] = [[] for _ in calls]
  for _ in range(repeats):
    for own, call in zip(times, calls, strict=True):
      time.sleep(_REST)
      start = time.perf_counter()
      call()
      own.append(time.perf_counter() - start)
  return [statistics.median(own) for own in times]


def number(value: float | None, missing: str = "-") -> str:
  """Four significant digits."""
  return missing if value is None else f"{value:,.4g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Columns with two spaces between them, the first one to the left."""
  lines = [header, *rows]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(
      [line[0].ljust(widths[0])]
      + [x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True)]
    )
    for line in lines
  )
