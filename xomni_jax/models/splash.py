"""JAX's splash attention kernel for TPUs, on sequences of any length.

Shape letters as in layers.py. Source: jax.experimental.pallas.ops.tpu.
"""

import math

import jax
import jax.numpy as jnp

from xomni_jax import mesh

# 1024 needs half the temporaries of 512; 2048 does not fit a core's memory.
_BLOCK = 1024
_LANES = 128


def splash(
  q_BTNH: jax.Array,
  k_BKTH: jax.Array,
  v_BKTH: jax.Array,
  segments_BT: jax.Array,
  *,
  causal: bool,
  interpret: bool = False,
) -> jax.Array:
  """Attention within segments, as `layers.attention`, scaled by H**-0.5.

  Args:
    q_BTNH: queries; head n reads key/value head n // (N / K).
    k_BKTH, v_BKTH: keys and values.
    segments_BT: i32, from 0; attention stays within a segment.
    causal: a query attends to its own and earlier positions only.
    interpret: run the kernel step by step on any device, to check it.
  Returns:
    [B, T, N, H].
  """
  T, N, H = q_BTNH.shape[1:]
  parts = mesh.ways("length")
  block = min(_BLOCK, _round_up(-(-T // parts), _LANES))
  length = _round_up(T, block * parts)
  pad = lambda x, axis, size: jnp.pad(
    x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)]
  )
  width = _round_up(H, _LANES)  # a lane is the least the kernel takes
  q_BNTH = jnp.swapaxes(q_BTNH, 1, 2) * H**-0.5
  q, k, v = (pad(pad(x, 2, length), 3, width) for x in (q_BNTH, k_BKTH, v_BKTH))
  # Padding is a segment of its own.
  segments = pad(segments_BT + 1, 1, length)
  heads = mesh.fits("heads", N) and mesh.fits("kv_heads", k.shape[1])
  kernel = _kernel(
    length,
    N,
    block,
    causal,
    mesh.ways("heads") if heads else 1,
    parts,
    interpret,
  )
  h, kh = ("heads", "kv_heads") if heads else (None, None)
  out = mesh.run_split(
    _attend,
    (kernel, q, k, v, segments, segments),
    (
      ("kernel", h, "length"),
      ("batch", h, "length", None),
      ("batch", kh, None, None),
      ("batch", kh, None, None),
      ("batch", "length"),
      ("batch", None),
    ),
    ("batch", h, "length", None),
    kernel=lambda sharding: kernel.manual_sharding_spec(sharding),
  )
  return jnp.swapaxes(out[:, :, :T, :H], 1, 2)


def _attend(kernel, q, k, v, q_segments, kv_segments):
  from jax.experimental.pallas.ops.tpu import splash_attention as lib

  one = lambda q, k, v, a, b: kernel(q, k, v, lib.SegmentIds(a, b))
  return jax.vmap(one)(q, k, v, q_segments, kv_segments)


def _kernel(length, heads, block, causal, head_parts, parts, interpret):
  from jax.experimental.pallas.ops.tpu import splash_attention as lib

  shape = (length, length)
  mask = lib.CausalMask(shape) if causal else lib.FullMask(shape)
  sizes = lib.BlockSizes(
    **{
      f"block_{name}": block
      for name in (
        *("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute"),
        *("q_dq", "kv_dq"),
      )
    }
  )
  return lib.make_splash_mha(
    lib.MultiHeadMask([mask] * heads),
    block_sizes=sizes,
    head_shards=head_parts,
    q_seq_shards=parts,
    interpret=interpret,
  )


def _round_up(size: int, multiple: int) -> int:
  return math.ceil(size / multiple) * multiple
