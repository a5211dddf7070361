"""Images at the sizes of aspect buckets, and those that previews show."""

import dataclasses
import math

import numpy as np
from PIL import Image

from xomni_jax.data import records
from xomni_jax.errors import InputError
from xomni_jax.train_config import TrainConfig

Grid = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Grids:
  """Aspect buckets: (rows, columns) of image tokens of `patch` px each."""

  sizes: tuple[Grid, ...]
  patch: int

  def bucket_of(self, width: int, height: int) -> Grid:
    """The grid whose shape is nearest to an image's."""
    if min(width, height) < 1:
      raise InputError(f"image is {width}x{height} px, expected at least 1x1")
    aspect = math.log(width / height)
    return min(self.sizes, key=lambda g: abs(math.log(g[1] / g[0]) - aspect))

  def pixels(self, image: Image.Image, grid: Grid | None) -> np.ndarray:
    """u8[H, W, 3] of a picture at a grid's size, resized as in inference.

    None: the first grid.
    """
    h, w = grid or self.sizes[0]
    size = (w * self.patch, h * self.patch)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))

  def blank(self, grid: Grid | None) -> np.ndarray:
    """u8[H, W, 3] of nothing."""
    h, w = grid or self.sizes[0]
    return np.zeros((h * self.patch, w * self.patch, 3), np.uint8)


def shown(cfg: TrainConfig, count: int) -> list[records.Record]:
  """The first held-out records of a run, for people to look at."""
  source_cfg = (cfg.eval_data or cfg.data).sources[0]
  source = records.open_source(source_cfg)
  first = source_cfg.first
  return [source[i] for i in range(first, min(first + count, len(source)))]
