"""A stage out of a run's settings: which files it starts from."""

import dataclasses
import pathlib
import shutil

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from xomni_jax.checkpoints import run_config
from xomni_jax.config import Architecture
from xomni_jax.errors import InputError
from xomni_jax.inference import checkpoint, fresh
from xomni_jax.train_config import TrainConfig
from xomni_jax.training import configure
from xomni_jax.training.stage import Program, Stage
from xomni_jax.training.stages import ar, decoder, grpo, tokenizer, vae


def program(
  cfg: TrainConfig, arch: Architecture, config: ConfigDict
) -> Program:
  """The compiled part of a stage alone, from sizes; reads no file."""
  if cfg.stage == "tokenizer":
    lm = configure.section(config, "lm", "LMConfig", "config")
    return tokenizer.program(cfg, arch, lm)
  if cfg.stage == "vae":
    return vae.program(cfg, arch)
  if cfg.stage == "decoder":
    return decoder.program(cfg, arch)
  if cfg.stage == "grpo":
    return grpo.program(cfg, arch)
  return ar.program(cfg, arch)


def stage(
  cfg: TrainConfig, arch: Architecture, config: ConfigDict, workdir
) -> Stage:
  """The stage, with its data and the model folders that it starts from.

  Where the config names no model, one of the config's sizes is made in
  `<workdir>/start`: random weights, and tokenizers from the drawn world's text.

  Raises:
    InputError: folders or data do not fit the config.
  """
  cfg = _with_start(cfg, arch, config, pathlib.Path(workdir) / "start")
  if cfg.stage == "vae":
    return vae.stage(cfg, arch)
  opened = checkpoint.open_checkpoint(cfg.init.model)
  arch = dataclasses.replace(
    arch, ar=opened.config.ar, siglip=opened.siglip, vq=opened.config.vq
  )
  if cfg.stage in ("pretrain", "sft"):
    return ar.stage(cfg, arch, opened)
  if cfg.stage == "tokenizer":
    lm = configure.section(config, "lm", "LMConfig", "config")
    return tokenizer.stage(cfg, arch, opened, lm)
  if cfg.stage == "grpo":
    return grpo.stage(cfg, arch, opened, pathlib.Path(workdir))
  return decoder.stage(cfg, arch, opened)


def _with_start(cfg, arch, config, folder):
  """The config with `init.model` and `init.flux` named."""
  init = cfg.init
  needs_flux = cfg.stage in ("vae", "decoder", "grpo")
  needs_model = cfg.stage != "vae"
  if (init.model or not needs_model) and (init.flux or not needs_flux):
    return cfg
  if "transform" not in config:
    raise InputError(
      f"config: init.model names no model, and stage {cfg.stage} starts from "
      "one; give --config.init.model=FOLDER, such as what stage tokenizer "
      "left in its WORKDIR/model"
    )
  xomni, flux1 = folder / "xomni", folder / "flux1"
  whole = lambda: xomni.exists() and flux1.exists()
  # Until a run has saved anything its config may change, seed and sizes too.
  made = whole() and run_config.has_made(folder.parent)
  if jax.process_index() == 0 and not made:
    for half in (xomni, flux1):  # what a kill left
      shutil.rmtree(half, ignore_errors=True)
    fresh.write_fresh(
      xomni,
      flux1,
      arch,
      jax.random.key(cfg.seed),
      transform=configure.section(
        config, "transform", "TransformConfig", "config"
      ),
      decoder=configure.section(config, "decoder", "DecoderConfig", "config"),
    )
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("start")
  if not whole():
    raise InputError(
      f"{folder}: made by process 0, but not to be seen here; put --workdir on "
      "a file system that all processes share"
    )
  init = dataclasses.replace(
    init,
    model=init.model or str(xomni),
    flux=init.flux or (str(flux1) if needs_flux else ""),
  )
  return dataclasses.replace(cfg, init=init)
