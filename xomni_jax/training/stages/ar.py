"""Stages `pretrain` and `sft`: next-token loss over packed sequences.

They differ in their records only: in `pretrain` every token is a target, in
`sft` the response alone (data/sequences.py).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from xomni_jax.checkpoints import released
from xomni_jax.config import Architecture
from xomni_jax.data import images, pipeline, protocol, sequences
from xomni_jax.errors import InputError
from xomni_jax.inference import checkpoint as checkpoint_lib
from xomni_jax.inference import fresh, loading, qwen, sampling
from xomni_jax.inference.sheets import Picture
from xomni_jax.models import ar
from xomni_jax.train_config import TrainConfig
from xomni_jax.training import flops, losses
from xomni_jax.training.stage import (
  Batch,
  Context,
  Params,
  Part,
  Program,
  Stage,
)
from xomni_jax.training.stages.grids import shown_of

_PREVIEWS = 4
_ANSWER = 64  # tokens at most


def program(cfg: TrainConfig, arch: Architecture) -> Program:
  """The compiled part; nothing is read."""
  model, options = ar.XOmniAR(arch.ar, cfg.compute), cfg.options
  rows, length = cfg.global_batch, cfg.data.seq_len

  def weights(batch: Batch):
    """f32[B, T] twice: of text targets, and of multimodal ones."""
    image = batch["tokens"] >= arch.ar.vocab_size
    zero = jnp.zeros_like(batch["weights"])
    return (
      jnp.where(image, zero, batch["weights"]),
      jnp.where(image, batch["weights"], zero),
    )

  def totals(batch: Batch):
    text, image = (jnp.sum(w) for w in weights(batch))
    return {"text": text, "image": image}

  def loss(params: Params, batch: Batch, context: Context):
    hidden, _ = model.apply(
      {"params": params["ar"]},
      batch["tokens"],
      batch["positions"],
      batch["segments"] > 0,
      segments_BT=batch["segments"],
    )
    text, image = losses.joint_loss(
      params["ar"],
      hidden,
      batch["tokens"],
      batch["weights"],
      arch.ar.vocab_size,
      options.loss_chunk,
    )
    total = context.totals
    weighted = (
      options.text_weight * total["text"]
      + options.image_weight * total["image"]
    )
    value = options.text_weight * text.nll + options.image_weight * image.nll
    share = lambda x, of: x / jnp.maximum(total[of], 1.0)
    metrics = {
      "text_loss": share(text.nll, "text"),
      "image_loss": share(image.nll, "image"),
      "text_accuracy": share(text.correct, "text"),
      "image_accuracy": share(image.correct, "image"),
    }
    return value / jnp.maximum(weighted, 1e-6), metrics

  array = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype)
  per_row = flops.ar_blocks(arch.ar, length) + flops.head(
    length, arch.ar.hidden_size, arch.ar.vocab_size + arch.ar.mm_vocab_size
  )
  return Program(
    parts={"ar": Part(ar.rows(arch.ar), ar.abstract(arch.ar))},
    init=lambda key: {"ar": init(key, arch)},
    totals=totals,
    loss=loss,
    batch={
      "tokens": array(jnp.int32, length),
      "segments": array(jnp.int32, length),
      "positions": array(jnp.int32, length),
      "weights": array(jnp.float32, length),
      "id": array(jnp.int32),
    },
    tokens=rows * length,
    flops=3.0 * rows * per_row,
  )


def init(key: jax.Array, arch: Architecture) -> dict[str, Any]:
  """Random f32 parameters of the AR model."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  valid = jnp.ones((1, 2), bool)
  return ar.XOmniAR(arch.ar).init(key, tokens, tokens, valid)["params"]


def stage(
  cfg: TrainConfig, arch: Architecture, opened: checkpoint_lib.Checkpoint
) -> Stage:
  """The stage on the records and the model folder that the config names.

  Args:
    cfg: of the run.
    arch: sizes; those of the AR model are the folder's.
    opened: the model folder: its tokenizer, and what does not train here.
  """
  tokenizer = protocol.load_tokenizer(
    opened.folder, arch.ar.vocab_size, arch.ar.image_vocab_size
  )
  process = (jax.process_index(), jax.process_count())

  def packed(data, seed):
    return pipeline.packed(
      data,
      tokenizer,
      seed=seed,
      global_batch=cfg.global_batch,
      process=process,
    )

  def load(mesh, dtypes):
    if "ar" not in dtypes:
      return {}
    if cfg.init.qwen:
      # The rest, all that is X-Omni's own, is drawn at random.
      source = qwen.open_qwen(cfg.init.qwen)
      return {"ar": qwen.load_ar(source, arch.ar, mesh, dtypes["ar"])}
    return {"ar": released.load(opened.parts["ar"], mesh, dtypes["ar"])}

  return Stage(
    program=program(cfg, arch),
    # Each phase has an order of its own.
    batches=lambda i: packed(cfg.phases[i].data or cfg.data, cfg.seed + i),
    held_out=cfg.eval_data and packed(cfg.eval_data, cfg.seed),
    load=load,
    preview=_Preview(cfg, opened) if cfg.report.preview_every else None,
    export=lambda params, out: fresh.replace_parts(
      opened, out, {"ar": params["ar"]}
    ),
  )


class _Preview:
  """Images for some prompts, and what the model reads in held-out images.

  Images are painted where there is a decoder, else shown as colours of codes.
  """

  def __init__(self, cfg: TrainConfig, opened: checkpoint_lib.Checkpoint):
    self._cfg, self._opened = cfg, opened
    self._model = None

  def __call__(self, params: Params, step: int) -> list[Picture]:
    cfg = self._cfg
    if self._model is None:
      # At the first picture only: a run without any needs no painter.
      self._model = loading.load(
        self._opened.folder,
        cfg.init.flux or None,
        cfg.compute.dtype,
        jax.tree.leaves(params)[0].sharding.mesh,
      )
      self._prompts = self._some_prompts()
      self._read = self._some_to_read()
    self._model.params["ar"] = params["ar"]
    return [
      *(
        Picture(self._picture(codes, prompt), prompt)
        for codes, prompt in self._draw(step)
      ),
      *(
        Picture(
          self._picture(codes, wanted),
          f"{question}read: {self._answer(asked)}\nis: {wanted}",
        )
        for codes, asked, question, wanted in self._read
      ),
    ]

  def _draw(self, seed: int) -> list[tuple[np.ndarray, str]]:
    """(codes, prompt), one size after the other."""
    px, drawn = self._model.pixels_per_token, []
    for (h, w), prompts in self._prompts.items():
      made = self._model.generate(
        prompts, (h * px, w * px), seed=seed, decode=False
      )
      drawn += zip(made.codes, prompts, strict=True)
    return drawn

  def _picture(self, codes: np.ndarray, text: str) -> Image.Image:
    model = self._model
    if self._cfg.init.flux:
      return Image.fromarray(model.decode(codes, text))
    return images.codes_picture(
      codes, model.config.vq.codebook_size, model.pixels_per_token
    )

  def _answer(self, asked) -> str:
    answer = self._model.continue_text(
      asked, sampling.Sampling(greedy=True), _ANSWER, document=True
    )
    return self._model.tokenizer.text(answer)

  def _some_prompts(self) -> dict[tuple[int, int], list[str]]:
    """{size of the record's image in tokens: prompts}, some of each source."""
    data = self._cfg.eval_data or self._cfg.data
    sources = [
      s for s in data.sources if s.task in ("generate", "text_to_image")
    ]
    found: dict[tuple[int, int], list[str]] = {}

    def make(record, i):
      self._sample(record, "generate", i)
      return record["codes"].shape, record.get("prompt") or record["text"]

    for cfg in sources:
      for shape, prompt in shown_of(cfg, -(-_PREVIEWS // len(sources)), make):
        found.setdefault(shape, []).append(prompt)
    return found

  def _some_to_read(self) -> list[tuple[np.ndarray, np.ndarray, str, str]]:
    """(codes, tokens up to the answer, question, answer), if it is trained."""
    tasks = {source.task for source in self._cfg.data.sources}
    tasks = sorted(tasks & {"image_to_text", "chat"})
    tokenizer, found = self._model.tokenizer, []
    sources = (self._cfg.eval_data or self._cfg.data).sources if tasks else ()

    def make(record, i):
      task = tasks[i % len(tasks)]
      first_qa = (record.get("qa") or [])[:1]
      record = {**record, "qa": first_qa}
      question = f"{first_qa[0][0]}\n" if task == "chat" and first_qa else ""
      tokens, weights = self._sample(record, task, i)
      # A caption begins behind the image, an answer where it counts.
      first = (
        tokens.tolist().index(tokenizer.eom_id) + 1
        if task == "image_to_text"
        else int(weights.argmax())
      )
      answer = tokenizer.text(tokens[first:-1].tolist())
      return record["codes"], tokens[:first], question, answer

    for cfg in sources:
      found += shown_of(cfg, -(-_PREVIEWS // len(sources)), make)
    return found[:_PREVIEWS]

  def _sample(self, record, task: str, seed: int) -> sequences.Sample:
    """A record as training reads it; InputError where it passes it over."""
    length = (self._cfg.eval_data or self._cfg.data).seq_len
    made = sequences.sample(
      record, task, self._model.tokenizer, np.random.default_rng(seed)
    )
    if len(made.tokens) > length:
      raise InputError(f"{len(made.tokens)} tokens, expected up to {length}")
    return made
