"""ArrayRecord shards of records: read at random, written whole or not at all.

A record is a msgpack map of the fields of `fields`; `image` is the bytes of a
file, `codes` a map of rows, columns, dtype and little-endian data.
"""

import itertools
import os
import pathlib
import threading
import zipfile
from collections.abc import Iterable, Mapping, Sequence

import msgpack
import numpy as np
from array_record.python import array_record_module

from xomni_jax.checks import beside
from xomni_jax.data import fields
from xomni_jax.data.boundary import unreadable
from xomni_jax.data.fields import Record
from xomni_jax.data.recent import OPEN_FILES, Recent
from xomni_jax.errors import InputError

BAD = ".bad.txt"  # of a list of the records that a shard is without
SUFFIX = ".array_record"
# A record a chunk, or reading one would decompress its neighbours as well.
_OPTIONS = "group_size:1,zstd:3"


class Shards:
  """A source over ArrayRecord files, one after the other."""

  def __init__(self, paths: Sequence[pathlib.Path]):
    self._paths = list(paths)
    self._tables = [_read_table(path) for path in self._paths]
    counts = [
      len(table["width"]) if table else _count(path)
      for path, table in zip(self._paths, self._tables, strict=True)
    ]
    self._ends = np.array([0, *itertools.accumulate(counts)])
    self._lengths: dict[str, np.ndarray] = {}  # asked for, by task
    self._open()

  def _open(self):
    self._lock, self._readers = threading.Lock(), Recent(OPEN_FILES)

  def __getstate__(self):
    return self.__dict__ | {"_lock": None, "_readers": None}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._open()

  def __len__(self) -> int:
    return int(self._ends[-1])

  def name(self, i: int) -> str:
    """Shard and number within it."""
    shard, j = self._find(i)
    return f"{self._paths[shard]} record {j}"

  def __getitem__(self, i: int) -> Record:
    """Record i; raises InputError where the shard is damaged."""
    shard, j = self._find(i)
    try:
      data = self._reader(shard).read([j])[0]
      raw = msgpack.unpackb(data)
      if not isinstance(raw, dict):
        raise ValueError("no map")
    except InputError:
      raise
    except Exception as e:  # Riegeli's RuntimeError, and msgpack's many
      advice = "an intact record; write or fetch the shard again"
      raise unreadable("the record", e, advice) from None
    if isinstance(raw.get("codes"), dict):
      raw["codes"] = _unpack_codes(raw["codes"])
    return fields.as_record(raw, f"{self._paths[shard].stem}/{j}")

  def size(self, i: int) -> tuple[int, int]:
    """(width, height) in px, as stored or by the image's header."""
    shard, j = self._find(i)
    table = self._tables[shard]
    if table and table["width"][j]:
      return int(table["width"][j]), int(table["height"][j])
    return fields.size_of(self[i])

  def lengths(self, task: str) -> np.ndarray | None:
    """i32[len], tokens of each record as a task; 0: it can't be that.

    None where a shard's lengths are not known.
    """
    if not all(table and task in table for table in self._tables):
      return None
    if task not in self._lengths:
      tables = [table[task] for table in self._tables]
      self._lengths[task] = np.concatenate(tables)
    return self._lengths[task]

  def _find(self, i):
    if not 0 <= i < len(self):
      raise IndexError(f"record {i} of {len(self)}")
    shard = int(np.searchsorted(self._ends, i, side="right")) - 1
    return shard, int(i - self._ends[shard])

  def _reader(self, shard):
    with self._lock:
      return self._readers.get(shard, lambda: self._checked(shard))

  def _checked(self, shard):
    """A reader of a shard; raises InputError if it has lost records."""
    reader = _open_reader(self._paths[shard])
    found = _records(reader)
    expected = int(self._ends[shard + 1] - self._ends[shard])
    if found != expected:
      # A truncated file reads as one of no records.
      raise InputError(
        f"the shard has {found} records, expected {expected}; write or fetch "
        "it again"
      )
    return reader


def _open_reader(path):
  # Without read-ahead, which would read what nobody asked for.
  return array_record_module.ArrayRecordReader(
    str(path), options="readahead_buffer_size:0", file_reader_buffer_size=32768
  )


def _records(reader):
  """How many a reader has; raises what kept it from opening its file."""
  if not reader.ok():
    reader.read([0])  # no other method says why
  return reader.num_records()


def _count(path):
  """Records of a shard without a table beside it."""
  try:
    count = _records(_open_reader(path))
  except Exception as e:  # whatever Riegeli meets
    raise unreadable(str(path), e, "an intact ArrayRecord file") from None
  if not count:
    raise InputError(
      f"{path} holds no record, expected an intact ArrayRecord file; write or "
      "fetch it again"
    )
  return count


def _table_path(path):
  return path.with_name(f"{path.name}.lengths.npz")


def _read_table(path):
  """{"width", "height" or task: i32[n]}, or None if there is no such file."""
  table = _table_path(path)
  if not table.exists():
    return None
  try:
    with np.load(table) as arrays:
      out = {name: arrays[name] for name in arrays.files}
    if len({len(a) for a in out.values()} | {len(out["width"])}) != 1:
      raise ValueError("columns of different lengths")
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
    advice = "the table written with the shard; fetch both again"
    raise unreadable(str(table), e, advice) from None
  return out


def write_records(
  path: str | os.PathLike,
  records: Iterable[Record],
  lengths: Sequence[Mapping[str, int]] = (),
) -> int:
  """Writes one ArrayRecord shard, whole or not at all, and counts its records.

  Args:
    path: `*.array_record`; `<path>.lengths.npz` is written beside it.
    records: dicts; images are stored as they are, PIL images as PNG.
    lengths: {task: tokens} of each record; (): not known.
  Raises:
    InputError: a record can't be stored, or the file can't be written.
  """
  path = pathlib.Path(path)
  if path.suffix != SUFFIX:
    raise InputError(f"{path}: expected a name that ends in {SUFFIX}")
  temporary = beside(path)
  table = _table_path(temporary)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = _write_shard(temporary, records)
    if not sizes:
      raise InputError(f"{path}: no records to write")
    _write_table(table, sizes, lengths)
    # The table first: a shard that is there is complete.
    table.replace(_table_path(path))
    temporary.replace(path)
  except InputError:
    raise
  # RuntimeError is Riegeli's, and what msgpack can't pack the other two.
  except (OSError, RuntimeError, TypeError, ValueError) as e:
    reason = " ".join(str(e).split())
    raise InputError(f"{path}: can't be written ({reason})") from None
  finally:
    temporary.unlink(missing_ok=True)
    table.unlink(missing_ok=True)
  return len(sizes)


def _write_shard(path, records):
  """Writes records to a file; (width, height) of each."""
  writer = array_record_module.ArrayRecordWriter(str(path), _OPTIONS)
  sizes = []
  try:
    for record in records:
      packed, size = _pack(record)
      writer.write(packed)
      sizes.append(size)
  finally:
    writer.close()
  # On a full disk the writer may have said nothing.
  if sizes and _open_reader(path).num_records() != len(sizes):
    raise OSError("the file is not complete, is the disk full?")
  with path.open("rb+") as file:
    os.fsync(file.fileno())
  return sizes


def _write_table(path, sizes, lengths):
  if lengths and len(lengths) != len(sizes):
    raise InputError(f"{len(lengths)} lengths for {len(sizes)} records")
  columns = dict(zip(("width", "height"), np.array(sizes).T, strict=True))
  for task in sorted({task for each in lengths for task in each}):
    columns[task] = np.array([each.get(task, 0) for each in lengths])
  with path.open("wb") as file:
    np.savez(file, **{k: v.astype(np.int32) for k, v in columns.items()})
    file.flush()
    os.fsync(file.fileno())


def _pack(record):
  """(bytes of a record, its picture's size or (0, 0))."""
  out = dict(record)
  size = (0, 0)
  if "image" in record or {"width", "height"} <= record.keys():
    size = fields.size_of(record)
    out["width"], out["height"] = size
  if "image" in record:
    out["image"] = fields.image_bytes(record)
  if "codes" in record:
    out["codes"] = _pack_codes(record["codes"])
  return msgpack.packb(out), size


def _pack_codes(codes):
  codes = np.asarray(codes)
  dtype = "<u2" if codes.max() < 2**16 else "<i4"
  h, w = codes.shape
  data = codes.astype(dtype).tobytes()
  return {"h": h, "w": w, "dtype": dtype, "data": data}


def _unpack_codes(packed):
  try:
    flat = np.frombuffer(packed["data"], packed["dtype"])
    return flat.reshape(packed["h"], packed["w"]).astype(np.int32)
  except (KeyError, TypeError, ValueError) as e:
    raise unreadable("field codes", e, "h, w, dtype and data") from None
