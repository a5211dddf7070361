"""The SigLIP vision transformer of the image tokenizer, any resolution.

Source: SigLIP 2 (arXiv:2502.14786), as released with X-Omni: no class token,
no final norm, no pooling.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from xomni_jax.config import Compute, SiglipConfig
from xomni_jax.mesh import constrain
from xomni_jax.models.layers import (
  attention,
  constrain_heads,
  run_stack,
  stack_init,
  stacked,
)
from xomni_jax.params import Row, abstract_tree, dense, norm, prefixed

# Tensors of a released file that nothing here uses: final norm, pooling, head.
IGNORED = r"(norm|fc_norm|attn_pool|head)\..*"


class Block(nn.Module):
  """Pre-norm transformer block with exact GELU."""

  cfg: SiglipConfig
  compute: Compute

  @nn.compact
  def __call__(self, x_BLD: jax.Array) -> tuple[jax.Array, None]:
    cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
    head_dim = cfg.width // cfg.heads
    norm_ = lambda name: nn.LayerNorm(
      epsilon=1e-6,
      # E[x^2] - E[x]^2 cancels where a mean is far from zero.
      use_fast_variance=False,
      dtype=dtype,
      name=name,
    )
    qkv = nn.DenseGeneral((3, cfg.heads, head_dim), dtype=dtype, name="qkv")(
      norm_("norm1")(x_BLD)
    )
    q, k, v = (constrain_heads(qkv[:, :, i]) for i in range(3))
    a_BLNH = attention(
      q,
      jnp.swapaxes(k, 1, 2),
      jnp.swapaxes(v, 1, 2),
      scale=head_dim**-0.5,
      chunk=self.compute.query_chunk,
    )
    x_BLD += nn.DenseGeneral(
      cfg.width, axis=(-2, -1), dtype=dtype, name="proj"
    )(a_BLNH)
    h_BLF = nn.Dense(cfg.mlp, dtype=dtype, name="fc1")(norm_("norm2")(x_BLD))
    x_BLD += nn.Dense(cfg.width, dtype=dtype, name="fc2")(
      nn.gelu(h_BLF, approximate=False)
    )
    return constrain(x_BLD, "batch", "length", None), None


class Siglip(nn.Module):
  """Images to patch features."""

  cfg: SiglipConfig
  compute: Compute = Compute()

  @nn.compact
  def __call__(self, image_BHWC: jax.Array) -> jax.Array:
    """The last block's residual stream.

    Args:
      image_BHWC: f32 in [-1, 1], sides multiples of the patch.
    Returns:
      [B, h, w, width], a cell a patch.
    """
    cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
    x_BhwD = nn.Conv(
      cfg.width,
      (cfg.patch, cfg.patch),
      strides=cfg.patch,
      padding="VALID",
      dtype=dtype,
      name="patch_embed",
    )(image_BHWC)
    B, h, w, D = x_BhwD.shape
    table = self.param(
      "pos_embed", nn.initializers.normal(D**-0.5), (cfg.grid**2, D)
    )
    x_BhwD += resize_table(table, h, w).astype(dtype)
    x_BLD = constrain(x_BhwD.reshape(B, h * w, D), "batch", "length", None)
    block = Block(cfg, self.compute, parent=None)
    params = stacked(self, "blocks", stack_init(block, cfg.layers, x_BLD))
    x_BLD, _ = run_stack(
      block,
      params,
      x_BLD,
      scan=self.compute.scan_layers,
      remat=self.compute.remat,
    )
    return x_BLD.reshape(B, h, w, D)


def resize_table(table_PD: jax.Array, h: int, w: int) -> jax.Array:
  """A square position table at h x w cells, f32[h, w, D].

  Bilinear with half-pixel centres and without antialiasing, as the reference:
  each cell mixes at most four entries however much it shrinks.
  """
  side = round(table_PD.shape[0] ** 0.5)
  grid = table_PD.astype(jnp.float32).reshape(side, side, -1)
  rows_, cols = _bilinear(side, h), _bilinear(side, w)
  return jnp.einsum("hy,wx,yxd->hwd", rows_, cols, grid)


def _bilinear(size: int, target: int) -> np.ndarray:
  """f32[target, size], the weights of linear interpolation."""
  # float32 throughout: PyTorch computes the source coordinate in it.
  scale = np.float32(size) / np.float32(target)
  centre = (np.arange(target, dtype=np.float32) + np.float32(0.5)) * scale
  centre = np.maximum(centre - np.float32(0.5), 0)
  low = np.minimum(centre.astype(np.int32), size - 1)
  high = np.minimum(low + 1, size - 1)
  weight = centre - low
  out = np.zeros((target, size), np.float32)
  np.add.at(out, (np.arange(target), low), 1 - weight)
  np.add.at(out, (np.arange(target), high), weight)
  return out


_BLOCK = [
  *norm("norm1", "norm1", "norm"),
  *dense(
    "qkv",
    "attn.qkv",
    "(three heads head_dim) embed -> embed three heads head_dim",
  ),
  *dense("proj", "attn.proj", "embed (heads head_dim) -> heads head_dim embed"),
  *norm("norm2", "norm2", "norm"),
  *dense("fc1", "mlp.fc1", "mlp embed -> embed mlp"),
  *dense("fc2", "mlp.fc2", "embed mlp -> mlp embed"),
]


def rows(cfg: SiglipConfig) -> list[Row]:
  """The parameter table; the file may hold IGNORED tensors besides."""
  del cfg
  return [
    *prefixed(
      "",
      "",
      [
        ("pos_embed", "pos_embed", "1 cell embed -> cell embed"),
        *dense(
          "patch_embed", "patch_embed.proj", "embed c kh kw -> kh kw c embed"
        ),
      ],
    ),
    *prefixed("blocks/", "blocks.{i}.", _BLOCK),
  ]


@abstract_tree
def abstract(cfg: SiglipConfig) -> dict[str, Any]:
  """The parameter tree as shapes, nothing allocated."""
  image = jnp.zeros((1, cfg.patch, cfg.patch, 3))
  return Siglip(cfg, Compute(scan_layers=True)).init(jax.random.key(0), image)[
    "params"
  ]
