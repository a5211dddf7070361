"""What the transformers share: attention, rotary embeddings, stacked blocks.

Shape letters: B batch, T query length, S key length, N heads, K key/value
heads, G query heads per key/value head, H head dim, D width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from xomni_jax.mesh import constrain

# Finite, so that a fully masked row (padding) gives numbers and not NaN.
NEG_INF = jnp.finfo(jnp.float32).min


def attention(
  q_BTNH: jax.Array,
  k_BKSH: jax.Array,
  v_BKSH: jax.Array,
  *,
  scale: float,
  chunk: int,
  valid_BS: jax.Array | None = None,
  causal_from: int | jax.Array | None = None,
  bias_NTS: jax.Array | None = None,
) -> jax.Array:
  """softmax(q k^T * scale + masks) v, the softmax in float32.

  Args:
    q_BTNH: queries; head n reads key/value head n // (N / K).
    k_BKSH, v_BKSH: keys and values.
    scale: of the scores.
    chunk: at most this many queries have their scores in memory at once.
    valid_BS: False keys are never attended to.
    causal_from: key slot of the first query; a query attends to its own slot
      and earlier ones. None: to all.
    bias_NTS: added to the scores; only with T <= chunk.
  Returns:
    [B, T, N, H].
  """
  B, T, N, H = q_BTNH.shape
  K, S = k_BKSH.shape[1:3]
  slots_S = jnp.arange(S)

  def attend(q, first):
    """Attention of one run of queries that starts at query `first`."""
    t = q.shape[1]
    q = q.reshape(B, t, K, N // K, H)
    scores = jnp.einsum(
      "BTKGH,BKSH->BKGTS", q, k_BKSH, preferred_element_type=jnp.float32
    )
    scores *= scale
    if bias_NTS is not None:
      scores += bias_NTS.reshape(K, N // K, T, S)
    keep = jnp.ones((1, 1, S), bool)
    if valid_BS is not None:
      keep &= valid_BS[:, None, :]
    if causal_from is not None:
      keep &= slots_S <= (causal_from + first + jnp.arange(t))[:, None]
    scores = jnp.where(keep[:, None, None], scores, NEG_INF)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BKSH.dtype)
    out = jnp.einsum("BKGTS,BKSH->BTKGH", weights, v_BKSH)
    return out.reshape(B, t, N, H)

  if chunk >= T:
    return attend(q_BTNH, 0)
  if bias_NTS is not None:
    raise ValueError(f"a bias needs T <= chunk, got T={T}, chunk={chunk}")
  runs = -(-T // chunk)
  q = jnp.pad(q_BTNH, ((0, 0), (0, runs * chunk - T), (0, 0), (0, 0)))
  q = jnp.moveaxis(q.reshape(B, runs, chunk, N, H), 1, 0)
  out = jax.lax.map(lambda x: attend(*x), (q, jnp.arange(runs) * chunk))
  return jnp.moveaxis(out, 0, 1).reshape(B, runs * chunk, N, H)[:, :T]


def rope_angles(
  positions: jax.Array, dim: int, theta: float
) -> tuple[jax.Array, jax.Array]:
  """(cos, sin) f32[..., dim / 2] of positions[...]."""
  inverse = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
  angles = positions.astype(jnp.float32)[..., None] * inverse
  return jnp.cos(angles), jnp.sin(angles)


def rotate_halves(x_BTNH, cos_BTh, sin_BTh):
  """RoPE on the pairs (i, i + H/2), Qwen2's layout."""
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos_BTh[:, :, None], sin_BTh[:, :, None]
  out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return out.astype(x_BTNH.dtype)


def rotate_pairs(x_BTNH, cos_Th, sin_Th):
  """RoPE on the interleaved pairs (2i, 2i + 1), FLUX's layout."""
  x = x_BTNH.astype(jnp.float32)
  a, b = x[..., ::2], x[..., 1::2]
  cos, sin = cos_Th[:, None], sin_Th[:, None]
  out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return out.reshape(x.shape).astype(x_BTNH.dtype)


def stack_init(block: nn.Module, length: int, *args: Any) -> Callable:
  """Initialiser of `length` copies of a block, stacked on a leading axis."""

  def init(key):
    one = lambda key: block.init(key, *args)["params"]
    return jax.vmap(one)(jax.random.split(key, length))

  return init


def run_stack(
  block: nn.Module,
  params: Any,
  x: Any,
  *args: Any,
  cache: Any = None,
  scan: bool,
) -> tuple[Any, Any]:
  """`x` through stacked blocks.

  Args:
    block: the (detached) block, called as `block(x, *args) -> (x, out)`, or
      `block(x, *args, cache, layer) -> (x, cache)` where there is a cache.
    params: its parameters with a leading axis `layers`.
    x: what flows from block to block.
    *args: what every block gets alike.
    cache: None; or a KVCache of all layers if `scan`, else a tuple with one a
      layer. It travels in the scan's carry: as scan inputs and outputs it
      would exist twice.
    scan: `lax.scan`, or a Python loop over static slices.
  Returns:
    x, and the new cache or the blocks' second results (stacked if `scan`, else
    a tuple).
  """
  length = jax.tree.leaves(params)[0].shape[0]
  if not scan:
    outs = []
    for i in range(length):
      layer = jax.tree.map(lambda leaf, i=i: leaf[i], params)
      own = () if cache is None else (cache[i], None)
      x, out = block.apply({"params": layer}, x, *args, *own)
      outs.append(out)
    return x, tuple(outs)
  if cache is None:
    return jax.lax.scan(
      lambda x, layer: block.apply({"params": layer}, x, *args), x, params
    )

  def body(carry, inputs):
    layer, i = inputs
    return block.apply({"params": layer}, carry[0], *args, carry[1], i), None

  return jax.lax.scan(body, (x, cache), (params, jnp.arange(length)))[0]


class KVCache(NamedTuple):
  """Keys and values [B, K, S, H]; of all layers with a leading axis."""

  k: jax.Array
  v: jax.Array


def write_cache(
  cache: KVCache,
  layer: jax.Array | None,
  slot: jax.Array,
  k_BKTH: jax.Array,
  v_BKTH: jax.Array,
) -> tuple[KVCache, jax.Array, jax.Array]:
  """Writes new keys and values from `slot` on.

  Args:
    cache: of one layer, or of all where `layer` says which.
  Returns:
    the cache in the same form, and this layer's keys and values [B, K, S, H].
  """
  if layer is None:
    k, v = (
      jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slot, 2)
      for old, new in zip(cache, (k_BKTH, v_BKTH), strict=True)
    )
    return KVCache(k, v), k, v
  # Only the new slots are written: replacing the layer would copy all of it.
  start = (layer, 0, 0, slot, 0)
  # Pinned to row-major: else XLA for TPU lays one position's keys out with B
  # before H, carries that over to the cache, and copies it in and out of the
  # loop (batch 64, length 6000: 10.81 GiB per device instead of 7.57).
  fresh = with_layout_constraint((k_BKTH, v_BKTH), Layout((0, 1, 2, 3)))
  cache = KVCache(
    *(
      jax.lax.dynamic_update_slice(old, new.astype(old.dtype)[None], start)
      for old, new in zip(cache, fresh, strict=True)
    )
  )
  k, v = (
    jax.lax.dynamic_index_in_dim(whole, layer, 0, keepdims=False)
    for whole in cache
  )
  return cache, k, v


def constrain_heads(x_BTNH: jax.Array, name: str = "heads") -> jax.Array:
  """Lays [B, T, N, H] out by batch, length and head."""
  return constrain(x_BTNH, "batch", "length", name, None)
