"""Stage `sft`: the AR model on instructions, loss on the response only.

  xomni train --config=configs/sft.py:tiny --workdir=runs/sft \
    --config.init.model=runs/pretrain/model

goes on from configs/pretrain.py:tiny and its data: 5 minutes on 2 slow CPU
cores (--cpu-devices=auto).

  xomni train --config=configs/sft.py:7b --workdir=/mnt/runs/sft \
    --config.init.model=/mnt/runs/pretrain/model

for one slice of 256 chips (v5e:16x16 or v6e:16x16): about a day.
"""

import pathlib

from ml_collections import ConfigDict

from xomni_jax.config_files import of_size, read_config

_PRETRAIN = str(pathlib.Path(__file__).with_name("pretrain.py"))


def get_config(size: str = "7b") -> ConfigDict:
  """As `xomni_jax.train_config.TrainConfig`, whose defaults go unsaid."""
  return of_size(size, {"7b": _full, "tiny": _tiny})


def _full():
  """As pretraining, but for what follows."""
  config = read_config(_PRETRAIN, "7b").to_dict()
  config["phases"] = {
    "1_all": {
      "steps": 10_000,
      "train": ("ar/",),
      "warmup_steps": 200,
      "decay": "cosine",
      "end_scale": 0.1,
    }
  }
  config["optim"]["lr"] = 2e-5
  return _instructions(
    config,
    (
      _source("data/sft/codes", "generate", 0.7),
      _source("data/sft/codes", "chat", 0.3),
    ),
    (_source("data/held_out/codes", "generate", 1.0),),
  )


def _tiny():
  config = read_config(_PRETRAIN, "tiny").to_dict()
  codes = "runs/codes"
  config = _instructions(
    config,
    (
      _source(f"{codes}/signs/train", "generate", 0.4),
      _source(f"{codes}/signs/train", "chat", 0.2),
      # Captions too: without them they are forgotten.
      _source(f"{codes}/signs/train", "image_to_text", 0.08),
      _source(f"{codes}/posters/train", "generate", 0.2),
      _source(f"{codes}/posters/train", "chat", 0.12),
    ),
    (
      _source(f"{codes}/signs/validation", "generate", 0.5),
      _source(f"{codes}/posters/validation", "generate", 0.5),
    ),
  )
  # Answers have few tokens: beside drawing they would be learned late.
  answers = (
    _source(f"{codes}/signs/train", "chat", 0.6),
    _source(f"{codes}/posters/train", "chat", 0.2),
    _source(f"{codes}/signs/train", "generate", 0.2),
  )
  config["phases"] = {
    "1_answer": {
      "steps": 400,
      "train": ("ar/",),
      "warmup_steps": 20,
      "data": {**config["data"], "sources": answers},
    },
    "2_all": {"steps": 500, "train": ("ar/",), "decay": "linear"},
  }
  config["optim"]["lr"] = 1e-3
  return config


def _source(path, task, weight):
  return {"path": path, "task": task, "weight": weight}


def _instructions(config, sources, held_out):
  config["stage"] = "sft"
  config["data"] |= {
    "prompt_dropout": 0.1,  # so that guidance has an unconditional branch
    "sources": sources,
  }
  config["eval_data"] |= {"sources": held_out}
  return config
