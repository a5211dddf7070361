"""What makes a tiny model fast on a CPU: devices, and memory that is kept."""

import ctypes
import os

import jax

from xomni_jax.errors import InputError

_MOST = 8  # devices that a CPU is split into; the tiny batches divide by it
# M_TRIM_THRESHOLD: never, M_MMAP_MAX: none, M_ARENA_MAX: one (glibc, malloc.h)
_KEEP = (-1, -1), (-4, 0), (-8, 1)


def split(how: str) -> None:
  """Splits the CPU into devices; to be called before JAX looks for any.

  Args:
    how: "auto" (one a core, a power of two, at most 8) or a number.
  Raises:
    InputError: it is neither.
  """
  cores = min(_MOST, len(os.sched_getaffinity(0)))
  count = str(1 << (cores.bit_length() - 1)) if how == "auto" else how
  if not (count.isascii() and count.isdigit() and int(count)):
    raise InputError(
      f"--cpu-devices {how!r}: expected auto or a number from 1, such as 2"
    )
  jax.config.update("jax_num_cpu_devices", int(count))


def keep_memory() -> None:
  """Freed memory stays with this process, in one pool for all its threads.

  XLA takes the buffers of a program anew whenever it runs. glibc gives large
  ones back in between, and the kernel clears their pages again each time: a
  fifth of the cores' time in a tiny model's step. The process stays as large as
  it once was. To be called before there are threads; elsewhere than in glibc
  nothing happens.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):
    return
  for option, value in _KEEP:
    mallopt(option, value)
