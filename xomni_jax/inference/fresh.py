"""Model folders in the released layout from live parameters.

From nothing (`write_fresh`), from whole models (`write_xomni`, `write_flux1`),
or from a folder of which some parts were trained (`replace_parts`,
`replace_flux1`). Every folder appears whole or not at all.
"""

import dataclasses
import itertools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from xomni_jax.checkpoints import released, released_json
from xomni_jax.checkpoints.released_config import read_json
from xomni_jax.config import (
  Architecture,
  DecoderConfig,
  TransformConfig,
  XOmniConfig,
)
from xomni_jax.data import build_encoder_tokenizers, build_tokenizers
from xomni_jax.data.protocol import load_tokenizer
from xomni_jax.data.world import open_world
from xomni_jax.errors import InputError
from xomni_jax.flux_config import SchedulerConfig
from xomni_jax.inference import checkpoint, flux1
from xomni_jax.inference.initial import PARTS, check_fit, random_params
from xomni_jax.models import ar, flux, siglip, vq
from xomni_jax.params import check, to_torch, torch_shapes

Path = str | os.PathLike
Params = Mapping[str, Any]

FLUX_SCHEDULER = SchedulerConfig(256, 4096, 0.5, 1.15)  # FLUX.1-dev's
# Of the drawn world a tokenizer sees; more lines change no merge that matters.
_LINES = {"signs": 400, "posters": 200}
_PROMPTS = 1500  # of each level that T5's sees besides


def write_fresh(
  out_xomni: Path,
  out_flux1: Path,
  arch: Architecture,
  key: jax.Array,
  *,
  transform: TransformConfig,
  decoder: DecoderConfig,
  scheduler: SchedulerConfig = FLUX_SCHEDULER,
  lines: Iterable[str] | None = None,
  params: Params | None = None,
) -> None:
  """Writes a model that never was: tokenizers from text, random parameters.

  Args:
    out_xomni, out_flux1: new folders.
    arch: sizes of every part.
    key: of the parameters.
    transform, decoder, scheduler: settings that are no sizes.
    lines: text that the tokenizers learn from; None: the drawn world's.
    params: parts to take instead of random ones.
  Raises:
    InputError: sizes that do not fit each other or the tokenizers, or a
      folder that exists.
  """
  check_fit(arch, decoder)
  prompts: list[str] = []
  if lines is None:
    world = (build_tokenizers.world_lines(n, k) for k, n in _LINES.items())
    lines = itertools.chain.from_iterable(world)
    # The decoder is told letters by the codes. Prompts of posters, letter by
    # letter, are too long for it, and their colours come last.
    levels = [open_world(level) for level in _LINES]
    prompts = [level.prompt(i) for level in levels for i in range(_PROMPTS)]
  lines = list(lines)
  given = dict(params or {})
  drawn = [part for part in PARTS if part not in given]
  params = given | random_params(arch, key, drawn)
  with tempfile.TemporaryDirectory() as scratch:
    text, clip, t5 = (pathlib.Path(scratch, n) for n in ("text", "clip", "t5"))
    sizes = arch.ar
    build_tokenizers.build_qwen(
      lines,
      text,
      sizes.vocab_size,
      sizes.image_vocab_size,
      sizes.mm_vocab_size,
    )
    build = build_encoder_tokenizers
    build.build_clip(lines, clip, arch.clip.vocab_size)
    build.build_t5([*lines, *prompts], t5, arch.t5.vocab_size)
    write_xomni(out_xomni, arch, transform, decoder, text, params)
    write_flux1(out_flux1, arch, scheduler, (clip, t5), params)


def write_xomni(
  out: Path,
  arch: Architecture,
  transform: TransformConfig,
  decoder: DecoderConfig,
  tokenizer_folder: Path,
  params: Params,
  *,
  siglip_name: str | None = None,
  dtype: str | None = None,
  vit_format: str = "safetensors",
) -> None:
  """Writes an X-Omni folder.

  Args:
    out: a new folder.
    arch: sizes; those of `params`.
    transform, decoder: settings of the image tokenizer and of decoding.
    tokenizer_folder: the text tokenizer's files.
    params: {"ar", "siglip", "vq", "flux": tree}; others are ignored.
    siglip_name: of the ViT; None: one that says its patch size.
    dtype: "float32" or "bfloat16", to cast to; None: as the parameters are.
    vit_format: "safetensors" or "pt" (needs torch), of the ViT and quantiser.
  Raises:
    InputError: `out` exists, or parameters or tokenizer do not fit the sizes.
  """
  name = siglip_name or f"siglip_patch{arch.siglip.patch}"
  tokenizer = load_tokenizer(
    tokenizer_folder, arch.ar.vocab_size, arch.ar.image_vocab_size
  )
  end = tokenizer.backend.convert_tokens_to_ids("<|im_end|>")
  cfg = XOmniConfig(
    ar=arch.ar,
    transform=transform,
    vq=arch.vq,
    decoder=decoder,
    siglip_name=name,
    siglip_heads=arch.siglip.heads,
    siglip_path=f"vit/{name}.pt",
    projector_path="vit/projector.pt",
    flux_path="flux",
    eos_token_ids=(tokenizer.pad_id if end is None else end,),
  )
  tensors = {
    part: _tensors(part, table, tree, params, dtype)
    for part, (table, tree) in {
      "ar": (ar.rows(arch.ar), ar.abstract(arch.ar)),
      "siglip": (siglip.rows(arch.siglip), siglip.abstract(arch.siglip)),
      "vq": (vq.rows(arch.vq), vq.abstract(arch.vq)),
      "flux": (flux.rows(arch.flux), flux.abstract(arch.flux)),
    }.items()
  }
  kind = _dtype_name(params["ar"], dtype)
  with released.staged(pathlib.Path(out)) as folder:
    # First, since a tokenizer's folder may be a model's, with its configs.
    _copy_files(pathlib.Path(tokenizer_folder), folder)
    released.write_json(
      folder / "config.json", released_json.xomni_json(cfg, kind)
    )
    released.write_json(
      folder / "generation_config.json", released_json.generation_json(cfg)
    )
    (folder / cfg.flux_path).mkdir()
    released.write_json(
      folder / cfg.flux_path / "config.json",
      released_json.flux_json(arch.flux),
    )
    checkpoint.write_weights(folder, cfg, tensors, vit_format)


def write_flux1(
  out: Path,
  arch: Architecture,
  scheduler: SchedulerConfig,
  tokenizer_folders: tuple[Path, Path],
  params: Params,
  *,
  dtype: str | None = None,
) -> None:
  """Writes a FLUX.1-dev folder without transformer.

  Args:
    out: a new folder.
    arch: sizes; those of `params`.
    scheduler: the shift of noise levels.
    tokenizer_folders: CLIP's and T5's.
    params: {"vae", "clip", "t5": tree}; others are ignored.
    dtype: "float32" or "bfloat16", to cast to; None: as the parameters are.
  Raises:
    InputError: `out` exists, or the parameters do not fit the sizes.
  """
  tables = flux1.tables_of(arch.vae, arch.clip, arch.t5)
  tensors = {
    part: _tensors(part, *table, params, dtype)
    for part, table in tables.items()
  }
  to_json = released_json
  with released.staged(pathlib.Path(out)) as folder:
    released.write_json(folder / flux1.INDEX, to_json.model_index_json())
    for name in flux1.FOLDERS:
      (folder / name).mkdir()
    for name, source in zip(
      ("tokenizer", "tokenizer_2"), tokenizer_folders, strict=True
    ):
      _copy_files(pathlib.Path(source), folder / name)
    released.write_json(
      folder / "scheduler" / "scheduler_config.json",
      to_json.scheduler_json(scheduler),
    )
    configs = {
      "vae": to_json.vae_json(arch.vae),
      "clip": to_json.clip_json(arch.clip, _dtype_name(params["clip"], dtype)),
      "t5": to_json.t5_json(arch.t5, _dtype_name(params["t5"], dtype)),
    }
    for part, (name, stem) in flux1.WEIGHTS.items():
      released.write_json(folder / name / "config.json", configs[part])
      released.write_safetensors(folder / name, stem, tensors[part])


def replace_parts(
  source: checkpoint.Checkpoint | Path,
  out: Path,
  params: Params,
  *,
  dtype: str | None = None,
  vit_format: str = "safetensors",
) -> None:
  """Writes a copy of an X-Omni folder in which some parts are other ones.

  Args:
    source: a folder or hub id, or what `open_checkpoint` made of it.
    out: a new folder.
    params: {part: tree} of "ar", "siglip", "vq" or "flux"; the tensors of
      parts not named are those of the source, bit by bit.
    dtype: "float32" or "bfloat16", of the parts named; None: as they are.
    vit_format: "safetensors" or "pt" (needs torch), of the ViT and quantiser.
  Raises:
    InputError: `out` exists, or the source or parameters do not fit.
  """
  if not isinstance(source, checkpoint.Checkpoint):
    source = checkpoint.open_checkpoint(source)
  parts = {**source.parts, "flux": checkpoint.open_flux(source)[1]}
  _check_names(params, parts)
  raw = dict(source.raw)
  if "ar" in params:
    raw["torch_dtype"] = _dtype_name(params["ar"], dtype)
  source = dataclasses.replace(source, raw=raw)
  tensors = {
    name: _tensors(name, part.table, part.tree, params, dtype)
    if name in params
    else released.read_tensors(part, None)
    for name, part in parts.items()
  }
  checkpoint.write_released(
    pathlib.Path(out), source, tensors, dtype=None, vit_format=vit_format
  )


def replace_flux1(
  source: Path,
  out: Path,
  params: Params,
  vae_scale: tuple[float, float] | None = None,
  *,
  text_len: int | None = None,
  dtype: str | None = None,
) -> None:
  """Writes a copy of a FLUX.1-dev folder in which some parts are other ones.

  A `transformer` folder is left out. Files of parts not named are copied.

  Args:
    source: a folder or hub id.
    out: a new folder.
    params: {part: tree} of "vae", "clip" or "t5".
    vae_scale: (scaling_factor, shift_factor) of the latents; None: as before.
    text_len: T5 ids of a prompt; None: as before.
    dtype: "float32" or "bfloat16", of the parts named; None: as they are.
  Raises:
    InputError: `out` exists, or the source or parameters do not fit.
  """
  opened = flux1.open_flux1(source)
  parts = flux1.parts_of(opened)
  _check_names(params, parts)
  tensors = {
    name: _tensors(name, part.table, part.tree, params, dtype)
    for name, part in parts.items()
    if name in params
  }
  trained = {flux1.WEIGHTS[name][0] for name in params}
  with released.staged(pathlib.Path(out)) as folder:
    index = opened.folder / flux1.INDEX
    if index.exists():
      shutil.copyfile(index, folder / flux1.INDEX)
    else:
      released.write_json(
        folder / flux1.INDEX, released_json.model_index_json()
      )
    for name in flux1.FOLDERS:
      (folder / name).mkdir()
      _copy_files(
        opened.folder / name, folder / name, weights=name not in trained
      )
    if vae_scale is not None:
      config = read_json(opened.folder / "vae" / "config.json")
      config["scaling_factor"], config["shift_factor"] = map(float, vae_scale)
      released.write_json(folder / "vae" / "config.json", config)
    if text_len is not None:
      where = folder / "tokenizer_2" / "tokenizer_config.json"
      config = {**read_json(where), "model_max_length": text_len}
      released.write_json(where, config)
    for name, stream in tensors.items():
      released.write_safetensors(
        folder / flux1.WEIGHTS[name][0], flux1.WEIGHTS[name][1], stream
      )


def _check_names(params, parts):
  unknown = sorted(params.keys() - parts.keys())
  if unknown:
    raise InputError(
      f"no parts {', '.join(unknown)} in the folder to copy, expected some of "
      f"{', '.join(parts)}"
    )


def _tensors(part, table, tree, params, dtype):
  """(PyTorch key, tensor) of a part, which is checked at once."""
  if part not in params:
    raise InputError(f"no parameters of {part}; give those of every part")
  found = torch_shapes(table, params[part])
  check(table, tree, found, f"parameters of {part}")
  return (
    (key, released.cast(array, dtype))
    for key, array in to_torch(table, params[part])
  )


def _dtype_name(tree, dtype):
  """What a config says of a part: the widest of its dtypes, or `dtype`."""
  return dtype or jnp.result_type(*jax.tree.leaves(tree)).name


def _copy_files(source, target, weights=False):
  """Copies the files of a folder, those of weights only if asked to."""
  for path in sorted(source.iterdir()):
    is_weight = ".safetensors" in path.suffixes or path.suffix == ".bin"
    if path.is_file() and (weights or not is_weight):
      shutil.copyfile(path, target / path.name)
