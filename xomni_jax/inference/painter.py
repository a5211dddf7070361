"""The diffusion decoder at work: semantic features and a prompt to an image."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from xomni_jax.config import Architecture, Compute
from xomni_jax.data import encoder_ids
from xomni_jax.data.boundary import array
from xomni_jax.errors import InputError
from xomni_jax.inference import checkpoint, flow
from xomni_jax.mesh import constrain, to_host
from xomni_jax.models import text_encoders, vae, vq


class Painter:
  """FLUX transformer, autoencoder and text encoders of one model.

  Attributes:
    cfg: configs, and the folder of the tokenizers.
    t5_ids, clip_ids: prompts -> i32[n, T].
  """

  def __init__(
    self,
    opened: checkpoint.Decoder,
    params: dict[str, Any],
    compute: Compute,
    progress: bool,
    text_len: int | None = None,
  ):
    """
    Args:
      opened: configs, and the folder of the tokenizers.
      params: {"flux", "vae", "clip", "t5": tree}.
      compute, progress: how, and whether a bar is shown.
      text_len: T5 ids of a prompt; None: as the folder says.
    """
    self.cfg = opened
    self._params = params
    self._compute = compute
    self._progress = progress
    self.clip_ids = encoder_ids.load_clip_tokenizer(
      opened.folder / "tokenizer", opened.clip.max_position_embeddings
    )
    self.t5_ids = encoder_ids.load_t5_tokenizer(
      opened.folder / "tokenizer_2", text_len
    )
    self._embedded: dict[tuple[str, ...], tuple[jax.Array, jax.Array]] = {}

  def paint(
    self,
    features: jax.Array,
    grid: tuple[int, int],
    prompt: str,
    *,
    steps: int,
    cfg_scale: float,
    seed: int,
    noise,
  ) -> np.ndarray:
    """One image u8[H, W, 3]; arguments as for `Model.decode`.

    Args:
      features: [1, h*w, Z], of the codes.
      grid: (h, w).
    """
    if type(steps) is not int or steps < 1:
      raise InputError(f"steps is {steps!r}, expected a whole number from 1")
    if not 1 <= cfg_scale < float("inf"):
      raise InputError(f"cfg_scale is {cfg_scale}, expected at least 1")
    text, pooled = self.embed((prompt,) if cfg_scale == 1 else (prompt, ""))
    latents = flow.pack(jnp.asarray(self._noise(grid, seed, noise)))
    levels = flow.sigmas(self.cfg.scheduler, grid[0] * grid[1], steps)
    bar = tqdm(
      range(steps), desc="denoising", unit="step", disable=not self._progress
    )
    for i in bar:
      latents = flow.euler_step(
        self._params["flux"],
        latents,
        levels[i],
        levels[i + 1],
        text,
        pooled,
        features,
        cfg=self.cfg.flux,
        compute=self._compute,
        grid=grid,
        cfg_scale=float(cfg_scale),
      )
      if self._progress:
        latents.block_until_ready()  # the bar shows work done, not queued
    image = _image(
      self._params["vae"],
      latents,
      grid=grid,
      cfg=self.cfg.vae,
      compute=self._compute,
    )
    return to_host(image)[0]

  def embed(self, prompts: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """T5 features [n, T, E] and pooled CLIP vectors [n, P] of prompts."""
    if prompts not in self._embedded:
      # Only the last are kept: the images of one prompt are painted in turn.
      self._embedded = {
        prompts: _embed(
          self._params["t5"],
          self._params["clip"],
          self.t5_ids(list(prompts)),
          self.clip_ids(list(prompts)),
          t5=self.cfg.t5,
          clip=self.cfg.clip,
          compute=self._compute,
        )
      }
    return self._embedded[prompts]

  def _noise(self, grid, seed, noise) -> np.ndarray:
    """f32[1, C, 2h, 2w]: `noise`, or drawn."""
    h, w = grid
    shape = (1, self.cfg.vae.latent_channels, 2 * h, 2 * w)
    if noise is None:
      # On the host: the same noise on every kind of device.
      return np.random.default_rng(seed).standard_normal(shape, np.float32)
    noise = array("noise", noise, f"finite f32{list(shape)}", np.float32)
    if noise.shape != shape or not np.isfinite(noise).all():
      raise InputError(
        f"noise is {list(noise.shape)}, expected finite {list(shape)} for "
        f"{h} x {w} codes"
      )
    return noise


@partial(jax.jit, static_argnames=("t5", "clip", "compute"))
def _embed(t5_params, clip_params, t5_ids, clip_ids, *, t5, clip, compute):
  """T5 features [B, T, E] and pooled CLIP vectors [B, P]."""
  text = text_encoders.T5Encoder(t5, compute).apply(
    {"params": t5_params}, t5_ids
  )
  _, pooled = text_encoders.CLIPText(clip, compute).apply(
    {"params": clip_params}, clip_ids
  )
  return text, pooled


@partial(jax.jit, static_argnames=("grid", "cfg", "compute"))
def _image(vae_params, latents, *, grid, cfg, compute):
  """u8[B, H, W, 3] of packed latents."""
  latents = vae.from_model_space(flow.unpack(latents, grid), cfg)
  return vae.to_bytes(vae.decode(vae_params, latents, cfg, compute))


@partial(
  jax.jit,
  static_argnames=("arch", "compute", "grid", "cfg_scale"),
)
def paint_rows(
  params: dict[str, Any],
  codes: jax.Array,
  t5_ids: jax.Array,
  clip_ids: jax.Array,
  keys: jax.Array,
  levels: jax.Array,
  *,
  arch: Architecture,
  compute: Compute,
  grid: tuple[int, int],
  cfg_scale: float = 1.0,
) -> jax.Array:
  """Many images in one program, each as if it were painted alone.

  Args:
    params: {"vq", "flux", "vae", "clip", "t5": tree}.
    codes: i32[B, h*w].
    t5_ids, clip_ids: i32[B, T], of the prompts; with guidance i32[2 B, T], of
      the empty prompt behind them.
    keys: [B], of the noise.
    levels: f32[steps + 1], of `flow.sigmas`.
    arch, compute: the models.
    grid: (h, w).
    cfg_scale: guidance; 1: none.
  Returns:
    u8[B, H, W, 3].
  """
  h, w = grid
  features = vq.VQ(arch.vq, compute).apply(
    {"params": params["vq"]}, codes.reshape(-1, h, w), method="decode"
  )
  features = features.reshape(len(features), h * w, -1)
  text, pooled = _embed(
    params["t5"],
    params["clip"],
    t5_ids,
    clip_ids,
    t5=arch.t5,
    clip=arch.clip,
    compute=compute,
  )
  shape = (arch.vae.latent_channels, 2 * h, 2 * w)
  noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)

  def step(latents, pair):
    v = flow.velocity(
      params["flux"],
      latents,
      pair[0],
      text,
      pooled,
      features,
      cfg=arch.flux,
      compute=compute,
      grid=grid,
      cfg_scale=cfg_scale,
    )
    latents = latents + (pair[1] - pair[0]) * v
    return constrain(latents, "batch", "length", None), None

  pairs = jnp.stack([levels[:-1], levels[1:]], axis=1)
  latents, _ = jax.lax.scan(step, flow.pack(noise), pairs)
  image = _image(
    params["vae"], latents, grid=grid, cfg=arch.vae, compute=compute
  )
  return constrain(image, "batch", None, None, None)
