"""GRPO: what an update of the policy is made of.

Shape letters: B rows (samples), G samples of a prompt, L image tokens, D width,
V codes. Source: DeepSeekMath (arXiv:2402.03300), section 4.1; DAPO
(arXiv:2503.14476) for two-sided clipping and token means.

The behaviour policy is what tokens were drawn from: temperature, then the
filters (top-k, top-p, min-p). Under other parameters a filter could leave a
drawn token out, so the support that was kept when it was drawn is stored, and
both log-probs of a ratio are normalised over it. The KL divergence is between
the two models as they are, under the temperature alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xomni_jax.config import ARConfig
from xomni_jax.mesh import ways
from xomni_jax.models import ar
from xomni_jax.models.layers import join_runs, split_runs
from xomni_jax.stage_options import GRPOOptions
from xomni_jax.training.stage import Batch, Metrics


def group_advantages(
  rewards: np.ndarray, group_size: int, *, normalise: bool, floor: float = 1e-4
) -> np.ndarray:
  """Rewards less their group's mean.

  Args:
    rewards: f[B], the G samples of a prompt adjacent; NaN = unscored.
    group_size: G, at least 2.
    normalise: divide by the group's standard deviation.
    floor: added to it.
  Returns:
    f32[B]; 0 where the reward is NaN, or where the group has one score alone.
  Raises:
    ValueError: G < 2, or G does not divide B.
  """
  if group_size < 2 or len(rewards) % group_size:
    raise ValueError(
      f"{len(rewards)} rewards are not groups of {group_size}; groups have at "
      "least 2 samples"
    )
  groups = np.asarray(rewards, np.float64).reshape(-1, group_size)
  scored = np.isfinite(groups)
  count = np.maximum(scored.sum(axis=1, keepdims=True), 1)
  mean = np.where(scored, groups, 0).sum(axis=1, keepdims=True) / count
  found = np.where(scored, groups - mean, 0)
  if normalise:
    deviation = np.sqrt((found**2).sum(axis=1, keepdims=True) / count)
    found = found / (deviation + floor)
  return found.reshape(-1).astype(np.float32)


class TokenScores(NamedTuple):
  """How likely drawn codes are, f32[B, L] each, in nats.

  Attributes:
    logp: under the temperature, over the support they were drawn from.
    logp_model: under the temperature alone.
    entropy: of the distribution of `logp`.
  """

  logp: jax.Array
  logp_model: jax.Array
  entropy: jax.Array


def token_scores(
  params: dict,
  hidden_BLD: jax.Array,
  codes_BL: jax.Array,
  support_BLv: jax.Array | None,
  cfg: ARConfig,
  *,
  temperature: float,
  chunk: int,
) -> TokenScores:
  """Scores of codes; logits exist for `chunk` positions of a row at a time.

  Args:
    params: of the AR model, its head whole.
    hidden_BLD: normed hidden states from which each code is predicted.
    codes_BL: i32.
    support_BLv: u8[B, L, ceil(V / 8)], one bit a code, most significant first;
      None: all codes.
    cfg: of the AR model.
    temperature: logits are divided by it.
    chunk: positions.
  """
  # As in losses.token_loss: the head's gradient is added up in float32.
  params = {**params, "mm_head": params["mm_head"].astype(jnp.float32)}

  def run(_, inputs):
    hidden, codes, support = inputs
    logits = ar.image_logits(params, hidden, cfg) / temperature
    of_code = lambda x: jnp.take_along_axis(x, codes[..., None], -1)[..., 0]
    log_model = jax.nn.log_softmax(logits, axis=-1)
    log_kept = log_model
    if support is not None:
      # A run's padding keeps none: NaN there would reach the head's gradient.
      # (Asked of the bytes: libtpu 0.0.52 dies of a reduction of the bits.)
      most = jnp.max(support.astype(jnp.int32), axis=-1, keepdims=True)
      support = jnp.where(most > 0, support, jnp.uint8(255))
      kept = jnp.unpackbits(support, axis=-1, count=logits.shape[-1]) > 0
      logits = jnp.where(kept, logits, -jnp.inf)
      log_kept = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(log_kept)
    entropy = -jnp.sum(
      probs * jnp.where(probs > 0, log_kept, 0), axis=-1
    )  # 0 log 0 is 0
    return None, TokenScores(of_code(log_kept), of_code(log_model), entropy)

  inputs = (hidden_BLD, codes_BL, support_BLv)
  L = codes_BL.shape[1]
  if chunk >= L or ways("length") > 1:
    return run(None, inputs)[1]
  inputs = jax.tree.map(lambda x: split_runs(x, 1, chunk), inputs)
  _, scores = jax.lax.scan(jax.checkpoint(run), None, inputs)
  return jax.tree.map(lambda x: join_runs(x, 1, L), scores)


def policy_totals(batch: Batch) -> dict[str, jax.Array]:
  """{"tokens", "rows"} that count, f32[] each, of the given rows."""
  rows_B = jnp.any(batch["mask"] > 0, axis=1)
  return {
    "tokens": jnp.sum(batch["mask"]),
    "rows": jnp.sum(rows_B.astype(jnp.float32)),
  }


def policy_loss(
  scores: TokenScores, batch: Batch, totals: Batch, options: GRPOOptions
) -> tuple[jax.Array, Metrics]:
  """Contribution of some rows to the loss, and to the metrics.

  Args:
    scores: of the policy that is being trained.
    batch: rows with `logp_old` and `logp_ref` f32[B, L], of the policy when it
      drew them and of the reference (a model's, see `TokenScores`);
      `logp_sampler` f32[B, L], as the sampler computed `logp_old`;
      `advantage` f32[B, L]; `mask` f32[B, L], 1 for tokens that count: none of
      a row without a reward.
    totals: `policy_totals` of the global batch.
    options: of the stage.
  Returns:
    the loss, and metrics, of tokens that count; those called "..._max" are
    the greatest value of these rows, the others add up over parts of a batch.
  """
  mask_BL = batch["mask"]
  # Before anything is exponentiated: what does not count may be anything, and
  # 0 times the slope of an infinite exp would be NaN.
  counted = lambda x: jnp.where(mask_BL > 0, x, 0)
  advantage_BL = counted(batch["advantage"])
  ratio = jnp.exp(counted(scores.logp - batch["logp_old"]))
  low, high = 1 - options.clip_low, 1 + options.clip_high
  surrogate = jnp.minimum(
    ratio * advantage_BL, jnp.clip(ratio, low, high) * advantage_BL
  )
  gap = counted(batch["logp_old"] - batch["logp_sampler"])
  if options.importance_cap:
    # Of what the sampler did, numerically, to what training says it did.
    surrogate *= jnp.minimum(jnp.exp(gap), options.importance_cap)
  # k3 (Schulman): unbiased, and never negative. expm1 keeps it so near 0.
  behind = counted(batch["logp_ref"] - scores.logp_model)
  kl = jnp.expm1(behind) - behind
  token_loss = counted(-surrogate + options.beta * kl)
  tokens = jnp.maximum(totals["tokens"], 1.0)
  mean = lambda x: jnp.sum(counted(x)) / tokens
  most = lambda x: jnp.max(counted(x), initial=0.0)
  if options.aggregate == "token":
    loss = mean(token_loss)
  else:
    lengths_B = jnp.maximum(jnp.sum(mask_BL, axis=1), 1.0)
    of_rows_B = jnp.sum(token_loss, axis=1)
    loss = jnp.sum(of_rows_B / lengths_B) / jnp.maximum(totals["rows"], 1.0)
  # Without an advantage there is no slope that a clip could stop.
  clipped = ((advantage_BL > 0) & (ratio > high)) | (
    (advantage_BL < 0) & (ratio < low)
  )
  off, gap_size = jnp.abs(ratio - 1), jnp.abs(gap)
  metrics = {
    "tokens": jnp.sum(mask_BL),
    "kl": mean(kl),
    "entropy": mean(scores.entropy),
    "clip_fraction": mean(clipped),
    "ratio": mean(ratio),
    "ratio_off": mean(off),
    "ratio_off_max": most(off),
    "sampler_gap": mean(gap_size),
    "sampler_gap_max": most(gap_size),
    "advantage_size": mean(jnp.abs(advantage_BL)),
  }
  return loss, metrics
