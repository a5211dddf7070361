"""Records by number: shards, tables, folders and the drawn world.

A source has
  len(source)             number of records
  source[i]               record i, read anew
  source.name(i)          where it lies, for messages
  source.size(i)          (width, height) of its image in px, without decoding
  source.lengths(task)    i32[len] tokens of each as a task, or None: unknown

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

from collections.abc import Iterable
from typing import Any

from PIL import Image

from xomni_jax.train_config import SourceConfig

Record = dict[str, Any]


def open_source(cfg: SourceConfig):
  """The source that a path names, all of it (`first`, `count` not applied).

  Raises:
    InputError: there is no such thing, or it can't be read.
  """
  raise NotImplementedError


def need(record: Record, field: str):
  """A field of a record; raises InputError where it has none."""
  raise NotImplementedError


def image_of(record: Record) -> Image.Image:
  """The record's picture, decoded, RGB; raises InputError."""
  raise NotImplementedError


def write_records(path, records: Iterable[Record], lengths=()) -> None:
  """Writes one ArrayRecord shard, whole or not at all.

  Args:
    path: `*.array_record`; `<path>.lengths.npz` is written beside it.
    records: dicts; images are stored as they are, PIL images as PNG.
    lengths: {task: tokens} of each record; (): not known.
  Raises:
    InputError: it can't be written.
  """
  raise NotImplementedError
