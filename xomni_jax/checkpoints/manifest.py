"""Sizes and hashes of the files of a checkpoint, in a file beside them."""

import concurrent.futures
import hashlib
import json
import os
import pathlib

from xomni_jax.errors import InputError

FILE = "manifest.json"
# Orbax writes these two after the manifest; restoring reads neither.
_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")
_CHUNK = 8 << 20
# Hashing lets go of the interpreter lock, so threads share the work.
_THREADS = 16
PROBLEMS = ("is missing", "has another size", "has other bytes")

Files = list[tuple[str, int, str]]  # path in the folder, bytes, blake2b


def write_json(path: pathlib.Path, value) -> None:
  """Writes a JSON file: all of it, or nothing."""
  temporary = path.with_name(path.name + ".tmp")
  with temporary.open("w", encoding="utf-8") as f:
    json.dump(value, f, indent=1)
    f.flush()
    os.fsync(f.fileno())
  temporary.replace(path)


def write(folder: pathlib.Path) -> None:
  """Writes the manifest of all files in a folder."""
  names = sorted(
    p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()
  )
  names = [n for n in names if n not in (*_LATER, FILE)]
  digests = _map(lambda name: _digest(folder / name), names)
  sizes = [(folder / n).stat().st_size for n in names]
  files = list(zip(names, sizes, digests, strict=True))
  write_json(folder / FILE, {"files": files})


def read(folder: pathlib.Path) -> Files:
  """The files that a folder's manifest names.

  Raises:
    InputError: there is no manifest, or it is no such file.
  """
  try:
    files = json.loads((folder / FILE).read_text("utf-8"))["files"]
    files = [(str(n), int(size), str(digest)) for n, size, digest in files]
  except FileNotFoundError:
    raise InputError(f"{FILE} is missing") from None
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise InputError(f"{FILE} is unreadable ({type(e).__name__})") from None
  if not files:
    raise InputError(f"{FILE} names no files")
  return files


def altered(folder: pathlib.Path, files: Files) -> tuple[int, int] | None:
  """(index of a file, index of its problem) of the first bad one; None: none.

  Sizes are looked at first, since that reads nothing.
  """
  for check in (_size_problem, _bytes_problem):
    found = _map(lambda file, check=check: check(folder, *file), files)
    for i, problem in enumerate(found):
      if problem is not None:
        return i, problem
  return None


def _size_problem(folder, name, size, digest):
  try:
    return None if (folder / name).stat().st_size == size else 1
  except OSError:
    return 0


def _bytes_problem(folder, name, size, digest):
  try:
    return None if _digest(folder / name) == digest else 2
  except OSError:  # unreadable on the disk, too
    return 2


def _digest(path):
  digest = hashlib.blake2b(digest_size=32)
  with path.open("rb") as f:
    while chunk := f.read(_CHUNK):
      digest.update(chunk)
  return digest.hexdigest()


def _map(function, items):
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return list(pool.map(function, items))
