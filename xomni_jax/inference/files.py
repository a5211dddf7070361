"""Files that people give and get: prompts, codes as JSON, images."""

import collections
import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from xomni_jax.checks import replacing
from xomni_jax.errors import InputError

# Pillow knows more, of which it can't write some, or not in colour.
_WRITABLE = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


class Prompt(NamedTuple):
  """A prompt, and the name its images get (None: numbered)."""

  text: str
  name: str | None = None


def read_prompts(path: str | os.PathLike) -> list[Prompt]:
  """A prompt a line, or JSONL by the suffix `.jsonl`.

  Raises:
    InputError: unreadable; or lists every line that is no prompt.
  """
  path = pathlib.Path(path)
  try:
    # `splitlines` also splits at characters that JSON has in its texts.
    lines = path.read_text(encoding="utf-8-sig").split("\n")
  except (OSError, UnicodeDecodeError) as e:
    raise InputError(f"{path}: not readable as UTF-8 text ({e})") from None
  if path.suffix != ".jsonl":
    prompts = [Prompt(line.strip()) for line in lines if line.strip()]
  else:
    prompts, bad = [], []
    for i, line in enumerate(lines):
      if line.strip():
        prompt = _json_prompt(line)
        if isinstance(prompt, Prompt):
          prompts.append(prompt)
        else:
          bad.append(f"line {i + 1} {prompt}")
    if bad:
      raise InputError(
        f"{path}: {'; '.join(bad)}; expected objects with a text 'prompt'"
      )
  if not prompts:
    raise InputError(f"{path}: holds no prompt; write one a line")
  twice = _twice(p.name for p in prompts if p.name is not None)
  if twice:
    raise InputError(f"{path}: ids occur twice: {', '.join(twice)}")
  return prompts


def _twice(names):
  counts = collections.Counter(names)
  return sorted(name for name, count in counts.items() if count > 1)


def _json_prompt(line):
  """A Prompt, or what is wrong with the line."""
  try:
    record = json.loads(line)
  except json.JSONDecodeError as e:
    return f"is no JSON ({e.msg})"
  if not isinstance(record, dict):
    return f"is a {type(record).__name__}"
  text = record.get("prompt")
  if not isinstance(text, str) or not text.strip():
    return f"has prompt {text!r}"
  name = record.get("id", record.get("prompt_id"))
  if name is not None and not _is_file_name(str(name)):
    return f"has id {str(name)[:60]!r}, which is no file name"
  return Prompt(text, None if name is None else str(name))


def _is_file_name(name):
  # With what is added to it: file systems take 255 bytes.
  short = len(name.encode(errors="replace")) <= 200
  return short and "\0" not in name and pathlib.PurePath(name).name == name


def output_paths(
  output: str, prompts: list[Prompt], num_images: int, kind: str
) -> list[pathlib.Path]:
  """Where each image goes, prompt-major; their folder exists afterwards.

  Args:
    output: the file's name if there is one image. For several, `dir/x.png`
      becomes `dir/x-0000-0.png` and so on; a name without suffix is a folder.
    prompts: their names replace the running number.
    num_images: per prompt.
    kind: "image" or "json".
  Raises:
    InputError: the name has a suffix of another kind, or can't be written.
  """
  path = pathlib.Path(output)
  suffix = ".json" if kind == "json" else ".png"
  if len(prompts) * num_images == 1 and path.suffix and not path.is_dir():
    if kind == "json":
      path = path.with_suffix(".json") if path.suffix == ".png" else path
    return [checked_path(path, kind)]
  if path.suffix and not path.is_dir():
    if kind == "image":
      suffix = path.suffix
    stem, folder = f"{path.stem}-", path.parent
  else:
    stem, folder = "", path
  paths = [
    folder / f"{stem}{p.name or f'{i:04d}'}-{j}{suffix}"
    for i, p in enumerate(prompts)
    for j in range(max(num_images, 0))
  ]
  twice = _twice(p.name for p in paths)
  if twice:
    raise InputError(
      f"{', '.join(twice[:5])} would be written twice: an id is also another "
      "prompt's number; give every prompt an id, or none"
    )
  return [checked_path(p, kind) for p in paths]


def checked_path(path: str | os.PathLike, kind: str) -> pathlib.Path:
  """A path that a file of this kind can be written to.

  Raises:
    InputError: its suffix is of no known image format (or not `.json`), its
      folder can't be made or written.
  """
  path = pathlib.Path(path)
  if not _is_file_name(path.name):
    raise InputError(
      f"{str(path)[:60]!r}... is no file name, expected at most 200 bytes"
    )
  known = {".json"} if kind == "json" else _WRITABLE
  if path.suffix.lower() not in known:
    raise InputError(
      f"{path}: suffix {path.suffix!r} is unknown for a {kind} file; expected "
      f"{'.json' if kind == 'json' else '.png, .jpg or .webp'}"
    )
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise InputError(
      f"{path}: its folder can't be made ({e.strerror})"
    ) from None
  if path.is_dir() or not os.access(path.parent, os.W_OK):
    raise InputError(f"{path}: can't be written; name another file")
  return path


def write_image(path: pathlib.Path, image: Image.Image) -> None:
  """Writes an image, whole or not at all."""
  with replacing(path) as temporary:
    image.save(temporary, Image.registered_extensions()[path.suffix.lower()])


def codes_json(codes: np.ndarray) -> dict[str, Any]:
  """Codes i32[h, w] as JSON: height, width, and the codes row by row."""
  h, w = codes.shape
  return {"height": h, "width": w, "codes": codes.reshape(-1).tolist()}


def write_codes(path: pathlib.Path, codes: np.ndarray) -> None:
  """Writes `codes_json`, whole or not at all."""
  with replacing(path) as temporary:
    temporary.write_text(json.dumps(codes_json(codes)) + "\n")


def read_codes(path: str | os.PathLike) -> np.ndarray:
  """i32[h, w] from a file that `write_codes` wrote.

  Raises:
    InputError: no such JSON, or not height x width codes.
  """
  try:
    record = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    h, w, codes = (record[k] for k in ("height", "width", "codes"))
    whole = [type(x) is int for x in (h, w, *codes)]
  except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as e:
    raise InputError(
      f"{path}: not readable as codes ({type(e).__name__}: {e}); expected JSON "
      "with height, width and codes"
    ) from None
  if not all(whole) or min(h, w) < 1:
    raise InputError(f"{path}: height, width and codes are not whole numbers")
  if len(codes) != h * w:
    raise InputError(
      f"{path}: {len(codes)} codes for {h} x {w}, expected {h * w}"
    )
  if max(map(abs, codes)) >= 2**31:
    raise InputError(f"{path}: a code of {max(codes, key=abs)} is no index")
  return np.array(codes, np.int32).reshape(h, w)
