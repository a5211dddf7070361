"""What stage `tokenizer` compiles: SigLIP-VQ, read by a language model.

Image -> ViT -> quantiser -> convolutions, whose output stands before a text as
its image's embeddings; the loss is that of the text's answers, and the
quantiser's own. Shape letters: B images, L = h*w image tokens, T text tokens,
Z width of features and of the language model.
Source: X-Omni (arXiv:2507.22058), section 3.1; IBQ (arXiv:2412.02692).
"""

import re
from typing import Any

import jax
import jax.numpy as jnp

from xomni_jax.config import Architecture, LMConfig
from xomni_jax.errors import InputError
from xomni_jax.models import lm, siglip, vq
from xomni_jax.models.layers import SHARED
from xomni_jax.params import Row
from xomni_jax.train_config import TrainConfig
from xomni_jax.training import codebook, flops, losses, pixels
from xomni_jax.training.stage import (
  Batch,
  Context,
  Params,
  Part,
  Program,
  row_keys,
)

# Of the averaged use of codes, by which dead ones are told.
_USAGE_DECAY = 0.98


def program(cfg: TrainConfig, arch: Architecture, reader: LMConfig) -> Program:
  """The compiled part; nothing is read.

  Rows are those of `questions.QuestionRows`, `id` and `real`. A batch is of one
  of `options.grids`; the first is what counts of work and shapes are for.

  Args:
    cfg: of the run.
    arch: sizes; `siglip` and `vq` count here.
    reader: of the language model.
  Raises:
    InputError: features do not have the width of the language model.
  """
  opts, sizes = cfg.options, arch.vq
  if not sizes.z_channels == arch.siglip.width == reader.hidden_size:
    raise InputError(
      f"vq.z_channels {sizes.z_channels}, siglip.width {arch.siglip.width} and "
      f"lm.hidden_size {reader.hidden_size} differ; expected them equal, since "
      "the language model reads features as embeddings"
    )
  rows, T = cfg.global_batch, opts.text_len
  h, w = opts.grids[0]
  patch = arch.siglip.patch
  shape = lambda dtype, *dims: jax.ShapeDtypeStruct((rows, *dims), dtype)
  return Program(
    parts=_parts(cfg, arch, reader),
    init=lambda key: init(cfg, arch, reader, key),
    totals=lambda batch: {
      "answers": jnp.sum(batch["weights"] * batch["real"][:, None]),
      "rows": jnp.sum(batch["real"]),
    },
    loss=_loss(cfg, arch, reader),
    batch={
      "pixels": shape(jnp.uint8, h * patch, w * patch, 3),
      "tokens": shape(jnp.int32, T),
      "weights": shape(jnp.float32, T),
      "segments": shape(jnp.int32, T),
      "positions": shape(jnp.int32, T),
      "id": shape(jnp.int32),
      "real": shape(jnp.float32),
    },
    tokens=rows * (h * w + T),
    flops=rows * _flops(cfg, arch, reader),
    summarise=_summarise,
    update=_count_use,
    extra=lambda: {"usage": jnp.ones(sizes.codebook_size)},
  )


def _parts(cfg, arch, reader):
  parts = {
    "siglip": Part(siglip.rows(arch.siglip), siglip.abstract(arch.siglip)),
    "vq": Part(vq.rows(arch.vq), vq.abstract(arch.vq)),
    "lm": Part(lm.rows(reader), lm.abstract(reader)),
  }
  if cfg.options.pixels:
    table = [
      Row("kernel", "readout.weight", "fan_out fan_in -> fan_in fan_out"),
      Row("bias", "readout.bias", "fan_out -> fan_out"),
    ]
    tree = jax.eval_shape(lambda: _readout_init(arch, jax.random.key(0)))
    parts["readout"] = Part(table, tree)
  return parts


def init(
  cfg: TrainConfig, arch: Architecture, reader: LMConfig, key: jax.Array
) -> Params:
  """Random f32 parameters."""
  keys = jax.random.split(key, 4)
  patch = jnp.zeros((1, arch.siglip.patch, arch.siglip.patch, 3))
  cell = jnp.zeros((1, 1, 1, arch.vq.z_channels))
  ids = jnp.zeros((1, 2), jnp.int32)
  params = {
    "siglip": siglip.Siglip(arch.siglip).init(keys[0], patch)["params"],
    "vq": vq.VQ(arch.vq).init(keys[1], cell)["params"],
    "lm": lm.CausalLM(reader).init(keys[2], ids, ids, ids == 0)["params"],
  }
  if cfg.options.pixels:
    params["readout"] = _readout_init(arch, keys[3])
  return params


def _readout_init(arch, key):
  """Of the linear layer from a feature to its patch's pixels."""
  width, out = arch.vq.z_channels, 3 * arch.siglip.patch**2
  return {
    "kernel": jax.random.normal(key, (width, out)) * width**-0.5,
    "bias": jnp.zeros(out),
  }


def _flops(cfg, arch, reader):
  """Of a row, forward and backward."""
  (h, w), T = cfg.options.grids[0], cfg.options.text_len
  length = h * w + T
  vit = flops.siglip(arch.siglip, (h, w))
  vit_trains = any(
    re.match(pattern, "siglip/patch_embed/kernel")
    or re.match(pattern, "siglip/blocks/fc1/kernel")
    for phase in cfg.phases
    for pattern in phase.train
  )
  rest = (
    flops.vq_encoder(arch.vq, (h, w))
    # The softmax's mixture of codes.
    + flops.head(h * w, arch.vq.codebook_dim, arch.vq.codebook_size)
    + flops.vq_decoder(arch.vq, (h, w))
    + flops.transformer(
      length=length,
      width=reader.hidden_size,
      heads_width=reader.num_attention_heads * reader.head_dim,
      kv_width=reader.num_key_value_heads * reader.head_dim,
      mlp=reader.intermediate_size,
      gated=True,
      layers=reader.num_hidden_layers,
      context=(length + 1) / 2,
    )
    + flops.head(T, reader.hidden_size, reader.vocab_size)
  )
  return (3 if vit_trains else 1) * vit + 3 * rest


def features(
  params: Params, image_bytes: jax.Array, cfg: TrainConfig, arch: Architecture
) -> jax.Array:
  """The ViT's features [B, h, w, Z] of u8[B, H, W, 3]."""
  model = siglip.Siglip(arch.siglip, cfg.compute)
  return model.apply({"params": params["siglip"]}, pixels.to_float(image_bytes))


def read(
  params: Params,
  embeddings_BhwZ: jax.Array,
  batch: Batch,
  cfg: TrainConfig,
  reader: LMConfig,
) -> jax.Array:
  """Normed hidden states [B, T, Z] of the texts behind their images.

  Args:
    embeddings_BhwZ: of the images.
    batch: `tokens`, `segments` and `positions` i32[B, T] of the texts.
  """
  B, h, w, Z = embeddings_BhwZ.shape
  L = h * w
  image = lambda row_L: jnp.broadcast_to(row_L, (B, L))
  join = lambda image_BL, text_BT: jnp.concatenate([image_BL, text_BT], axis=1)
  segments_BS = join(image(jnp.full(L, SHARED)), batch["segments"])
  hidden_BSZ = lm.CausalLM(reader, cfg.compute).apply(
    {"params": params["lm"]},
    batch["tokens"],
    join(image(jnp.arange(L)), L + batch["positions"]),
    jnp.ones_like(segments_BS, bool),
    embeddings_BhwZ.reshape(B, L, Z),
    segments_BS,
  )
  return hidden_BSZ[:, L:]


def _loss(cfg, arch, reader):
  opts = cfg.options
  model = vq.VQ(arch.vq, cfg.compute)

  def loss(params: Params, batch: Batch, ctx: Context):
    vit_BhwZ = features(params, batch["pixels"], cfg, arch)
    on = ctx.step >= opts.quantise_from
    bypass_B = jnp.broadcast_to(~on, batch["id"].shape)
    if ctx.train:
      keys_B = row_keys(ctx.key, batch["id"])
      draw = lambda key: jax.random.bernoulli(key, opts.skip)
      bypass_B |= jax.vmap(draw)(keys_B)
    out_BhwZ, _, made = model.apply(
      {"params": params["vq"]},
      vit_BhwZ,
      bypass_B,
      opts.temperature,
      opts.commitment,
      method="train_codes",
    )
    # Before it has codes of its own, nothing is drawn to the random ones.
    terms = {
      "vq/error": on * _row_mean(made.loss),
      "vq/entropy": on * _row_mean(made.entropy),
      "vq/entropy_of_image": on * entropy_of_image(made.soft),
    }
    weights = {
      "vq/error": 1.0,
      "vq/entropy": opts.entropy,
      "vq/entropy_of_image": -opts.entropy,
    }
    if opts.features:
      terms["tokenizer/features"] = _row_mean(away(out_BhwZ, vit_BhwZ))
      weights["tokenizer/features"] = opts.features
    if opts.pixels:
      terms["tokenizer/pixels"] = pixel_error(
        params["readout"], out_BhwZ, batch["pixels"]
      )
      weights["tokenizer/pixels"] = opts.pixels
    share_B = batch["real"] / jnp.maximum(ctx.totals["rows"], 1)
    terms = {name: jnp.sum(x_B * share_B) for name, x_B in terms.items()}
    answers = _answer_loss(params, out_BhwZ, batch, cfg, reader)
    answers = {
      f"tokenizer/answer_{name}": x / jnp.maximum(ctx.totals["answers"], 1)
      for name, x in answers.items()
    }
    value = answers["tokenizer/answer_loss"] + sum(
      weights[name] * x for name, x in terms.items()
    )
    counts_K = codebook.count(made.codes, batch["real"], arch.vq.codebook_size)
    metrics = {**answers, **terms, "counts": counts_K}
    return value, metrics

  return loss


def _answer_loss(params, embeddings_BhwZ, batch, cfg, reader):
  """Sums over the answers' tokens."""
  hidden_BTZ = read(params, embeddings_BhwZ, batch, cfg, reader)
  # Shifted with the length kept, which may be split over devices.
  weights_BT = batch["weights"] * batch["real"][:, None]
  found = losses.token_loss(
    hidden_BTZ,
    lm.head(params["lm"], reader),
    jnp.roll(batch["tokens"], -1, axis=1),
    jnp.roll(weights_BT, -1, axis=1).at[:, -1].set(0),
    cfg.options.loss_chunk,
  )
  return {"loss": found.nll, "accuracy": found.correct}


def entropy_of_image(soft_BK: jax.Array) -> jax.Array:
  """f32[B], nats, of each image's softmax over codes, averaged over its cells.

  It stands for the entropy over the whole batch: that one is no sum over rows,
  and would depend on how many devices share them.
  """
  share_BK = soft_BK / jnp.sum(soft_BK, axis=-1, keepdims=True)
  return -jnp.sum(share_BK * jnp.log(jnp.maximum(share_BK, 1e-12)), axis=-1)


def away(ours: jax.Array, target: jax.Array) -> jax.Array:
  """1 - cosine along the last axis, f32; the target gets no gradient."""
  target = vq.normalise(jax.lax.stop_gradient(target))
  return 1 - jnp.sum(vq.normalise(ours) * target, axis=-1)


def pixel_error(
  readout: dict[str, Any], features_BhwZ: jax.Array, image_bytes: jax.Array
) -> jax.Array:
  """f32[B], mean squared error of each patch's pixels, read off its feature.

  Args:
    readout: a linear layer, `kernel` [Z, patch*patch*3] and `bias`.
    features_BhwZ: of patches.
    image_bytes: u8[B, h*patch, w*patch, 3]; errors are of values in [-1, 1].
  """
  B, h, w, _ = features_BhwZ.shape
  made = features_BhwZ.astype(jnp.float32) @ readout["kernel"] + readout["bias"]
  side = image_bytes.shape[1] // h
  target = pixels.to_float(image_bytes).reshape(B, h, side, w, side, 3)
  target = jnp.swapaxes(target, 2, 3).reshape(B, h, w, -1)
  return jnp.mean(jnp.square(made - target), axis=(1, 2, 3))


def _row_mean(x):
  return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def _summarise(metrics):
  counts_K = metrics["counts"]
  scalars = {name: x for name, x in metrics.items() if name != "counts"}
  return scalars | {
    "vq/codes_used": codebook.codes_used(counts_K),
    "vq/perplexity": codebook.perplexity(counts_K),
  }


def _count_use(params, extra, metrics, ctx):
  """Averages how often each code occurs."""
  del ctx
  usage = extra["usage"]
  usage += (1 - _USAGE_DECAY) * (metrics["counts"] - usage)
  return params, {**extra, "usage": usage}
