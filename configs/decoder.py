"""Stage `decoder`: the FLUX transformer learns to paint codes.

  xomni train --config=configs/decoder.py:tiny --workdir=runs/decoder \
    --config.init.model=runs/tokenizer/model --config.init.flux=runs/vae/model

paints the drawn world from the codes of a tokenizer and in the latents
of an autoencoder (configs/tokenizer.py, configs/vae.py); its text encoders
learn with it and lie in runs/decoder/flux1: 10 to 15 minutes on 2 slow CPU
cores (--cpu-devices=auto).

  xomni train --config=configs/decoder.py:7b --workdir=/mnt/runs/decoder \
    --config.init.model=X-Omni --config.init.flux=FLUX.1-dev

is for one slice of 256 chips (v5e:16x16): about a week. `xomni plan
--program=train --config=configs/decoder.py:7b` says what it needs of a chip.
"""

from ml_collections import ConfigDict

from xomni_jax.config_files import model_sections, of_size, world_sources


def get_config(size: str = "7b") -> ConfigDict:
  """As `xomni_jax.train_config.TrainConfig`, whose defaults go unsaid."""
  return of_size(size, {"7b": _full, "tiny": _tiny})


def _full():
  data = {
    "window": 8192,  # records that are sorted into aspect buckets together
    "workers": 8,
    "text_backend": "tensorflow_text",
  }
  return {
    "stage": "decoder",
    "seed": 0,
    "global_batch": 256,  # one image a chip
    "phases": {
      # First what is new, which begins at zero, then all of it.
      "1_features": {
        "steps": 5000,
        "train": ("flux/siglip_embed/", "flux/single/"),
        "warmup_steps": 500,
      },
      "2_all": {
        "steps": 50_000,
        "train": ("flux/",),
        "lr_scale": 0.5,
        "warmup_steps": 500,
        "decay": "cosine",
        "end_scale": 0.1,
      },
    },
    "data": {
      **data,
      "shuffle": True,
      # Guidance needs both; a tenth is what diffusion models drop as a rule.
      "prompt_dropout": 0.1,
      "sources": ({"path": "data/images", "task": "image"},),
    },
    "eval_data": {
      **data,
      "shuffle": False,
      "prompt_dropout": 0.0,
      "sources": ({"path": "data/held_out", "task": "image"},),
    },
    "init": {},
    "optim": {
      "lr": 1e-4,
    },
    "checkpoint": {
      "every": 1000,
      "keep_every": 10_000,
    },
    "report": {
      "eval_every": 1000,
      "eval_batches": 8,
      "preview_every": 1000,
    },
    "compute": {
      "dtype": "bfloat16",
      "scan_layers": True,
      "remat": "full",
      "query_chunk": 512,
    },
    # fsdp above 32 makes shards of a width of 3072 that are no multiple of a
    # tile, and XLA then sums whole weight gradients.
    "mesh": {"data": -1, "fsdp": 32},
    "frozen_dtype": "bfloat16",
    "options": {
      # 1 megapixel in five shapes.
      "grids": ((64, 64), (56, 72), (72, 56), (48, 84), (84, 48)),
      "times": "logit_normal",  # as Stable Diffusion 3 and FLUX train
      "token_dropout": 0.1,  # a guess: codes drawn by a model have errors
      "text_len": 512,  # FLUX.1-dev's
      "preview_steps": 16,
    },
    **model_sections("7b"),
  }


def _tiny():
  """Paints signs and posters of the drawn world."""
  config = _full()
  data = {
    "window": 1024,
  }
  config |= {
    "global_batch": 16,
    "phases": {
      "1_all": {
        "steps": 1500,
        # Nothing here was trained before, text encoders included.
        "train": ("flux/", "clip/", "t5/"),
        "warmup_steps": 50,
        "decay": "cosine",
        "end_scale": 0.05,
      },
    },
    "data": {
      **data,
      "shuffle": True,
      "prompt_dropout": 0.1,
      "sources": world_sources("train", "image"),
    },
    "eval_data": {
      **data,
      "shuffle": False,
      "prompt_dropout": 0.0,
      # Words that no training image shows.
      "sources": world_sources("validation", "image"),
    },
    "report": {
      "log_every": 20,
      "eval_every": 250,
      "eval_batches": 8,
      "preview_every": 500,
    },
    "compute": {
      "dtype": "float32",
      "scan_layers": False,
    },
    "mesh": {"data": -1},
    "frozen_dtype": "float32",
    **model_sections("world"),
  }
  config["optim"] |= {
    "lr": 2e-3,
    "b2": 0.98,
    "weight_decay": 0.01,
    # Half as many steps as AdamW alone needs.
    "muon": ("(flux/(double|single)|clip/blocks|t5/blocks)/.*kernel",),
  }
  config["checkpoint"] |= {"every": 500, "keep_every": 0}
  config["options"] |= {
    "grids": ((6, 6), (13, 8)),
    "token_dropout": 0.0,
    "text_len": 64,  # prompts of posters take up to 61
  }
  return config
