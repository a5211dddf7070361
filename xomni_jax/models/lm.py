"""A plain Qwen2 causal language model: the reader of the image tokenizer.

It is the AR model's `lm` stack alone, with the names of the Hugging Face
layout. Features of an image may stand before its text.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from xomni_jax.config import Compute, LMConfig
from xomni_jax.mesh import constrain
from xomni_jax.models import ar
from xomni_jax.models.layers import (
  rope_angles,
  run_stack,
  stack_init,
  stacked,
)
from xomni_jax.params import Row, abstract_tree, prefixed

_INIT = nn.initializers.normal(0.02)  # Qwen2's initializer_range


class CausalLM(nn.Module):
  """Tokens, and what stands before them, to normed hidden states.

  The head is declared here, so that `init` makes it, and applied outside, so
  that a loss may go through the vocabulary in chunks.
  """

  cfg: LMConfig
  compute: Compute = Compute()

  @nn.compact
  def __call__(
    self,
    tokens_BT: jax.Array,
    positions_BS: jax.Array,
    valid_BS: jax.Array,
    prefix_BLD: jax.Array | None = None,
    segments_BS: jax.Array | None = None,
  ) -> jax.Array:
    """Final-norm output at every position, [B, S, D] with S = L + T.

    Args:
      tokens_BT: i32, text ids.
      positions_BS: i32, of the prefix and the tokens.
      valid_BS: bool; False keys (padding) are never attended to.
      prefix_BLD: embeddings before the tokens, of an image; None: L is 0.
      segments_BS: i32, of packed samples; none attends to another.
    """
    cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
    table = self.param(
      "embed_tokens", _INIT, (cfg.vocab_size, cfg.hidden_size), jnp.float32
    )
    if not cfg.tie_word_embeddings:
      self.param("lm_head", _INIT, table.shape, jnp.float32)
    x_BSD = table[tokens_BT].astype(dtype)
    if prefix_BLD is not None:
      x_BSD = jnp.concatenate([prefix_BLD.astype(dtype), x_BSD], axis=1)
    x_BSD = constrain(x_BSD, "batch", "length", None)
    rope = rope_angles(positions_BS, cfg.head_dim, cfg.rope_theta)
    image_BS = jnp.zeros_like(valid_BS)  # no block here is vision-only
    block = ar.Block(cfg, self.compute, parent=None)
    init = stack_init(
      block, cfg.num_hidden_layers, x_BSD, rope, image_BS, valid_BS
    )
    packed = {} if segments_BS is None else {"segments_BT": segments_BS}
    x_BSD, _ = run_stack(
      block,
      stacked(self, "layers", init),
      x_BSD,
      rope,
      image_BS,
      valid_BS,
      scan=self.compute.scan_layers,
      remat=self.compute.remat,
      **packed,
    )
    return nn.RMSNorm(epsilon=cfg.rms_norm_eps, dtype=dtype, name="norm")(x_BSD)


def head(params: dict, cfg: LMConfig) -> jax.Array:
  """The head [V, D]; the text embedding where they are tied."""
  return params["embed_tokens" if cfg.tie_word_embeddings else "lm_head"]


def logits(params: dict, hidden: jax.Array, cfg: LMConfig) -> jax.Array:
  """f32[..., vocab_size] from normed hidden states [..., D]."""
  return jnp.einsum(
    "...D,VD->...V",
    hidden,
    head(params, cfg).astype(hidden.dtype),
    preferred_element_type=jnp.float32,
  )


def rows(cfg: LMConfig) -> list[Row]:
  """The parameter table, with Hugging Face's keys."""
  table = "vocab embed -> vocab embed"
  outside = [
    ("embed_tokens", "model.embed_tokens.weight", table),
    ("norm/scale", "model.norm.weight", "norm -> norm"),
  ]
  if not cfg.tie_word_embeddings:
    outside.append(("lm_head", "lm_head.weight", table))
  return [
    *prefixed("", "", outside),
    *prefixed("layers/", "model.layers.{i}.", ar.BLOCK),
  ]


@abstract_tree
def abstract(cfg: LMConfig) -> dict[str, Any]:
  """The parameter tree as shapes, nothing allocated."""
  tokens, valid = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
  model = CausalLM(cfg, Compute(scan_layers=True))
  return model.init(jax.random.key(0), tokens, tokens, valid)["params"]
