"""Rows of the decoder stage: an image, its caption, and what is left out."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from xomni_jax.data import records
from xomni_jax.errors import InputError

Grid = tuple[int, int]
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
    grids: (rows, columns) of image tokens.
    patch: px.
    prompt_dropout: share of records that lose their prompt.
  """

  clip_ids: TextIds
  t5_ids: TextIds
  grids: tuple[Grid, ...]
  patch: int
  prompt_dropout: float

  def bucket_of(self, width: int, height: int) -> Grid:
    """The grid whose shape is nearest to an image's."""
    if min(width, height) < 1:
      raise InputError(f"image is {width}x{height} px, expected at least 1x1")
    aspect = math.log(width / height)
    return min(self.grids, key=lambda g: abs(math.log(g[1] / g[0]) - aspect))

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
    image = self.pixels(records.image_of(record), grid or self.grids[0])
    return self._row(image, "" if dropped else text, float(seen))

  def blank(self, grid: Grid | None) -> dict[str, np.ndarray]:
    """A row without anything to learn."""
    h, w = grid or self.grids[0]
    shape = (h * self.patch, w * self.patch, 3)
    return self._row(np.zeros(shape, np.uint8), "", 0.0)

  def pixels(self, image: Image.Image, grid: Grid) -> np.ndarray:
    """u8[H, W, 3] of a picture at a grid's size, resized as in inference."""
    h, w = grid
    size = (w * self.patch, h * self.patch)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))

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
  """

  side: int

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
    left, top = (int(rng.integers(n - self.side + 1)) for n in image.size)
    box = (left, top, left + self.side, top + self.side)
    return {"pixels": np.asarray(image.crop(box))}

  def blank(self, bucket: None) -> dict[str, np.ndarray]:
    """A row without anything to learn."""
    del bucket
    return {"pixels": np.zeros((self.side, self.side, 3), np.uint8)}
