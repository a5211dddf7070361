"""Losses that go through a large vocabulary in chunks.

Shape letters: B rows, T positions, D width, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from xomni_jax.mesh import ways
from xomni_jax.models.layers import split_runs


class TokenLoss(NamedTuple):
  """Sums over positions of one vocabulary.

  Attributes:
    nll: f32[], of weight times negative log-likelihood, in nats.
    correct: f32[], of weight where no token is likelier than the target.
  """

  nll: jax.Array
  correct: jax.Array


def token_loss(
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  chunk: int,
) -> TokenLoss:
  """Cross-entropy of targets under softmax(head . hidden).

  Logits are in float32 and exist for `chunk` positions of a row at a time, in
  the backward pass too (made again there if there are several chunks); the
  gradient of the head is added up in float32.

  Args:
    hidden_BTD: normed hidden states, in the dtype of the matmul.
    head_VD: output embedding.
    targets_BT: i32 in [0, V); anything where the weight is 0.
    weights_BT: f32.
    chunk: positions.
  """
  # A cotangent has its primal's dtype: in bf16 the sum over chunks would lose
  # what a single chunk adds.
  head_VD = head_VD.astype(jnp.float32)

  def run(total, inputs):
    hidden, targets, weights = inputs
    logits_BtV = jnp.einsum(
      "BtD,VD->BtV",
      hidden,
      head_VD.astype(hidden.dtype),
      preferred_element_type=jnp.float32,
    )
    targets = jnp.clip(targets, 0, head_VD.shape[0] - 1)
    chosen = jnp.take_along_axis(logits_BtV, targets[..., None], -1)[..., 0]
    nll = jax.nn.logsumexp(logits_BtV, axis=-1) - chosen
    # argmax takes eight times as long on a CPU.
    correct = chosen >= jnp.max(logits_BtV, axis=-1)
    return TokenLoss(
      total.nll + jnp.sum(weights * nll),
      total.correct + jnp.sum(weights * correct),
    ), None

  zero = TokenLoss(jnp.zeros(()), jnp.zeros(()))
  inputs = (hidden_BTD, targets_BT, weights_BT)
  T, parts = targets_BT.shape[1], ways("length")
  if chunk * parts >= T or T % parts:
    return run(zero, inputs)[0]
  inputs = jax.tree.map(lambda x: split_runs(x, 1, chunk), inputs)
  return jax.lax.scan(jax.checkpoint(run), zero, inputs)[0]


class JointLoss(NamedTuple):
  """`TokenLoss` of each vocabulary."""

  text: TokenLoss
  image: TokenLoss


def joint_loss(
  params: dict,
  hidden_BTD: jax.Array,
  tokens_BT: jax.Array,
  weights_BT: jax.Array,
  vocab_size: int,
  chunk: int,
) -> JointLoss:
  """Next-token loss of the AR model.

  A target in the text vocabulary is scored by `lm_head` alone, one in the
  multimodal vocabulary (codes and specials) by `mm_head` alone: inference,
  too, picks the head by what is to come.

  Args:
    params: of the AR model, heads whole.
    hidden_BTD: after the final norm.
    tokens_BT: i32, joint ids.
    weights_BT: f32, of predicting token t from t - 1.
    vocab_size: of text.
    chunk: see `token_loss`.
  """
  # Shifted with the length kept, which may be split over devices.
  targets_BT = jnp.roll(tokens_BT, -1, axis=1)
  weights_BT = jnp.roll(weights_BT, -1, axis=1).at[:, -1].set(0)
  image_BT = targets_BT >= vocab_size
  return JointLoss(
    token_loss(
      hidden_BTD,
      params["lm_head"],
      targets_BT,
      jnp.where(image_BT, 0, weights_BT),
      chunk,
    ),
    token_loss(
      hidden_BTD,
      params["mm_head"],
      targets_BT - vocab_size,
      jnp.where(image_BT, weights_BT, 0),
      chunk,
    ),
  )
