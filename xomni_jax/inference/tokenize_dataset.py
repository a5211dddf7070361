"""`xomni tokenize-dataset`: images of a source as shards of code records.

Shards are made one by one, each whole or not at all, and one that is there
is not made again: a run that was stopped goes on where it was, and several
processes share the shards by number. With the codes go the texts, and the
number of tokens of each record as each task, which packing asks for.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from xomni_jax.checks import make_folder, replacing
from xomni_jax.config import TransformConfig
from xomni_jax.data import (
  fields,
  images,
  records,
  sequences,
  shards,
  text_ops,
)
from xomni_jax.data.pipeline import BadRecords
from xomni_jax.errors import ArgumentParser, InputError
from xomni_jax.inference.fingerprint import fingerprint
from xomni_jax.inference.pipeline import Model
from xomni_jax.train_config import SourceConfig

# Above this a source is without end for practical purposes.
_ENDLESS = 10**9
_READERS = 4  # threads that read and resize


@dataclasses.dataclass(frozen=True)
class Job:
  """What becomes of a source, whichever process does it.

  Attributes:
    source: a path, or world:LEVEL[:SPLIT].
    first, count: records of it; count 0: to the end.
    shard_size: records of a shard, bad ones included.
    model: path or hub id.
    documents: records are texts: there are no images to encode.
    keep_images: store the images' files with their codes.
    text_backend: of Unicode normalisation; the result is the same.
  """

  source: str
  first: int
  count: int
  shard_size: int
  model: str
  documents: bool = False
  keep_images: bool = False
  text_backend: str = "tokenizers"


def main(argv: list[str]) -> int:
  """Makes the shards that are asked for and prints what was done.

  Raises:
    InputError: bad arguments, a source or model that can't be read, or too
      many bad records.
  """
  args = _parse(argv)
  names = [field.name for field in dataclasses.fields(Job)]
  job = Job(**{name: getattr(args, name) for name in names})
  import xomni_jax
  from xomni_jax import mesh

  model = xomni_jax.load(
    job.model,
    dtype=args.dtype,
    mesh=mesh.make_mesh(**mesh.parse_sizes(args.mesh)) if args.mesh else None,
    only=() if job.documents else ("siglip", "vq"),
    progress=True,
  )
  written = run(
    job,
    model,
    pathlib.Path(args.out),
    batch=args.batch,
    part=(args.shard_index, args.shard_count),
    max_bad_rate=args.max_bad_rate,
  )
  bad = sorted(p for p in pathlib.Path(args.out).glob("*.bad.txt"))
  tail = f"; bad records are listed in {args.out}/*.bad.txt" if bad else ""
  print(f"{len(written)} shards complete in {args.out}{tail}")
  return 0


def _parse(argv):
  parser = ArgumentParser(
    prog="xomni tokenize-dataset",
    description="Turn the images of a source into shards of code records.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add("--model", required=True, help="X-Omni folder or hub id")
  add("--source", required=True, help="records, or world:LEVEL[:SPLIT]")
  add("--out", required=True, metavar="DIR", help="where the shards go")
  add("--first", type=int, default=0, help="number of the first record")
  add("--count", type=int, default=0, help="records; 0: to the end")
  add("--shard-size", type=int, default=1024, help="records of a shard")
  add("--shard-index", type=int, default=0, help="of this process, from 0")
  add("--shard-count", type=int, default=1, help="processes that share")
  add("--batch", type=int, default=16, help="images of a size encoded at once")
  add("--dtype", help="float32 or bfloat16; default: as the device suggests")
  add("--mesh", metavar="data=N", help="devices that share a batch")
  add("--max-bad-rate", type=float, default=0.01, help="stop above it")
  add("--documents", action="store_true", help="texts only, no images")
  add("--keep-images", action="store_true", help="store the images as well")
  add(
    "--text-backend",
    choices=("tokenizers", "tensorflow_text"),
    default="tokenizers",
    help="of Unicode normalisation",
  )
  args = parser.parse_args(argv)
  if not 0 <= args.shard_index < args.shard_count:
    raise InputError(
      f"shard-index is {args.shard_index}, expected 0 to shard-count - 1 = "
      f"{args.shard_count - 1}"
    )
  if min(args.shard_size, args.batch) < 1 or min(args.first, args.count) < 0:
    raise InputError(
      f"shard-size {args.shard_size}, batch {args.batch}, first {args.first}, "
      f"count {args.count}: expected from 1, 1, 0, 0"
    )
  if not 0 <= args.max_bad_rate <= 1:
    raise InputError(
      f"max-bad-rate is {args.max_bad_rate}, expected a share from 0 to 1, "
      "such as 0.05"
    )
  return args


def run(
  job: Job,
  model: Model,
  out: pathlib.Path,
  *,
  batch: int = 16,
  part: tuple[int, int] = (0, 1),
  max_bad_rate: float = 0.01,
) -> list[pathlib.Path]:
  """Makes the shards of a job that are this process's and not there yet.

  Args:
    job: what to do.
    model: its ViT, quantiser and tokenizer are used.
    out: folder of the shards; another job's shards there are an error.
    batch: images of one size that are encoded at once.
    part: (index, count): of every `count` shards, the one that is made here.
    max_bad_rate: of records that are left out.
  Returns:
    the shards of this process, all of which are there now.
  Raises:
    InputError: the source can't be read, or too much of it is bad.
  """
  source = records.open_source(SourceConfig(job.source, "image"))
  first, end = _span(job, len(source))
  _claim(out, job, end - first)
  starts = range(first, end, job.shard_size)
  mine = list(enumerate(starts))[part[0] :: part[1]]
  name = f"codes-{{:05d}}-of-{len(starts):05d}.array_record"
  paths = {start: out / name.format(k) for k, start in mine}
  for path in paths.values():
    _name_list(path)  # a kill may have come before it
  missing = [start for start, path in paths.items() if not path.exists()]
  numbers = {s: range(s, min(s + job.shard_size, end)) for s in missing}
  total = sum(map(len, numbers.values()))
  with tqdm(total=total, desc="tokenizing", unit="record") as bar:
    watch = BadRecords(max_bad_rate, lambda line: bar.write(line, sys.stderr))
    for start, range_ in numbers.items():
      made, bad = _records(job, model, source, range_, batch, bar, watch)
      _write(paths[start], model, made, bad)
  # Of all shards, those of an earlier try too: the watch above counts this one
  # only, and says nothing of few records.
  bad = sum(map(_bad, paths.values()))
  records_ = sum(min(job.shard_size, end - start) for start in paths)
  if bad > max_bad_rate * records_:
    raise InputError(
      f"{bad} of {records_} records are bad, expected at most "
      f"{max_bad_rate:.2%}; see {out}/*.bad.txt, mend them and delete their "
      "shards, which are then made again, or raise --max-bad-rate"
    )
  return [path for path in paths.values() if path.exists()]


def _span(job, length):
  """First record of a job and the one behind its last."""
  end = job.first + job.count if job.count else length
  if job.first >= length or end > length:
    raise InputError(
      f"{job.source} has {length} records, expected more than first "
      f"{job.first} + count {job.count}; lower them"
    )
  if end - job.first > _ENDLESS:
    raise InputError(f"{job.source} has no end, give --count")
  return job.first, end


def _claim(out, job, count):
  """Writes into the folder whose shards it holds, or compares."""
  # A model that was trained anew lies at the same path.
  parts = () if job.documents else ("siglip", "vq")
  weights = fingerprint(job.model, only=parts)
  settings = dataclasses.asdict(job) | {"count": count, "weights": weights}
  settings.pop("text_backend")
  path = out / "dataset.json"
  if path.exists():
    try:
      there = json.loads(path.read_text("utf-8"))
      differ = [k for k, v in settings.items() if there.get(k) != v]
    except (OSError, ValueError, AttributeError) as e:
      raise InputError(f"{path} can't be read ({e}); use a new --out") from None
    if differ:
      changes = ", ".join(
        f"{k} {there.get(k)!r} -> {settings[k]!r}" for k in differ
      )
      raise InputError(
        f"{out} holds shards of another job ({changes}); use a new --out"
      )
    return
  make_folder(out)
  with replacing(path) as temporary:
    temporary.write_text(json.dumps(settings, indent=2) + "\n")


def _bad(shard):
  """How many records were left out of a shard."""
  path = _bad_path(shard)
  return len(path.read_text().splitlines()) if path.exists() else 0


def _bad_path(shard):
  return shard.with_name(f"{shard.name}{shards.BAD}")


def _write(path, model, made, bad):
  """Writes a shard, and before it the list of what is not in it.

  The list has its name once the shard is there: a list without a shard says
  that no record of it was good.
  """
  for earlier in (_bad_path(path), _pending(path)):
    earlier.unlink(missing_ok=True)
  if bad:
    _pending(path).write_text("\n".join(bad) + "\n")
  if made:
    lengths = [sequences.lengths(r, model.tokenizer) for r in made]
    records.write_records(path, made, lengths)
    _name_list(path)
  elif bad:
    _pending(path).replace(_bad_path(path))


def _name_list(shard):
  if shard.exists() and _pending(shard).exists():
    _pending(shard).replace(_bad_path(shard))


def _pending(shard):
  return shard.with_name(f"{shard.name}.bad.part")


def _records(job, model, source, numbers, batch, bar, watch):
  """(code records, lines of bad ones) of a shard, in order."""
  found, bad = {}, []
  waiting = collections.defaultdict(list)  # by size in px: (number, pixels)

  def encode(group):
    pixels = images.LEVELS[np.stack([p for _, p in group])]
    # Filled up, so that a size is one program.
    fill = [(0, batch - len(group)), (0, 0), (0, 0), (0, 0)]
    codes = model.encode_pixels(np.pad(pixels, fill, mode="edge"))
    for (n, _), each in zip(group, codes, strict=False):
      found[n]["codes"] = each

  for n, record, pixels, problem in _read_all(job, model, source, numbers):
    bar.update()
    watch.add([problem] if problem else [], 0 if problem else 1)
    if problem:
      bad.append(problem)
      continue
    found[n] = record
    if pixels is not None:
      group = waiting[pixels.shape]
      group.append((n, pixels))
      if len(group) == batch:
        encode(waiting.pop(pixels.shape))
  for group in waiting.values():
    encode(group)
  made = [found[n] for n in sorted(found)]
  return _normalised(made, job.text_backend), bad


def _read_all(job, model, source, numbers) -> Iterator[tuple]:
  """(number, record, pixels u8 or None, problem or None), read ahead."""
  read = lambda n: (n, *_read(job, source, n, model.config.transform))
  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    waiting: collections.deque = collections.deque()
    for n in numbers:
      waiting.append(pool.submit(read, n))
      if len(waiting) > 2 * _READERS:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()


def _read(job, source, n, transform: TransformConfig):
  """(record without its image, its pixels, None), or the problem at last."""
  name = source.name(n)
  try:
    record = dict(source[n])
    name = f"{name} ({record['key']})"
    if job.documents:
      record.pop("image", None)
      fields.need(record, "text")
      return record, None, None
    image = fields.image_of(record)
    record["width"], record["height"] = image.size
    pixels = images.pixels_u8(image, transform)
    if job.keep_images:
      record["image"] = fields.image_bytes(record)
    else:
      del record["image"]
    return record, pixels, None
  except InputError as e:
    return None, None, f"{name}: {e}"


def _normalised(made, backend):
  """The records, their texts in Unicode's composed form."""
  texts = []
  for record in made:
    texts += [record[k] for k in ("text", "prompt") if k in record]
    texts += [t for pair in record.get("qa", ()) for t in pair]
  done = iter(text_ops.nfc(texts, backend))
  for record in made:
    record |= {k: next(done) for k in ("text", "prompt") if k in record}
    if "qa" in record:
      record["qa"] = [[next(done) for _ in pair] for pair in record["qa"]]
  return made
