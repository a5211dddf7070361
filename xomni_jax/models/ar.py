"""The AR transformer: Qwen2 with vision-only blocks before and after.

One Block and three stacks, `vision_in`, `lm` and `vision_out`, all over the
whole sequence. A vision-only block writes its result back at image positions
only, while its keys and values exist at every position.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from xomni_jax.config import ARConfig, Compute
from xomni_jax.mesh import constrain
from xomni_jax.models.layers import (
  NEG_INF,
  KVCache,
  attention,
  constrain_heads,
  rope_angles,
  rotate_halves,
  run_stack,
  stack_init,
  stacked,
  write_cache,
)
from xomni_jax.models.splash import splash
from xomni_jax.params import Row, abstract_tree, dense, prefixed

_INIT = nn.initializers.normal(0.02)  # Qwen2's initializer_range


class Block(nn.Module):
  """One Qwen2 block; vision-only ones differ in where they write."""

  cfg: ARConfig
  compute: Compute
  vision_only: bool = False
  keep_kv: bool = False

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    image_BT: jax.Array,
    valid_BS: jax.Array,
    slot: int | jax.Array = 0,
    cache: KVCache | None = None,
    layer: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
  ):
    """The block's output.

    Args:
      x_BTD: residual stream.
      rope: cos, sin f32[B, T, H/2].
      image_BT: True at image-side positions.
      valid_BS: False keys (padding) are never attended to.
      slot: key slot of the first position.
      cache, layer: keys and values of earlier positions (see `write_cache`);
        None: the sequence itself is all there is.
      segments_BT: i32, of packed samples; none attends to another.
    Returns:
      x_BTD and the updated cache, or, without one, the new KVCache if
      `keep_kv` is set, else None.
    """
    cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
    heads = lambda n, name: nn.DenseGeneral(
      (n, cfg.head_dim), dtype=dtype, kernel_init=_INIT, name=name
    )
    linear = lambda size, name: nn.Dense(
      size, use_bias=False, dtype=dtype, kernel_init=_INIT, name=name
    )
    norm = lambda name: nn.RMSNorm(
      epsilon=cfg.rms_norm_eps, dtype=dtype, name=name
    )
    h_BTD = norm("input_layernorm")(x_BTD)
    q_BTNH = heads(cfg.num_attention_heads, "q_proj")(h_BTD)
    k_BTKH = heads(cfg.num_key_value_heads, "k_proj")(h_BTD)
    v_BTKH = heads(cfg.num_key_value_heads, "v_proj")(h_BTD)
    q_BTNH = constrain_heads(rotate_halves(q_BTNH, *rope))
    k_BTKH = constrain_heads(rotate_halves(k_BTKH, *rope), "kv_heads")
    k, v = (jnp.swapaxes(x, 1, 2) for x in (k_BTKH, v_BTKH))
    if cache is None:
      out = KVCache(k, v) if self.keep_kv else None
    else:
      out, k, v = write_cache(cache, layer, slot, k, v)
    kernel = self.compute.attention
    if segments_BT is not None and kernel != "chunked":
      a_BTNH = splash(
        q_BTNH,
        k,
        v,
        segments_BT,
        causal=True,
        interpret=kernel == "splash_interpret",
      )
    else:
      # Over `context` queries stay split, keys and values are whole.
      k, v = (constrain(x, "batch", "kv_heads", None, None) for x in (k, v))
      a_BTNH = attention(
        q_BTNH,
        k,
        v,
        scale=cfg.head_dim**-0.5,
        chunk=self.compute.query_chunk,
        valid_BS=valid_BS,
        causal_from=slot,
        segments=None if segments_BT is None else (segments_BT, segments_BT),
      )
    y_BTD = x_BTD + nn.DenseGeneral(
      cfg.hidden_size,
      axis=(-2, -1),
      use_bias=False,
      dtype=dtype,
      kernel_init=_INIT,
      name="o_proj",
    )(constrain_heads(a_BTNH))
    h_BTD = norm("post_attention_layernorm")(y_BTD)
    gate_BTF = linear(cfg.intermediate_size, "gate_proj")(h_BTD)
    up_BTF = linear(cfg.intermediate_size, "up_proj")(h_BTD)
    y_BTD += linear(cfg.hidden_size, "down_proj")(nn.silu(gate_BTF) * up_BTF)
    if self.vision_only:
      y_BTD = jnp.where(image_BT[..., None], y_BTD, x_BTD)
    return constrain(y_BTD, "batch", "length", None), out


class XOmniAR(nn.Module):
  """Tokens to normed hidden states; `text_logits`, `image_logits` follow.

  The heads are declared here, so that `init` makes them, and applied outside,
  so that a decode step computes only the one it needs and a loss may go
  through the vocabulary in chunks.
  """

  cfg: ARConfig
  compute: Compute = Compute()
  keep_kv: bool = False

  @nn.compact
  def __call__(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    valid_BS: jax.Array,
    slot: int | jax.Array = 0,
    cache: dict[str, Any] | None = None,
    segments_BT: jax.Array | None = None,
  ):
    """Final-norm output at every position.

    Args:
      tokens_BT: i32, joint ids: text below `vocab_size`, image-side from it.
      positions_BT: i32, counting real tokens.
      valid_BS: bool; False keys (padding) are never attended to.
      slot: key slot of the first token (with a cache).
      cache: {stack name: keys and values}, from `init_cache`.
      segments_BT: i32, of packed samples; none attends to another.
    Returns:
      hidden [B, T, D], and the updated cache; without a cache, the new keys
      and values in `cache`'s form if `keep_kv` is set.
    """
    cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
    table = lambda name, size: self.param(
      name, _INIT, (size, cfg.hidden_size), jnp.float32
    )
    lm_table = table("lm_embed_tokens", cfg.vocab_size)
    mm_table = table("mm_embed_tokens", cfg.mm_vocab_size)
    table("lm_head", cfg.vocab_size)
    table("mm_head", cfg.mm_vocab_size)

    image_BT = tokens_BT >= cfg.vocab_size
    lm_ids = jnp.where(image_BT, 0, tokens_BT)
    mm_ids = jnp.where(image_BT, tokens_BT - cfg.vocab_size, 0)
    x_BTD = jnp.where(
      image_BT[..., None], mm_table[mm_ids], lm_table[lm_ids]
    ).astype(dtype)
    x_BTD = constrain(x_BTD, "batch", "length", None)
    rope = rope_angles(positions_BT, cfg.head_dim, cfg.rope_theta)

    out = {}
    args = (rope, image_BT, valid_BS, slot)
    packed = {} if segments_BT is None else {"segments_BT": segments_BT}
    for name, length in stacks(cfg).items():
      if not length:
        continue
      block = Block(cfg, self.compute, name != "lm", self.keep_kv, parent=None)
      # Shapes alone count here, and `valid_BS` is as long as the cache.
      init = stack_init(block, length, x_BTD, rope, image_BT, image_BT)
      x_BTD, out[name] = run_stack(
        block,
        stacked(self, name, init),
        x_BTD,
        *args,
        cache=None if cache is None else cache[name],
        scan=self.compute.scan_layers,
        remat=self.compute.remat,
        **packed,
      )
    norm = lambda name: nn.RMSNorm(
      epsilon=cfg.rms_norm_eps, dtype=dtype, name=name
    )
    x_BTD = jnp.where(
      image_BT[..., None], norm("mm_norm")(x_BTD), norm("lm_norm")(x_BTD)
    )
    return x_BTD, out


def stacks(cfg: ARConfig) -> dict[str, int]:
  """Name and length of the stacks, in the order they are passed."""
  return {
    "vision_in": cfg.num_mm_adap_layers,
    "lm": cfg.num_lm_layers,
    "vision_out": cfg.num_mm_head_layers,
  }


def positions_of(valid_BT: jax.Array) -> jax.Array:
  """i32[B, T]: real tokens counted from 0; 1 at padding, as the reference."""
  count = jnp.cumsum(valid_BT, axis=-1, dtype=jnp.int32) - 1
  return jnp.where(valid_BT, count, 1)


def text_logits(params: dict, hidden: jax.Array) -> jax.Array:
  """f32[..., vocab_size] from normed hidden states [..., D]."""
  return _head(params["lm_head"], hidden)


def image_logits(params: dict, hidden: jax.Array, cfg: ARConfig) -> jax.Array:
  """f32[..., image_vocab_size] from normed hidden states [..., D]."""
  return _head(params["mm_head"][: cfg.image_vocab_size], hidden)


def _head(table_VD, hidden):
  return jnp.einsum(
    "...D,VD->...V",
    hidden,
    table_VD.astype(hidden.dtype),
    preferred_element_type=jnp.float32,
  )


def joint_logits(
  params: dict, hidden: jax.Array, cfg: ARConfig, mode: str
) -> jax.Array:
  """f32[..., vocab_size + mm_vocab_size], float32 min outside the mode."""
  total = cfg.vocab_size + cfg.mm_vocab_size
  if mode == "text":
    logits, first = text_logits(params, hidden), 0
  else:
    logits, first = image_logits(params, hidden, cfg), cfg.vocab_size
  pad = [(0, 0)] * (logits.ndim - 1)
  last = total - first - logits.shape[-1]
  return jnp.pad(logits, [*pad, (first, last)], constant_values=NEG_INF)


def init_cache(
  cfg: ARConfig, compute: Compute, batch: int, length: int
) -> dict[str, Any]:
  """Empty keys and values for `length` positions, by stack name."""
  dtype = jnp.dtype(compute.dtype)
  shape = (batch, cfg.num_key_value_heads, length, cfg.head_dim)

  def empty(*lead):
    zeros = jnp.zeros((*lead, *shape), dtype)
    zeros = constrain(zeros, *cache_axes(zeros.ndim))
    return KVCache(zeros, zeros)

  if compute.scan_layers:
    return {n: empty(size) for n, size in stacks(cfg).items() if size}
  return {
    n: tuple(empty() for _ in range(size))
    for n, size in stacks(cfg).items()
    if size
  }


def cache_axes(ndim: int) -> tuple[str | None, ...]:
  """Logical axes of the cache's arrays, of one layer (4) or of all (5)."""
  return ("layers", "batch", "kv_heads", None, None)[-ndim:]


BLOCK = [
  *(
    entry
    for x, heads in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads"))
    for entry in dense(
      f"{x}_proj",
      f"self_attn.{x}_proj",
      f"({heads} head_dim) embed -> embed {heads} head_dim",
    )
  ),
  (
    "o_proj/kernel",
    "self_attn.o_proj.weight",
    "embed (heads head_dim) -> heads head_dim embed",
  ),
  ("gate_proj/kernel", "mlp.gate_proj.weight", "mlp embed -> embed mlp"),
  ("up_proj/kernel", "mlp.up_proj.weight", "mlp embed -> embed mlp"),
  ("down_proj/kernel", "mlp.down_proj.weight", "embed mlp -> mlp embed"),
  ("input_layernorm/scale", "input_layernorm.weight", "norm -> norm"),
  (
    "post_attention_layernorm/scale",
    "post_attention_layernorm.weight",
    "norm -> norm",
  ),
]

_OUTSIDE = [
  (
    "lm_embed_tokens",
    "model.lm_embed_tokens.weight",
    "vocab embed -> vocab embed",
  ),
  (
    "mm_embed_tokens",
    "model.mm_embed_tokens.weight",
    "vocab embed -> vocab embed",
  ),
  ("lm_norm/scale", "model.lm_norm.weight", "norm -> norm"),
  ("mm_norm/scale", "model.mm_norm.weight", "norm -> norm"),
  ("lm_head", "lm_head.weight", "vocab embed -> vocab embed"),
  ("mm_head", "mm_head.weight", "vocab embed -> vocab embed"),
]


def rows(cfg: ARConfig) -> list[Row]:
  """The parameter table: `model.layers.N` runs over all three stacks."""
  out, first = prefixed("", "", _OUTSIDE), 0
  for name, length in stacks(cfg).items():
    if length:
      out += prefixed(f"{name}/", "model.layers.{i}.", BLOCK, first)
    first += length
  return out


@abstract_tree
def abstract(cfg: ARConfig) -> dict[str, Any]:
  """The parameter tree as shapes, nothing allocated."""
  tokens, valid = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
  model = XOmniAR(cfg, Compute(scan_layers=True))
  return model.init(jax.random.key(0), tokens, tokens, valid)["params"]
