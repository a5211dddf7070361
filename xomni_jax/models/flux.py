"""The FLUX diffusion transformer, with a layer that adds semantic features.

Shape letters: T text tokens, L image tokens, S = T + L, D width, Z channels of
the semantic features. Text tokens come first in the joint sequence.
Source: FLUX.1-dev as diffusers has it; X-Omni adds `siglip_embed` between the
double and the single blocks.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from xomni_jax.config import Compute
from xomni_jax.flux_config import FluxConfig
from xomni_jax.mesh import constrain
from xomni_jax.models.layers import (
  attention,
  constrain_heads,
  rope_angles,
  rotate_pairs,
  run_stack,
  stack_init,
  stacked,
)
from xomni_jax.params import Row, abstract_tree, dense, prefixed

_TIME_DIM = 256  # of the sinusoids, fixed in FLUX
_THETA = 10000.0


def _norm(x, dtype):
  """LayerNorm without weights."""
  return nn.LayerNorm(
    epsilon=1e-6,
    use_bias=False,
    use_scale=False,
    # E[x^2] - E[x]^2 cancels where a mean is far from zero.
    use_fast_variance=False,
    dtype=dtype,
  )(x)


def _modulation(temb_BD, count, dtype, name):
  """`count` vectors [B, 1, D] from the conditioning."""
  size = count * temb_BD.shape[-1]
  m = nn.Dense(size, dtype=dtype, name=name)(nn.silu(temb_BD))
  # Whole on every device, before and after: each piece of a split axis would
  # be passed around (thousands of small messages a step).
  parts = jnp.split(constrain(m, "batch", None)[:, None], count, axis=-1)
  return [constrain(x, "batch", None, None) for x in parts]


def _qkv(module, x_BSD, names, norms):
  """Projected heads of one stream, queries and keys normed."""
  cfg, dtype = module.cfg, jnp.dtype(module.compute.dtype)
  shape = (cfg.num_attention_heads, cfg.attention_head_dim)
  q, k, v = (nn.DenseGeneral(shape, dtype=dtype, name=n)(x_BSD) for n in names)
  norm = lambda name: nn.RMSNorm(epsilon=1e-6, dtype=dtype, name=name)
  return norm(norms[0])(q), norm(norms[1])(k), v


def _attend(module, q, k, v, rope):
  """Rotated attention over the joint sequence, [B, S, N, H]."""
  q, k, v = (constrain_heads(x) for x in (q, k, v))
  return attention(
    rotate_pairs(q, *rope),
    jnp.swapaxes(rotate_pairs(k, *rope), 1, 2),
    jnp.swapaxes(v, 1, 2),
    scale=module.cfg.attention_head_dim**-0.5,
    chunk=module.compute.query_chunk,
  )


class DoubleBlock(nn.Module):
  """Joint attention of two streams that keep their own weights."""

  cfg: FluxConfig
  compute: Compute

  @nn.compact
  def __call__(self, streams, temb_BD, rope):
    """(text [B, T, D], image [B, L, D]) -> the same, None."""
    cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
    txt, img = streams
    T = txt.shape[1]
    t_mod = _modulation(temb_BD, 6, dtype, "norm1_context")
    i_mod = _modulation(temb_BD, 6, dtype, "norm1")
    t_qkv = _qkv(
      self,
      _norm(txt, dtype) * (1 + t_mod[1]) + t_mod[0],
      ("add_q_proj", "add_k_proj", "add_v_proj"),
      ("norm_added_q", "norm_added_k"),
    )
    i_qkv = _qkv(
      self,
      _norm(img, dtype) * (1 + i_mod[1]) + i_mod[0],
      ("to_q", "to_k", "to_v"),
      ("norm_q", "norm_k"),
    )
    joint = (
      jnp.concatenate(pair, axis=1) for pair in zip(t_qkv, i_qkv, strict=True)
    )
    a_BSNH = _attend(self, *joint, rope)

    def finish(x, a, mod, out, mlp):
      """Attention's result and the MLP, each gated."""
      merge = nn.DenseGeneral(cfg.width, axis=(-2, -1), dtype=dtype, name=out)
      x += mod[2] * merge(a)
      h = _norm(x, dtype) * (1 + mod[4]) + mod[3]
      h = nn.Dense(cfg.mlp, dtype=dtype, name=f"{mlp}_in")(h)
      h = nn.gelu(h, approximate=True)
      x += mod[5] * nn.Dense(cfg.width, dtype=dtype, name=f"{mlp}_out")(h)
      return constrain(x, "batch", "length", None)

    txt = finish(txt, a_BSNH[:, :T], t_mod, "to_add_out", "ff_context")
    img = finish(img, a_BSNH[:, T:], i_mod, "to_out", "ff")
    return (txt, img), None


class SingleBlock(nn.Module):
  """Attention and MLP in parallel over the joint sequence.

  The MLP's features are P parts of N heads of size H, P = mlp / width, so that
  attention's heads join them as one part more, each head on its own device.
  """

  cfg: FluxConfig
  compute: Compute

  @nn.compact
  def __call__(self, x_BSD, temb_BD, rope):
    cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
    shift, scale, gate = _modulation(temb_BD, 3, dtype, "norm")
    h_BSD = _norm(x_BSD, dtype) * (1 + scale) + shift
    parts = cfg.mlp // cfg.width
    shape = (parts, cfg.num_attention_heads, cfg.attention_head_dim)
    mlp_BSPNH = nn.DenseGeneral(shape, dtype=dtype, name="proj_mlp")(h_BSD)
    mlp_BSPNH = nn.gelu(mlp_BSPNH, approximate=True)
    qkv = _qkv(self, h_BSD, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
    a_BSNH = _attend(self, *qkv, rope)
    both = jnp.concatenate([a_BSNH[:, :, None], mlp_BSPNH], axis=2)
    both = constrain(both, "batch", "length", None, "heads", None)
    merge = nn.DenseGeneral(
      cfg.width, axis=(-3, -2, -1), dtype=dtype, name="proj_out"
    )
    x_BSD += gate * merge(both)
    return constrain(x_BSD, "batch", "length", None), None


class _Embedder(nn.Module):
  """linear, SiLU, linear."""

  width: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(self.width, dtype=self.dtype, name="linear_1")(x)
    return nn.Dense(self.width, dtype=self.dtype, name="linear_2")(nn.silu(x))


class Flux(nn.Module):
  """Velocity of packed latents."""

  cfg: FluxConfig
  compute: Compute = Compute()

  @nn.compact
  def __call__(
    self,
    latents_BLC: jax.Array,
    text_BTE: jax.Array,
    pooled_BP: jax.Array,
    sigma_B: jax.Array,
    guidance_B: jax.Array,
    grid: tuple[int, int],
    features_BLZ: jax.Array | None = None,
  ) -> jax.Array:
    """v [B, L, C] at noise level sigma.

    Args:
      latents_BLC: packed latents, one image token a cell of `grid`, row-major.
      text_BTE: T5 features.
      pooled_BP: CLIP's pooled vector.
      sigma_B: f32 in (0, 1].
      guidance_B: f32, the distilled guidance; unused without its embedder.
      grid: (rows, columns) of image tokens.
      features_BLZ: semantic features; None adds nothing.
    """
    cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
    T = text_BTE.shape[1]
    img = nn.Dense(cfg.width, dtype=dtype, name="x_embedder")(latents_BLC)
    txt = nn.Dense(cfg.width, dtype=dtype, name="context_embedder")(text_BTE)
    embed = lambda name: _Embedder(cfg.width, dtype, name=name)
    temb_BD = embed("timestep_embedder")(_sinusoids(sigma_B, dtype))
    if cfg.guidance_embeds:
      temb_BD += embed("guidance_embedder")(_sinusoids(guidance_B, dtype))
    temb_BD += embed("text_embedder")(pooled_BP)
    rope = _rope(cfg, T, grid)

    streams = (
      constrain(txt, "batch", "length", None),
      constrain(img, "batch", "length", None),
    )
    block = DoubleBlock(cfg, self.compute, parent=None)
    args = (temb_BD, rope)
    params = stacked(
      self, "double", stack_init(block, cfg.num_layers, streams, *args)
    )
    how = dict(scan=self.compute.scan_layers, remat=self.compute.remat)
    (txt, img), _ = run_stack(block, params, streams, *args, **how)

    add = nn.Dense(
      cfg.width,
      use_bias=False,
      dtype=dtype,
      # Zero, so that training starts from the text-to-image model it extends.
      kernel_init=nn.initializers.zeros,
      name="siglip_embed",
    )
    if features_BLZ is not None:
      img += add(features_BLZ)
    x_BSD = jnp.concatenate([txt, img], axis=1)
    block = SingleBlock(cfg, self.compute, parent=None)
    params = stacked(
      self, "single", stack_init(block, cfg.num_single_layers, x_BSD, *args)
    )
    x_BSD, _ = run_stack(block, params, x_BSD, *args, **how)

    # The final modulation is (scale, shift), all others are (shift, scale).
    scale, shift = _modulation(temb_BD, 2, dtype, "norm_out")
    x_BLD = _norm(x_BSD[:, T:], dtype) * (1 + scale) + shift
    return nn.Dense(cfg.in_channels, dtype=dtype, name="proj_out")(x_BLD)


def _sinusoids(x_B: jax.Array, dtype) -> jax.Array:
  """[B, 256]: cosines, then sines, of 1000 x at falling frequencies."""
  half = _TIME_DIM // 2
  # Rounded as PyTorch rounds (exponent in float32, then an exact exponential):
  # at angles of up to 3500 a frequency's last bit is worth 2e-4 of a cosine.
  exponent = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32)
  exponent /= np.float32(half)
  frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
  angles = 1000.0 * x_B.astype(jnp.float32)[:, None] * frequency
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1).astype(dtype)


def _rope(cfg: FluxConfig, text: int, grid: tuple[int, int]):
  """cos, sin f32[S, H/2]: ids (0, row, column); 0 for all text tokens."""
  h, w = grid
  row, column = jnp.indices(grid).reshape(2, h * w)
  ids = jnp.stack([jnp.zeros_like(row), row, column])
  ids = jnp.pad(ids, ((0, 0), (text, 0)))
  angles = [
    rope_angles(axis, dim, _THETA)
    for axis, dim in zip(ids, cfg.axes_dims_rope, strict=True)
  ]
  return tuple(jnp.concatenate(x, axis=-1) for x in zip(*angles, strict=True))


_HEADS = "(heads head_dim) embed -> embed heads head_dim"
_MERGE = "embed (heads head_dim) -> heads head_dim embed"


def _scale(name):
  return (f"{name}/scale", f"attn.{name}.weight", "head_dim -> head_dim")


def _mlp(ours, theirs):
  return [
    *dense(f"{ours}_in", f"{theirs}.net.0.proj", "mlp embed -> embed mlp"),
    *dense(f"{ours}_out", f"{theirs}.net.2", "embed mlp -> mlp embed"),
  ]


_QKV = [
  *(e for x in "qkv" for e in dense(f"to_{x}", f"attn.to_{x}", _HEADS)),
  _scale("norm_q"),
  _scale("norm_k"),
]
_DOUBLE = [
  *dense("norm1", "norm1.linear", "fan_out fan_in -> fan_in fan_out"),
  *dense(
    "norm1_context", "norm1_context.linear", "fan_out fan_in -> fan_in fan_out"
  ),
  *_QKV,
  *(
    e
    for x in "qkv"
    for e in dense(f"add_{x}_proj", f"attn.add_{x}_proj", _HEADS)
  ),
  _scale("norm_added_q"),
  _scale("norm_added_k"),
  *dense("to_out", "attn.to_out.0", _MERGE),
  *dense("to_add_out", "attn.to_add_out", _MERGE),
  *_mlp("ff", "ff"),
  *_mlp("ff_context", "ff_context"),
]
_SINGLE = [
  *dense("norm", "norm.linear", "fan_out fan_in -> fan_in fan_out"),
  *_QKV,
  *dense(
    "proj_mlp",
    "proj_mlp",
    "(parts heads head_dim) embed -> embed parts heads head_dim",
  ),
  *dense(
    "proj_out",
    "proj_out",
    "embed (parts heads head_dim) -> parts heads head_dim embed",
  ),
]


def rows(cfg: FluxConfig) -> list[Row]:
  """The parameter table."""
  embedders = ["timestep", "guidance", "text"]
  if not cfg.guidance_embeds:
    embedders.remove("guidance")
  outside = [
    *dense("x_embedder", "x_embedder", "fan_out fan_in -> fan_in fan_out"),
    *dense(
      "context_embedder", "context_embedder", "fan_out fan_in -> fan_in fan_out"
    ),
    *(
      entry
      for name in embedders
      for i in (1, 2)
      for entry in dense(
        f"{name}_embedder/linear_{i}",
        f"time_text_embed.{name}_embedder.linear_{i}",
        "fan_out fan_in -> fan_in fan_out",
      )
    ),
    (
      "siglip_embed/kernel",
      "siglip_embed.weight",
      "fan_out fan_in -> fan_in fan_out",
    ),
    *dense("norm_out", "norm_out.linear", "fan_out fan_in -> fan_in fan_out"),
    *dense("proj_out", "proj_out", "fan_out fan_in -> fan_in fan_out"),
  ]
  return [
    *prefixed("", "", outside),
    *prefixed("double/", "transformer_blocks.{i}.", _DOUBLE),
    *prefixed("single/", "single_transformer_blocks.{i}.", _SINGLE),
  ]


@abstract_tree
def abstract(cfg: FluxConfig) -> dict[str, Any]:
  """The parameter tree as shapes, nothing allocated."""
  return Flux(cfg, Compute(scan_layers=True)).init(
    jax.random.key(0),
    jnp.zeros((1, 1, cfg.in_channels)),
    jnp.zeros((1, 1, cfg.joint_attention_dim)),
    jnp.zeros((1, cfg.pooled_projection_dim)),
    jnp.zeros(1),
    jnp.zeros(1),
    (1, 1),
    jnp.zeros((1, 1, cfg.siglip_channels)),
  )["params"]
