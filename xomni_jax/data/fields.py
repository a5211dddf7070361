"""The fields of a record: what they may hold, and the picture among them."""

import io
import math
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from PIL import Image

from xomni_jax.data import images
from xomni_jax.data.boundary import codes_grid, encodable, unreadable
from xomni_jax.errors import InputError

Record = dict[str, Any]
_WORLD = "world:"

FIELDS = (
  "key",
  "image",
  "codes",
  "text",
  "prompt",
  "qa",
  "boxes",
  "width",
  "height",
)


def world_of(path: str) -> tuple[str, str] | None:
  """(level, split) of "world:LEVEL[:SPLIT]", the drawn world; None: another."""
  if not path.startswith(_WORLD):
    return None
  level, _, split = path.removeprefix(_WORLD).partition(":")
  return level, split or "train"


def as_record(raw: Mapping[str, Any], key: str) -> Record:
  """The record that a file holds, its fields checked; `image` is not decoded.

  Args:
    raw: fields of other names, and those that are None, are left out.
    key: the record's name, if it has none itself.
  Raises:
    InputError: a field holds something else; all of them at once.
  """
  out, problems = {"key": key}, []
  for name in FIELDS:
    if raw.get(name) is not None:
      try:
        out[name] = _CHECKS[name](raw[name])
      except (TypeError, ValueError, KeyError, OverflowError) as e:
        what = str(e) if isinstance(e, InputError) else _short(raw[name])
        problems.append(f"{name} is no good: {what}")
  if problems:
    raise InputError(
      "; ".join(problems) + "; expected the fields of a record (see "
      "xomni_jax/data/records.py)"
    )
  return out


def _short(value):
  text = repr(value)
  return text if len(text) < 60 else f"{text[:57]}..."


def _string(value):
  if not isinstance(value, str):
    raise TypeError
  return encodable(value)


def _image(value):
  # A column of Hugging Face's Image type holds {"bytes": ..., "path": ...}.
  if isinstance(value, Mapping):
    value = value["bytes"] if value.get("bytes") else value["path"]
  if not isinstance(value, (bytes, str, os.PathLike, Image.Image)):
    raise TypeError
  return value


def _pairs(value):
  out = []
  for pair in value:
    if isinstance(pair, Mapping):
      pair = pair["question"], pair["answer"]
    question, answer = pair
    out.append([_string(question), _string(answer)])
  return out


def _boxes(value):
  out = []
  for text, *corners in value:
    x0, y0, x1, y1 = map(float, corners)
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
      raise ValueError
    out.append([_string(text), x0, y0, x1, y1])
  return out


def _length(value):
  if isinstance(value, bool) or int(value) != value or value < 1:
    raise ValueError
  return int(value)


_CHECKS = {
  "key": _string,
  "image": _image,
  "codes": codes_grid,
  "text": _string,
  "prompt": _string,
  "qa": _pairs,
  "boxes": _boxes,
  "width": _length,
  "height": _length,
}


def need(record: Record, field: str) -> Any:
  """A field of a record; raises InputError where it has none."""
  if record.get(field) is None:
    has = ", ".join(name for name in FIELDS[1:] if name in record) or "nothing"
    raise InputError(
      f"no field {field!r}, got {has}; give the source another task, or "
      "complete its records"
    )
  return record[field]


def image_of(record: Record) -> Image.Image:
  """The record's picture, decoded, RGB.

  Raises:
    InputError: there is none, or it can't be read.
  """
  return images.open_image(need(record, "image"))


def image_bytes(record: Record) -> bytes:
  """The record's picture as the bytes of a file; a PIL image becomes PNG."""
  image = need(record, "image")
  if isinstance(image, bytes):
    return image
  if isinstance(image, Image.Image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
  try:
    return pathlib.Path(image).read_bytes()
  except OSError as e:
    raise InputError(
      f"image {image} can't be read ({e.strerror}); check the path"
    ) from None


def size_of(record: Record) -> tuple[int, int]:
  """(width, height) of the record's picture in px, without decoding it.

  Raises:
    InputError: there is none, or its header can't be read.
  """
  if "width" in record and "height" in record:
    return record["width"], record["height"]
  image = need(record, "image")
  if isinstance(image, Image.Image):
    return image.size
  source = io.BytesIO(image) if isinstance(image, bytes) else image
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # `image_of` checks in its own way
      with Image.open(source) as opened:
        return opened.size
  except Exception as e:  # a broken header raises whatever its parser meets
    name = "image" if isinstance(image, bytes) else f"image {image}"
    raise unreadable(name, e, "a PNG, JPEG, WebP or the like") from None
