"""A stage out of a run's settings: which files it starts from."""

import dataclasses
import json
import pathlib
import shutil

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from xomni_jax.checkpoints import manifest, run_config
from xomni_jax.checkpoints.released_config import read_json
from xomni_jax.config import Architecture
from xomni_jax.errors import InputError
from xomni_jax.inference import checkpoint, fresh
from xomni_jax.train_config import TrainConfig
from xomni_jax.training import configure
from xomni_jax.training.stage import Program, Stage
from xomni_jax.training.stages import ar, decoder, grpo, tokenizer, vae

# In a start: two folders, and what they were made of.
_HALVES = ("xomni", "flux1")
_MADE_OF = "made_of.json"


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
  cfg = _with_start(cfg, arch, config, pathlib.Path(workdir))
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


def _with_start(cfg, arch, config, workdir):
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
  if init.qwen and needs_model and not init.model:
    # Its embeddings would be those of other tokens.
    raise InputError(
      f"config: init.qwen is {init.qwen}, but init.model names no model, and "
      "one made from nothing has a tokenizer of the drawn world's words; give "
      "--config.init.model=FOLDER, of a model with Qwen's vocabulary, such as "
      "X-Omni"
    )
  if needs_model and needs_flux and (init.model or init.flux):
    given, other = ("model", "flux") if init.model else ("flux", "model")
    raise InputError(
      f"config: init.{given} is {getattr(init, given)}, but init.{other} is "
      f"not named, and one made from nothing knows nothing of it; give "
      f"--config.init.{other}=FOLDER"
    )
  folder, several = workdir / "start", jax.process_count() > 1
  if several:
    # Connected processes wait for long, but on CPUs the first time they meet
    # Gloo gives them 30 s, and making a start may take more.
    multihost_utils.sync_global_devices("before start")
  if jax.process_index() == 0:
    _make_start(cfg, arch, config, folder, run_config.has_made(workdir))
  if several:
    multihost_utils.sync_global_devices("start")
  init = dataclasses.replace(
    init,
    model=init.model or str(folder / "xomni"),
    flux=init.flux or (str(folder / "flux1") if needs_flux else ""),
  )
  return dataclasses.replace(cfg, init=init)


def _make_start(cfg, arch, config, folder, has_begun):
  """Makes the two folders of a start, unless they are there and as asked for.

  Of a run that has begun they stay what it began with.
  """
  transform, decoder = (
    configure.section(config, name, kind, "config")
    for name, kind in (
      ("transform", "TransformConfig"),
      ("decoder", "DecoderConfig"),
    )
  )
  of = {"architecture": arch, "transform": transform, "decoder": decoder}
  of = {name: dataclasses.asdict(sizes) for name, sizes in of.items()}
  wanted = json.loads(json.dumps({"seed": cfg.seed, **of}))  # tuples as lists
  record = folder / _MADE_OF
  made_of = read_json(record) if record.exists() else {}
  differ = [name for name, x in wanted.items() if made_of.get(name) != x]
  if _is_whole(folder) and (has_begun or not differ):
    if made_of and differ:
      print(
        f"{folder} was made of another {', '.join(differ)} than the config "
        "has; it stays, as the run began with it",
        flush=True,
      )
    return
  foreign = _not_of_a_start(folder)
  if foreign:
    raise InputError(
      f"{folder}: holds {foreign[0]}, which no run made, and what this one "
      "starts from goes there; move it, or give another --workdir"
    )
  # What a kill left, or a try with another config.
  shutil.rmtree(folder, ignore_errors=True)
  fresh.write_fresh(
    folder / "xomni",
    folder / "flux1",
    arch,
    jax.random.key(cfg.seed),
    transform=transform,
    decoder=decoder,
  )
  manifest.write_json(record, wanted)


def _is_whole(folder):
  return all((folder / half).exists() for half in _HALVES)


def _not_of_a_start(folder):
  """Names of what neither a start has nor a kill leaves of one."""
  known = (*_HALVES, _MADE_OF, *(f"{half}.partial-*" for half in _HALVES))
  there = sorted(folder.iterdir()) if folder.is_dir() else []
  return [p.name for p in there if not any(p.match(name) for name in known)]
