"""A whole model's parameters before any training."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xomni_jax.config import Architecture, DecoderConfig
from xomni_jax.errors import InputError
from xomni_jax.models import ar, flux, siglip, text_encoders, vae, vq

# Each initialiser runs once: what matters is compiling it, which takes a third
# of the time this way (the sizes of the drawn world, on a CPU).
_QUICK = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}


PARTS = ("ar", "siglip", "vq", "flux", "vae", "clip", "t5")


def random_params(
  arch: Architecture, key: jax.Array, parts: Sequence[str] = PARTS
) -> dict[str, Any]:
  """f32 parameters {part: tree}, drawn as training from nothing begins.

  A part's parameters do not depend on which others are drawn.
  """
  inits, keys = _initialisers(arch), _keys(key)
  return {
    part: jax.jit(inits[part], compiler_options=_QUICK)(keys[part])["params"]
    for part in parts
  }


def draw(
  arch: Architecture, key: jax.Array, parts: Sequence[str] = PARTS
) -> dict[str, Any]:
  """`random_params`, to be called inside `jit`."""
  inits, keys = _initialisers(arch), _keys(key)
  return {part: inits[part](keys[part])["params"] for part in parts}


def _keys(key):
  return dict(zip(PARTS, jax.random.split(key, len(PARTS)), strict=True))


def _initialisers(arch):
  """{part: key -> {"params": tree}}."""
  ids = jnp.zeros((1, 1), jnp.int32)
  patch = jnp.zeros((1, arch.siglip.patch, arch.siglip.patch, 3))
  cell = jnp.zeros((1, 1, 1, arch.vq.z_channels))
  return {
    "ar": lambda key: ar.XOmniAR(arch.ar).init(key, ids, ids, ids == 0),
    "siglip": lambda key: siglip.Siglip(arch.siglip).init(key, patch),
    "vq": lambda key: vq.VQ(arch.vq).init(key, cell),
    "flux": lambda key: _flux_init(arch.flux, key),
    "vae": lambda key: {"params": vae.init(key, arch.vae)},
    "clip": lambda key: text_encoders.CLIPText(arch.clip).init(key, ids),
    "t5": lambda key: text_encoders.T5Encoder(arch.t5).init(key, ids),
  }


def _flux_init(cfg, key):
  tokens = lambda *shape: jnp.zeros((1, *shape))
  return flux.Flux(cfg).init(
    key,
    tokens(1, cfg.in_channels),
    tokens(1, cfg.joint_attention_dim),
    tokens(cfg.pooled_projection_dim),
    tokens(),
    tokens(),
    (1, 1),
    tokens(1, cfg.siglip_channels),
  )


def check_fit(arch: Architecture, decoder: DecoderConfig) -> None:
  """Raises one InputError that lists sizes which parts share and differ in."""
  wrong = [
    f"{what} {a}, but {other} {b}"
    for what, a, other, b in (
      ("siglip.width", arch.siglip.width, "vq.z_channels", arch.vq.z_channels),
      (
        "flux.siglip_channels",
        arch.flux.siglip_channels,
        "vq.z_channels",
        arch.vq.z_channels,
      ),
      (
        "flux.in_channels",
        arch.flux.in_channels,
        "4 * vae.latent_channels",
        4 * arch.vae.latent_channels,
      ),
      (
        "flux.joint_attention_dim",
        arch.flux.joint_attention_dim,
        "t5.d_model",
        arch.t5.d_model,
      ),
      (
        "flux.pooled_projection_dim",
        arch.flux.pooled_projection_dim,
        "clip.hidden_size",
        arch.clip.hidden_size,
      ),
      (
        "upscale_factor",
        decoder.upscale_factor,
        "2 * vae.factor",
        2 * arch.vae.factor,
      ),
    )
    if a != b
  ]
  if wrong:
    raise InputError(f"sizes do not fit each other: {'; '.join(wrong)}")
