"""Lines of JSON that outlive a kill: one value a line, appended whole."""

import contextlib
import gzip
import json
import os
import sys
import zlib
from pathlib import Path

from xomni_jax.errors import InputError


class Journal:
  """A file that lines are appended to, by one process at a time."""

  def __init__(self, path: str | os.PathLike):
    """Opens or makes the file; what a kill left of a last line is cut off.

    Raises:
      InputError: the file can't be opened, or is no journal.
    """
    self.path, self._said = Path(path), False
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      _cut_torn_line(self.path)
      self._file = os.open(
        self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644
      )
    except OSError as e:
      raise InputError(
        f"{self.path} can't be opened ({e.strerror}), expected a file that "
        "can be written"
      ) from None

  def add(self, values) -> None:
    """Appends values, each a line, in one write; all of them or, where that
    raises OSError, none."""
    lines = "".join(json.dumps(v, allow_nan=False) + "\n" for v in values)
    data = memoryview(lines.encode())
    before = os.fstat(self._file).st_size
    try:
      while data:  # a write may be short, on a full disk for one
        data = data[os.write(self._file, data) :]
    except OSError:
      with contextlib.suppress(OSError):
        os.ftruncate(self._file, before)
      raise

  def try_add(self, values) -> None:
    """`add`; a disk that takes no more is a line on standard error, once."""
    try:
      self.add(values)
    except OSError as e:
      if not self._said:
        print(
          f"warning: {self.path} can't be written ({e.strerror}); the run goes "
          "on without, make room there",
          file=sys.stderr,
          flush=True,
        )
      self._said = True

  def close(self) -> None:
    """Closes the file; nothing can be added any more."""
    with contextlib.suppress(OSError):
      os.close(self._file)


def read_journal(path: str | os.PathLike) -> list:
  """The values of a journal; a torn last line is left out.

  Args:
    path: of the file; one that ends in .gz was packed by gzip.
  Raises:
    InputError: it can't be read, or a line before the last is no JSON.
  """
  path = Path(path)
  try:
    data = path.read_bytes()
    if path.suffix == ".gz":
      data = gzip.decompress(data)
  except (OSError, EOFError, zlib.error) as e:
    reason = getattr(e, "strerror", None) or e
    raise InputError(
      f"{path} can't be read ({reason}), expected lines of JSON"
    ) from None
  lines = data[: data.rfind(b"\n") + 1].splitlines()
  values = []
  for number, line in enumerate(lines, 1):
    try:
      values.append(json.loads(line))
    except (ValueError, RecursionError):
      raise InputError(
        f"{path}, line {number} is no JSON ({line[:40]!r}), expected a file "
        "that only a run has written to; restore it or move it away"
      ) from None
  return values


def _cut_torn_line(path):
  if not path.exists():
    return
  with path.open("rb+") as file:
    data = file.read()
    file.truncate(data.rfind(b"\n") + 1)
