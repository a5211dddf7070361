"""Configs out of the JSON files of a released checkpoint."""

import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from xomni_jax.config import (
  ARConfig,
  DecoderConfig,
  SiglipConfig,
  TransformConfig,
  VQConfig,
  XOmniConfig,
)
from xomni_jax.config_files import from_mapping
from xomni_jax.errors import InputError
from xomni_jax.flux_config import (
  CLIPConfig,
  FluxConfig,
  SchedulerConfig,
  T5Config,
  VAEConfig,
)

# Heads can't be read off the ViT's weights, and the released config.json names
# the ViT only. Source: the table built into the reference implementation.
SIGLIP_HEADS = {
  "siglip_so400m_patch16_384": 16,
  "siglip2_giant_patch16_384": 16,
}


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file; InputError if there is none."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise InputError(
      f"{path}: no such file; expected a folder in the released layout"
    ) from None
  except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
    raise InputError(f"{path}: not readable as JSON ({e})") from None
  if not isinstance(value, dict):
    raise InputError(f"{path}: holds a {type(value).__name__}, not an object")
  return value


def _section(mapping, name, where):
  value = mapping.get(name)
  if not isinstance(value, Mapping):
    raise InputError(f"{where}: {name} is {value!r}, expected an object")
  return value


def ar_config(config: Mapping[str, Any], where: str) -> ARConfig:
  """The AR transformer's config out of a released `config.json`."""
  # `sliding_window` may carry a number; it is in force only by its switch.
  return from_mapping(
    ARConfig,
    config,
    where,
    hidden_act="silu",
    rope_scaling=None,
    use_sliding_window=False,
    tie_word_embeddings=False,
  )


def xomni_config(
  config: Mapping[str, Any],
  where: str,
  generation: Mapping[str, Any] | None = None,
) -> XOmniConfig:
  """The whole model's config out of a released `config.json`.

  Args:
    generation: its `generation_config.json`, whose end tokens count as well.
  Raises:
    InputError: a setting is missing or unknown, or the two guidance scales of
      the decoder differ (only equal ones are known).
  """
  if config.get("model_type", "x-omni") != "x-omni":
    raise InputError(
      f"{where}: model_type is {config['model_type']!r}, expected 'x-omni'; "
      "name the folder of an X-Omni checkpoint"
    )
  vision = _section(config, "vision_config", where)
  encoder = _section(vision, "encoder", f"{where}: vision_config")
  decoder = _section(vision, "decoder", f"{where}: vision_config")
  scales = decoder.get("cfg_scale"), decoder.get("cfg_scale_2")
  if scales[0] != scales[1]:
    raise InputError(
      f"{where}: vision_config.decoder has cfg_scale {scales[0]} and "
      f"cfg_scale_2 {scales[1]}, only equal ones are known"
    )
  paths = {
    "siglip_name": encoder.get("siglip_name"),
    "siglip_path": encoder.get("siglip_path"),
    "projector_path": encoder.get("projector_path"),
    "flux_path": decoder.get("model_path"),
  }
  bad = [name for name, value in paths.items() if not isinstance(value, str)]
  if bad:
    raise InputError(f"{where}: vision_config lacks {', '.join(bad)}")
  try:
    ar = ar_config(config, where)
    return XOmniConfig(
      ar=ar,
      transform=from_mapping(
        TransformConfig,
        _section(vision, "transform", f"{where}: vision_config"),
        f"{where}: vision_config.transform",
      ),
      vq=from_mapping(VQConfig, encoder, f"{where}: vision_config.encoder"),
      decoder=from_mapping(
        DecoderConfig, decoder, f"{where}: vision_config.decoder"
      ),
      siglip_heads=_siglip_heads(paths["siglip_name"], vision, where),
      eos_token_ids=_ends(config, generation or {}, ar.vocab_size, where),
      **paths,
    )
  except InputError as e:
    raise InputError(
      str(e) if str(e).startswith(where) else f"{where}: {e}"
    ) from None


def _ends(config, generation, vocab, where) -> tuple[int, ...]:
  """Ids that end a text: those of both files, as PyTorch's `generate` takes
  them from the second."""
  found = []
  for source in (config, generation):
    ids = source.get("eos_token_id")
    found += ids if isinstance(ids, list) else [] if ids is None else [ids]
  if not found or any(type(i) is not int or not 0 <= i < vocab for i in found):
    raise InputError(
      f"{where}: eos_token_id is {found} (generation_config.json included); "
      f"expected ids of 0 to {vocab - 1}, else no answer would end"
    )
  return tuple(dict.fromkeys(found))


def _siglip_heads(name, vision, where):
  heads = SIGLIP_HEADS.get(name, vision.get("siglip_heads"))
  if type(heads) is not int or heads < 1:
    raise InputError(
      f"{where}: vision_config.siglip_heads is {heads!r}, expected the ViT's "
      f"number of heads, since {name!r} is none of the released names "
      f"({', '.join(SIGLIP_HEADS)})"
    )
  return heads


def siglip_config(
  shapes: Mapping[str, tuple[int, ...]], heads: int, where: str
) -> SiglipConfig:
  """The ViT's sizes, read off the shapes of its weights (all but `heads`)."""
  wanted = {
    "pos_embed": 3,
    "patch_embed.proj.weight": 4,
    "blocks.0.mlp.fc1.weight": 2,
  }
  bad = [k for k, n in wanted.items() if len(shapes.get(k, ())) != n]
  if bad:
    raise InputError(
      f"{where}: no usable {', '.join(bad)}; expected a SigLIP ViT's weights"
    )
  _, cells, width = shapes["pos_embed"]
  blocks = {int(m[1]) for k in shapes if (m := re.match(r"blocks\.(\d+)\.", k))}
  grid = math.isqrt(cells)
  if grid * grid != cells:
    raise InputError(f"{where}: pos_embed has {cells} cells, not a square")
  try:
    return SiglipConfig(
      width=width,
      layers=max(blocks) + 1,
      heads=heads,
      mlp=shapes["blocks.0.mlp.fc1.weight"][0],
      patch=shapes["patch_embed.proj.weight"][-1],
      grid=grid,
    )
  except InputError as e:
    raise InputError(f"{where}: {e}") from None


def flux_config(config: Mapping[str, Any], where: str) -> FluxConfig:
  """Out of the FLUX transformer's `config.json`."""
  out = config.get("out_channels")
  if out not in (None, config.get("in_channels")):
    raise InputError(f"{where}: out_channels {out} differs from in_channels")
  return from_mapping(FluxConfig, config, where, patch_size=1)


def vae_config(config: Mapping[str, Any], where: str) -> VAEConfig:
  """Out of the autoencoder's `config.json` (FLUX's kind only)."""
  channels = config.get("block_out_channels")
  levels = len(channels) if isinstance(channels, list) else 0
  return from_mapping(
    VAEConfig,
    config,
    where,
    act_fn="silu",
    use_quant_conv=False,
    use_post_quant_conv=False,
    mid_block_add_attention=True,
    down_block_types=["DownEncoderBlock2D"] * levels,
    up_block_types=["UpDecoderBlock2D"] * levels,
  )


def clip_config(config: Mapping[str, Any], where: str) -> CLIPConfig:
  """Out of the CLIP text encoder's `config.json`."""
  return from_mapping(CLIPConfig, config, where)


def t5_config(config: Mapping[str, Any], where: str) -> T5Config:
  """Out of the T5 encoder's `config.json`."""
  return from_mapping(
    T5Config,
    # Configs older than the field have this distance.
    {"relative_attention_max_distance": 128, **config},
    where,
    feed_forward_proj="gated-gelu",
  )


def scheduler_config(config: Mapping[str, Any], where: str) -> SchedulerConfig:
  """Out of `scheduler_config.json`; `shift` is unused with dynamic shifting."""
  return from_mapping(
    SchedulerConfig,
    config,
    where,
    use_dynamic_shifting=True,
    num_train_timesteps=1000,
    invert_sigmas=False,
    shift_terminal=None,
    stochastic_sampling=False,
    time_shift_type="exponential",
    use_beta_sigmas=False,
    use_exponential_sigmas=False,
    use_karras_sigmas=False,
  )
