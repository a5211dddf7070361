"""Whether drawn images have the colours that their prompts name, by pixels.

Rewards that read text do not see colours: what RL would do to them for its
reward's sake shows here.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from xomni_jax.data import world, world_paint
from xomni_jax.errors import InputError
from xomni_jax.evals import best_of_n, measure, stats
from xomni_jax.evals.asked import Asked, shown, true_records
from xomni_jax.evals.drawing import Drawer
from xomni_jax.inference import sheets
from xomni_jax.inference.sampling import Sampling

NAME = "colours"
BOARD, TEXT, FIRST, ALL = "board", "text", "first line", "all"
_ROLES = (ALL, BOARD, TEXT, FIRST)
_NAMES = tuple(world_paint.COLOURS)
_RGB = np.array([world_paint.COLOURS[name] for name in _NAMES], np.float32)
# Half of what the two colours that are most alike are apart.
_FAR = 0.5 * min(
  float(np.linalg.norm(a - b))
  for i, a in enumerate(_RGB)
  for b in _RGB[i + 1 :]
)
_SHOWN = 32  # wrong images on a sheet


class Wanted(NamedTuple):
  """What a prompt says of colours.

  Attributes:
    colours: {role: of COLOURS} of those that it names.
    boxes: {role: [x0, y0, x1, y1] in px of each of its lines}.
  """

  colours: dict[str, str]
  boxes: dict[str, list[tuple[int, int, int, int]]]


def check_names(source: str) -> None:
  """InputError unless the prompts of a source name colours in English."""
  if source.split(":")[:2] not in (["world", "signs"], ["world", "posters"]):
    raise InputError(
      f"--source is {source}, expected world:signs:SPLIT or "
      "world:posters:SPLIT, whose prompts name colours in English"
    )


def settings(source: str, models: Sequence[str]) -> list[measure.Setting]:
  """All that is looked at: true drawings, and one image a prompt of models."""
  ceilings = [
    measure.Setting(best_of_n.TRUE, "", source),
    measure.Setting(best_of_n.REPAINTED, best_of_n.SFT, source),
  ]
  drawn = [
    measure.Setting(f"{model} T=1", model, source, how=Sampling())
    for model in models
  ]
  return ceilings + drawn


def read(image: np.ndarray, boxes: Sequence[Sequence[int]]) -> list[str]:
  """Colour of the board, and of what stands on it in each box.

  A pixel has the colour of COLOURS that it is nearest to, or none if it is as
  far from it as another colour may be. The board has most of the image's
  pixels; what stands on it, most of the box's that are not the board's.

  Args:
    image: u8[H, W, 3].
    boxes: [x0, y0, x1, y1] in px.
  Returns:
    Names; "": there is nothing.
  """
  apart = np.linalg.norm(image[:, :, None].astype(np.float32) - _RGB, axis=-1)
  nearest = np.where(apart.min(-1) < _FAR, apart.argmin(-1), len(_NAMES))

  def most(labels, but=None):
    counts = np.bincount(labels.ravel(), minlength=len(_NAMES) + 1)
    counts[-1] = 0
    if but:
      counts[_NAMES.index(but)] = 0
    return _NAMES[counts.argmax()] if counts.any() else ""

  board = most(nearest)
  return [board, *(most(nearest[b:d, a:c], board) for a, b, c, d in boxes)]


def wanted(record: Mapping[str, Any], board: str, lines: list[str]) -> Wanted:
  """What the prompt of a record names; a wording may leave colours out.

  Args:
    record: with "prompt" and "boxes".
    board: its colour.
    lines: colour of each line.
  """
  said = re.sub('"[^"]*"', "", record["prompt"])
  named = set(re.findall("[a-z]+", said.lower()))
  colours = {BOARD: board}
  boxes: dict[str, list] = {BOARD: []}
  for colour, (_, *box) in zip(lines, record["boxes"], strict=True):
    # Further lines are alike, so that another colour is the first line's own.
    role = TEXT if colour == lines[-1] else FIRST
    colours[role] = colour
    boxes.setdefault(role, []).append(tuple(box))
  asked = {role: c for role, c in colours.items() if c in named}
  return Wanted(asked, {role: boxes[role] for role in asked})


def right(image: np.ndarray, of: Wanted) -> tuple[dict[str, float], str]:
  """What is as the prompt says, and what is not in words.

  Returns:
    {role or ALL: 1.0 or 0.0, NaN where the prompt names nothing}.
    "": nothing is wrong.
  """
  found, wrong = {}, []
  for role, colour in of.colours.items():
    board, *lines = read(image, of.boxes[role])
    seen = [board] if role == BOARD else lines
    found[role] = float(all(c == colour for c in seen))
    if not found[role]:
      there = ", ".join(c or "nothing" for c in seen)
      wrong.append(f"{role}: {there}, not {colour}")
  every = float(min(found.values())) if found else np.nan
  made = {role: found.get(role, np.nan) for role in _ROLES} | {ALL: every}
  return made, "; ".join(wrong)


def look(
  some: Sequence[measure.Setting],
  asked: Sequence[Asked],
  drawer: Callable[[str], Drawer],
  batch: int,
  bar: tqdm,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, list[sheets.Picture]]]:
  """Draws all images and looks at their colours.

  Args:
    some: see `settings`.
    asked: the prompts.
    drawer: by a model's name.
    batch: images drawn at once.
    bar: counts images.
  Returns:
    {setting: {role: f64[prompts], NaN where the prompt does not name it}}.
    {setting: the first images with a wrong colour, at most 32}.
  """
  numbers = range(len(asked))
  source = some[0].source
  prompts = [
    wanted(record, sign.board, world.colours(sign))
    for record, sign in zip(
      true_records(source, numbers), shown(source, numbers), strict=True
    )
  ]
  found, wrong = {}, {}
  for setting in some:
    values = {role: np.full(len(asked), np.nan) for role in _ROLES}
    pictures = wrong.setdefault(setting.name, [])
    for part in measure.batches(setting, asked, batch):
      images = measure.draw(part, asked, drawer, batch)
      for n, image in zip(part.numbers, images, strict=True):
        made, said = right(image, prompts[n])
        for role, value in made.items():
          values[role][n] = value
        if said and len(pictures) < _SHOWN:
          text = f"{asked[n].text}\n{said}"
          pictures.append(sheets.Picture(Image.fromarray(image), text))
      bar.update(len(part.numbers))
    found[setting.name] = values
  return found, wrong


def summary(
  identity: Mapping[str, Any],
  found: Mapping[str, Mapping[str, np.ndarray]],
  kinds: Sequence[str],
) -> dict[str, Any]:
  """The figures as JSON.

  Args:
    identity: what was measured.
    found: see `look`.
    kinds: of the prompts' texts.
  Returns:
    right: {setting: {role: {kind: Estimate}}}.
    differences: the same, of "rl T=1" minus each other model.
  """
  roles = [
    role
    for role in _ROLES
    if any(np.isfinite(of[role]).any() for of in found.values())
  ]
  after = f"{best_of_n.RL} T=1"
  columns = {
    ("right", name, role): of[role]
    for name, of in found.items()
    for role in roles
  }
  columns |= {
    ("differences", name, role): found[after][role] - of[role]
    for name, of in found.items()
    if name != after
    for role in roles
  }
  made = stats.by_kind(columns, kinds, signed=("differences",))
  return {"identity": dict(identity), **made}
