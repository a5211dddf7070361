"""Pictures of a rollout: prompts x samples, with what the rewards said."""

import io
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from xomni_jax.data.prompts import Prompt
from xomni_jax.inference.sheets import Picture
from xomni_jax.rewards.wire import Score

_PROMPTS, _SAMPLES = 4, 4  # that are shown
_CAPTION = "caption"


def pictures(
  images: Mapping[int, np.ndarray],
  scores: Mapping[str, Mapping[int, Score]],
  prompts: Sequence[Prompt | None],
  group_size: int,
) -> list[Picture]:
  """The first images of the first prompts; all processes call it alike.

  Args:
    images: {row: u8[H, W, 3]} that this process has painted.
    scores: {reward's name: {row: its score}}, of the same rows.
    prompts: of all rows, those of a group adjacent; None: it was cut.
    group_size: samples of a prompt.
  """
  rows = [
    row
    for row in range(len(prompts))
    if row // group_size < _PROMPTS and row % group_size < _SAMPLES
  ]

  def picture(row):
    if row not in images:
      return None
    first = prompts[row] and row % group_size == 0
    title = [prompts[row].text] if first else []
    said = [f"{name}: {_said(of[row])}" for name, of in scores.items()]
    caption = "\n".join([*title, *said])
    # JSON of a server can spell halves of characters, which no file can hold.
    caption = caption.encode("utf-8", "replace").decode()
    return Picture(Image.fromarray(images[row]), caption)

  found = [picture(row) for row in rows]
  if jax.process_count() > 1:
    found = _gathered(found)
  return [picture for picture in found if picture]


def _said(score) -> str:
  """A score and what was read, for people."""
  if score.score is None:
    return score.error_kind or "none"
  raw = score.raw if isinstance(score.raw, dict) else {}
  read = " / ".join(str(raw.get("text", "")).split("\n"))
  return f"{score.score:.2f} {read}".strip()


def _gathered(pictures):
  """Pictures of all processes, each of the process that has it."""
  files = [_png(p) if p else b"" for p in pictures]
  sizes = multihost_utils.process_allgather(np.array([*map(len, files)]))
  found = []
  for file, owner, size in zip(
    files, sizes.argmax(0), sizes.max(0), strict=True
  ):
    # One after the other, since each goes through the devices of all.
    data = np.frombuffer(file.ljust(size, b"\0")[:size], np.uint8)
    data = multihost_utils.process_allgather(data)[owner]
    image = Image.open(io.BytesIO(data.tobytes()))
    image.load()
    found.append(Picture(image, image.text[_CAPTION]))
  return found


def _png(picture) -> bytes:
  """An image with its caption in the file."""
  info, out = PngInfo(), io.BytesIO()
  info.add_itxt(_CAPTION, picture.caption)
  picture.image.save(out, "PNG", pnginfo=info)
  return out.getvalue()
