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

from xomni_jax import mesh
from xomni_jax.mesh import constrain, ways

# Finite, so that a fully masked row (padding) gives numbers and not NaN.
NEG_INF = jnp.finfo(jnp.float32).min
# The segment of keys that queries of every segment attend to.
SHARED = -1


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
  segments: tuple[jax.Array, jax.Array] | None = None,
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
    segments: i32[B, T] of the queries and i32[B, S] of the keys; attention
      stays within a segment, and what is SHARED.
  Returns:
    [B, T, N, H].
  """
  B, T, N, H = q_BTNH.shape
  K, S = k_BKSH.shape[1:3]
  slots_S = jnp.arange(S)

  def attend(q, slots_t, segments_Bt):
    """Attention of the queries of some slots."""
    t = q.shape[1]
    # With queries after their heads both products, and those of the backward
    # pass, take scores and weights as they lie; transposed copies of them
    # took as long on a CPU as the products.
    q_BKGTH = q.reshape(B, t, K, N // K, H).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum(
      "BKGTH,BKSH->BKGTS",
      q_BKGTH,
      k_BKSH,
      preferred_element_type=jnp.float32,
    )
    scores *= scale
    if bias_NTS is not None:
      scores += bias_NTS.reshape(K, N // K, T, S)
    keep = jnp.ones((1, 1, S), bool)
    if valid_BS is not None:
      keep &= valid_BS[:, None, :]
    if causal_from is not None:
      keep &= slots_S <= (causal_from + slots_t)[:, None]
    if segments is not None:
      keys_BS = segments[1][:, None, :]
      keep &= (segments_Bt[:, :, None] == keys_BS) | (keys_BS == SHARED)
    scores = jnp.where(keep[:, None, None], scores, NEG_INF)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BKSH.dtype)
    out_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", weights, v_BKSH)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, t, N, H)

  of_queries = None if segments is None else segments[0]
  parts = ways("length")  # queries may be split over devices, keys are not
  if bias_NTS is not None and chunk < T:
    raise ValueError(f"a bias needs T <= chunk, got T={T}, chunk={chunk}")
  if chunk * parts >= T or T % parts:
    return attend(q_BTNH, jnp.arange(T), of_queries)
  inputs = (
    split_runs(q_BTNH, 1, chunk),
    split_runs(jnp.arange(T), 0, chunk),
    None if of_queries is None else split_runs(of_queries, 1, chunk),
  )
  # Scores are made again in the backward pass instead of being kept.
  out = jax.lax.map(jax.checkpoint(lambda x: attend(*x)), inputs)
  return join_runs(out, 1, T)


def split_runs(x: jax.Array, axis: int, chunk: int) -> jax.Array:
  """[..., T, ...] -> [runs, ..., parts * chunk, ...], padded with 0.

  Where the length is split over devices, a run has `chunk` positions of each
  device's part, so that all of them work on every run.
  """
  parts = ways("length")
  before, T, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
  runs = -(-T // parts // chunk)
  x = x.reshape(*before, parts, T // parts, *after)
  pad = [(0, 0)] * x.ndim
  pad[axis + 1] = (0, runs * chunk - T // parts)
  x = jnp.pad(x, pad).reshape(*before, parts, runs, chunk, *after)
  x = jnp.moveaxis(x, axis + 1, 0)
  return x.reshape(runs, *before, parts * chunk, *after)


def join_runs(x: jax.Array, axis: int, length: int) -> jax.Array:
  """The reverse of `split_runs`; `axis` as there, `length` is T."""
  parts = ways("length")
  runs, before, after = x.shape[0], x.shape[1 : axis + 1], x.shape[axis + 2 :]
  chunk = x.shape[axis + 1] // parts
  x = x.reshape(runs, *before, parts, chunk, *after)
  x = jnp.moveaxis(x, 0, axis + 1)
  x = x.reshape(*before, parts, runs * chunk, *after)
  x = jax.lax.slice_in_dim(x, 0, length // parts, axis=axis + 1)
  return x.reshape(*before, length, *after)


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


def stacked(module: nn.Module, name: str, init: Callable) -> Any:
  """The parameters of a stack of blocks, declared by `module`.

  `Module.param` would compare each shape with what `init` makes, and trace all
  of it for that; a training step's arrays are parts of whole ones.
  """
  if module.is_initializing():
    return module.param(name, init)
  return module.get_variable("params", name)


def run_stack(
  block: nn.Module,
  params: Any,
  x: Any,
  *args: Any,
  cache: Any = None,
  scan: bool,
  remat: str = "none",
  **named: Any,
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
    remat: what is not kept for the backward pass; see `Compute.remat`.
    **named: what every block gets alike, by name.
  Returns:
    x, and the new cache or the blocks' second results (stacked if `scan`, else
    a tuple).
  """
  length = jax.tree.leaves(params)[0].shape[0]

  def apply(layer, x, *own):
    # Gathered inside what is rematerialised, so that no more than one layer's
    # weights are whole at a time, in the backward pass too.
    return block.apply({"params": mesh.gather(layer)}, x, *args, *own, **named)

  if remat != "none":
    apply = jax.checkpoint(apply, policy=_POLICIES[remat], prevent_cse=not scan)
  if not scan:
    outs = []
    for i in range(length):
      layer = jax.tree.map(lambda leaf, i=i: leaf[i], params)
      own = () if cache is None else (cache[i], None)
      x, out = apply(layer, x, *own)
      outs.append(out)
    return x, tuple(outs)
  if cache is None:
    return jax.lax.scan(lambda x, layer: apply(layer, x), x, params)

  def body(carry, inputs):
    layer, i = inputs
    return apply(layer, carry[0], carry[1], i), None

  return jax.lax.scan(body, (x, cache), (params, jnp.arange(length)))[0]


_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


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
