"""Stage `vae`: a KL autoencoder in FLUX's layout, for worlds without FLUX's.

  xomni train --config=configs/vae.py:tiny --workdir=runs/vae

draws its data and starts from random weights: 7 minutes on 2 slow CPU
cores (--cpu-devices=auto). What it leaves in runs/vae/model is a FLUX.1-dev
folder, for configs/decoder.py.

  xomni train --config=configs/vae.py:7b --workdir=/mnt/runs/vae \
    --config.init.flux=FLUX.1-dev

goes on from FLUX's own, say on scans or screenshots: a day on one slice of 16
chips (v5e:4x4).
"""

from ml_collections import ConfigDict

from xomni_jax.config_files import model_sections, of_size, world_sources


def get_config(size: str = "7b") -> ConfigDict:
  """As `xomni_jax.train_config.TrainConfig`, whose defaults go unsaid."""
  return of_size(size, {"7b": _full, "tiny": _tiny})


def _full():
  data = {"shuffle": True, "workers": 8, "max_bad_rate": 0.01}
  return {
    "stage": "vae",
    "seed": 0,
    # A multiple of 256 chips, so that the same config runs on a pod.
    "global_batch": 256,
    "phases": {
      "1_all": {
        "steps": 50_000,
        "train": ("vae/",),
        "warmup_steps": 1000,
        "decay": "cosine",
        "end_scale": 0.05,
      },
    },
    "data": {**data, "sources": ({"path": "data/images", "task": "image"},)},
    "eval_data": {
      **data,
      "shuffle": False,
      "sources": ({"path": "data/held_out", "task": "image"},),
    },
    "init": {},
    "optim": {
      "lr": 1e-4,  # 4.5e-6 an image of a batch is usual (arXiv:2112.10752)
      "ema": 0.999,
    },
    "checkpoint": {},
    "report": {
      "log_every": 20,
      "eval_every": 1000,
      "eval_batches": 8,
      "preview_every": 1000,
    },
    "compute": {
      "dtype": "bfloat16",
      "scan_layers": True,
    },
    # 84M parameters are whole on every chip.
    "mesh": {"data": -1},
    "frozen_dtype": "bfloat16",
    "options": {
      "crops": (256,),  # px, as latent diffusion's (arXiv:2112.10752)
      "l1": 1.0,
      "l2": 1.0,
      "edges": 1.0,  # keeps strokes of text sharp; chosen at the tiny size
      # Of latent diffusion: 1e-6 a nat of an image against the sum over its
      # pixels, a hundredth of which are latents.
      "kl": 1e-6,
      "fit_scale": True,
    },
    **model_sections("7b"),
  }


def _tiny():
  """Rebuilds signs and posters of the drawn world."""
  config = _full()
  data = {"shuffle": True, "workers": 0}
  phase = {
    "train": ("vae/",),
    "warmup_steps": 50,
    "decay": "cosine",
    "end_scale": 0.05,
  }
  config |= {
    "global_batch": 8,
    "phases": {
      # Many small crops: what counts is the number of steps.
      "1_crops": {**phase, "steps": 1500},
      # Norms and attention see all of an image: 28 dB before this, 38 after.
      "2_whole": {**phase, "steps": 350, "lr_scale": 0.6},
    },
    "data": {**data, "sources": world_sources("train", "image")},
    "eval_data": {
      **data,
      "shuffle": False,
      # Words that no training image shows.
      "sources": world_sources("validation", "image"),
    },
    "report": {
      "log_every": 50,
      "eval_every": 500,
      "eval_batches": 16,
      "preview_every": 500,
    },
    "compute": {
      "dtype": "float32",
      "scan_layers": False,
    },
    "frozen_dtype": "float32",
    **model_sections("world"),
  }
  config["optim"] |= {
    "lr": 2e-3,
    "ema": 0.0,
    # Half as many steps as AdamW alone needs.
    "muon": ("vae/.*(resnets|samplers|attentions).*/kernel",),
  }
  config["checkpoint"] |= {"every": 500}
  # Cells are what is learned: crops that cut them are 2 dB behind. The squared
  # error sees thin strokes from the start, the absolute one only large areas.
  config["options"] |= {"crops": (32, 96), "align": 16, "l2": 2.0}
  return config
