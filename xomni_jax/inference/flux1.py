"""The parts of a FLUX.1-dev folder that decoding needs: found and checked."""

import dataclasses
import pathlib

from xomni_jax.checkpoints import released_config
from xomni_jax.checkpoints.released import Part
from xomni_jax.checkpoints.released_config import read_json
from xomni_jax.checkpoints.tensor_files import folder_files
from xomni_jax.flux_config import (
  CLIPConfig,
  SchedulerConfig,
  T5Config,
  VAEConfig,
)
from xomni_jax.inference import shipped
from xomni_jax.inference.hub import resolve
from xomni_jax.models import text_encoders, vae

# All but the transformer: X-Omni brings its own.
FOLDERS = (
  "scheduler",
  "text_encoder",
  "text_encoder_2",
  "tokenizer",
  "tokenizer_2",
  "vae",
)
INDEX = "model_index.json"  # by which diffusers' pipelines know the folders
# Where a part's weights are, and the stem of their files.
WEIGHTS = {
  "vae": ("vae", "diffusion_pytorch_model"),
  "clip": ("text_encoder", "model"),
  "t5": ("text_encoder_2", "model"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flux1:
  """What a FLUX.1-dev folder says; `parts_of` opens its weights.

  Attributes:
    folder: where it is (for its tokenizers).
    vae, clip, t5, scheduler: configs.
  """

  folder: pathlib.Path
  vae: VAEConfig
  clip: CLIPConfig
  t5: T5Config
  scheduler: SchedulerConfig


def open_flux1(path_or_id: str | pathlib.Path) -> Flux1:
  """Reads the configs of a FLUX.1-dev folder or hub id; raises InputError.

  A `transformer` folder in it is ignored. Models that ship are also known by
  their names.
  """
  named = shipped.find(path_or_id)
  folder = (
    named.flux1
    if named
    else resolve(path_or_id, [INDEX, *(f"{name}/*" for name in FOLDERS)])
  )

  def read(name, parse, file="config.json"):
    where = folder / name / file
    return parse(read_json(where), str(where))

  return Flux1(
    folder=folder,
    vae=read("vae", released_config.vae_config),
    clip=read("text_encoder", released_config.clip_config),
    t5=read("text_encoder_2", released_config.t5_config),
    scheduler=read(
      "scheduler", released_config.scheduler_config, "scheduler_config.json"
    ),
  )


def parts_of(opened: Flux1) -> dict[str, Part]:
  """The parts "vae", "clip" and "t5"; InputError where weights do not fit."""
  tables = tables_of(opened.vae, opened.clip, opened.t5)
  names = {"vae": "autoencoder", "clip": "CLIP", "t5": "T5"}
  return {
    part: Part(
      names[part], *tables[part], folder_files(opened.folder / folder, stem)
    )
    for part, (folder, stem) in WEIGHTS.items()
  }


def tables_of(vae_cfg: VAEConfig, clip: CLIPConfig, t5: T5Config):
  """{part: (parameter table, abstract parameters)}."""
  te = text_encoders
  return {
    "vae": (vae.rows(vae_cfg), vae.abstract(vae_cfg)),
    "clip": (te.clip_rows(clip), te.clip_abstract(clip)),
    "t5": (te.t5_rows(t5), te.t5_abstract(t5)),
  }
