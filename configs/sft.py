"""Stage `sft`: the AR model on instructions, loss on the response only.

  xomni train --config=configs/sft.py:tiny --workdir=runs/sft \
    --config.init.model=runs/pretrain/model

goes on from configs/pretrain.py:tiny and its data: about 2 minutes on 2 CPU
cores.

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
  return _instructions(config, "data/sft/codes", "data/held_out/codes")


def _tiny():
  config = read_config(_PRETRAIN, "tiny").to_dict()
  config["phases"] = {
    "1_all": {
      "steps": 400,
      "train": ("ar/",),
      "warmup_steps": 20,
      "decay": "linear",
    }
  }
  config["optim"]["lr"] = 1e-3
  return _instructions(config, "runs/codes/train", "runs/codes/held-out")


def _instructions(config, path, held_out):
  source = {"path": path}
  config["stage"] = "sft"
  config["data"] |= {
    "prompt_dropout": 0.1,  # so that guidance has an unconditional branch
    "sources": (
      {**source, "task": "generate", "weight": 0.7},
      {**source, "task": "chat", "weight": 0.3},
    ),
  }
  config["eval_data"] |= {
    "sources": (
      {**source, "path": held_out, "task": "generate", "weight": 1.0},
    ),
  }
  return config
