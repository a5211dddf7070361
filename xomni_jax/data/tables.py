"""Records out of Parquet, JSONL and folders of images."""

import itertools
import json
import pathlib
import threading
from collections.abc import Sequence

import numpy as np

from xomni_jax.data import fields
from xomni_jax.data.boundary import unreadable
from xomni_jax.data.fields import Record
from xomni_jax.data.recent import OPEN_FILES, Recent
from xomni_jax.errors import InputError

IMAGE_NAMES = r".*\.(png|jpe?g|webp|bmp|gif|tiff?)"
# Row groups in memory, so that neighbours and small tables are read once.
_CACHED_GROUPS = 4


class Parquet:
  """A source over Parquet files, their rows by number.

  A row is read with its whole row group: for training at random, groups of
  few rows (or shards of `xomni tokenize-dataset`) are far faster.
  """

  def __init__(self, paths: Sequence[pathlib.Path]):
    from pyarrow import parquet

    self._groups = []  # (file, group within it)
    counts = []
    self._paths = list(paths)
    for n, path in enumerate(self._paths):
      try:
        meta = parquet.read_metadata(path)
      except Exception as e:  # pyarrow's own, OSError
        advice = "an intact Parquet file; fetch it again"
        raise unreadable(str(path), e, advice) from None
      for group in range(meta.num_row_groups):
        self._groups.append((n, group))
        counts.append(meta.row_group(group).num_rows)
    self._ends = np.array([0, *itertools.accumulate(counts)])
    self._open()

  def _open(self):
    self._lock = threading.Lock()
    self._files, self._tables = Recent(OPEN_FILES), Recent(_CACHED_GROUPS)

  def __getstate__(self):
    return {k: self.__dict__[k] for k in ("_paths", "_groups", "_ends")}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._open()

  def __len__(self) -> int:
    return int(self._ends[-1])

  def name(self, i: int) -> str:
    """File, row group and row within it."""
    place, j = self._find(i)
    n, group = self._groups[place]
    return f"{self._paths[n]} row group {group} row {j}"

  def __getitem__(self, i: int) -> Record:
    """Row i; raises InputError where the file is damaged."""
    place, j = self._find(i)
    row = self._group(place).slice(j, 1).to_pylist()[0]
    path = self._paths[self._groups[place][0]]
    record = fields.as_record(row, f"{path.stem}/{i}")
    if isinstance(record.get("image"), str):
      record["image"] = path.parent / record["image"]
    return record

  def size(self, i: int) -> tuple[int, int]:
    """(width, height) in px, by its columns or the image's header."""
    return fields.size_of(self[i])

  def _find(self, i):
    if not 0 <= i < len(self):
      raise IndexError(f"record {i} of {len(self)}")
    place = int(np.searchsorted(self._ends, i, side="right")) - 1
    return place, int(i - self._ends[place])

  def _group(self, place):
    """The table of a row group."""
    # One lock for all: a ParquetFile is not safe to read from two threads.
    with self._lock:
      read = lambda: self._read_group(*self._groups[place])
      return self._tables.get(place, read)

  def _read_group(self, n, group):
    from pyarrow import parquet

    try:
      file = self._files.get(n, lambda: parquet.ParquetFile(self._paths[n]))
      names = [c for c in file.schema_arrow.names if c in fields.FIELDS]
      return file.read_row_group(group, columns=names, use_threads=False)
    except Exception as e:  # pyarrow's own, OSError
      advice = "an intact Parquet file; fetch it again"
      raise unreadable("the row group", e, advice) from None


class JsonLines:
  """A source over JSONL files: an object a line, image paths relative to it."""

  def __init__(self, paths: Sequence[pathlib.Path]):
    self._paths = list(paths)
    starts = [_line_starts(path) for path in self._paths]
    self._ends = np.array([0, *itertools.accumulate(len(s) for s in starts)])
    self._starts = np.concatenate(starts)

  def __len__(self) -> int:
    return int(self._ends[-1])

  def name(self, i: int) -> str:
    """File and number of the line among those that are not empty."""
    n = self._file(i)
    return f"{self._paths[n]} line {i - self._ends[n] + 1}"

  def __getitem__(self, i: int) -> Record:
    """The record of line i; raises InputError if it is none."""
    n = self._file(i)
    path = self._paths[n]
    try:
      with path.open("rb") as file:
        file.seek(self._starts[i])
        raw = json.loads(file.readline())
      if not isinstance(raw, dict):
        raise ValueError(f"a {type(raw).__name__}")
    except (OSError, ValueError) as e:  # JSON and UTF-8 errors are ValueErrors
      raise unreadable("the line", e, "a JSON object") from None
    record = fields.as_record(raw, f"{path.stem}/{i - self._ends[n]}")
    if isinstance(record.get("image"), str):
      record["image"] = path.parent / record["image"]
    return record

  def size(self, i: int) -> tuple[int, int]:
    """(width, height) in px, by its fields or the image's header."""
    return fields.size_of(self[i])

  def _file(self, i):
    if not 0 <= i < len(self):
      raise IndexError(f"record {i} of {len(self)}")
    return int(np.searchsorted(self._ends, i, side="right")) - 1


def _line_starts(path):
  """i64[n], offsets of the lines that are not empty."""
  starts, at = [], 0
  try:
    with path.open("rb") as file:
      for line in file:
        if line.strip():
          starts.append(at)
        at += len(line)
  except OSError as e:
    raise InputError(f"{path} can't be read ({e.strerror})") from None
  return np.array(starts, np.int64)


class ImageFolder:
  """A source over images in a folder, with `.txt` captions beside them."""

  def __init__(self, folder: pathlib.Path, paths: Sequence[pathlib.Path]):
    self._folder, self._paths = folder, list(paths)

  def __len__(self) -> int:
    return len(self._paths)

  def name(self, i: int) -> str:
    """The image's path."""
    return str(self._paths[i])

  def __getitem__(self, i: int) -> Record:
    """Image i, and its caption if there is one."""
    path = self._paths[i]
    record = {
      "key": path.relative_to(self._folder).as_posix(),
      "image": path,
    }
    caption = path.with_suffix(".txt")
    if caption.exists():
      try:
        record["text"] = caption.read_text("utf-8-sig").strip()
      except (OSError, UnicodeDecodeError) as e:
        raise unreadable(str(caption), e, "UTF-8 text") from None
    return record

  def size(self, i: int) -> tuple[int, int]:
    """(width, height) in px, by the image's header."""
    return fields.size_of({"image": self._paths[i]})
