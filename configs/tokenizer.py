"""Stage `tokenizer`: SigLIP-VQ, trained by a language model that reads it.

  xomni train --config=configs/tokenizer.py:tiny --workdir=runs/tokenizer

draws its data and starts from random weights: 5 to 8 minutes on 2 slow CPU
cores (--cpu-devices=auto).

  xomni train --config=configs/tokenizer.py:7b --workdir=/mnt/runs/tokenizer \
    --config.init.model=X-Omni --config.init.qwen=Qwen/Qwen2.5-1.5B

is for one v5e:16x16 slice: by its operations half a day at 40 % of peak.
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
  }
  source = {"task": "image"}
  return {
    "stage": "tokenizer",
    "seed": 0,
    "global_batch": 512,
    "phases": {
      # The paper freezes the ViT; the language model learns with the codes.
      "1_all": {
        "steps": 100_000,
        "train": ("vq/", "lm/"),
        "warmup_steps": 1000,
        "decay": "cosine",
        "end_scale": 0.1,
      },
    },
    "data": {
      **data,
      "shuffle": True,
      "sources": (
        # Captions, text in images, and questions; the weights are a guess.
        {**source, "path": "data/captions", "weight": 2.0},
        {**source, "path": "data/ocr", "weight": 1.0},
        {**source, "path": "data/questions", "weight": 1.0},
      ),
    },
    "eval_data": {
      **data,
      "shuffle": False,
      "sources": ({**source, "path": "data/held_out", "weight": 1.0},),
    },
    "init": {},
    "optim": {
      "lr": 1e-4,
    },
    "checkpoint": {
      "every": 1000,
      "keep_every": 20_000,
    },
    "report": {
      "log_every": 20,
      "eval_every": 1000,
      "eval_batches": 8,
      "preview_every": 2000,
    },
    "compute": {
      "dtype": "bfloat16",
      "scan_layers": True,
      "remat": "full",
      # Splash knows no keys that all questions share.
      "query_chunk": 512,
    },
    # fsdp above 32 turns shards into no multiple of a tile.
    "mesh": {"data": -1, "fsdp": 16},
    "frozen_dtype": "bfloat16",
    "options": {
      # 0.3 megapixels in five shapes, each side a multiple of 2 tokens.
      "grids": ((32, 32), (28, 36), (36, 28), (24, 42), (42, 24)),
      "text_len": 256,
      # The released class's 2 makes the softmax over 16,384 unit vectors flat:
      # squared distances span 4. Chosen at the tiny size.
      "temperature": 0.03,
      "entropy": 0.05,
      "commitment": 0.25,  # the released class's
      "skip": 0.1,  # of the paper
      # The projection is new: the language model reads it before it is cut up.
      "quantise_from": 2000,
      "kmeans": 10,
      "kmeans_batches": 2,  # 2 x 512 x 1008 features, of which 8 a code count
      "revive_every": 1000,
      "revive_until": 80_000,
      "dead_below": 0.03,
      "features": 0.0,
      "pixels": 0.0,
      "loss_chunk": 64,  # logits of 2 rows a device: 0.07 GiB
    },
    **model_sections("7b"),
    "lm": {  # Qwen2.5-1.5B, whose width is the ViT's
      "vocab_size": 151936,
      "hidden_size": 1536,
      "intermediate_size": 8960,
      "num_hidden_layers": 28,
      "num_attention_heads": 12,
      "num_key_value_heads": 2,
      "rope_theta": 1000000.0,
      "rms_norm_eps": 1e-6,
      "max_position_embeddings": 32768,
      "tie_word_embeddings": True,
    },
  }


def _tiny():
  """Reads signs and posters of the drawn world."""
  config = _full()
  model = model_sections("world")
  arch = model["architecture"]
  data = {
    "window": 1024,
  }
  phase = {
    # The ViT is random: unlike a released one it has all to learn.
    "train": ("siglip/", "vq/", "lm/", "readout/"),
    "warmup_steps": 50,
    "decay": "cosine",
    "end_scale": 0.05,
  }
  config |= {
    "global_batch": 16,
    "phases": {
      # Posters too from the start, 40 codes of a few colours are left.
      "1_signs": {
        **phase,
        "steps": 900,
        "data": {
          **data,
          "shuffle": True,
          "sources": world_sources("train", "image")[:1],
        },
      },
      "2_all": {**phase, "steps": 600},
    },
    "data": {
      **data,
      "shuffle": True,
      "sources": world_sources("train", "image"),
    },
    "eval_data": {
      **data,
      "shuffle": False,
      # Words that no training image shows.
      "sources": world_sources("validation", "image"),
    },
    "checkpoint": {
      "every": 500,
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
    **model,
    "lm": {
      "vocab_size": arch["ar"]["vocab_size"],
      "hidden_size": arch["vq"]["z_channels"],
      "intermediate_size": 352,
      "num_hidden_layers": 2,
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
      "rope_theta": arch["ar"]["rope_theta"],
      "rms_norm_eps": 1e-6,
      "max_position_embeddings": 4096,
      "tie_word_embeddings": True,
    },
  }
  config["optim"] |= {
    "lr": 2e-3,
    "b2": 0.98,
    "weight_decay": 0.01,
    # A third as many steps as AdamW alone needs.
    "muon": ("(siglip/blocks|lm)/.*/kernel",),
  }
  config["options"] |= {
    "grids": ((6, 6), (13, 8)),
    "text_len": 128,  # about five questions
    "temperature": 0.03,
    # Most cells of a sign are blank: pushed to use many codes, they would say
    # in codes of their own what no prompt tells.
    "entropy": 0.0,
    # By then the language model reads. Cut up earlier, 28 codes of a few
    # colours are left, and answers wait for a thousand steps.
    "quantise_from": 450,
    "kmeans_batches": 16,
    "revive_every": 50,
    "revive_until": 1200,
    "dead_below": 0.1,
    # What a patch looks like is learned at once so; with a weight of 1 answers
    # wait for a thousand steps more.
    "pixels": 6.0,
    "loss_chunk": 128,
  }
  return config
