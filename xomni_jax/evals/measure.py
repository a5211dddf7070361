"""The loop of a measurement: draw, paint, read, keep.

Work goes in batches, cut the same way in every run, so that a batch that a
kill interrupted is made again just as it was. Engines read a batch while the
next one is drawn.
"""

import collections
import pathlib
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from xomni_jax.errors import RunError
from xomni_jax.evals import asked as asked_lib
from xomni_jax.evals.asked import Asked
from xomni_jax.evals.drawing import Drawer
from xomni_jax.evals.reading import Readers, Readings
from xomni_jax.evals.rows import Key, Reusable, Rows
from xomni_jax.inference import sheets
from xomni_jax.inference.sampling import Sampling
from xomni_jax.rewards.wire import Item

SHOWN = 32  # prompts of a setting on its sheet
_AHEAD = 2  # batches that wait for engines
_MAX_FAILED, _WATCHED = 0.01, 200  # rate of failures, of so many at least


class Setting(NamedTuple):
  """What is drawn.

  Attributes:
    name: unique in a file of rows.
    model: by which `Drawer` is asked for; "": none, the true drawings.
    source: of the prompts, for the true drawings.
    samples: images a prompt.
    how: codes are drawn; None: they are those of the true drawings.
  """

  name: str
  model: str
  source: str
  samples: int = 1
  how: Sampling | None = None


class Batch(NamedTuple):
  """Prompts of one size, by number, that are drawn at once."""

  setting: Setting
  numbers: Sequence[int]


def batches(
  setting: Setting, asked: Sequence[Asked], images: int
) -> list[Batch]:
  """All batches of a setting, of about so many images."""
  each = max(1, images // setting.samples)
  by_size = collections.defaultdict(list)
  for number, one in enumerate(asked):
    by_size[one.size].append(number)
  return [
    Batch(setting, numbers[i : i + each])
    for numbers in by_size.values()
    for i in range(0, len(numbers), each)
  ]


def reused(there: Reusable, settings: Sequence[Setting]) -> dict[Key, Readings]:
  """Another measurement's rows of the settings whose model is the same."""
  samples = {s.name: s.samples for s in settings if s.model in there.models}
  return {
    key: read
    for key, read in there.rows.items()
    if key.sample < samples.get(key.setting, 0)
  }


def sheet_path(folder: pathlib.Path, name: str) -> pathlib.Path:
  """Where the sheet of a setting lies."""
  return folder / (re.sub(r"[^a-z0-9.]+", "-", name.lower()) + ".png")


def run(
  settings: Sequence[Setting],
  asked: Sequence[Asked],
  rows: Rows,
  readers: Readers,
  drawer: Callable[[str], Drawer],
  *,
  images: int,
  folder: pathlib.Path,
  unshown: Collection[str] = (),
) -> None:
  """Makes all rows of settings that are not there yet, and their sheets.

  Args:
    settings: those of one model adjacent.
    asked: the prompts.
    rows: where they are kept.
    readers: of the images.
    drawer: by a model's name; only the last one is used.
    images: of a batch.
    folder: of the sheets.
    unshown: settings without a sheet: keys would now draw other images than
      those that their rows are of.
  Raises:
    RunError: an engine fails too often.
  """
  whole = [b for s in settings for b in batches(s, asked, images)]
  count = lambda b: len(b.numbers) * b.setting.samples
  work = [b for b in whole if _is_missing(b, rows, folder, unshown)]
  if not work:
    return
  total = sum(map(count, whole))
  with progress(total, total - sum(map(count, work))) as bar:
    waiting: collections.deque = collections.deque()
    keep = _Keeper(asked, rows, folder, unshown, bar)
    full = {s.name: max(1, images // s.samples) for s in settings}
    for batch in work:
      bar.set_description(batch.setting.name, refresh=False)
      made = draw(batch, asked, drawer, full[batch.setting.name])
      waiting.append((batch, made, readers.ask(_items(batch, made, asked))))
      if len(waiting) > _AHEAD:
        done, made, futures = waiting.popleft()
        keep(done, made, readers.hear(futures))
    for done, made, futures in waiting:
      keep(done, made, readers.hear(futures))


def progress(total: int, done: int = 0) -> tqdm:
  """A bar that counts images."""
  return tqdm(
    total=total,
    initial=done,
    unit="image",
    file=sys.stderr,
    smoothing=0.05,
    # A log gets a line now and then, a terminal what moves.
    mininterval=0.5 if sys.stderr.isatty() else 30,
  )


def _is_missing(batch, rows, folder, unshown):
  setting, numbers = batch
  shown = setting.name not in unshown and any(n < SHOWN for n in numbers)
  if shown and not sheet_path(folder, setting.name).exists():
    return True
  return any(
    Key(setting.name, n, s) not in rows.found
    for n in numbers
    for s in range(setting.samples)
  )


def draw(
  batch: Batch,
  asked: Sequence[Asked],
  drawer: Callable[[str], Drawer],
  full: int,
) -> np.ndarray:
  """Images u8[prompts * samples, H, W, 3] of a batch.

  Args:
    batch: what is drawn.
    asked: all prompts.
    drawer: by a model's name.
    full: prompts of a full batch.
  """
  setting, numbers = batch
  if not setting.model:
    pictures = asked_lib.true_images(setting.source, numbers)
    return np.stack([np.asarray(p.convert("RGB")) for p in pictures])
  # Filled up with its last prompt: one program for all batches.
  filled = [*numbers, *(numbers[-1],) * (full - len(numbers))]
  some = [asked[n] for n in filled]
  if setting.how is None:
    pictures = asked_lib.true_images(setting.source, filled)
    made = drawer(setting.model).repaint(pictures, some, filled)
  else:
    made = drawer(setting.model).draw(
      some, filled, setting.samples, setting.how
    )
  return made[: len(numbers) * setting.samples]


def _items(batch, made, asked):
  each = batch.setting.samples
  numbers = [n for n in batch.numbers for _ in range(each)]
  return [
    Item(str(i), image, asked[n].text, asked[n].targets, asked[n].lang)
    for i, (n, image) in enumerate(zip(numbers, made, strict=True))
  ]


class _Keeper:
  """Keeps what was read, and shows the first of it."""

  def __init__(self, asked, rows, folder, unshown, bar):
    self._asked, self._rows, self._folder = asked, rows, folder
    self._unshown, self._bar = unshown, bar
    self._cells: dict[str, dict[int, sheets.Picture]] = {}
    self._seen: collections.Counter = collections.Counter()

  def __call__(
    self, batch: Batch, made: np.ndarray, readings: Sequence[Readings]
  ) -> None:
    setting, numbers = batch
    each = setting.samples
    keys = [Key(setting.name, n, s) for n in numbers for s in range(each)]
    self._watch(readings)
    self._rows.add(zip(keys, readings, strict=True))
    self._show(setting, zip(keys, made, readings, strict=True))
    self._bar.update(len(keys))

  def _watch(self, readings: Sequence[Readings]) -> None:
    for name in readings[0]:
      failed = [r[name]["error"] for r in readings if "error" in r[name]]
      self._seen[name] += len(readings)
      self._seen[name, "failed"] += len(failed)
      count, bad = self._seen[name], self._seen[name, "failed"]
      # Rows that were kept stay: not even a first batch may hold many.
      if bad > _MAX_FAILED * max(count, _WATCHED):
        raise RunError(
          f"{name} fails on {bad} of {count} images, expected at most "
          f"{_MAX_FAILED:.0%}; the last: {(failed or ['-'])[-1]}"
        )

  def _show(self, setting, found) -> None:
    path = sheet_path(self._folder, setting.name)
    if setting.name in self._unshown or path.exists():
      return
    cells = self._cells.setdefault(setting.name, {})
    for key, image, readings in found:
      if key.prompt < SHOWN and key.sample == 0:
        lines = [" / ".join(self._asked[key.prompt].targets)]
        lines += [_said(name, r) for name, r in readings.items()]
        cells[key.prompt] = sheets.Picture(
          Image.fromarray(image.copy()), "\n".join(lines)
        )
    if len(cells) == min(SHOWN, len(self._asked)):
      page = sheets.grid([cells[n] for n in sorted(cells)], columns=8)
      sheets.save(path, page)
      del self._cells[setting.name]


def _said(name: str, reading: Mapping) -> str:
  if "text" not in reading:
    return f"{name}: failed"
  text = " / ".join(reading["text"].split("\n"))
  return f"{name[0]} {reading['score']:.2f} {text}"
