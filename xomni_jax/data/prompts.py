"""Prompts of reinforcement learning, with what a reward has to know of them."""

import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from xomni_jax.data import plan, world
from xomni_jax.data.fields import world_of
from xomni_jax.errors import InputError
from xomni_jax.train_config import DataConfig, SourceConfig

_LANG = re.compile(r"([A-Za-z]{2,3})([-_][A-Za-z0-9]+)*")  # zh, zh-Hans_CN


class Prompt(NamedTuple):
  """What an image is asked for.

  Attributes:
    key: for messages.
    text: the prompt.
    targets: texts that the image should show, line by line; (): none.
    lang: of the targets, "en", "zh", ...
    size: (height, width) in px; None: the run's.
  """

  key: str
  text: str
  targets: tuple[str, ...] = ()
  lang: str = "en"
  size: tuple[int, int] | None = None


def open_prompts(path: str) -> Sequence[Prompt]:
  """Prompts by number.

  Args:
    path: "world:LEVEL[:SPLIT]", the drawn world (signs have the run's size,
      posters their own); or a JSONL file of
      {"prompt": "...", "targets": ["..."], "lang": "en", "size": [h, w],
      "key": "..."}, of which only the prompt is needed. Targets are named,
      never guessed from the prompt. Of a language's tag case and region do not
      count: "zh-CN" is "zh".
  Raises:
    InputError: no such file, or lines that are no prompts; the first ten.
  """
  if drawn := world_of(path):
    return _WorldPrompts(*drawn)
  file = pathlib.Path(path)
  if not file.is_file():
    raise InputError(
      f"prompts {path}: no such file; expected JSONL, or world:LEVEL"
    )
  found, problems = [], []
  try:
    lines = file.read_text(encoding="utf-8-sig").split("\n")
  except (OSError, UnicodeDecodeError) as e:
    raise InputError(
      f"prompts {path}: can't be read ({e}), expected lines of JSON in UTF-8"
    ) from None
  for number, line in enumerate(lines, 1):
    if line.strip():
      where = f"{file.name}:{number}"
      try:
        found.append(_prompt(json.loads(line), where))
      except (InputError, ValueError) as e:
        problems.append(f"line {number}: {' '.join(str(e).split())[:120]}")
  if problems or not found:
    raise InputError(
      f"prompts {path}: {'; '.join(problems[:10]) or 'the file has none'}"
    )
  return found


def _prompt(raw: Any, where: str) -> Prompt:
  if not isinstance(raw, dict):
    raise InputError(f"is a {type(raw).__name__}, expected an object")
  text, targets = raw.get("prompt"), raw.get("targets", [])
  lang, size = raw.get("lang", "en"), raw.get("size")
  texts = [text, lang, *(targets if isinstance(targets, list) else [None])]
  if not all(isinstance(x, str) and x.strip() for x in texts):
    raise InputError(
      "expected texts that are not empty: prompt, lang, and a list of targets"
    )
  for part in texts:
    # JSON can spell halves of characters.
    if not _is_unicode(part):
      raise InputError(f"{part!r} is no Unicode text, mend its \\u escapes")
  tag = _LANG.fullmatch(lang.strip())
  if not tag:
    raise InputError(
      f"lang is {lang[:20]!r}, expected a tag of 2 or 3 letters, such as en, "
      "zh or zh-CN"
    )
  if size is not None and not (
    isinstance(size, list)
    and len(size) == 2
    and all(type(n) is int and n > 0 for n in size)
  ):
    raise InputError(f"size is {size!r}, expected [height, width] in px")
  key = str(raw.get("key", where))
  lang, size = tag[1].lower(), size and tuple(size)
  return Prompt(key, text, tuple(targets), lang, size)


def _is_unicode(text: str) -> bool:
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


class _WorldPrompts:
  """Of the drawn world; one of its own wordings asks for each image."""

  def __init__(self, level: str, split: str):
    self._world = world.open_world(level, split)
    # Signs are also drawn at other sizes, by models too small for their own.
    self._sized = level == "posters"

  def __len__(self) -> int:
    return len(self._world)

  def __getitem__(self, i: int) -> Prompt:
    width, height = self._world.size(i)
    return Prompt(
      self._world.name(i),
      self._world.prompt(i),
      self._world.sign(i).lines,
      lang=self._world.lang,
      size=(height, width) if self._sized else None,
    )


class Prompts:
  """The prompts of each rollout: a function of seed and number."""

  def __init__(
    self,
    data: DataConfig,
    seed: int,
    count: int,
    sizes: Sequence[tuple[int, int]],
  ):
    """
    Args:
      data: the mixture; its sources have the task "prompt".
      seed: of the order.
      count: prompts of a rollout, all of one size.
      sizes: (height, width) in px that there are; the first is of prompts
        that name none. A prompt of another size is passed over; a line on
        standard error says how many are.
    Raises:
      InputError: sources that can't be opened, or have another task.
    """
    wrong = sorted({s.task for s in data.sources} - {"prompt"})
    if wrong:
      raise InputError(
        f"data of prompts has the tasks {', '.join(wrong)}, expected prompt"
      )
    self._sources = [open_prompts(source.path) for source in data.sources]
    self._sizes, self._count, self._window = sizes, count, data.window
    firsts, counts = zip(*map(_range, data.sources, self._sources), strict=True)
    for source, prompts in zip(data.sources, self._sources, strict=True):
      self._warn(source.path, prompts)
    self._mixture = plan.Mixture(
      firsts,
      counts,
      tuple(source.weight for source in data.sources),
      seed,
      data.shuffle,
    )
    self._windows = plan.Windows(
      self._sorted,
      f"raise data.window ({data.window}), or lower the number of sizes or of "
      f"prompts in a rollout ({count})",
    )

  def _warn(self, path, prompts):
    # Those of a level of the drawn world are of one size.
    every = isinstance(prompts, list)
    some = prompts if every else [prompts[0]]
    other = [p for p in some if (p.size or self._sizes[0]) not in self._sizes]
    if other:
      count = f"{len(other)} of {len(some)}" if every else "all"
      print(
        f"warning: prompts {path}: {count} are of sizes such as "
        f"{other[0].size}, which are not drawn here ({self._sizes})",
        file=sys.stderr,
        flush=True,
      )

  def __getitem__(self, rollout: int) -> list[Prompt]:
    """`count` prompts of one size, each with its size."""
    (_, places), _ = self._windows.unit(rollout)
    return [self._prompt(place) for place in places]

  def _sorted(self, window: int) -> plan.Window:
    """Prompts of a window in rollouts of one size."""
    first = window * self._window
    places = range(first, first + self._window)
    sizes = [self._prompt(place).size for place in places]
    sizes = [size if size in self._sizes else None for size in sizes]
    found, bad, dropped = plan.bucket(sizes, self._count)
    units = [(size, [first + n for n in of]) for size, of in found]
    return plan.Window(units, bad, dropped)

  def _prompt(self, place: int) -> Prompt:
    picks = self._mixture.picks(np.array([place]))
    prompt = self._sources[int(picks.source[0])][int(picks.record[0])]
    return prompt._replace(size=prompt.size or self._sizes[0])


def _range(cfg: SourceConfig, source) -> tuple[int, int]:
  """(first, count) of the prompts that are used."""
  count = cfg.count or len(source) - cfg.first
  if count < 1 or cfg.first + count > len(source):
    raise InputError(
      f"prompts {cfg.path}: first {cfg.first} and count {cfg.count} do not fit "
      f"{len(source)} prompts"
    )
  return cfg.first, count
