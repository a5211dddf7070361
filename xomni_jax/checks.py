"""Checks of what people ask for, that more than one room needs."""

import os
import pathlib
from typing import Any

from xomni_jax.errors import InputError


def validate(config: Any, *checks: tuple[bool, str]) -> None:
  """Raises one InputError that lists every failed (ok, message) check."""
  problems = [message for ok, message in checks if not ok]
  if problems:
    raise InputError(f"{type(config).__name__}: " + "; ".join(problems))


def positive(config: Any, *names: str) -> list[tuple[bool, str]]:
  """Checks for `validate`: fields of these names are above 0."""
  return [
    (getattr(config, n) > 0, f"{n} is {getattr(config, n)}, expected above 0")
    for n in names
  ]


def make_folder(path: str | os.PathLike) -> pathlib.Path:
  """Makes a folder where there is none; InputError where it can't be."""
  path = pathlib.Path(path)
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise InputError(
      f"{path}: the folder can't be made ({e.strerror}); name another one"
    ) from None
  return path
