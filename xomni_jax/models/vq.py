"""The vector quantiser between ViT features and codes, and its convolutions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from xomni_jax.config import Compute, VQConfig
from xomni_jax.mesh import constrain
from xomni_jax.params import Row, dense, norm, prefixed

_POST_BLOCKS = 2  # fixed in the reference, no config field


class ResBlock(nn.Module):
  """norm, GELU, conv, twice, plus the input."""

  channels: int
  dtype: str

  @nn.compact
  def __call__(self, x_BhwZ: jax.Array) -> jax.Array:
    h = x_BhwZ
    for i in ("1", "2"):
      h = nn.GroupNorm(
        num_groups=32,
        epsilon=1e-5,
        dtype=self.dtype,
        # The fast one, E[x^2] - E[x]^2, cancels where a group is off centre.
        use_fast_variance=False,
        name=f"norm{i}",
      )(h)
      h = nn.gelu(h, approximate=False)
      h = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name=f"conv{i}")(h)
    return x_BhwZ + h


class VQ(nn.Module):
  """Features to codes (`encode`) and codes to features (`decode`)."""

  cfg: VQConfig
  compute: Compute = Compute()

  def setup(self):
    cfg, dtype = self.cfg, self.compute.dtype
    # PyTorch's 1x1 convolutions are linear layers over channels.
    self.quant_conv = nn.Dense(cfg.codebook_dim, dtype=dtype)
    self.codebook = self.param(
      "codebook",
      nn.initializers.normal(1.0),
      (cfg.codebook_size, cfg.codebook_dim),
    )
    self.post_quant_conv = nn.Dense(cfg.z_channels, dtype=dtype)
    self.post_conv = [
      ResBlock(cfg.z_channels, dtype) for _ in range(_POST_BLOCKS)
    ]

  def __call__(self, features_BhwZ: jax.Array) -> jax.Array:
    """Features through the codes and back."""
    return self.decode(self.encode(features_BhwZ))

  def project(self, features_BhwZ: jax.Array) -> jax.Array:
    """What is quantised: z [B, h, w, codebook_dim]."""
    return self.quant_conv(features_BhwZ)

  def encode(self, features_BhwZ: jax.Array) -> jax.Array:
    """i32[B, h, w], the codes nearest in angle to the projected features."""
    z = normalise(self.project(features_BhwZ))
    # On the unit sphere the nearest row is the one of largest cosine.
    cosine = jnp.einsum(
      "...e,ke->...k",
      z,
      normalise(self.codebook),
      precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.argmax(cosine, axis=-1).astype(jnp.int32)

  def decode(self, codes_Bhw: jax.Array) -> jax.Array:
    """Semantic features [B, h, w, z_channels] of codes i32[B, h, w]."""
    # The reference reads the raw codebook here, though encoding normalises it.
    x = self.post_quant_conv(self.codebook[codes_Bhw])
    for block in self.post_conv:
      x = block(x)
    return constrain(x, "batch", None, None, None)


def normalise(x: jax.Array) -> jax.Array:
  """f32 rows of unit length; PyTorch's floor on the norm, 1e-12."""
  x = x.astype(jnp.float32)
  length = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
  return x / jnp.maximum(length, 1e-12)


def rows(cfg: VQConfig) -> list[Row]:
  """The parameter table."""
  del cfg
  post = [
    entry
    for i in range(_POST_BLOCKS)
    for j in ("1", "2")
    for entry in (
      *norm(f"post_conv_{i}/norm{j}", f"post_conv.{i}.norm{j}", "norm"),
      *dense(
        f"post_conv_{i}/conv{j}",
        f"post_conv.{i}.conv{j}",
        "cout cin kh kw -> kh kw cin cout",
      ),
    )
  ]
  return prefixed(
    "",
    "",
    [
      *dense(
        "quant_conv", "quant_conv", "code_dim fan_in 1 1 -> fan_in code_dim"
      ),
      (
        "codebook",
        "quantize.embedding.weight",
        "code code_dim -> code code_dim",
      ),
      *dense(
        "post_quant_conv",
        "post_quant_conv",
        "fan_out code_dim 1 1 -> code_dim fan_out",
      ),
      *post,
    ],
  )


def abstract(cfg: VQConfig) -> dict[str, Any]:
  """The parameter tree as shapes, nothing allocated."""
  x = jax.ShapeDtypeStruct((1, 1, 1, cfg.z_channels), jnp.float32)
  init = lambda x: VQ(cfg).init(jax.random.key(0), x)["params"]
  return jax.eval_shape(init, x)
