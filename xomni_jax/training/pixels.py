"""Pixels of a batch, u8 on the way to the device and floats there."""

import jax
import jax.numpy as jnp

from xomni_jax.data.images import LEVELS


def to_float(pixels: jax.Array) -> jax.Array:
  """u8 in [0, 255] -> f32 in [-1, 1] as `data.images.preprocess` has it."""
  return jnp.asarray(LEVELS)[pixels.astype(jnp.int32)]


def to_bytes(image: jax.Array) -> jax.Array:
  """f32 about [-1, 1] -> u8, clipped and rounded as inference does."""
  image = jnp.clip(image / 2 + 0.5, 0, 1)
  return jnp.round(image * 255).astype(jnp.uint8)
