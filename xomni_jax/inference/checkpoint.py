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
from xomni_jax.config import (
  CLIPConfig,
  FluxConfig,
  SchedulerConfig,
  SiglipConfig,
  T5Config,
  VAEConfig,
  XOmniConfig,
)
from xomni_jax.errors import InputError
from xomni_jax.models import ar, flux, siglip, text_encoders, vae, vq

# Of FLUX.1-dev all but its transformer: X-Omni brings its own.
_FLUX1_FILES = [
  f"{name}/*"
  for name in (
    "scheduler",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "vae",
  )
]
_STEM, _DIFFUSERS_STEM = "model", "diffusion_pytorch_model"


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
class Decoder:
  """The diffusion decoder, opened.

  Attributes:
    folder: the FLUX.1-dev folder (for its tokenizers).
    flux, vae, clip, t5, scheduler: configs.
    parts: "flux", "vae", "clip" and "t5".
  """

  folder: pathlib.Path
  flux: FluxConfig
  vae: VAEConfig
  clip: CLIPConfig
  t5: T5Config
  scheduler: SchedulerConfig
  parts: Mapping[str, Part]


def resolve(
  path_or_id: str | pathlib.Path, patterns: list[str] | None = None
) -> pathlib.Path:
  """The local folder of a path or a Hugging Face hub id.

  Args:
    path_or_id: a folder, or `owner/name`, which is fetched into the hub cache.
    patterns: fetch only files that match.
  Raises:
    InputError: neither; or the hub can't give it.
  """
  path = pathlib.Path(path_or_id)
  if path.is_dir():
    return path
  text = str(path_or_id)
  if path.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
    raise InputError(
      f"{text}: no such folder; expected a folder in the released layout or a "
      "Hugging Face hub id 'owner/name'"
    )
  import huggingface_hub
  from huggingface_hub import errors

  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(text, allow_patterns=patterns)
    )
  except (
    errors.HfHubHTTPError,
    errors.HFValidationError,
    OSError,
    ValueError,
  ) as e:
    reason = (str(e).strip() or type(e).__name__).splitlines()[0]
    raise InputError(
      f"{text}: no such folder, and the hub can't give it ({reason})"
    ) from None


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
  """Opens an X-Omni folder; raises InputError where it does not fit."""
  folder = resolve(path_or_id)
  where = folder / "config.json"
  raw = read_json(where)
  cfg = released_config.xomni_config(raw, str(where))
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
        folder_files(folder, _STEM),
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
    folder_files(folder, _DIFFUSERS_STEM),
  )


def open_decoder(checkpoint: Checkpoint, flux1: str | pathlib.Path) -> Decoder:
  """The diffusion decoder: X-Omni's transformer and FLUX.1-dev's other parts.

  A `transformer` folder in FLUX.1-dev is ignored.
  """
  folder = resolve(flux1, _FLUX1_FILES)

  def read(name, parse, file="config.json"):
    where = folder / name / file
    return parse(read_json(where), str(where))

  vae_cfg = read("vae", released_config.vae_config)
  clip = read("text_encoder", released_config.clip_config)
  t5 = read("text_encoder_2", released_config.t5_config)
  scheduler = read(
    "scheduler", released_config.scheduler_config, "scheduler_config.json"
  )
  flux_cfg, flux_part = open_flux(checkpoint)
  factor = checkpoint.config.decoder.upscale_factor
  wrong = [
    f"{what} {a} of the diffusion transformer, {b} of {other}"
    for what, a, b, other in (
      (
        "in_channels",
        flux_cfg.in_channels,
        4 * vae_cfg.latent_channels,
        "the VAE",
      ),
      ("joint_attention_dim", flux_cfg.joint_attention_dim, t5.d_model, "T5"),
      (
        "pooled_projection_dim",
        flux_cfg.pooled_projection_dim,
        clip.hidden_size,
        "CLIP",
      ),
      ("upscale_factor", factor, 2 * vae_cfg.factor, "the VAE"),
    )
    if a != b
  ]
  if wrong:
    raise InputError(f"{folder}: does not fit: {'; '.join(wrong)}")
  return Decoder(
    folder,
    flux_cfg,
    vae_cfg,
    clip,
    t5,
    scheduler,
    {
      "flux": flux_part,
      "vae": Part(
        "autoencoder",
        vae.rows(vae_cfg),
        vae.abstract(vae_cfg),
        folder_files(folder / "vae", _DIFFUSERS_STEM),
      ),
      "clip": Part(
        "CLIP",
        text_encoders.clip_rows(clip),
        text_encoders.clip_abstract(clip),
        folder_files(folder / "text_encoder", _STEM),
      ),
      "t5": Part(
        "T5",
        text_encoders.t5_rows(t5),
        text_encoders.t5_abstract(t5),
        folder_files(folder / "text_encoder_2", _STEM),
      ),
    },
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
    (folder / f"{_STEM}.safetensors.index.json").unlink(missing_ok=True)
    released.write_safetensors(folder, _STEM, tensors["ar"])
    for name, path in (("siglip", cfg.siglip_path), ("vq", cfg.projector_path)):
      target = (folder / path).with_suffix(f".{vit_format}")
      target.parent.mkdir(parents=True, exist_ok=True)
      released.write_pt(target, tensors[name])
    target = folder / cfg.flux_path
    target.mkdir(parents=True)
    shutil.copyfile(
      checkpoint.folder / cfg.flux_path / "config.json", target / "config.json"
    )
    released.write_safetensors(target, _DIFFUSERS_STEM, tensors["flux"])


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
