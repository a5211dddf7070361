"""The prompts of a measurement, and which models it is about."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from xomni_jax.data import world
from xomni_jax.data.fields import Record, world_of
from xomni_jax.data.prompts import open_prompts
from xomni_jax.errors import InputError
from xomni_jax.inference import arguments, checkpoint, shipped
from xomni_jax.inference.fingerprint import fingerprint
from xomni_jax.rewards import text_scores


class Asked(NamedTuple):
  """A prompt of a measurement.

  Attributes:
    text: the prompt.
    targets: texts that the image should show, line by line.
    lang: of the targets.
    size: (height, width) in px.
    kind: of text, by which results are split; "": they are not.
  """

  text: str
  targets: tuple[str, ...]
  lang: str
  size: tuple[int, int]
  kind: str


def open_asked(source: str, count: int) -> list[Asked]:
  """The first `count` prompts of a source.

  Args:
    source: see `data.prompts.open_prompts`.
  Raises:
    InputError: there are not so many, or one has no targets or no size.
  """
  prompts, drawn = open_prompts(source), _world(source)
  if count < 1 or count > len(prompts):
    raise InputError(
      f"count is {count}, expected 1 to the {len(prompts)} prompts of {source}"
    )
  found, problems = [], []
  # What scores compare is without punctuation.
  scored = lambda p: text_scores.text_reward("", p.targets, p.lang, False)
  for i in range(count):
    prompt, kind, size = prompts[i], "", prompts[i].size
    if drawn:
      kind, size = world.kind(drawn.sign(i)), drawn.size(i)[::-1]
    if size is None or not scored(prompt):
      problems.append(prompt.key)
      continue
    found.append(Asked(prompt.text, prompt.targets, prompt.lang, size, kind))
  if problems:
    raise InputError(
      f"{source}: {len(problems)} prompts lack a size in px, or targets with "
      f"letters or digits ({', '.join(problems[:5])}); add both to each line"
    )
  return found


def true_records(source: str, indices: Sequence[int]) -> list[Record]:
  """Records of the drawn world: images, captions, questions."""
  drawn = _world(source)
  return [drawn[i] for i in indices]


def shown(source: str, indices: Sequence[int]) -> list[Any]:
  """The signs or posters of the drawn world that prompts ask for."""
  drawn = _world(source)
  return [drawn.sign(i) for i in indices]


def true_images(source: str, indices: Sequence[int]) -> list[Image.Image]:
  """What prompts of the drawn world ask for, spelt as they ask for it."""
  drawn = _world(source)
  return [drawn.picture(i) for i in indices]


def has_images(source: str) -> bool:
  """Whether `true_images` knows the source."""
  return world_of(source) is not None


def _world(source):
  drawn = world_of(source)
  return drawn and world.open_world(*drawn)


def as_json(asked: Asked) -> dict[str, Any]:
  """The prompt as a line of a file; `from_json` is its inverse."""
  return asked._asdict()


def from_json(raw: Mapping[str, Any]) -> Asked:
  """See `as_json`."""
  return Asked(
    **{**raw, "targets": (*raw["targets"],), "size": (*raw["size"],)}
  )


def check_sizes(asked: Sequence[Asked], models: Sequence[str]) -> None:
  """InputError where a model can't draw a size, before hours are spent."""
  sizes = sorted({a.size for a in asked})
  for model in models:
    decoder = checkpoint.open_checkpoint(model).config.decoder
    for size in sizes:
      try:
        arguments.grid_of(size, decoder.upscale_factor)
      except InputError as e:
        (text, *_) = [a.text for a in asked if a.size == size]
        raise InputError(f"prompt {text[:60]!r}: {e}") from None


def prompts_hash(asked: Sequence[Asked]) -> str:
  """16 hex digits of all that is asked."""
  lines = json.dumps([as_json(a) for a in asked])
  return hashlib.sha256(lines.encode()).hexdigest()[:16]


def model_hash(model: str, flux: str | None) -> str:
  """16 hex digits of a model that paints, see `fingerprint`.

  Args:
    model: as for `xomni_jax.load`.
    flux: likewise; None: the model brings its own.
  Raises:
    InputError: the files do not make a model.
  """
  if flux is None and shipped.find(model) is None:
    raise InputError(
      f"painting what {model} draws needs FLUX.1-dev's parts; name them with "
      "--flux"
    )
  return fingerprint(model, flux or model)
