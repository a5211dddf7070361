"""Sizes of every part of X-Omni, for programs that need no checkpoint.

  xomni plan --config=configs/model.py:7b --target v5e:2x4

compiles the full-size model for a TPU slice without having one (a minute or
two on any CPU machine). "tiny" has the sizes of the golden checkpoint in the
tests, "world" is the smallest that learns to draw and read the signs of the
drawn world on a CPU.
"""

from ml_collections import ConfigDict

from xomni_jax.config_files import of_size


def get_config(size: str = "7b") -> ConfigDict:
  """Sections as in `xomni_jax.config.Architecture`."""
  return of_size(size, {"7b": _full, "tiny": _tiny, "world": _world})


def _full():
  """X-Omni (arXiv:2507.22058) with FLUX.1-dev."""
  return {
    "ar": {
      # Qwen2.5-7B ...
      "vocab_size": 152064,
      "hidden_size": 3584,
      "intermediate_size": 18944,
      "num_attention_heads": 28,
      "num_key_value_heads": 4,
      "rope_theta": 1000000.0,
      "rms_norm_eps": 1e-6,
      "max_position_embeddings": 32768,
      # ... with 4 vision-only blocks before and after its 28.
      "num_hidden_layers": 36,
      "num_mm_adap_layers": 4,
      "num_mm_head_layers": 4,
      "image_vocab_size": 16384,
      "mm_vocab_size": 16448,  # codes and room for 64 special tokens
    },
    "siglip": {  # SigLIP2-g
      "width": 1536,
      "layers": 40,
      "heads": 16,
      "mlp": 6144,
      "patch": 16,
      "grid": 128,  # 2048 px
    },
    "vq": {"codebook_size": 16384, "codebook_dim": 2048, "z_channels": 1536},
    "flux": {  # FLUX.1-dev
      "num_layers": 19,
      "num_single_layers": 38,
      "num_attention_heads": 24,
      "attention_head_dim": 128,
      "in_channels": 64,
      "joint_attention_dim": 4096,
      "pooled_projection_dim": 768,
      "guidance_embeds": True,
      "axes_dims_rope": (16, 56, 56),
      "siglip_channels": 1536,
    },
    "vae": {
      "block_out_channels": (128, 256, 512, 512),
      "layers_per_block": 2,
      "norm_num_groups": 32,
      "latent_channels": 16,
      "in_channels": 3,
      "out_channels": 3,
      "scaling_factor": 0.3611,
      "shift_factor": 0.1159,
    },
    "clip": {  # CLIP ViT-L/14
      "vocab_size": 49408,
      "hidden_size": 768,
      "intermediate_size": 3072,
      "num_hidden_layers": 12,
      "num_attention_heads": 12,
      "max_position_embeddings": 77,
      "layer_norm_eps": 1e-5,
      "hidden_act": "quick_gelu",
      "eos_token_id": 2,  # what its config says; see models/text_encoders.py
    },
    "t5": {  # T5 v1.1 XXL
      "vocab_size": 32128,
      "d_model": 4096,
      "d_kv": 64,
      "d_ff": 10240,
      "num_layers": 24,
      "num_heads": 64,
      "relative_attention_num_buckets": 32,
      "relative_attention_max_distance": 128,
      "layer_norm_epsilon": 1e-6,
    },
    # What a model folder says besides.
    "transform": {
      "short_size": 384,
      "long_size": 1152,
      "patch_size": 16,
      "min_short_size": 128,
      "max_aspect_ratio": 3.0,
      "filtering": False,
    },
    "decoder": {
      "upscale_factor": 16,
      "num_inference_steps": 28,
      "cfg_scale": 1.0,
    },
  }


def _tiny():
  """Every part in small; the same shapes of everything else."""
  config = _full()
  config["ar"] |= {
    "vocab_size": 448,
    "image_vocab_size": 64,
    "mm_vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 6,
    "num_mm_adap_layers": 1,
    "num_mm_head_layers": 2,
    "max_position_embeddings": 4096,
  }
  config["siglip"] |= {"width": 64, "layers": 3, "heads": 4, "mlp": 256}
  config["vq"] = {"codebook_size": 64, "codebook_dim": 48, "z_channels": 64}
  config["flux"] |= {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 24,
    "axes_dims_rope": (4, 6, 6),
    "siglip_channels": 64,
  }
  config["vae"] |= {
    "block_out_channels": (16, 16, 24, 24),
    "layers_per_block": 1,
    "norm_num_groups": 8,
  }
  config["clip"] |= {
    "vocab_size": 584,
    "hidden_size": 24,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
  }
  config["t5"] |= {
    "vocab_size": 192,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 72,
    "num_layers": 2,
    "num_heads": 4,
  }
  return config


def _world():
  """For signs of 96 x 96 px, 6 x 6 image tokens, and posters of 128 x 208."""
  config = _full()
  config["ar"] |= {
    "vocab_size": 512,  # 256 bytes, the merges of one small text, specials
    "image_vocab_size": 512,
    "mm_vocab_size": 576,  # codes and room for 64 special tokens
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 6,
    "num_mm_adap_layers": 1,
    "num_mm_head_layers": 1,
    "max_position_embeddings": 4096,
    # Waves of 6 to 470 tokens, a row's length. With Qwen2.5's million three in
    # four do not turn within a sign, and reading takes several times as long.
    "rope_theta": 100.0,
  }
  config["siglip"] |= {
    "width": 128,
    "layers": 4,
    "heads": 4,
    "mlp": 512,
    "grid": 16,  # 256 px
  }
  config["vq"] = {"codebook_size": 512, "codebook_dim": 32, "z_channels": 128}
  config["flux"] |= {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "axes_dims_rope": (8, 12, 12),
    "siglip_channels": 128,
  }
  config["vae"] |= {
    # Convolutions of whole images are most of a step.
    "block_out_channels": (16, 32, 64, 128),
    "layers_per_block": 1,
    "norm_num_groups": 4,  # of at least 4 channels, as FLUX's
  }
  config["clip"] |= {
    "vocab_size": 640,  # 256 bytes, each also as a word's end, and merges
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,  # captions take up to 37
  }
  config["transform"] |= {
    "short_size": 96,
    "long_size": 208,
    "min_short_size": 32,
  }
  config["decoder"] |= {
    "image_size": (96, 96),  # a sign
    "num_inference_steps": 8,  # OCR reads what 3 steps paint as well
  }
  config["t5"] |= {
    "vocab_size": 512,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
  }
  return config
