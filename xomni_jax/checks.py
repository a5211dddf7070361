"""Checks of what people ask for, and files that are whole or not there."""

import contextlib
import fcntl
import os
import pathlib
import time
import uuid
from collections.abc import Iterator
from typing import IO, Any

from xomni_jax.errors import InputError

PATIENCE = 10.0  # s that `lock` waits


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


def file_to_write(name: str, path: str) -> None:
  """InputError where no file can be at `path`; `name` is what is set so."""
  path = pathlib.Path(path).absolute()
  if not path.parent.is_dir():
    raise InputError(f"{name} {path}: its folder does not exist")
  if path.is_dir():
    raise InputError(f"{name} {path}: is a folder, expected the name of a file")


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


def lock(file: int | IO[bytes]) -> bool:
  """Whether an open file is ours alone, until it is closed by all who have it.

  One whose process has been killed is waited for: it lives on for a moment.
  """
  end = time.monotonic() + PATIENCE
  while True:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      if time.monotonic() > end:
        return False
      time.sleep(0.5)
    except OSError:  # a file system without locks
      return True
    else:
      return True


@contextlib.contextmanager
def alone(folder: str | os.PathLike) -> Iterator[None]:
  """Makes a folder, which no other process that asks so has meanwhile.

  Raises:
    InputError: one has it, or it can't be made.
  """
  handle = os.open(make_folder(folder), os.O_RDONLY)
  try:
    if not lock(handle):
      raise InputError(
        f"{folder} is being written to by another process; wait for it, stop "
        "it, or name another folder"
      )
    yield
  finally:
    os.close(handle)


def beside(path: pathlib.Path) -> pathlib.Path:
  """A hidden name beside `path` that nothing else has.

  Not made of a process's number: on a disk that hosts share, two of them often
  have the same one, as the first processes of pods do.
  """
  return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A name beside `path` to write to, which replaces it if nothing fails.

  Raises:
    InputError: it can't be written; `path` is as it was.
  """
  temporary = beside(path)
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
