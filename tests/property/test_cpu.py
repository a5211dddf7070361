"""What a tiny model gets of a CPU."""

import os
import platform
import subprocess
import sys

import pytest

from tests.train_runs import ROOT

_COUNT = """
import sys
from xomni_jax import cpu
cpu.split(sys.argv[1])
import jax
print(jax.device_count())
"""
# Page faults of a large buffer that a thread takes for the second time.
_FAULTS = """
import os, resource, sys, threading
os.environ["NUMPY_MADVISE_HUGEPAGE"] = "0"  # XLA does not ask for large pages
import numpy as np
from xomni_jax import cpu
if sys.argv[1] == "kept":
  cpu.keep_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
  np.full(2**26, 1, np.uint8)
  before = faults()
  np.full(2**26, 1, np.uint8)
  print(faults() - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def _run(code, argument, **more):
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  done = subprocess.run(
    [sys.executable, "-c", code, argument],
    env=env | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    **more,
  )
  assert done.returncode == 0, done.stderr
  return int(done.stdout)


@pytest.mark.parametrize(
  ("how", "cpus", "count"), [("3", 1, 3), ("auto", 2, 2)]
)
def test_cpu_is_split_into_devices(how, cpus, count):
  there = sorted(os.sched_getaffinity(0))
  if len(there) < cpus:
    pytest.skip(f"{len(there)} CPUs")
  pin = lambda: os.sched_setaffinity(0, there[:cpus])
  assert _run(_COUNT, how, preexec_fn=pin) == count


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_is_kept():
  pages = 2**26 // os.sysconf("SC_PAGE_SIZE")
  kept, given_back = _run(_FAULTS, "kept"), _run(_FAULTS, "given back")
  assert kept < pages / 20
  # Fewer than `pages` where the system makes all pages large.
  assert given_back > kept
