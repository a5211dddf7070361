"""Checks that several readers of this folder share."""

import errno
import os
from pathlib import Path

import numpy as np

from xomni_jax.errors import InputError, RunError


def unreadable(
  name: str, error: Exception, advice: str
) -> InputError | RunError:
  """The error, on one line, for a file that some parser choked on.

  A RunError where nothing is wrong with the file: no more can be opened.
  """
  reason = " ".join(f"{type(error).__name__}: {error}".split())
  if os.strerror(errno.EMFILE) in reason:  # parsers have no errno to look at
    return RunError(
      f"{name} can't be read (too many open files); allow this process more "
      "of them (ulimit -n)"
    )
  reason = reason[:300]
  return InputError(f"{name} can't be read ({reason}), expected {advice}")


def has_files(folder, *names: str) -> bool:
  """Whether a folder holds all these files."""
  return all(Path(folder, name).is_file() for name in names)


def encodable(text: str) -> str:
  """The text itself; raises InputError where it holds lone surrogates."""
  try:
    text.encode()
  except UnicodeEncodeError as e:
    raise InputError(
      f"text holds {text[e.start]!r} at character {e.start}, expected Unicode; "
      "check the encoding of its source"
    ) from None
  return text


def array(name: str, value, expected: str, dtype=None) -> np.ndarray:
  """A caller's value as an array; InputError where it is none."""
  try:
    return np.asarray(value, dtype)
  except (TypeError, ValueError, OverflowError):
    raise InputError(
      f"{name} is no array: its rows differ in length, or hold something else "
      f"than numbers; expected {expected}"
    ) from None


def codes_grid(codes, codebook_size: int | None = None) -> np.ndarray:
  """i32[h, w] within the codebook (None: of unknown size).

  Raises:
    InputError: codes are no grid of integers, or outside the codebook.
  """
  codes = array("codes", codes, "i32[h, w]")
  if codes.ndim != 2 or not codes.size or codes.dtype.kind not in "iu":
    raise InputError(
      f"codes are {codes.dtype}{list(codes.shape)}, expected i32[h, w]"
    )
  limit = 2**31 if codebook_size is None else codebook_size
  if codes.min() < 0 or codes.max() >= limit:
    raise InputError(
      f"codes lie in {codes.min()}..{codes.max()}, expected 0..{limit - 1}, "
      "the codebook's"
    )
  return codes.astype(np.int32)
