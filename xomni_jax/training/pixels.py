"""Pixels of a batch, u8 on the way to the device and floats there."""

import jax
import jax.numpy as jnp

from xomni_jax.data.images import LEVELS


def to_float(pixels: jax.Array) -> jax.Array:
  """u8 in [0, 255] -> f32 in [-1, 1] as `data.images.preprocess` has it."""
  return jnp.asarray(LEVELS)[pixels.astype(jnp.int32)]
