"""What a measurement of several models works with: prompts, rows, readers."""

import contextlib
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from xomni_jax.checks import make_folder, replacing
from xomni_jax.errors import InputError
from xomni_jax.evals import (
  asked,
  best_of_n,
  drawing,
  files,
  measure,
  reading,
  rows,
)
from xomni_jax.inference import loading

_MODELS = (best_of_n.SFT, best_of_n.RL, best_of_n.CONTROL)


def check_flags(args, counts: Sequence[str]) -> None:
  """InputError unless these flags are counts, and the seed is one."""
  for flag in counts:
    if getattr(args, flag) < 1:
      raise InputError(f"--{flag} is {getattr(args, flag)}, expected 1 or more")
  if not 0 <= args.seed < 2**32:
    raise InputError(f"--seed is {args.seed}, expected 0 to 2^32 - 1")


class Workbench(contextlib.ExitStack):
  """What a measurement needs; models are loaded when they are needed.

  Attributes:
    identity: what is measured.
    rows: the file of rows.
  """

  def __init__(self, args, name):
    super().__init__()
    check_flags(args, ("samples", "steps", "batch", "readers"))
    self._args, self._name = args, name
    self._out = pathlib.Path(args.out)
    self._prompts: dict[str, list[asked.Asked]] = {}
    self._drawers: dict[str, Any] = {}
    self._seconds: dict[str, float] = {}
    self._images = 0
    self._there: rows.Reusable | None = None

  def ask(self, split: str, source: str, count: int) -> list[asked.Asked]:
    """Prompts, which become part of the identity."""
    self._prompts[split] = asked.open_asked(source, count)
    return self._prompts[split]

  def open(self, more: Mapping[str, Any]) -> None:
    """Opens the rows, for what the arguments name."""
    args = self._args
    models = {m: getattr(args, m, None) for m in _MODELS}
    models = {m: path for m, path in models.items() if path}
    hashes = {m: asked.model_hash(p, args.flux) for m, p in models.items()}
    for some in self._prompts.values():
      asked.check_sizes(some, list(models.values()))
    self._readers = reading.Readers(args.readers)
    self.callback(self._readers.close)
    self.identity = {
      "measures": self._name,
      "folders": {**models, "flux": args.flux},
      "models": hashes,
      "source": args.source,
      "prompts": {
        split: [len(some), asked.prompts_hash(some)]
        for split, some in self._prompts.items()
      },
      "seed": args.seed,
      "steps": args.steps,
      "samples": args.samples,
      "batch": args.batch,
      "engines": self._readers.engines,
      "drawing": [drawing.VERSION],
      **more,
    }
    path = files.rows_path(self._out, self._name)
    packed = files.kept_rows(self._out, self._name)
    if packed != path and packed.exists():
      raise InputError(
        f"{packed} is packed, and can't be added to; unpack it with gunzip, or "
        "use a new --out and name this one with --reuse"
      )
    if args.reuse:
      other = files.kept_rows(args.reuse, self._name)
      self._there = rows.reusable(other, self.identity)
      both = {drawing.VERSION, *self._there.drawings}
      self.identity["drawing"] = sorted(both)
    self.rows = rows.Rows(path, self.identity)
    self.callback(self.rows.close)
    for split, some in self._prompts.items():
      rows.write_prompts(files.prompts_path(self._out, self._name, split), some)

  def measure(self, settings, prompts) -> None:
    """Makes the rows that are missing."""
    unshown = self._take(settings)
    before = len(self.rows.found)
    measure.run(
      settings,
      prompts,
      self.rows,
      self._readers,
      self._drawer,
      images=self._args.batch,
      folder=self._out / "sheets" / self._name,
      unshown=unshown,
    )
    self._images += len(self.rows.found) - before

  def _take(self, settings):
    """Takes what is reused, sheets too: without one, its images are redrawn.

    Returns:
      Settings of which they can't be: keys drew others then.
    """
    if self._there is None:
      return []
    self.rows.add(measure.reused(self._there, settings).items())
    taken = [s for s in settings if s.model in self._there.models]
    for setting in taken:
      there, here = (
        measure.sheet_path(out / "sheets" / self._name, setting.name)
        for out in (self._args.reuse, self._out)
      )
      if there.exists() and not here.exists():
        make_folder(here.parent)
        with replacing(here) as part:
          shutil.copyfile(there, part)
    same = self._there.drawings == (drawing.VERSION,)
    return [] if same else [s.name for s in taken]

  def _drawer(self, name: str):
    """The drawer of a model; one is in memory at a time."""
    if name not in self._drawers:
      self._spent()
      self._drawers.clear()
      args = self._args
      path = getattr(args, name)
      model = loading.load(path, args.flux)
      # Hours may lie between: rows must not be another model's.
      if asked.model_hash(path, args.flux) != self.identity["models"][name]:
        raise InputError(
          f"--{name} {path} was changed since this command began; start again "
          "with another --out"
        )
      self._drawers[name] = drawing.Drawer(model, args.seed, args.steps)
    return self._drawers[name]

  def _spent(self):
    for drawer in self._drawers.values():
      for what, seconds in drawer.seconds.items():
        self._seconds[what] = self._seconds.get(what, 0.0) + seconds
        drawer.seconds[what] = 0.0

  def write(self, figures: Mapping[str, Any]) -> None:
    """Writes the figures, and says where."""
    path = files.figures_path(self._out, self._name)
    files.write_json(path, figures)
    self._spent()
    spent = {**self._seconds, **self._readers.seconds}
    if self._images:
      parts = ", ".join(f"{k} {s:.0f} s" for k, s in spent.items() if s)
      print(f"{self._images} images: {parts}", file=sys.stderr)
    print(f"{path}: {len(self.rows.found)} images")
