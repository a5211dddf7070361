"""The diffusion decoder's loop: sigmas, guidance and Euler steps.

Shape letters: B images, L image tokens, C packed channels, Z feature channels.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from xomni_jax.config import Compute
from xomni_jax.flux_config import FluxConfig, SchedulerConfig
from xomni_jax.mesh import constrain
from xomni_jax.models.flux import Flux

GUIDANCE = 1.0  # X-Omni decodes with the distilled guidance switched off


def sigmas(cfg: SchedulerConfig, tokens: int, steps: int) -> np.ndarray:
  """Noise levels f32[steps + 1], falling from near 1 to 0.

  Source: FlowMatchEulerDiscreteScheduler of diffusers with dynamic shifting.
  """
  levels = np.linspace(1.0, 1.0 / steps, steps, dtype=np.float32)
  by = shift(cfg, tokens)
  levels = by / (by + (1 / levels - 1))
  return np.append(levels, 0).astype(np.float32)


def shift(cfg: SchedulerConfig, tokens: int) -> float:
  """How far noise levels of an image of `tokens` image tokens are moved up.

  It is exp(mu), where mu grows linearly with the number of tokens, beyond the
  configured range too. A level s becomes shift / (shift + 1 / s - 1).
  """
  slope = (cfg.max_shift - cfg.base_shift) / (
    cfg.max_image_seq_len - cfg.base_image_seq_len
  )
  return math.exp(cfg.base_shift + slope * (tokens - cfg.base_image_seq_len))


@jax.jit
def pack(latents: jax.Array) -> jax.Array:
  """[B, C, 2h, 2w] -> [B, h*w, 4C]: channel c * 4 + 2 * row + column."""
  B, C, H, W = latents.shape
  x = latents.reshape(B, C, H // 2, 2, W // 2, 2)
  x = x.transpose(0, 2, 4, 1, 3, 5).reshape(B, H * W // 4, 4 * C)
  return constrain(x, "batch", "length", None)


def unpack(packed: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """[B, h*w, 4C] -> [B, 2h, 2w, C], channels last for the autoencoder."""
  h, w = grid
  B, _, C = packed.shape
  x = packed.reshape(B, h, w, C // 4, 2, 2)
  return x.transpose(0, 1, 4, 2, 5, 3).reshape(B, 2 * h, 2 * w, C // 4)


@partial(
  jax.jit,
  static_argnames=("cfg", "compute", "grid", "cfg_scale"),
  donate_argnames=("latents",),
)
def euler_step(
  params: dict,
  latents: jax.Array,
  level: jax.Array,
  next_level: jax.Array,
  text: jax.Array,
  pooled: jax.Array,
  features: jax.Array,
  *,
  cfg: FluxConfig,
  compute: Compute,
  grid: tuple[int, int],
  cfg_scale: float,
) -> jax.Array:
  """The latents one noise level further.

  Args:
    params: of the FLUX transformer.
    latents: f32[B, L, C], packed.
    level, next_level: f32[], sigmas.
    text: [2B, T, E], T5 features of the prompts, then of the empty prompt;
      [B, T, E] without guidance.
    pooled: [2B, P] or [B, P], CLIP's, likewise.
    features: [B, L, Z], semantic features; the negative branch sees zeros.
    cfg, compute: the model.
    grid: (rows, columns) of image tokens.
    cfg_scale: guidance v_neg + s * (v - v_neg); 1: no negative branch.
  """
  v = velocity(
    params,
    latents,
    level,
    text,
    pooled,
    features,
    cfg=cfg,
    compute=compute,
    grid=grid,
    cfg_scale=cfg_scale,
  )
  # Laid out as they came, or the next step would be a new program.
  return constrain(latents + (next_level - level) * v, "batch", "length", None)


def velocity(
  params,
  latents,
  level,
  text,
  pooled,
  features,
  *,
  cfg,
  compute,
  grid,
  cfg_scale,
) -> jax.Array:
  """Guided velocity f32[B, L, C]; arguments as for `euler_step`."""
  if cfg_scale != 1:
    latents = jnp.concatenate([latents, latents])
    features = jnp.concatenate([features, jnp.zeros_like(features)])
  rows = latents.shape[0]
  v = (
    Flux(cfg, compute)
    .apply(
      {"params": params},
      latents,
      text,
      pooled,
      jnp.full(rows, level),
      jnp.full(rows, GUIDANCE),
      grid,
      features,
    )
    .astype(jnp.float32)
  )
  if cfg_scale == 1:
    return v
  v, negative = jnp.split(v, 2)
  return negative + cfg_scale * (v - negative)
