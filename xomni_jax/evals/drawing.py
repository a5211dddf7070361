"""Whole batches of images, drawn and painted by one model.

An image depends on the seed, the number of its prompt and its own number
alone: models and settings are compared under the same random keys.
"""

import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from xomni_jax.data import images, protocol
from xomni_jax.evals.asked import Asked
from xomni_jax.inference import arguments, flow, painter
from xomni_jax.inference.pipeline import Model
from xomni_jax.inference.sampling import Sampling
from xomni_jax.mesh import to_host

# Which draws a key makes; to be raised where code makes others of the same key.
# 0: padding had a part in them, so that a batch's longest prompt did.
VERSION = 1

_DRAW, _PAINT = range(2)  # what keys are for
_PARTS = ("vq", "flux", "vae", "clip", "t5")


class Drawer:
  """A model at work.

  Attributes:
    seconds: spent on "draw" and "paint", compilation included.
  """

  def __init__(self, model: Model, seed: int, steps: int):
    """
    Args:
      model: with its decoder.
      seed: of codes and of noise.
      steps: of denoising.
    Raises:
      InputError: the model has no decoder.
    """
    self._model, self._seed, self._steps = model, seed, steps
    self._painter, self._arch = model.painter, model.architecture
    self.seconds = {"draw": 0.0, "paint": 0.0}

  def draw(
    self,
    asked: Sequence[Asked],
    numbers: Sequence[int],
    samples: int,
    how: Sampling,
  ) -> np.ndarray:
    """Images u8[prompts * samples, H, W, 3] of prompts of one size.

    Args:
      asked: the prompts.
      numbers: of the prompts, for the keys.
      samples: images a prompt; they are adjacent.
      how: codes are drawn.
    """
    start = time.perf_counter()
    model = self._model
    grid = arguments.grid_of(asked[0].size, model.pixels_per_token)
    ids = [model.tokenizer.encode(a.text) for a in asked]
    prefix = model.tokenizer.encode(protocol.image_prefix(*grid))
    longest = max(map(len, ids)) + len(prefix) + grid[0] * grid[1]
    arguments.fits_positions(longest, model.config.ar)
    keys = self._keys(numbers, samples, _DRAW)
    codes = model.draw_codes(ids, grid, how, keys).token
    self.seconds["draw"] += time.perf_counter() - start
    repeated = [a for a in asked for _ in range(samples)]
    noise = self._keys(numbers, samples, _PAINT)
    return self._paint(codes.reshape(-1, *grid), repeated, noise)

  def repaint(
    self,
    pictures: Sequence[Image.Image],
    asked: Sequence[Asked],
    numbers: Sequence[int],
  ) -> np.ndarray:
    """Images u8[n, H, W, 3] painted from the codes of pictures of one size.

    The noise is that of each prompt's first sample.
    """
    start = time.perf_counter()
    transform = self._model.config.transform
    pixels = [images.preprocess(picture, transform) for picture in pictures]
    codes = self._model.encode_pixels(np.stack(pixels))
    self.seconds["draw"] += time.perf_counter() - start
    return self._paint(codes, asked, self._keys(numbers, 1, _PAINT))

  def _paint(self, codes, asked, keys):
    start = time.perf_counter()
    model, grid = self._model, codes.shape[1:]
    # The decoder reads a prompt as the vocabulary spells it.
    spell = lambda text: model.tokenizer.text(model.tokenizer.encode(text))
    texts = [spell(a.text) for a in asked]
    scale = model.config.decoder.cfg_scale
    texts += [""] * len(texts) if scale != 1 else []
    levels = flow.sigmas(
      self._painter.cfg.scheduler, grid[0] * grid[1], self._steps
    )
    with jax.set_mesh(model.mesh):
      made = painter.paint_rows(
        {name: model.params[name] for name in _PARTS},
        codes.reshape(len(codes), -1),
        self._painter.t5_ids(texts),
        self._painter.clip_ids(texts),
        keys,
        levels,
        arch=self._arch,
        compute=model.compute,
        grid=tuple(grid),
        cfg_scale=float(scale),
      )
    made = to_host(made)
    self.seconds["paint"] += time.perf_counter() - start
    return made

  def _keys(self, numbers, samples, use):
    with jax.set_mesh(self._model.mesh):  # keys belong to a mesh as well
      # np.uint32: a seed of 2^31 and more is no int32.
      return _keys(np.uint32(self._seed), jnp.asarray(numbers), use, samples)


@functools.partial(jax.jit, static_argnames=("samples",))
def _keys(seed, numbers, use, samples):
  """[n * samples] keys of the images of prompts i32[n]."""
  fold = jax.random.fold_in
  key = fold(jax.random.key(seed), use)
  of_prompt = lambda n: jax.vmap(lambda s: fold(fold(key, n), s))(
    jnp.arange(samples)
  )
  return jax.vmap(of_prompt)(numbers).reshape(-1)
