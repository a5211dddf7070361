"""Records by number: shards, tables, folders and the drawn world.

A source has
  len(source)             number of records
  source[i]               record i, read anew; raises InputError
  source.name(i)          where it lies, for messages
  source.size(i)          (width, height) of its image in px, without decoding

and a record is a dict of
  key: str                its name, for messages
  image                   PIL image, bytes of a file, or a path
  codes: i32[h, w]        in place of the image, or beside it
  text: str               caption or document
  prompt: str             wording that asks for the image
  qa: [[question, answer], ...]
  boxes: [[text, x0, y0, x1, y1], ...]   px
  width, height: int      px, of the original image
of which any may be missing but `key`; `need` asks for one.
"""

import collections
import os
import pathlib
import re

import numpy as np

from xomni_jax.data import shards, tables
from xomni_jax.data.fields import (
  Record,
  image_of,
  need,
  size_of,
  world_of,
)
from xomni_jax.data.shards import write_records
from xomni_jax.errors import InputError
from xomni_jax.train_config import SourceConfig

__all__ = [
  "Record",
  "image_of",
  "known_lengths",
  "need",
  "open_source",
  "size_of",
  "write_records",
]

_EXPECTED = (
  f"a file, folder or glob of *{shards.SUFFIX}, *.parquet, *.jsonl or images, "
  "or world:LEVEL[:SPLIT]"
)


_PART = re.compile("-([0-9]+)-of-([0-9]+)")


def open_source(cfg: SourceConfig):
  """The source that a path names, all of it (`first`, `count` not applied).

  A folder is searched, with all in it, for shards, else for Parquet, else for
  JSONL, else for images.

  Raises:
    InputError: there is no such thing, or it can't be read.
  """
  if drawn := world_of(cfg.path):
    from xomni_jax.data import world

    return world.open_world(*drawn)
  folder, paths = _files(cfg.path)
  kinds = (
    # Also `x.array_record-00000-of-00010`, but not the table beside it.
    (rf".*\{shards.SUFFIX}(-[0-9]+-of-[0-9]+)?", shards.Shards),
    (r".*\.parquet", tables.Parquet),
    (r".*\.jsonl", tables.JsonLines),
    (tables.IMAGE_NAMES, lambda p: tables.ImageFolder(folder, p)),
  )
  for pattern, kind in kinds:
    chosen = [p for p in paths if re.fullmatch(pattern, p.name.lower())]
    if chosen:
      if kind is shards.Shards and folder == _path(cfg.path):
        _check_all_there(cfg.path, chosen)
      source = kind(chosen)
      if not len(source):
        raise InputError(f"{cfg.path} holds no record, expected some")
      return source
  raise InputError(f"{cfg.path} holds nothing to read, expected {_EXPECTED}")


def _check_all_there(name, paths):
  """InputError where shards of a folder are missing, which a run would miss.

  Records are counted as it starts: a resumed one would shuffle others.
  """
  sets = collections.defaultdict(set)
  for path in paths:
    if part := _PART.search(path.name):
      stem = path.name[: part.start()]
      sets[path.parent, stem, part[2], path.name[part.end() :]].add(part[1])
  for (folder, stem, count, end), there in sets.items():
    names = (f"{i:0{len(count)}}" for i in range(int(count)))
    missing = [
      shard
      for shard in (
        f"{stem}-{n}-of-{count}{end}" for n in names if n not in there
      )
      # A shard all of whose records were bad is not there.
      if not (folder / f"{shard}{shards.BAD}").exists()
    ]
    if missing:
      raise InputError(
        f"{name} has {len(there)} of {count} shards, {missing[0]} is missing; "
        "write or fetch the others, or name these by a glob"
      )


def _path(name):
  try:
    return pathlib.Path(name).expanduser()
  except RuntimeError as e:  # no such user
    raise InputError(f"{name}: {e}; expected {_EXPECTED}") from None


def _files(name):
  """(folder, its files that a path, folder or glob names, sorted)."""
  path = _path(name)
  if path.is_file():
    return path.parent, [path]
  if path.is_dir():
    folder, found = path, _walk(path)
  else:
    # The glob begins with the first part that has one of its characters.
    parts = path.parts
    fixed = [not set(part) & set("*?[") for part in parts]
    if all(fixed):
      raise InputError(f"{name} does not exist, expected {_EXPECTED}")
    n = fixed.index(False)
    folder = pathlib.Path(*parts[:n])
    try:
      found = list(folder.glob("/".join(parts[n:])))
    except ValueError as e:
      raise InputError(
        f"{name} is no glob ({e}), expected {_EXPECTED}"
      ) from None
  hidden = lambda p: any(
    part.startswith(".") for part in p.relative_to(folder).parts
  )
  return folder, sorted(p for p in found if p.is_file() and not hidden(p))


def _walk(folder):
  """All files in a folder and in those that it links to, each folder once."""
  seen = set()
  for where, folders, names in os.walk(folder, followlinks=True):
    real = os.path.realpath(where)
    if real in seen:
      folders.clear()
      continue
    seen.add(real)
    # In order, so that a folder of two links has one name on every host.
    folders[:] = sorted(f for f in folders if not f.startswith("."))
    yield from (pathlib.Path(where, name) for name in names)


def known_lengths(source, task: str) -> np.ndarray | None:
  """i32[len], tokens of each record as a task (0: it can't be that).

  None where they were not stored: then records have to be read for them.
  """
  return source.lengths(task) if isinstance(source, shards.Shards) else None
