"""Stage `vae`: a KL autoencoder in FLUX's layout, by reconstruction.

For worlds without FLUX's own. What is compiled is in vae_program.py, rows are
in painting_rows.py; what it leaves is a FLUX.1-dev folder.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from xomni_jax.checkpoints import released
from xomni_jax.config import Architecture
from xomni_jax.data import pipeline, records
from xomni_jax.errors import InputError
from xomni_jax.flux_config import VAEConfig
from xomni_jax.inference import flux1, fresh
from xomni_jax.inference.sheets import Picture
from xomni_jax.mesh import to_host
from xomni_jax.models import vae
from xomni_jax.train_config import TrainConfig
from xomni_jax.training import pixels
from xomni_jax.training.stage import Params, Stage
from xomni_jax.training.stages.grids import shown
from xomni_jax.training.stages.painting_rows import CropRows
from xomni_jax.training.stages.vae_program import program

__all__ = ["fit_scale", "program", "stage"]

_PREVIEWS = 4
_SIDE = 512  # px of a preview at most: a page at 300 dpi would take 4.5 GB
_SCALE_BATCHES = 8  # that the latents' mean and deviation are taken over


def stage(cfg: TrainConfig, arch: Architecture) -> Stage:
  """The stage on the records and the folder that the config names.

  Args:
    cfg: of the run; `init.flux` is a FLUX.1-dev folder, whose autoencoder is
      where training starts.
    arch: sizes; those of the autoencoder are the folder's.
  """
  opened = flux1.open_flux1(cfg.init.flux)
  arch = dataclasses.replace(arch, vae=opened.vae)
  sides = _sides(cfg, arch.vae)

  def crops(data, seed, side):
    rows = CropRows(side, cfg.options.align)
    return pipeline.images(
      data,
      seed=seed,
      global_batch=cfg.global_batch,
      prepare=rows.prepare,
      blank=rows.blank,
      process=(jax.process_index(), jax.process_count()),
    )

  batches = lambda i: crops(
    cfg.phases[i].data or cfg.data, cfg.seed + i, sides[i]
  )
  held_out = cfg.eval_data and crops(cfg.eval_data, cfg.seed, sides[-1])

  def load(mesh, dtypes):
    if "vae" not in dtypes:  # a run that goes on has it in its checkpoint
      return {}
    part = flux1.parts_of(opened)["vae"]
    return {"vae": released.load(part, mesh, dtypes["vae"])}

  def export(params: Params, out: pathlib.Path):
    scale = None
    if cfg.options.fit_scale:
      data = held_out or batches(len(cfg.phases) - 1)
      some = (data[i].arrays["pixels"] for i in range(_SCALE_BATCHES))
      scale = fit_scale(params["vae"], some, arch.vae, cfg.compute)
    fresh.replace_flux1(opened.folder, out, {"vae": params["vae"]}, scale)

  preview = _Preview(cfg, arch.vae)
  return Stage(
    program=program(cfg, arch),
    batches=batches,
    held_out=held_out,
    load=load,
    preview=preview if cfg.report.preview_every else None,
    export=export,
  )


def _sides(cfg: TrainConfig, model: VAEConfig) -> tuple[int, ...]:
  """Sides of the crops of each phase."""
  sides, phases = cfg.options.crops, len(cfg.phases)
  if len(sides) not in (1, phases) or any(
    n < 1 or n % model.factor for n in sides
  ):
    raise InputError(
      f"options.crops is {sides}, expected one side, or one for each of the "
      f"{phases} phases, multiples of {model.factor} px"
    )
  return sides if len(sides) == phases else sides * phases


def fit_scale(
  params: Any, batches: Iterable[np.ndarray], cfg: VAEConfig, compute
) -> tuple[float, float]:
  """(scaling_factor, shift_factor) by which latents have mean 0, deviation 1.

  Args:
    params: of the autoencoder.
    batches: u8[B, H, W, 3] each.
    cfg, compute: the model.
  """

  @jax.jit
  def moments(params, image_bytes):
    """Mean and mean square of drawn latents."""
    mean, logvar = vae.encode(
      params, pixels.to_float(image_bytes), cfg, compute
    )
    return jnp.mean(mean), jnp.mean(jnp.square(mean) + jnp.exp(logvar))

  found = np.array([moments(params, x) for x in batches], np.float64)
  mean, square = found.mean(axis=0)
  return float(1 / math.sqrt(square - mean**2)), float(mean)


class _Preview:
  """Held-out images and what the autoencoder makes of them."""

  def __init__(self, cfg: TrainConfig, model: VAEConfig):
    self._cfg, self._model = cfg, model
    self._shown = None

    @jax.jit
    def rebuild(params, image_bytes):
      mean, _ = vae.encode(
        params, pixels.to_float(image_bytes), model, cfg.compute
      )
      return vae.to_bytes(vae.decode(params, mean, model, cfg.compute))

    self._rebuild = rebuild

  def __call__(self, params: Params, step: int) -> list[Picture]:
    """Whatever the step, the same images, so that progress shows."""
    del step
    if self._shown is None:
      self._shown = self._some_images()
    found = []
    for name, image in self._shown:
      made = to_host(self._rebuild(params["vae"], image[None]))[0]
      both = np.concatenate([image, made], axis=1)
      found.append(Picture(Image.fromarray(both), name))
    return found

  def _some_images(self):
    """(key, u8[H, W, 3]) of the first held-out records."""
    make = lambda record, _: (
      record["key"],
      _middle(records.image_of(record), self._model.factor),
    )
    return shown(self._cfg, _PREVIEWS, make)


def _middle(image: Image.Image, factor: int) -> np.ndarray:
  """u8[H, W, 3] of a picture, whole but for rims unless it is large."""
  # As in crops, what is smaller than a latent cell is enlarged.
  image = image.resize([max(n, factor) for n in image.size])
  w, h = (min(n, _SIDE) // factor * factor for n in image.size)
  left, top = (image.width - w) // 2, (image.height - h) // 2
  return np.asarray(image.crop((left, top, left + w, top + h)))
