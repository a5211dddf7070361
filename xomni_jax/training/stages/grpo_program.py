"""What stage `grpo` compiles: the policy's update, and log-probs of rollouts.

Rows are images: a prompt, padded on the left, and the codes that were drawn.
Shape letters: B rows, P prompt tokens, L image tokens, V codes.
"""

import jax
import jax.numpy as jnp

from xomni_jax.config import Architecture
from xomni_jax.models import ar
from xomni_jax.train_config import TrainConfig
from xomni_jax.training import flops, policy
from xomni_jax.training.stage import Batch, Context, Params, Part, Program
from xomni_jax.training.stages import ar as ar_stage

# The policy and what it must not stray from: the same model twice.
POLICY, REFERENCE = "ar", "ref"


def has_support(cfg: TrainConfig) -> bool:
  """Whether a filter keeps some codes from being drawn."""
  opts = cfg.options
  return bool(opts.top_k or opts.top_p < 1 or opts.min_p)


def shapes(cfg: TrainConfig, arch: Architecture, rows: int) -> Batch:
  """What a number of rows look like."""
  opts = cfg.options
  px = arch.siglip.patch
  L = max(h // px * (w // px) for h, w in opts.sizes)
  T = opts.prompt_len + L - 1
  array = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype)
  out = {
    "tokens": array(jnp.int32, T),
    "valid": array(bool, T),
    "codes": array(jnp.int32, L),
    "mask": array(jnp.float32, L),
    "advantage": array(jnp.float32, L),
    "logp_old": array(jnp.float32, L),
    "logp_ref": array(jnp.float32, L),
    "logp_sampler": array(jnp.float32, L),
  }
  if has_support(cfg):
    bits = -(-arch.ar.image_vocab_size // 8)
    out["support"] = array(jnp.uint8, L, bits)
  return out


def scores(cfg: TrainConfig, arch: Architecture, params, batch: Batch):
  """`policy.TokenScores` of the rows of a batch under one model."""
  opts = cfg.options
  hidden_BTD, _ = ar.XOmniAR(arch.ar, cfg.compute).apply(
    {"params": params},
    batch["tokens"],
    ar.positions_of(batch["valid"]),
    batch["valid"],
  )
  return policy.token_scores(
    params,
    hidden_BTD[:, opts.prompt_len - 1 :],
    batch["codes"],
    batch.get("support"),
    arch.ar,
    temperature=opts.temperature,
    chunk=opts.loss_chunk,
  )


def judge(cfg: TrainConfig, arch: Architecture):
  """({part: tree}, rows) -> their log-probs before an update, f32[B, L] each.

  "logp_old", of the policy; "logp_ref", of the reference.
  """

  def run(params: Params, batch: Batch):
    return {
      "logp_old": scores(cfg, arch, params[POLICY], batch).logp,
      "logp_ref": scores(cfg, arch, params[REFERENCE], batch).logp_model,
    }

  return run


def extra(cfg: TrainConfig, arch: Architecture):
  """What is carried from step to step, empty.

  "current" is a rollout that takes several steps, "next" one that is drawn and
  waits for its rewards: a run that is resumed goes on with them. Each has its
  "rows", and a "mark" u32[] of what they are; 0: nothing.
  """
  opts, out = cfg.options, {}
  rows = shapes(cfg, arch, cfg.global_batch * opts.minibatches)
  empty = lambda: {
    "mark": jnp.zeros((), jnp.uint32),
    "rows": {k: jnp.zeros(x.shape, x.dtype) for k, x in rows.items()},
  }
  if opts.minibatches * opts.epochs > 1:
    out["current"] = empty()
  if opts.overlap:
    out["next"] = empty()
  return out


def program(cfg: TrainConfig, arch: Architecture) -> Program:
  """The compiled part; nothing is read."""
  opts, rows = cfg.options, cfg.global_batch
  batch = shapes(cfg, arch, rows)
  T = batch["tokens"].shape[1]

  def loss(params: Params, batch: Batch, context: Context):
    return policy.policy_loss(
      scores(cfg, arch, params[POLICY], batch), batch, context.totals, opts
    )

  part = Part(ar.rows(arch.ar), ar.abstract(arch.ar))
  per_row = flops.ar_blocks(arch.ar, T) + flops.head(
    batch["codes"].shape[1], arch.ar.hidden_size, arch.ar.image_vocab_size
  )
  return Program(
    parts={POLICY: part, REFERENCE: part},
    # Drawn where there are no files; then both are the same.
    init=lambda key: dict.fromkeys(
      (POLICY, REFERENCE), ar_stage.init(key, arch)
    ),
    totals=policy.policy_totals,
    loss=loss,
    batch=batch,
    tokens=rows * T,
    flops=3.0 * rows * per_row,
    extra=lambda: extra(cfg, arch),
    measure=judge(cfg, arch),
  )
