"""The prompt encoders of FLUX: CLIP's text model and T5's encoder.

Neither masks padding: FLUX was trained on what they make of it.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from xomni_jax.config import Compute
from xomni_jax.flux_config import CLIPConfig, T5Config
from xomni_jax.mesh import constrain
from xomni_jax.models.layers import (
  attention,
  constrain_heads,
  run_stack,
  stack_init,
  stacked,
)
from xomni_jax.params import Row, abstract_tree, dense, norm, prefixed

_EMBED = nn.initializers.normal(0.02)  # CLIP's initializer_range


class CLIPBlock(nn.Module):
  """Causal attention and MLP, each after its norm and added."""

  cfg: CLIPConfig
  compute: Compute

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, None]:
    cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
    head_dim = cfg.hidden_size // cfg.num_attention_heads
    heads = lambda name: constrain_heads(
      nn.DenseGeneral(
        (cfg.num_attention_heads, head_dim), dtype=dtype, name=name
      )(h_BTD)
    )
    h_BTD = _layer_norm(cfg, dtype, "layer_norm1")(x_BTD)
    k_BNSH, v_BNSH = (
      jnp.swapaxes(heads(name), 1, 2) for name in ("k_proj", "v_proj")
    )
    a_BTNH = attention(
      heads("q_proj"),
      k_BNSH,
      v_BNSH,
      scale=head_dim**-0.5,
      chunk=self.compute.query_chunk,
      causal_from=0,
    )
    x_BTD += nn.DenseGeneral(
      cfg.hidden_size, axis=(-2, -1), dtype=dtype, name="out_proj"
    )(constrain_heads(a_BTNH))
    h_BTD = _layer_norm(cfg, dtype, "layer_norm2")(x_BTD)
    h_BTF = nn.Dense(cfg.intermediate_size, dtype=dtype, name="fc1")(h_BTD)
    if cfg.hidden_act == "quick_gelu":
      h_BTF *= nn.sigmoid(1.702 * h_BTF)
    else:
      h_BTF = nn.gelu(h_BTF, approximate=False)
    x_BTD += nn.Dense(cfg.hidden_size, dtype=dtype, name="fc2")(h_BTF)
    return constrain(x_BTD, "batch", "length", None), None


def _layer_norm(cfg, dtype, name):
  # The fast variance, E[x^2] - E[x]^2, cancels where a stream is off centre.
  return nn.LayerNorm(
    epsilon=cfg.layer_norm_eps, dtype=dtype, use_fast_variance=False, name=name
  )


class CLIPText(nn.Module):
  """CLIP's text model.

  Source: Radford et al. 2021 (arXiv:2103.00020); transformers' CLIPTextModel.
  """

  cfg: CLIPConfig
  compute: Compute = Compute()

  @nn.compact
  def __call__(self, ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hidden states and one vector a prompt.

    Args:
      ids_BT: i32, T at most `max_position_embeddings`.
    Returns:
      hidden [B, T, D] after the final norm, and of it the position that ends
      the text, [B, D].
    """
    cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
    T = ids_BT.shape[1]
    if cfg.max_position_embeddings < T:
      raise ValueError(
        f"CLIP got {T} ids a prompt, expected at most "
        f"{cfg.max_position_embeddings}; truncate them"
      )
    table = lambda name, size: self.param(
      name, _EMBED, (size, cfg.hidden_size), jnp.float32
    )
    tokens_VD = table("token_embedding", cfg.vocab_size)
    positions_SD = table("position_embedding", cfg.max_position_embeddings)
    x_BTD = (tokens_VD[ids_BT] + positions_SD[:T]).astype(dtype)
    x_BTD = constrain(x_BTD, "batch", "length", None)

    block = CLIPBlock(cfg, self.compute, parent=None)
    params = stacked(
      self, "blocks", stack_init(block, cfg.num_hidden_layers, x_BTD)
    )
    x_BTD, _ = run_stack(
      block,
      params,
      x_BTD,
      scan=self.compute.scan_layers,
      remat=self.compute.remat,
    )
    x_BTD = _layer_norm(cfg, dtype, "final_layer_norm")(x_BTD)

    # Configs as old as FLUX's say 2 whatever the end token is; it has the
    # largest id. argmax gives the first of equals (padding is the same token).
    if cfg.eos_token_id == 2:
      end_B = jnp.argmax(ids_BT, axis=-1)
    else:
      end_B = jnp.argmax(ids_BT == cfg.eos_token_id, axis=-1)
    return x_BTD, x_BTD[jnp.arange(len(end_B)), end_B]


class T5Block(nn.Module):
  """Attention with a bias by distance and gated MLP, each after its norm."""

  cfg: T5Config
  compute: Compute

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, bias_NTS: jax.Array
  ) -> tuple[jax.Array, None]:
    cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
    linear = lambda size, name, **how: nn.DenseGeneral(
      size, use_bias=False, dtype=dtype, name=name, **how
    )
    heads = lambda name, **how: constrain_heads(
      linear((cfg.num_heads, cfg.d_kv), name, **how)(h_BTD)
    )
    h_BTD = _rms_norm(cfg, dtype, "layer_norm_0")(x_BTD)
    k_BNSH, v_BNSH = (jnp.swapaxes(heads(name), 1, 2) for name in ("k", "v"))
    # T5 leaves the scores unscaled; 1 / sqrt(d_kv) is in the initial weights.
    q_init = nn.initializers.variance_scaling(1 / cfg.d_kv, "fan_in", "normal")
    a_BTNH = attention(
      heads("q", kernel_init=q_init),
      k_BNSH,
      v_BNSH,
      scale=1.0,
      chunk=x_BTD.shape[1],  # the bias exists whole, so the scores may
      bias_NTS=bias_NTS,
    )
    x_BTD += linear(cfg.d_model, "o", axis=(-2, -1))(constrain_heads(a_BTNH))
    h_BTD = _rms_norm(cfg, dtype, "layer_norm_1")(x_BTD)
    gate_BTF = linear(cfg.d_ff, "wi_0")(h_BTD)
    up_BTF = linear(cfg.d_ff, "wi_1")(h_BTD)
    x_BTD += linear(cfg.d_model, "wo")(
      nn.gelu(gate_BTF, approximate=True) * up_BTF
    )
    return constrain(x_BTD, "batch", "length", None), None


def _rms_norm(cfg, dtype, name):
  return nn.RMSNorm(epsilon=cfg.layer_norm_epsilon, dtype=dtype, name=name)


class T5Encoder(nn.Module):
  """T5 v1.1's encoder.

  Source: Raffel et al. 2020 (arXiv:1910.10683); transformers' T5EncoderModel.
  """

  cfg: T5Config
  compute: Compute = Compute()

  @nn.compact
  def __call__(self, ids_BT: jax.Array) -> jax.Array:
    """Hidden states [B, T, D] after the final norm, of ids i32[B, T]."""
    cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
    shared_VD = self.param(
      "shared",
      nn.initializers.normal(1.0),
      (cfg.vocab_size, cfg.d_model),
      jnp.float32,
    )
    bias_RN = self.param(
      "relative_attention_bias",
      nn.initializers.normal(cfg.d_model**-0.5),
      (cfg.relative_attention_num_buckets, cfg.num_heads),
      jnp.float32,
    )
    x_BTD = constrain(shared_VD[ids_BT].astype(dtype), "batch", "length", None)
    buckets_TS = relative_buckets(ids_BT.shape[1], cfg)
    bias_NTS = jnp.moveaxis(bias_RN[buckets_TS].astype(jnp.float32), -1, 0)

    block = T5Block(cfg, self.compute, parent=None)
    params = stacked(
      self, "blocks", stack_init(block, cfg.num_layers, x_BTD, bias_NTS)
    )
    x_BTD, _ = run_stack(
      block,
      params,
      x_BTD,
      bias_NTS,
      scan=self.compute.scan_layers,
      remat=self.compute.remat,
    )
    return _rms_norm(cfg, dtype, "final_layer_norm")(x_BTD)


def relative_buckets(length: int, cfg: T5Config) -> np.ndarray:
  """i32[T, S]: the bucket of each key's distance from each query.

  Half of the buckets are for keys after the query; of each half, one half has
  a bucket a distance and the other is logarithmic up to the maximum distance.
  """
  slots = np.arange(length)
  offset_TS = slots - slots[:, None]
  half = cfg.relative_attention_num_buckets // 2
  exact = half // 2
  # float32 in this order, as transformers has it, and not by XLA: a distance
  # on a bucket's edge (16, 32, 64) moves with the last bit of the logarithm.
  far = np.maximum(np.abs(offset_TS), 1).astype(np.float32) / np.float32(exact)
  span = np.float32(math.log(cfg.relative_attention_max_distance / exact))
  far_TS = exact + (np.log(far) / span * np.float32(half - exact)).astype(int)
  bucket_TS = np.where(
    np.abs(offset_TS) < exact,
    np.abs(offset_TS),
    np.minimum(far_TS, half - 1),
  )
  return (bucket_TS + half * (offset_TS > 0)).astype(np.int32)


_CLIP_BLOCK = [
  *norm("layer_norm1", "layer_norm1", "norm"),
  *(
    entry
    for x in ("q_proj", "k_proj", "v_proj")
    for entry in dense(
      x, f"self_attn.{x}", "(heads head_dim) embed -> embed heads head_dim"
    )
  ),
  *dense(
    "out_proj",
    "self_attn.out_proj",
    "embed (heads head_dim) -> heads head_dim embed",
  ),
  *norm("layer_norm2", "layer_norm2", "norm"),
  *dense("fc1", "mlp.fc1", "mlp embed -> embed mlp"),
  *dense("fc2", "mlp.fc2", "embed mlp -> mlp embed"),
]

_CLIP_OUTSIDE = [
  (
    "token_embedding",
    "embeddings.token_embedding.weight",
    "vocab embed -> vocab embed",
  ),
  (
    "position_embedding",
    "embeddings.position_embedding.weight",
    "position embed -> position embed",
  ),
  *norm("final_layer_norm", "final_layer_norm", "norm"),
]

_T5_BLOCK = [
  ("layer_norm_0/scale", "layer.0.layer_norm.weight", "norm -> norm"),
  *(
    (
      f"{x}/kernel",
      f"layer.0.SelfAttention.{x}.weight",
      "(heads head_dim) embed -> embed heads head_dim",
    )
    for x in ("q", "k", "v")
  ),
  (
    "o/kernel",
    "layer.0.SelfAttention.o.weight",
    "embed (heads head_dim) -> heads head_dim embed",
  ),
  ("layer_norm_1/scale", "layer.1.layer_norm.weight", "norm -> norm"),
  *(
    (
      f"{x}/kernel",
      f"layer.1.DenseReluDense.{x}.weight",
      "mlp embed -> embed mlp",
    )
    for x in ("wi_0", "wi_1")
  ),
  (
    "wo/kernel",
    "layer.1.DenseReluDense.wo.weight",
    "embed mlp -> mlp embed",
  ),
]

_T5_OUTSIDE = [
  ("shared", "shared.weight", "vocab embed -> vocab embed"),
  (
    "relative_attention_bias",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "bucket heads -> bucket heads",
  ),
  ("final_layer_norm/scale", "encoder.final_layer_norm.weight", "norm -> norm"),
]


def clip_rows(cfg: CLIPConfig) -> list[Row]:
  """CLIP's parameter table (the same for any `cfg`)."""
  del cfg
  return [
    *prefixed("", "text_model.", _CLIP_OUTSIDE),
    *prefixed("blocks/", "text_model.encoder.layers.{i}.", _CLIP_BLOCK),
  ]


def t5_rows(cfg: T5Config) -> list[Row]:
  """T5's parameter table (the same for any `cfg`)."""
  del cfg
  return [
    *prefixed("", "", _T5_OUTSIDE),
    *prefixed("blocks/", "encoder.block.{i}.", _T5_BLOCK),
  ]


@abstract_tree
def clip_abstract(cfg: CLIPConfig) -> dict[str, Any]:
  """CLIP's parameter tree as shapes, nothing allocated."""
  return _init(CLIPText(cfg, Compute(scan_layers=True)))


@abstract_tree
def t5_abstract(cfg: T5Config) -> dict[str, Any]:
  """T5's parameter tree as shapes, nothing allocated."""
  return _init(T5Encoder(cfg, Compute(scan_layers=True)))


def _init(model):
  ids = jnp.zeros((1, 1), jnp.int32)
  return model.init(jax.random.key(0), ids)["params"]
