"""A released checkpoint as the parts of a model: found, checked, exported.

Opening reads configs and file headers only, and refuses what does not fit
before anything is loaded.
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from xomni_jax.checkpoints import released, released_config
from xomni_jax.checkpoints.released import Part
from xomni_jax.checkpoints.released_config import read_json
from xomni_jax.checkpoints.tensor_files import folder_files, pt_file
from xomni_jax.config import SiglipConfig, XOmniConfig
from xomni_jax.errors import InputError
from xomni_jax.flux_config import FluxConfig
from xomni_jax.inference import shipped
from xomni_jax.inference.flux1 import Flux1, open_flux1, parts_of
from xomni_jax.inference.hub import resolve
from xomni_jax.models import ar, flux, siglip, vq

# Of weight files.
STEM, DIFFUSERS_STEM = "model", "diffusion_pytorch_model"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """An X-Omni folder, opened.

  Attributes:
    folder: the model folder.
    raw: its `config.json` as it stands.
    config: what that says.
    siglip: sizes of the ViT, off its weights.
    parts: "ar", "siglip" and "vq".
  """

  folder: pathlib.Path
  raw: Mapping[str, Any]
  config: XOmniConfig
  siglip: SiglipConfig
  parts: Mapping[str, Part]


@dataclasses.dataclass(frozen=True)
class Decoder(Flux1):
  """The diffusion decoder, opened.

  Attributes:
    flux: config of the diffusion transformer, which X-Omni brings.
    parts: "flux", "vae", "clip" and "t5".
  """

  flux: FluxConfig
  parts: Mapping[str, Part]


def inside(folder: pathlib.Path, relative: str, where: str) -> pathlib.Path:
  """A path of a config within its folder; InputError if it leads out."""
  path = pathlib.PurePath(relative)
  if path.is_absolute() or ".." in path.parts:
    raise InputError(
      f"{where}: path {relative!r} leads out of the model folder; expected a "
      "path inside it"
    )
  return folder / path


def open_checkpoint(path_or_id: str | pathlib.Path) -> Checkpoint:
  """Opens an X-Omni folder; raises InputError where it does not fit.

  Args:
    path_or_id: a folder, a hub id, or the name of a model that ships.
  """
  named = shipped.find(path_or_id)
  folder = named.model if named else resolve(path_or_id)
  where = folder / "config.json"
  raw = read_json(where)
  generation = folder / "generation_config.json"
  cfg = released_config.xomni_config(
    raw, str(where), read_json(generation) if generation.exists() else None
  )
  vit_file = pt_file(inside(folder, cfg.siglip_path, str(where)))
  vit = released_config.siglip_config(
    vit_file.shapes, cfg.siglip_heads, str(vit_file.path)
  )
  if vit.width != cfg.vq.z_channels or vit.patch != cfg.transform.patch_size:
    raise InputError(
      f"{where}: the ViT has width {vit.width} and patch {vit.patch}, the "
      f"config z_channels {cfg.vq.z_channels} and patch_size "
      f"{cfg.transform.patch_size}; expected them equal"
    )
  projector = pt_file(inside(folder, cfg.projector_path, str(where)))
  return Checkpoint(
    folder,
    raw,
    cfg,
    vit,
    {
      "ar": Part(
        "language model",
        ar.rows(cfg.ar),
        ar.abstract(cfg.ar),
        folder_files(named.language_model if named else folder, STEM),
      ),
      "siglip": Part(
        "image encoder",
        siglip.rows(vit),
        siglip.abstract(vit),
        [vit_file],
        siglip.IGNORED,
      ),
      "vq": Part(
        "quantiser", vq.rows(cfg.vq), vq.abstract(cfg.vq), [projector]
      ),
    },
  )


def open_flux(checkpoint: Checkpoint) -> tuple[FluxConfig, Part]:
  """The FLUX transformer in an X-Omni folder."""
  cfg = checkpoint.config
  folder = inside(
    checkpoint.folder, cfg.flux_path, str(checkpoint.folder / "config.json")
  )
  where = folder / "config.json"
  config = released_config.flux_config(read_json(where), str(where))
  if config.siglip_channels != cfg.vq.z_channels:
    raise InputError(
      f"{where}: siglip_channels {config.siglip_channels} is not z_channels "
      f"{cfg.vq.z_channels} of the quantiser"
    )
  return config, Part(
    "diffusion transformer",
    flux.rows(config),
    flux.abstract(config),
    folder_files(folder, DIFFUSERS_STEM),
  )


def open_decoder(checkpoint: Checkpoint, flux1: str | pathlib.Path) -> Decoder:
  """The diffusion decoder: X-Omni's transformer and FLUX.1-dev's other parts.

  A `transformer` folder in FLUX.1-dev is ignored.
  """
  rest = open_flux1(flux1)
  flux_cfg, flux_part = open_flux(checkpoint)
  factor = checkpoint.config.decoder.upscale_factor
  wrong = [
    f"{what} {a} of the diffusion transformer, {b} of {other}"
    for what, a, b, other in (
      (
        "in_channels",
        flux_cfg.in_channels,
        4 * rest.vae.latent_channels,
        "the VAE",
      ),
      (
        "joint_attention_dim",
        flux_cfg.joint_attention_dim,
        rest.t5.d_model,
        "T5",
      ),
      (
        "pooled_projection_dim",
        flux_cfg.pooled_projection_dim,
        rest.clip.hidden_size,
        "CLIP",
      ),
      ("upscale_factor", factor, 2 * rest.vae.factor, "the VAE"),
    )
    if a != b
  ]
  if wrong:
    raise InputError(f"{rest.folder}: does not fit: {'; '.join(wrong)}")
  fields = {f.name: getattr(rest, f.name) for f in dataclasses.fields(rest)}
  return Decoder(
    **fields, flux=flux_cfg, parts={"flux": flux_part, **parts_of(rest)}
  )


Tensors = Iterable[tuple[str, np.ndarray]]


def write_released(
  out: pathlib.Path,
  checkpoint: Checkpoint,
  tensors: Mapping[str, Tensors],
  *,
  dtype: str | None,
  vit_format: str,
) -> None:
  """Writes a model in the released layout; all of it or nothing.

  Args:
    out: a new folder.
    checkpoint: gives configs and tokenizer files.
    tensors: of "ar", "siglip", "vq" and "flux", in PyTorch's names and layout.
    dtype: what they were cast to, to be said in the config; None: unchanged.
    vit_format: "pt" or "safetensors", of the tokenizer's two files.
  """
  raw, cfg = dict(checkpoint.raw), checkpoint.config
  if dtype:
    raw["torch_dtype"] = dtype
    raw["vision_config"] = {**raw["vision_config"], "dtype": dtype}
  with released.staged(out) as folder:
    released.write_json(folder / "config.json", raw)
    for path in sorted(checkpoint.folder.iterdir()):
      if path.suffix in _COPIED and path.name != "config.json":
        shutil.copyfile(path, folder / path.name)
    (folder / f"{STEM}.safetensors.index.json").unlink(missing_ok=True)
    (folder / cfg.flux_path).mkdir(parents=True)
    shutil.copyfile(
      checkpoint.folder / cfg.flux_path / "config.json",
      folder / cfg.flux_path / "config.json",
    )
    write_weights(folder, cfg, tensors, vit_format)


def write_weights(
  folder: pathlib.Path,
  cfg: XOmniConfig,
  tensors: Mapping[str, Tensors],
  vit_format: str,
) -> None:
  """Writes the weight files of a model into its folder, which has configs."""
  # The largest last: what the others lack is known before.
  for name, path in (("siglip", cfg.siglip_path), ("vq", cfg.projector_path)):
    target = (folder / path).with_suffix(f".{vit_format}")
    target.parent.mkdir(parents=True, exist_ok=True)
    released.write_pt(target, tensors[name])
  released.write_safetensors(
    folder / cfg.flux_path, DIFFUSERS_STEM, tensors["flux"]
  )
  released.write_safetensors(folder, STEM, tensors["ar"])


# Tokenizer, generation settings, the reference's own code and its texts.
_COPIED = {".json", ".txt", ".jinja", ".py", ".md"}


def export(
  source: str | pathlib.Path,
  out: str | pathlib.Path,
  dtype: str | None = None,
  vit_format: str = "pt",
  progress: Any = lambda name, tensors, total: tensors,
) -> None:
  """Copies a checkpoint through the parameter table, streaming.

  Args:
    source: a folder in the released layout, or a hub id.
    out: a new folder.
    dtype: "float32" or "bfloat16"; None: every tensor as it is stored.
    vit_format: "pt" or "safetensors", of the tokenizer's two files.
    progress: wraps an iterable of tensors, for a progress bar.
  Raises:
    InputError: the source does not fit, or `out` exists.
  """
  checkpoint = open_checkpoint(source)
  parts = {**checkpoint.parts, "flux": open_flux(checkpoint)[1]}
  write_released(
    pathlib.Path(out),
    checkpoint,
    {
      name: progress(
        part.name, released.read_tensors(part, dtype), part.tensors
      )
      for name, part in parts.items()
    },
    dtype=dtype,
    vit_format=vit_format,
  )
