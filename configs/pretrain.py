"""Stage `pretrain`: the AR model on packed text and images, in phases.

  xomni train --config=configs/pretrain.py:tiny --workdir=runs/pretrain \
    --config.init.model=runs/tokenizer/model

learns to draw and read signs and posters from the codes of a tokenizer
(configs/tokenizer.py) that `xomni tokenize-dataset` made: 11 minutes on 2
slow CPU cores (--cpu-devices=auto).

  xomni train --config=configs/pretrain.py:7b --workdir=/mnt/runs/pretrain \
    --config.init.model=X-Omni --config.init.qwen=Qwen/Qwen2.5-7B

starts from Qwen2.5-7B, for one slice of 256 chips (v5e:16x16 or v6e:16x16);
weeks. `xomni plan --program=train --config=configs/pretrain.py:7b` says what
it needs of a chip.
"""

from ml_collections import ConfigDict

from xomni_jax.config_files import model_sections, of_size


def get_config(size: str = "7b") -> ConfigDict:
  """As `xomni_jax.train_config.TrainConfig`, whose defaults go unsaid."""
  return of_size(size, {"7b": _full, "tiny": _tiny})


# All that Qwen2.5 does not bring: blocks, embedding, norm and head of images.
_VISION = ("ar/vision_in/", "ar/vision_out/", "ar/mm_")


def _source(path, task, weight):
  return {"path": path, "task": task, "weight": weight}


def _full():
  data = {
    # Prompt and codes of an image of 1152 x 1152 px take 5,184 and some.
    "seq_len": 8192,
    "window": 4096,
    "shuffle": True,
    "prompt_dropout": 0.0,
    "workers": 8,
  }
  return {
    "stage": "pretrain",
    "seed": 0,
    "global_batch": 256,  # 2.1M tokens
    "phases": {
      # The paper's order; its numbers of steps are not published. First what
      # is new alone, so that it does not spoil the language model.
      "1_vision": {
        "steps": 20_000,
        "train": _VISION,
        "warmup_steps": 1000,
      },
      "2_all": {
        "steps": 150_000,
        "train": ("ar/",),
        # Of a lower rate, as language models are tuned.
        "lr_scale": 0.3,
        "warmup_steps": 1000,
      },
      # On the best data, to zero.
      "3_anneal": {
        "steps": 20_000,
        "train": ("ar/",),
        "lr_scale": 0.3,
        "decay": "linear",
        "data": {
          **data,
          "sources": (
            _source("data/best/codes", "text_to_image", 0.6),
            _source("data/best/codes", "image_to_text", 0.2),
            _source("data/best/text", "text", 0.2),
          ),
        },
      },
    },
    "data": {
      **data,
      "sources": (
        _source("data/codes", "text_to_image", 0.6),
        _source("data/codes", "image_to_text", 0.2),
        _source("data/text", "text", 0.2),
      ),
    },
    "eval_data": {
      **data,
      "shuffle": False,
      "sources": (_source("data/held_out/codes", "text_to_image", 1.0),),
    },
    "init": {},
    "optim": {
      "lr": 1e-4,
      "weight_decay": 0.1,
    },
    "checkpoint": {
      "every": 1000,
      "keep_every": 20_000,
    },
    "report": {
      "eval_every": 1000,
      "eval_batches": 8,
      "preview_every": 0,
    },
    "compute": {
      "dtype": "bfloat16",
      "scan_layers": True,
      "remat": "full",
      "attention": "splash",
      "query_chunk": 512,
    },
    # fsdp above 32 makes shards of a width of 3584 that are no multiple of a
    # tile, and XLA then sums whole weight gradients.
    "mesh": {"data": -1, "fsdp": 32},
    "frozen_dtype": "bfloat16",
    "options": {
      "text_weight": 1.0,
      "image_weight": 1.0,
      "loss_chunk": 1024,  # logits of a row: 0.6 GiB
    },
    "architecture": model_sections("7b")["architecture"],
  }


def _tiny():
  """Draws and reads signs and posters of the drawn world."""
  config = _full()
  data = {
    "seq_len": 256,  # four signs and their prompts, or a poster
    "window": 256,
    "shuffle": True,
    "turns": 2,
  }
  # Nothing can be foretold of an image without a prompt, nor of a prompt.
  mixture = (
    _source("runs/codes/signs/train", "generate", 0.42),
    _source("runs/codes/posters/train", "generate", 0.23),
    _source("runs/codes/signs/train", "chat", 0.15),
    _source("runs/codes/posters/train", "chat", 0.08),
    _source("runs/codes/signs/train", "image_to_text", 0.08),
    _source("runs/codes/posters/train", "image_to_text", 0.04),
  )
  reading = (_source("runs/codes/signs/train", "image_to_text", 1.0),)
  drawing = (
    _source("runs/codes/signs/train", "generate", 0.85),
    _source("runs/codes/signs/train", "image_to_text", 0.15),
  )
  # In the mixture posters are still not read after 900 steps.
  posters = (
    _source("runs/codes/posters/train", "image_to_text", 0.6),
    _source("runs/codes/posters/train", "generate", 0.2),
    _source("runs/codes/signs/train", "generate", 0.1),
    _source("runs/codes/signs/train", "image_to_text", 0.1),
  )
  config |= {
    "global_batch": 8,
    "phases": {
      "1_vision": {"steps": 60, "train": _VISION, "warmup_steps": 20},
      # Captions alone are read after 300 steps, and not at all in a mixture.
      "2_read": {
        "steps": 400,
        "train": ("ar/",),
        "warmup_steps": 20,
        "data": {**data, "sources": reading},
      },
      "3_draw": {
        "steps": 700,
        "train": ("ar/",),
        "data": {**data, "sources": drawing},
      },
      "4_posters": {
        "steps": 300,
        "train": ("ar/",),
        "data": {**data, "sources": posters},
      },
      "5_all": {"steps": 600, "train": ("ar/",)},
      "6_anneal": {"steps": 400, "train": ("ar/",), "decay": "linear"},
    },
    "data": {**data, "sources": mixture},
    "eval_data": {
      **data,
      "shuffle": False,
      "sources": (
        _source("runs/codes/signs/validation", "generate", 0.3),
        _source("runs/codes/signs/validation", "chat", 0.3),
        _source("runs/codes/posters/validation", "generate", 0.2),
        _source("runs/codes/posters/validation", "chat", 0.2),
      ),
    },
    "report": {
      "log_every": 20,
      "eval_every": 100,
      "eval_batches": 4,
      "preview_every": 200,
    },
    "compute": {
      "dtype": "float32",
      "scan_layers": False,  # on a CPU unrolled trains 1.7 times as fast
    },
    "mesh": {"data": -1},
    "frozen_dtype": "float32",
    "architecture": model_sections("world")["architecture"],
  }
  config["optim"] |= {
    "lr": 2e-3,
    "b2": 0.98,
    "weight_decay": 0.01,
    # Half as many steps as AdamW alone needs.
    "muon": ("ar/.*/kernel",),
  }
  config["checkpoint"] |= {"every": 200, "keep_every": 0}
  config["options"] |= {"loss_chunk": 256}
  return config
