"""Checks of what people ask for, and files that are whole or not there."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
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


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A name beside `path` to write to, which replaces it if nothing fails.

  Raises:
    InputError: it can't be written; `path` is as it was.
  """
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    yield temporary
    temporary.replace(path)
  except OSError as e:
    raise InputError(
      f"{path} can't be written ({e.strerror or e}); make room there, or name "
      "another place"
    ) from None
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
