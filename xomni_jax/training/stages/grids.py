"""Images at the sizes of aspect buckets, and records that previews show."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from xomni_jax.data import records
from xomni_jax.errors import InputError
from xomni_jax.train_config import SourceConfig, TrainConfig

Grid = tuple[int, int]
_TRIES = 16  # records that are read for one that is shown, at most


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


def shown(
  cfg: TrainConfig, count: int, make: Callable[[records.Record, int], Any]
) -> list[Any]:
  """`shown_of` the first held-out source of a run."""
  return shown_of((cfg.eval_data or cfg.data).sources[0], count, make)


def shown_of(
  cfg: SourceConfig, count: int, make: Callable[[records.Record, int], Any]
) -> list[Any]:
  """What is made of the first good records of a source, to look at.

  Args:
    cfg: of the source.
    count: records at most; there are fewer where few are good.
    make: record, its number -> what is shown. InputError: the record is no
      good; it is passed over as in training, which says so.
  Raises:
    InputError: the source can't be opened.
  """
  source, found = records.open_source(cfg), []
  used = cfg.count or len(source)
  last = min(cfg.first + min(used, _TRIES * count), len(source))
  for i in range(cfg.first, last):
    if len(found) == count:
      break
    try:
      found.append(make(source[i], i))
    except InputError:
      continue
  return found
