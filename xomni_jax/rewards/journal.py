"""Lines of JSON that outlive a kill: one value a line, appended whole."""

import contextlib
import fcntl
import gzip
import json
import os
import sys
import zlib
from pathlib import Path

from xomni_jax.errors import InputError


class Journal:
  """A file that lines are appended to, by one process at a time."""

  def __init__(self, path: str | os.PathLike, *, alone: bool = False):
    """Opens or makes the file; what a kill left of a last line is cut off.

    Args:
      alone: while it is open so, nobody else can open it so.
    Raises:
      InputError: the file can't be opened, is no journal, or is another's.
    """
    self.path, self._said = Path(path), False
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      self._file = os.open(
        self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644
      )
      try:
        if alone:
          self._lock()
        self._mend()
      except BaseException:
        self.close()
        raise
    except OSError as e:
      raise InputError(
        f"{self.path} can't be opened ({e.strerror}), expected a file that "
        "can be written"
      ) from None

  def _lock(self):
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise InputError(
        f"{self.path} is being written to by another process; wait for it, or "
        "stop it"
      ) from None
    except OSError:  # a file system without locks
      pass

  def _mend(self):
    """Cuts off a torn last line, and ends one that only lacks its end."""
    with open(self._file, "rb", closefd=False) as file:
      data = file.read()
    whole = data.rfind(b"\n") + 1
    # What begins with no value is no journal, and nothing of it is cut.
    if whole:
      _value(self.path, 1, data[: data.find(b"\n")])
    elif data and data[:1] not in (b"{", b"["):
      _value(self.path, 1, data)
    if whole < len(data):
      try:
        json.loads(data[whole:])
      except ValueError:
        os.ftruncate(self._file, whole)
      else:
        os.write(self._file, b"\n")

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
  return [_value(path, number, line) for number, line in enumerate(lines, 1)]


def _value(path, number, line):
  try:
    return json.loads(line)
  except (ValueError, RecursionError):
    raise InputError(
      f"{path}, line {number} is no JSON ({line[:40]!r}), expected a file "
      "that only a run has written to; restore it or move it away"
    ) from None
