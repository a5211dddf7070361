"""Stage `tokenizer`: SigLIP-VQ, trained by a language model that reads it.

Before `quantise_from` features flow on as they are; at that step k-means gives
the codebook its start, and from then on dead codes are revived now and then.
What is compiled is in tokenizer_program.py, rows are in questions.py.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from xomni_jax.checkpoints import released
from xomni_jax.config import Architecture, LMConfig
from xomni_jax.data import pipeline, protocol, records
from xomni_jax.errors import InputError
from xomni_jax.inference import checkpoint as checkpoint_lib
from xomni_jax.inference import fresh, qwen
from xomni_jax.inference.sheets import Picture
from xomni_jax.mesh import to_host
from xomni_jax.models import lm, vq
from xomni_jax.train_config import TrainConfig
from xomni_jax.training import codebook, step
from xomni_jax.training.stage import Params, Stage
from xomni_jax.training.stages.grids import Grids, shown
from xomni_jax.training.stages.questions import CAPTION, QuestionRows
from xomni_jax.training.stages.tokenizer_program import (
  features,
  init,
  program,
  read,
)

__all__ = ["init", "program", "stage"]

_PREVIEWS = 4
# Vectors that k-means and revival look at, in multiples of the codebook.
_VECTORS = 8


def stage(
  cfg: TrainConfig,
  arch: Architecture,
  opened: checkpoint_lib.Checkpoint,
  reader: LMConfig,
) -> Stage:
  """The stage on the records and the folders that the config names.

  Args:
    cfg: of the run; `init.qwen` is the language model to start from, else it
      is drawn at random.
    arch: sizes; those of the ViT and the quantiser are the folder's.
    opened: the model folder: ViT, quantiser, tokenizer.
    reader: of the language model.
  Raises:
    InputError: sizes, files or data do not fit each other.
  """
  tokenizer = protocol.load_tokenizer(
    opened.folder, arch.ar.vocab_size, arch.ar.image_vocab_size
  )
  opts = cfg.options
  rows = QuestionRows(
    tokenizer,
    reader.vocab_size,
    Grids(opts.grids, arch.siglip.patch),
    opts.text_len,
  )
  process = (jax.process_index(), jax.process_count())

  def batches(data, seed):
    return pipeline.images(
      data,
      seed=seed,
      global_batch=cfg.global_batch,
      prepare=rows.prepare,
      blank=rows.blank,
      bucket_of=rows.grids.bucket_of if len(opts.grids) > 1 else None,
      process=process,
    )

  def load(mesh, dtypes):
    found = {
      name: released.load(opened.parts[name], mesh, dtypes[name])
      for name in ("siglip", "vq")
      if name in dtypes
    }
    if cfg.init.qwen and "lm" in dtypes:
      source = qwen.open_qwen(cfg.init.qwen)
      qwen.check_same(source, reader)
      found["lm"] = released.load(source.part, mesh, dtypes["lm"])
    return found

  def export(params: Params, out: pathlib.Path):
    own = {name: params[name] for name in ("siglip", "vq")}
    fresh.replace_parts(opened, out, own)
    qwen.write_qwen(out / "lm", reader, params["lm"], tokenizer.pad_id)

  preview = _Preview(cfg, arch, reader, rows)
  return Stage(
    program=program(cfg, arch, reader),
    # Each phase has an order of its own.
    batches=lambda i: batches(cfg.phases[i].data or cfg.data, cfg.seed + i),
    held_out=cfg.eval_data and batches(cfg.eval_data, cfg.seed),
    load=load,
    preview=preview if cfg.report.preview_every else None,
    export=export,
    prepare=_care(cfg, arch),
  )


def _care(cfg: TrainConfig, arch: Architecture) -> dict[int, Any]:
  """What is done to the codebook before which step."""
  opts, size = cfg.options, arch.vq.codebook_size
  first = opts.quantise_from
  cells = min(h * w for h, w in opts.grids)
  found = opts.kmeans_batches * cfg.global_batch * cells
  if opts.kmeans and found < size:
    raise InputError(
      f"options.kmeans_batches {opts.kmeans_batches} of {cfg.global_batch} "
      f"images hold {found} features, expected at least one for each of the "
      f"{size} codes; raise it"
    )
  look = _Vectors(cfg, arch)

  def start(step_, params, extra, data):
    key, own = jax.random.split(_key(cfg, step_))
    vectors_NE = look(params, data, step_, opts.kmeans_batches, key)
    make = jax.jit(codebook.kmeans, static_argnums=(1, 2))
    codes_KE = make(vectors_NE, size, opts.kmeans, own)
    return _with_codebook(params, codes_KE), {
      **extra,
      # Of a batch. Averages of k-means' would take long to tell the dead.
      "usage": jnp.full(size, cfg.global_batch * cells / size),
    }

  def revive(step_, params, extra, data):
    key, own = jax.random.split(_key(cfg, step_))
    vectors_NE = look(params, data, step_, 1, key)
    codes_KE, usage_K, _ = jax.jit(codebook.revive)(
      params["vq"]["codebook"], extra["usage"], vectors_NE, own, opts.dead_below
    )
    return _with_codebook(params, codes_KE), {**extra, "usage": usage_K}

  at = {}
  if opts.revive_every:
    end = min(opts.revive_until or cfg.steps, cfg.steps)
    for s in range(first + opts.revive_every, end, opts.revive_every):
      at[s] = lambda *args, s=s: revive(s, *args)
  if opts.kmeans:
    at[first] = lambda *args: start(first, *args)
  return at


def _key(cfg, step_):
  """Of the care before a step; steps themselves draw from other seeds."""
  return jax.random.fold_in(jax.random.key(cfg.seed ^ 0xC0DE), step_)


def _with_codebook(params, codes_KE):
  return {**params, "vq": {**params["vq"], "codebook": codes_KE}}


class _Vectors:
  """A sample of what is quantised."""

  def __init__(self, cfg: TrainConfig, arch: Architecture):
    self._wanted = _VECTORS * arch.vq.codebook_size
    model = vq.VQ(arch.vq, cfg.compute)

    def vectors(params, image_bytes):
      vit = features(params, image_bytes, cfg, arch)
      z = model.apply({"params": params["vq"]}, vit, method="project")
      return vq.normalise(z).reshape(-1, arch.vq.codebook_dim)

    def some(params, batch, key, count):
      z_NE = vectors(params, batch["pixels"])
      N = z_NE.shape[0]
      # Masked rows are no images: chosen last.
      real_N = jnp.repeat(batch["real"], N // batch["real"].size)
      order = jax.random.uniform(key, (N,)) + real_N
      return z_NE[jax.lax.top_k(order, min(count, N))[1]]

    self._some = jax.jit(some, static_argnums=3)

  def __call__(self, params, data, first: int, count: int, key) -> jax.Array:
    """f32[N, E] of unit length, from batches first .. first + count - 1."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    share = -(-self._wanted // count)
    found = []
    for i in range(count):
      rows = data[first + i].arrays
      batch = {name: rows[name] for name in ("pixels", "real")}
      own = jax.random.fold_in(key, i)
      batch = step.place_batch(batch, mesh)
      found.append(self._some(params, batch, own, share))
    return jnp.concatenate(found)


class _Preview:
  """Held-out images, and what the language model says of them."""

  def __init__(self, cfg, arch, reader, rows: QuestionRows):
    self._cfg, self._rows = cfg, rows
    self._shown = None
    end = rows.tokenizer.pad_id

    def answers(params, image_bytes, tokens_BT, asked):
      """Tokens with the likeliest answer behind the first `asked`."""
      vit = features(params, image_bytes, cfg, arch)
      codes = vq.VQ(arch.vq, cfg.compute)
      own = {"params": params["vq"]}
      embeddings = codes.apply(
        own, codes.apply(own, vit, method="encode"), method="decode"
      )
      T = tokens_BT.shape[1]
      batch = {
        "segments": jnp.ones_like(tokens_BT),
        "positions": jnp.broadcast_to(jnp.arange(T), tokens_BT.shape),
      }

      def one(t, state):
        tokens_BT, done_B = state
        hidden = read(
          params, embeddings, {**batch, "tokens": tokens_BT}, cfg, reader
        )
        logits_BV = lm.logits(params["lm"], hidden[:, t - 1], reader)
        next_B = jnp.where(done_B, end, jnp.argmax(logits_BV, axis=-1))
        return tokens_BT.at[:, t].set(next_B), done_B | (next_B == end)

      done_B = jnp.zeros(tokens_BT.shape[0], bool)
      return jax.lax.fori_loop(asked, T, one, (tokens_BT, done_B))[0]

    self._answers = jax.jit(answers)

  def __call__(self, params: Params, step_: int) -> list[Picture]:
    """Whatever the step, the same images, so that progress shows."""
    del step_
    rows = self._rows
    if self._shown is None:
      self._shown = shown(
        self._cfg,
        _PREVIEWS,
        lambda record, _: rows.grids.pixels(records.image_of(record), None),
      )
    if not self._shown:
      return []
    asked = rows.question(CAPTION)
    tokens = np.full(
      (len(self._shown), rows.length), rows.tokenizer.pad_id, np.int32
    )
    tokens[:, : len(asked)] = asked
    images = np.stack(self._shown)
    out = to_host(self._answers(params, images, tokens, len(asked)))
    return [
      Picture(Image.fromarray(image), rows.tokenizer.text(ids[len(asked) :]))
      for image, ids in zip(self._shown, out, strict=True)
    ]
