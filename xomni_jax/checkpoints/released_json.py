"""The JSON files of a released checkpoint out of configs.

Each is what `released_config` reads, and the settings besides that the
reference or its libraries look for.
"""

import dataclasses
from typing import Any

from xomni_jax.config import XOmniConfig
from xomni_jax.flux_config import (
  CLIPConfig,
  FluxConfig,
  SchedulerConfig,
  T5Config,
  VAEConfig,
)

# Of the libraries in whose layout the files are.
_TRANSFORMERS = {"transformers_version": "4.51.3"}
_DIFFUSERS_VERSION = {"_diffusers_version": "0.34.0"}


def _fields(config) -> dict[str, Any]:
  """The config's fields, tuples as lists."""
  return {
    name: list(value) if isinstance(value, tuple) else value
    for name, value in dataclasses.asdict(config).items()
  }


def xomni_json(cfg: XOmniConfig, dtype: str) -> dict[str, Any]:
  """The model's `config.json`; dtype is that of its weights."""
  eos = list(cfg.eos_token_ids)
  decoder = _fields(cfg.decoder)
  if not cfg.decoder.image_size:
    del decoder["image_size"]  # the released model has no such setting
  return {
    "architectures": ["XOmniForCausalLM"],
    "attention_dropout": 0.0,
    "eos_token_id": eos[0] if len(eos) == 1 else eos,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_window_layers": cfg.ar.num_hidden_layers,
    "mm_special_tokens": ["<SOM>", "<EOM>", "<IMAGE>"],
    "model_type": "x-omni",
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": dtype,
    **_TRANSFORMERS,
    "use_cache": True,
    "use_sliding_window": False,
    **_fields(cfg.ar),
    "vision_config": {
      "dtype": dtype,
      "transform": _fields(cfg.transform),
      "encoder": {
        "siglip_name": cfg.siglip_name,
        "siglip_path": cfg.siglip_path,
        "projector_path": cfg.projector_path,
        **_fields(cfg.vq),
      },
      "decoder": {
        "model_path": cfg.flux_path,
        **decoder,
        "cfg_scale_2": decoder["cfg_scale"],
      },
      "siglip_heads": cfg.siglip_heads,
    },
  }


def generation_json(cfg: XOmniConfig) -> dict[str, Any]:
  """The model's `generation_config.json`."""
  eos = list(cfg.eos_token_ids)
  return {
    "_from_model_config": True,
    "eos_token_id": eos[0] if len(eos) == 1 else eos,
    **_TRANSFORMERS,
  }


def flux_json(cfg: FluxConfig) -> dict[str, Any]:
  """The FLUX transformer's `config.json`."""
  return {
    "_class_name": "FluxTransformer2DModelWithSigLIP",
    **_DIFFUSERS_VERSION,
    **_fields(cfg),
    "drop_token_prob": 0.0,
    "out_channels": None,
    "patch_size": 1,
  }


def vae_json(cfg: VAEConfig) -> dict[str, Any]:
  """The autoencoder's `config.json`."""
  levels = len(cfg.block_out_channels)
  return {
    "_class_name": "AutoencoderKL",
    **_DIFFUSERS_VERSION,
    "act_fn": "silu",
    **_fields(cfg),
    "down_block_types": ["DownEncoderBlock2D"] * levels,
    "force_upcast": True,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "sample_size": 1024,
    "up_block_types": ["UpDecoderBlock2D"] * levels,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
  }


def clip_json(cfg: CLIPConfig, dtype: str) -> dict[str, Any]:
  """The CLIP text encoder's `config.json`."""
  return {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    **_fields(cfg),
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "model_type": "clip_text_model",
    "pad_token_id": 1,
    "projection_dim": cfg.hidden_size,
    "torch_dtype": dtype,
    **_TRANSFORMERS,
  }


def t5_json(cfg: T5Config, dtype: str) -> dict[str, Any]:
  """The T5 encoder's `config.json`."""
  return {
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    **_fields(cfg),
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "model_type": "t5",
    "num_decoder_layers": cfg.num_layers,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "torch_dtype": dtype,
    **_TRANSFORMERS,
    "use_cache": True,
  }


def scheduler_json(cfg: SchedulerConfig) -> dict[str, Any]:
  """`scheduler_config.json`."""
  return {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    **_DIFFUSERS_VERSION,
    **_fields(cfg),
    "invert_sigmas": False,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
  }


def model_index_json() -> dict[str, Any]:
  """`model_index.json` of a FLUX.1-dev folder."""
  return {
    "_class_name": "FluxPipeline",
    **_DIFFUSERS_VERSION,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
  }
