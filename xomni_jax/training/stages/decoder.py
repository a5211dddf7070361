"""Stage `decoder`: the FLUX transformer learns to paint codes.

What is compiled is in decoder_program.py, rows are in painting_rows.py. It
leaves an X-Omni folder; and beside it, where text encoders trained or see
prompts of another length than before, a FLUX.1-dev folder.
"""

import dataclasses
import pathlib

import jax
import numpy as np
from PIL import Image

from xomni_jax.checkpoints import released
from xomni_jax.config import Architecture
from xomni_jax.data import encoder_ids, pipeline, records
from xomni_jax.data.text_ops import T5Ids
from xomni_jax.errors import InputError
from xomni_jax.inference import checkpoint as checkpoint_lib
from xomni_jax.inference import fresh
from xomni_jax.inference.painter import Painter
from xomni_jax.inference.sheets import Picture
from xomni_jax.train_config import DataConfig, TrainConfig
from xomni_jax.training import pixels
from xomni_jax.training.stage import Params, Stage
from xomni_jax.training.stages.decoder_program import (
  program,
  semantic_features,
  trained_parts,
)
from xomni_jax.training.stages.grids import Grids, shown
from xomni_jax.training.stages.painting_rows import PaintingRows

__all__ = ["program", "stage"]

_PREVIEWS = 4
FLUX1 = "flux1"  # folder of the text encoders, beside the exported model


def stage(
  cfg: TrainConfig, arch: Architecture, opened: checkpoint_lib.Checkpoint
) -> Stage:
  """The stage on the records and the folders that the config names.

  Args:
    cfg: of the run; `init.flux` is a FLUX.1-dev folder.
    arch: sizes; those of all parts but the AR model are the folders'.
    opened: the model folder: ViT, quantiser, FLUX transformer.
  Raises:
    InputError: sizes, files or data do not fit each other.
  """
  decoder = checkpoint_lib.open_decoder(opened, cfg.init.flux)
  arch = dataclasses.replace(
    arch,
    siglip=opened.siglip,
    vq=opened.config.vq,
    flux=decoder.flux,
    vae=decoder.vae,
    clip=decoder.clip,
    t5=decoder.t5,
  )
  if arch.siglip.patch != 2 * arch.vae.factor:
    raise InputError(
      f"an image token is {arch.siglip.patch} px to the ViT and "
      f"{2 * arch.vae.factor} px to the autoencoder; expected the same"
    )
  made = program(cfg, arch, decoder.scheduler)
  files = {**opened.parts, **decoder.parts}

  def painted(data, seed):
    rows = _rows(cfg, arch, decoder.folder, data)
    return pipeline.images(
      data,
      seed=seed,
      global_batch=cfg.global_batch,
      prepare=rows.prepare,
      blank=rows.blank,
      bucket_of=rows.grids.bucket_of if len(rows.grids.sizes) > 1 else None,
      process=(jax.process_index(), jax.process_count()),
    )

  def load(mesh, dtypes):
    return {
      name: released.load(files[name], mesh, dtype)
      for name, dtype in dtypes.items()
    }

  def export(params: Params, out: pathlib.Path):
    trained = trained_parts(cfg, made.parts)
    encoders = {name: params[name] for name in ("clip", "t5")}
    encoders = {k: v for k, v in encoders.items() if k in trained}
    length = encoder_ids.t5_length(decoder.folder / "tokenizer_2")
    if encoders or length != cfg.options.text_len:
      beside = out.with_name(FLUX1)
      fresh.replace_flux1(
        decoder.folder, beside, encoders, text_len=cfg.options.text_len
      )
    fresh.replace_parts(opened, out, {"flux": params["flux"]})

  preview = _Preview(cfg, arch, decoder)
  return Stage(
    program=made,
    batches=lambda i: painted(cfg.phases[i].data or cfg.data, cfg.seed + i),
    held_out=cfg.eval_data and painted(cfg.eval_data, cfg.seed),
    load=load,
    preview=preview if cfg.report.preview_every else None,
    export=export,
  )


def _rows(
  cfg: TrainConfig, arch: Architecture, flux1: pathlib.Path, data: DataConfig
) -> PaintingRows:
  """How records of a mixture become rows."""
  return PaintingRows(
    clip_ids=encoder_ids.load_clip_tokenizer(
      flux1 / "tokenizer", arch.clip.max_position_embeddings
    ),
    t5_ids=T5Ids(
      flux1 / "tokenizer_2", cfg.options.text_len, data.text_backend
    ),
    grids=Grids(cfg.options.grids, arch.siglip.patch),
    prompt_dropout=data.prompt_dropout,
  )


class _Preview:
  """Held-out images, and what is painted of their codes."""

  def __init__(
    self,
    cfg: TrainConfig,
    arch: Architecture,
    decoder: checkpoint_lib.Decoder,
  ):
    self._cfg, self._arch, self._decoder = cfg, arch, decoder
    self._shown = None
    self._features = jax.jit(
      lambda params, image_bytes: semantic_features(
        params, pixels.to_float(image_bytes), cfg, arch
      )
    )

  def __call__(self, params: Params, step: int) -> list[Picture]:
    """Whatever the step, the same images and noise, so that progress shows."""
    del step
    cfg = self._cfg
    if self._shown is None:
      self._shown = self._some_images()
    # A new one each time: it keeps what text encoders made of a prompt.
    painter = Painter(
      self._decoder, params, cfg.compute, False, cfg.options.text_len
    )
    codes = {name: params[name] for name in ("siglip", "vq")}
    found = []
    with jax.set_mesh(jax.tree.leaves(params)[0].sharding.mesh):
      for i, (text, image) in enumerate(self._shown):
        grid = tuple(n // self._arch.siglip.patch for n in image.shape[:2])
        made = painter.paint(
          self._features(codes, image[None]),
          grid,
          text,
          steps=cfg.options.preview_steps,
          cfg_scale=1.0,
          seed=i,
          noise=None,
        )
        both = np.concatenate([image, made], axis=1)
        found.append(Picture(Image.fromarray(both), text))
    return found

  def _some_images(self):
    """(text, u8[H, W, 3]) of the first held-out records."""
    grids = Grids(self._cfg.options.grids, self._arch.siglip.patch)

    def make(record, _):
      image = records.image_of(record)
      text = record.get("text") or record.get("prompt") or ""
      return text, grids.pixels(image, grids.bucket_of(*image.size))

    return shown(self._cfg, _PREVIEWS, make)
