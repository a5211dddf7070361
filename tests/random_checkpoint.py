"""Random checkpoints of any shape, written in the released layout.

Configs are written out here, independently of the code that reads them; names
and shapes of tensors come from the parameter table, which other tests hold
against the released layout.
"""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
from safetensors.numpy import save_file

from tests.helpers import GOLDEN, random_state
from xomni_jax.config import Architecture, TransformConfig
from xomni_jax.models import ar, flux, siglip, text_encoders, vae, vq

# Of the golden checkpoint's tokenizer: ids below are bytes, merges and the
# three special tokens of text.
_TEXT_TOKENS = 379


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What a checkpoint is like.

  Attributes:
    sizes: of every part.
    transform: the tokenizer's preprocessing.
    upscale_factor: px per code that is decoded.
    steps: of denoising.
    shards: files that the AR model and FLUX are each split into; 1: one file,
      without an index.
    vit_format: "pt" or "safetensors".
    extra_config: entries of the AR model's `config.json` besides.
  """

  sizes: Architecture
  transform: TransformConfig
  upscale_factor: int
  steps: int = 2
  shards: int = 1
  vit_format: str = "pt"
  extra_config: dict = dataclasses.field(default_factory=dict)


def write_checkpoint(
  folder: pathlib.Path, recipe: Recipe, seed: int = 0
) -> tuple[pathlib.Path, pathlib.Path]:
  """Writes `xomni` and `flux1` into a folder and returns both paths."""
  xomni, flux1, sizes = folder / "xomni", folder / "flux1", recipe.sizes
  _write_tokenizer(xomni, sizes.ar)
  _write_json(xomni / "config.json", _xomni_config(recipe))
  _write_shards(xomni, "model", recipe.shards, _state(ar, sizes.ar, seed))
  for name, module, cfg in (
    ("vit/some_vit", siglip, sizes.siglip),
    ("vit/projector", vq, sizes.vq),
  ):
    path = xomni / f"{name}.{recipe.vit_format}"
    _write_state(path, _state(module, cfg, seed))

  config = _as_json(sizes.flux) | {"patch_size": 1, "out_channels": None}
  _write_json(xomni / "flux/config.json", config)
  _write_shards(
    xomni / "flux",
    "diffusion_pytorch_model",
    recipe.shards,
    _state(flux, sizes.flux, seed),
  )
  _write_flux1(flux1, sizes, seed)
  return xomni, flux1


def _state(module, cfg, seed):
  return random_state(module.rows(cfg), module.abstract(cfg), seed)


def _as_json(config):
  return json.loads(json.dumps(dataclasses.asdict(config)))


def _write_json(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value), encoding="utf-8")


def _xomni_config(recipe):
  sizes = recipe.sizes
  return {
    "architectures": ["XOmniForCausalLM"],
    "model_type": "x-omni",
    **_as_json(sizes.ar),
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    # A number without its switch has no effect.
    "sliding_window": 4,
    "use_sliding_window": False,
    "eos_token_id": 378,
    "torch_dtype": "float32",
    "vision_config": {
      "dtype": "float32",
      "siglip_heads": sizes.siglip.heads,
      "transform": _as_json(recipe.transform),
      "encoder": {
        "siglip_name": "some_vit",
        "siglip_path": "vit/some_vit.pt",
        "projector_path": "vit/projector.pt",
        **_as_json(sizes.vq),
      },
      "decoder": {
        "model_path": "flux",
        "upscale_factor": recipe.upscale_factor,
        "num_inference_steps": recipe.steps,
        "cfg_scale": 2.0,
        "cfg_scale_2": 2.0,
      },
    },
    **recipe.extra_config,
  }


def _write_tokenizer(folder, cfg):
  """The golden tokenizer with other numbers of text and image tokens.

  One unused id lies between the codes and `<SOM>`, which only have to be in
  that order.
  """
  names = [f"<|extra_{i}|>" for i in range(cfg.vocab_size - _TEXT_TOKENS)]
  names += [f"<MM-Token-{i}>" for i in range(cfg.image_vocab_size)]
  names += ["<unused>", "<SOM>", "<EOM>", "<IMAGE>"]
  source = GOLDEN / "xomni"
  tokenizer = json.loads((source / "tokenizer.json").read_text("utf-8"))
  added = tokenizer["added_tokens"][:3]
  like = {k: v for k, v in added[0].items() if k not in ("id", "content")}
  added += [
    {"id": _TEXT_TOKENS + i, "content": name, **like}
    for i, name in enumerate(names)
  ]
  tokenizer["added_tokens"] = added
  _write_json(folder / "tokenizer.json", tokenizer)
  config = json.loads((source / "tokenizer_config.json").read_text("utf-8"))
  config["added_tokens_decoder"] = {
    str(token["id"]): {k: v for k, v in token.items() if k != "id"}
    for token in added
  }
  _write_json(folder / "tokenizer_config.json", config)


def _write_state(path, state):
  """One file of tensors, of the kind its suffix says."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == ".safetensors":
    save_file(state, path)
    return
  import torch

  torch.save({k: torch.from_numpy(v) for k, v in state.items()}, path)


def _write_shards(folder, stem, shards, state):
  """Tensors dealt out to files in turn, with an index if there are several."""
  if shards == 1:
    _write_state(folder / f"{stem}.safetensors", state)
    return
  names = [
    f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)
  ]
  where = {key: names[i % shards] for i, key in enumerate(state)}
  for name in names:
    part = {k: v for k, v in state.items() if where[k] == name}
    _write_state(folder / name, part)
  total = sum(x.nbytes for x in state.values())
  _write_json(
    folder / f"{stem}.safetensors.index.json",
    {"metadata": {"total_size": total}, "weight_map": where},
  )


def _write_flux1(folder, sizes, seed):
  for name in ("tokenizer", "tokenizer_2", "scheduler"):
    shutil.copytree(GOLDEN / "flux1" / name, folder / name)
  levels = len(sizes.vae.block_out_channels)
  kinds = {
    "vae": {
      "down_block_types": ["DownEncoderBlock2D"] * levels,
      "up_block_types": ["UpDecoderBlock2D"] * levels,
      "act_fn": "silu",
      "use_quant_conv": False,
      "use_post_quant_conv": False,
    },
    "text_encoder": {"model_type": "clip_text_model"},
    "text_encoder_2": {"feed_forward_proj": "gated-gelu"},
  }
  te, clip, t5 = text_encoders, sizes.clip, sizes.t5
  for name, stem, cfg, state in (
    (
      "vae",
      "diffusion_pytorch_model",
      sizes.vae,
      _state(vae, sizes.vae, seed),
    ),
    (
      "text_encoder",
      "model",
      clip,
      random_state(te.clip_rows(clip), te.clip_abstract(clip), seed),
    ),
    (
      "text_encoder_2",
      "model",
      t5,
      random_state(te.t5_rows(t5), te.t5_abstract(t5), seed),
    ),
  ):
    _write_json(folder / name / "config.json", _as_json(cfg) | kinds[name])
    _write_state(folder / name / f"{stem}.safetensors", state)
  # A full FLUX.1-dev has one; it must not be looked at.
  _write_json(folder / "transformer/config.json", {"not": "this one"})
  (folder / "transformer/diffusion_pytorch_model.safetensors").write_bytes(
    np.zeros(8, np.uint8).tobytes()
  )
