"""What stage `decoder` compiles: flow matching on the autoencoder's latents.

Image -> ViT -> codes -> features, which the FLUX transformer sees beside the
prompt while it learns the velocity from noisy latents of the same image to
noise. Shape letters: B images, L = h*w image tokens, C packed channels, Z
feature channels.
Source: flow matching as FLUX has it (arXiv:2403.03206, rectified flow with
logit-normal times); X-Omni (arXiv:2507.22058), section 3.3.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xomni_jax.config import Architecture
from xomni_jax.flux_config import SchedulerConfig
from xomni_jax.inference import flow, flux1, initial
from xomni_jax.inference.fresh import FLUX_SCHEDULER
from xomni_jax.models import flux, siglip, text_encoders, vae, vq
from xomni_jax.params import flatten
from xomni_jax.train_config import TrainConfig
from xomni_jax.training import flops, pixels
from xomni_jax.training.stage import (
  Batch,
  Context,
  Params,
  Part,
  Program,
  row_keys,
)
from xomni_jax.training.stages import vae_program

PARTS = ("flux", "vq", "siglip", "vae", "clip", "t5")

_QUARTERS = 4


def program(
  cfg: TrainConfig,
  arch: Architecture,
  scheduler: SchedulerConfig = FLUX_SCHEDULER,
) -> Program:
  """The compiled part; nothing is read.

  Rows are those of `painting_rows.PaintingRows`, `id` and `real`. A batch is of
  one of `options.grids`; the largest is what counts of work and shapes are for.

  Args:
    cfg: of the run.
    arch: sizes; all but `ar` count here.
    scheduler: the shift of noise levels by image size.
  """
  opts, rows = cfg.options, cfg.global_batch
  h, w = max(opts.grids, key=math.prod)
  patch = arch.siglip.patch
  shape = lambda dtype, *dims: jax.ShapeDtypeStruct((rows, *dims), dtype)
  parts = {
    "flux": Part(flux.rows(arch.flux), flux.abstract(arch.flux)),
    "vq": Part(vq.rows(arch.vq), vq.abstract(arch.vq)),
    "siglip": Part(siglip.rows(arch.siglip), siglip.abstract(arch.siglip)),
    **{
      name: Part(*table)
      for name, table in flux1.tables_of(arch.vae, arch.clip, arch.t5).items()
    },
  }
  return Program(
    parts=parts,
    init=lambda key: initial.draw(arch, key, PARTS),
    totals=lambda batch: {"rows": jnp.sum(batch["real"])},
    loss=_loss(cfg, arch, scheduler),
    batch={
      "pixels": shape(jnp.uint8, h * patch, w * patch, 3),
      "clip_ids": shape(jnp.int32, arch.clip.max_position_embeddings),
      "t5_ids": shape(jnp.int32, opts.text_len),
      "seen": shape(jnp.float32),
      "id": shape(jnp.int32),
      "real": shape(jnp.float32),
    },
    tokens=rows * h * w,
    flops=rows * _flops(cfg, arch, parts, (h, w)),
  )


class Noisy(NamedTuple):
  """A step on the way from latents to noise.

  Attributes:
    latents: f32[B, L, C], (1 - sigma) x0 + sigma noise.
    sigma: f32[B] in (0, 1].
    velocity: f32[B, L, C], noise - x0: what is to be learned. An Euler step
      adds (next sigma - sigma) times it (`inference.flow.euler_step`).
  """

  latents: jax.Array
  sigma: jax.Array
  velocity: jax.Array


def noisy(x0: jax.Array, sigma: jax.Array, noise: jax.Array) -> Noisy:
  """Latents f32[B, L, C] at noise levels f32[B]."""
  level = sigma[:, None, None]
  return Noisy((1 - level) * x0 + level * noise, sigma, noise - x0)


def draw_sigma(key: jax.Array, times: str, shift: float) -> jax.Array:
  """A noise level f32[] in (0, 1], shifted towards noise.

  Args:
    key: of one row.
    times: "logit_normal" or "uniform", the distribution before the shift.
    shift: of `inference.flow.shift`; 1 changes nothing.
  """
  if times == "logit_normal":
    # shift / (shift + 1 / s - 1) adds log(shift) to the logit of s.
    return jax.nn.sigmoid(jax.random.normal(key) + math.log(shift))
  level = 1 - jax.random.uniform(key)  # (0, 1]
  return shift / (shift + (1 / level - 1))


def drop_tokens(key: jax.Array, features: jax.Array, p: float) -> jax.Array:
  """Features [L, Z] with each token zeroed with probability p, else scaled.

  Those that stay grow by 1 / (1 - p), so that sums keep their expectation.
  """
  keep = jax.random.bernoulli(key, 1 - p, features.shape[:1])
  return features * (keep / (1 - p)).astype(features.dtype)[:, None]


def shares_of_sigma(times: str, shift: float) -> np.ndarray:
  """f32[4]: how often a noise level falls into each quarter of (0, 1]."""
  edges = np.arange(1, _QUARTERS) / _QUARTERS
  logits = [math.log(s / (1 - s)) - math.log(shift) for s in edges]
  if times == "logit_normal":
    below = [0.5 * (1 + math.erf(x / math.sqrt(2))) for x in logits]
  else:
    below = [1 / (1 + math.exp(-x)) for x in logits]
  return np.diff([0.0, *below, 1.0]).astype(np.float32)


def _loss(cfg, arch, scheduler):
  opts = cfg.options

  def loss(params: Params, batch: Batch, ctx: Context):
    patch = arch.siglip.patch
    grid = tuple(n // patch for n in batch["pixels"].shape[1:3])
    shift = flow.shift(scheduler, math.prod(grid))
    keys_4B = jax.vmap(lambda k: jax.random.split(k, 4), out_axes=1)(
      row_keys(ctx.noise_key, batch["id"])
    )
    image = pixels.to_float(batch["pixels"])
    x0_BLC = encode(params["vae"], image, keys_4B[0], cfg, arch)
    features_BLZ = semantic_features(params, image, cfg, arch)
    features_BLZ *= batch["seen"].astype(features_BLZ.dtype)[:, None, None]
    if ctx.train and opts.token_dropout:
      drop = lambda key, x: drop_tokens(key, x, opts.token_dropout)
      features_BLZ = jax.vmap(drop)(keys_4B[3], features_BLZ)
    draw = lambda key: jax.random.normal(key, x0_BLC.shape[1:])
    sigma = lambda key: draw_sigma(key, opts.times, shift)
    at = noisy(x0_BLC, jax.vmap(sigma)(keys_4B[1]), jax.vmap(draw)(keys_4B[2]))
    v_BLC = predict(params, batch, at, features_BLZ, grid, cfg, arch)
    error_B = jnp.mean(jnp.square(v_BLC - at.velocity), axis=(1, 2))
    # Rows that are not real count as nothing, the others alike.
    error_B *= batch["real"] / jnp.maximum(ctx.totals["rows"], 1)
    value = jnp.sum(error_B)
    quarter_B = jnp.minimum((at.sigma * _QUARTERS).astype(int), _QUARTERS - 1)
    shares = shares_of_sigma(opts.times, shift)
    metrics = {
      # Its mean over many rows is the mean error at such noise levels; over a
      # few it also says how many there were.
      f"decoder/loss_at_{i / _QUARTERS:g}": jnp.sum(error_B * (quarter_B == i))
      / shares[i]
      for i in range(_QUARTERS)
    }
    return value, metrics

  return loss


def encode(
  vae_params: Any, image: jax.Array, keys: jax.Array, cfg, arch: Architecture
) -> jax.Array:
  """Packed latents f32[B, L, C] of f32[B, H, W, 3], drawn by keys [B]."""
  mean, logvar = vae.encode(vae_params, image, arch.vae, cfg.compute)
  latents = vae.to_model_space(vae_program.sample(mean, logvar, keys), arch.vae)
  packed = flow.pack(jnp.moveaxis(latents, -1, 1))
  return jax.lax.stop_gradient(packed)


def semantic_features(
  params: Params, image: jax.Array, cfg: TrainConfig, arch: Architecture
) -> jax.Array:
  """Features [B, L, Z] of the codes of f32[B, H, W, 3]."""
  vit = siglip.Siglip(arch.siglip, cfg.compute)
  model, own = vq.VQ(arch.vq, cfg.compute), {"params": params["vq"]}
  x_BhwZ = vit.apply({"params": params["siglip"]}, image)
  codes_Bhw = model.apply(own, x_BhwZ, method="encode")
  out_BhwZ = model.apply(own, codes_Bhw, method="decode")
  B, h, w, Z = out_BhwZ.shape
  return jax.lax.stop_gradient(out_BhwZ.reshape(B, h * w, Z))


def predict(
  params: Params,
  batch: Batch,
  at: Noisy,
  features_BLZ: jax.Array,
  grid: tuple[int, int],
  cfg: TrainConfig,
  arch: Architecture,
) -> jax.Array:
  """The transformer's velocity f32[B, L, C]; gradients reach the encoders."""
  text = text_encoders.T5Encoder(arch.t5, cfg.compute).apply(
    {"params": params["t5"]}, batch["t5_ids"]
  )
  _, pooled = text_encoders.CLIPText(arch.clip, cfg.compute).apply(
    {"params": params["clip"]}, batch["clip_ids"]
  )
  v_BLC = flux.Flux(arch.flux, cfg.compute).apply(
    {"params": params["flux"]},
    at.latents,
    text,
    pooled,
    at.sigma,
    jnp.full_like(at.sigma, flow.GUIDANCE),
    grid,
    features_BLZ,
  )
  return v_BLC.astype(jnp.float32)


def trained_parts(cfg: TrainConfig, parts: dict[str, Part]) -> set[str]:
  """Names of the parts of which some phase trains a parameter."""
  return {
    name
    for name, part in parts.items()
    for path in flatten(part.tree)
    for phase in cfg.phases
    if any(re.match(p, f"{name}/{path}") for p in phase.train)
    and not any(re.match(p, f"{name}/{path}") for p in phase.freeze)
  }


def _flops(cfg, arch, parts, grid):
  """Of a row, forward, and backward through all of a part that trains."""
  text = cfg.options.text_len
  sides = [n * arch.siglip.patch for n in grid]
  forward = {
    "flux": flops.flux(arch.flux, grid, text),
    "vq": flops.vq_encoder(arch.vq, grid) + flops.vq_decoder(arch.vq, grid),
    "siglip": flops.siglip(arch.siglip, grid),
    "vae": flops.vae_encoder(arch.vae, *sides),
    "clip": flops.clip(arch.clip, arch.clip.max_position_embeddings),
    "t5": flops.t5(arch.t5, text),
  }
  trained = trained_parts(cfg, parts)
  return sum(
    (3.0 if name in trained else 1.0) * count for name, count in forward.items()
  )
