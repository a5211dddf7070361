"""Rows of the decoder stage: an image, its caption, and what is left out."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from xomni_jax.data import records
from xomni_jax.errors import InputError
from xomni_jax.training.stages.grids import Grid, Grids

TextIds = Callable[[Sequence[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class PaintingRows:
  """What `data.pipeline.images` needs to make rows; grids are the buckets.

  Guidance contrasts codes and prompt with a branch that sees neither: an empty
  prompt, and zeros for features. So of the records that lose their prompt,
  half lose their features too; the other half teach to paint codes without a
  prompt, as `Model.decode(codes)` does.

  Attributes:
    clip_ids, t5_ids: tokenizers, texts -> i32[n, T].
    grids: aspect buckets.
    prompt_dropout: share of records that lose their prompt.
  """

  clip_ids: TextIds
  t5_ids: TextIds
  grids: Grids
  prompt_dropout: float

  def prepare(
    self, record: records.Record, rng: np.random.Generator, grid: Grid | None
  ) -> dict[str, np.ndarray]:
    """One row.

    Returns:
      pixels u8[H, W, 3], the whole image at the grid's size;
      clip_ids, t5_ids i32[T], of the caption or the prompt, whichever is
        drawn, or of the empty text;
      seen f32[], 0 where the decoder gets zeros for features, else 1.
    Raises:
      InputError: no image, or no text.
    """
    texts = [record[name] for name in ("text", "prompt") if record.get(name)]
    if not texts:
      raise InputError("has neither 'text' nor 'prompt', expected one of them")
    text = texts[rng.integers(len(texts))]
    dropped = rng.random() < self.prompt_dropout
    seen = not dropped or rng.random() < 0.5
    image = self.grids.pixels(records.image_of(record), grid)
    return self._row(image, "" if dropped else text, float(seen))

  def blank(self, grid: Grid | None) -> dict[str, np.ndarray]:
    """A row without anything to learn."""
    return self._row(self.grids.blank(grid), "", 0.0)

  def _row(self, pixels, text, seen):
    return {
      "pixels": pixels,
      "clip_ids": self.clip_ids([text])[0],
      "t5_ids": self.t5_ids([text])[0],
      "seen": np.float32(seen),
    }


@dataclasses.dataclass(frozen=True)
class CropRows:
  """Rows of the autoencoder's stage: square crops of images.

  Attributes:
    side: px.
    align: corners lie on multiples of it, px.
  """

  side: int
  align: int = 1

  def prepare(
    self, record: records.Record, rng: np.random.Generator, bucket: None
  ) -> dict[str, np.ndarray]:
    """pixels u8[side, side, 3], a crop at random of the image as it is.

    Only an image with a side below `side` is enlarged.
    """
    del bucket
    image = records.image_of(record)
    short = min(image.size)
    if short < self.side:
      size = [max(self.side, round(n * self.side / short)) for n in image.size]
      image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (
      self.align * int(rng.integers((n - self.side) // self.align + 1))
      for n in image.size
    )
    box = (left, top, left + self.side, top + self.side)
    return {"pixels": np.asarray(image.crop(box))}

  def blank(self, bucket: None) -> dict[str, np.ndarray]:
    """A row without anything to learn."""
    del bucket
    return {"pixels": np.zeros((self.side, self.side, 3), np.uint8)}
