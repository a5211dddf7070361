"""The vector quantiser between ViT features and codes, and its convolutions."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from xomni_jax.config import Compute, VQConfig
from xomni_jax.mesh import constrain
from xomni_jax.params import Row, abstract_tree, dense, norm, prefixed

_CHUNK = 4096  # vectors whose likeness to all codes exists at once
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


class Quantised(NamedTuple):
  """What `quantise` makes of every vector [..., E].

  Attributes:
    codes: i32[...].
    z_q: f32[..., E], their rows of the raw codebook; the gradient is that of
      the softmax over codes.
    loss: f32[...], the three squared errors, each a mean over E.
    entropy: f32[...], of the softmax over codes, nats.
    soft: f32[K] a leading row, the softmax summed over the row's vectors.
  """

  codes: jax.Array
  z_q: jax.Array
  loss: jax.Array
  entropy: jax.Array
  soft: jax.Array


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
    codebook = normalise(self.codebook)

    def nearest(z_BwE):
      # On the unit sphere the nearest row is the one of largest cosine.
      return jnp.argmax(_cosine(z_BwE, codebook), axis=-1)

    # Some lines at once: all cosines of 16 images of 1152 px are 5.4 GB.
    B, h, w, _ = z.shape
    lines = min(h, max(1, _CHUNK // (B * w)))
    codes = jax.lax.map(nearest, jnp.moveaxis(z, 1, 0), batch_size=lines)
    return jnp.moveaxis(codes, 0, 1).astype(jnp.int32)

  def decode(self, codes_Bhw: jax.Array) -> jax.Array:
    """Semantic features [B, h, w, z_channels] of codes i32[B, h, w]."""
    # The reference reads the raw codebook here, though encoding normalises it.
    return self.lift(self.codebook[codes_Bhw])

  def lift(self, z_BhwE: jax.Array) -> jax.Array:
    """Semantic features [B, h, w, z_channels] of rows of the codebook."""
    x = self.post_quant_conv(z_BhwE)
    for block in self.post_conv:
      x = block(x)
    return constrain(x, "batch", None, None, None)

  def train_codes(
    self,
    features_BhwZ: jax.Array,
    bypass_B: jax.Array,
    temperature: float,
    commitment: float,
  ) -> tuple[jax.Array, jax.Array, Quantised]:
    """Features through the quantiser, with gradients.

    Args:
      features_BhwZ: of the ViT.
      bypass_B: bool; True: of this image the normalised z goes on in place of
        the codebook's rows, which the loss draws to it: they are of one scale.
      temperature, commitment: of `quantise`.
    Returns:
      semantic features [B, h, w, z_channels], z f32[B, h, w, codebook_dim] of
      unit length, and what the quantiser made of it.
    """
    z_BhwE = normalise(self.project(features_BhwZ))
    made = quantise(z_BhwE, self.codebook, temperature, commitment)
    on = jnp.where(bypass_B[:, None, None, None], z_BhwE, made.z_q)
    return self.lift(on), z_BhwE, made


def quantise(
  z: jax.Array,
  codebook_KE: jax.Array,
  temperature: float,
  commitment: float = 0.25,
  chunk: int = _CHUNK,
) -> Quantised:
  """Codes by index backpropagation (IBQ).

  Logits are minus the squared distance to the normalised codebook over the
  temperature; z_q is the hard choice's row of the raw codebook forward, and
  the softmax's mixture of its rows backward.

  Args:
    z: f32[B, ..., E], of unit length.
    codebook_KE: raw.
    temperature: of the softmax.
    commitment: weight of the third error, that of the codebook to a fixed z.
    chunk: vectors whose logits over all codes exist at once.
  Source: IBQ (arXiv:2412.02692); the released inference code's class.
  """
  B, E = z.shape[0], z.shape[-1]
  K = codebook_KE.shape[0]
  z_NE = z.reshape(-1, E)
  N = z_NE.shape[0]
  stop = jax.lax.stop_gradient

  def some(inputs):
    z_nE, row_n = inputs
    logits_nK = -_squared_distance(z_nE, normalise(codebook_KE)) / temperature
    codes_n = jnp.argmax(logits_nK, axis=-1).astype(jnp.int32)
    logp_nK = jax.nn.log_softmax(logits_nK, axis=-1)
    soft_nK = jnp.exp(logp_nK)
    # The one-hot's share of the codebook's gradient is that of the lookup.
    mixture_nE = soft_nK @ stop(codebook_KE)
    entropy_n = -jnp.sum(soft_nK * logp_nK, axis=-1)
    # Row B takes the padding of the last chunk.
    soft_BK = jax.ops.segment_sum(soft_nK, row_n, B + 1)[:B]
    return codes_n, mixture_nE - stop(mixture_nE), entropy_n, soft_BK

  chunks = max(1, -(-N // chunk))
  size = -(-N // chunks)
  split = lambda x, fill: jnp.pad(
    x,
    ((0, chunks * size - N), *((0, 0),) * (x.ndim - 1)),
    constant_values=fill,
  ).reshape(chunks, size, *x.shape[1:])
  row_N = jnp.repeat(jnp.arange(B), N // B)
  # Logits are made again in the backward pass: 16,384 of them a token.
  codes, zero, entropy, soft = jax.lax.map(
    jax.checkpoint(some), (split(z_NE, 0), split(row_N, B))
  )
  join = lambda x: x.reshape(chunks * size, *x.shape[2:])[:N]
  codes = join(codes)
  hard_NE = codebook_KE[codes].astype(jnp.float32)
  z_q_NE = hard_NE + join(zero)
  error = lambda a, b: jnp.mean(jnp.square(a - b), axis=-1)
  loss = (
    error(z_q_NE, z_NE)
    + error(stop(hard_NE), z_NE)
    + commitment * error(hard_NE, stop(z_NE))
  )
  lead = z.shape[:-1]
  return Quantised(
    codes.reshape(lead),
    z_q_NE.reshape(z.shape),
    loss.reshape(lead),
    join(entropy).reshape(lead),
    jnp.sum(soft, axis=0).reshape(B, K),
  )


def _cosine(z, codebook_KE):
  return jnp.einsum(
    "...e,ke->...k", z, codebook_KE, precision=jax.lax.Precision.HIGHEST
  )


def _squared_distance(z_NE, codebook_KE):
  square = lambda x: jnp.sum(jnp.square(x), axis=-1)
  return (
    square(z_NE)[:, None] + square(codebook_KE) - 2 * _cosine(z_NE, codebook_KE)
  )


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


@abstract_tree
def abstract(cfg: VQConfig) -> dict[str, Any]:
  """The parameter tree as shapes, nothing allocated."""
  features = jnp.zeros((1, 1, 1, cfg.z_channels))
  return VQ(cfg).init(jax.random.key(0), features)["params"]
