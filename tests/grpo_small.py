"""Small runs of stage `grpo` in this process, on the golden checkpoint.

Rewards are functions of the codes: what is painted is their numbers.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import GOLDEN
from xomni_jax.inference import painter
from xomni_jax.rewards import wire
from xomni_jax.training import build, configure, loop, rewarding

WANTED = 7  # a code


def settings(**changes):
  """The tiny config on the golden checkpoint: 32 images of 2 x 3 codes."""
  config = configure.read("configs/grpo.py:tiny")
  sizes = configure.read("configs/model.py:tiny").to_dict()
  config.architecture = {k: sizes[k] for k in config.architecture}
  signs = {"path": "world:signs", "task": "prompt"}
  config.data.sources = config.eval_data.sources = (signs,)
  configure.override(
    config,
    [
      "global_batch=32",
      f"init.model={GOLDEN / 'xomni'}",
      f"init.flux={GOLDEN / 'flux1'}",
      "options.sizes=((32, 48),)",
      "options.prompt_len=80",
      "report.eval_every=0",
      "report.preview_every=0",
      "checkpoint.every=1000",
      "checkpoint.export=False",
      "phases.1_all.warmup_steps=0",
      "phases.1_all.decay=constant",
      *(f"{k.replace('__', '.')}={v}" for k, v in changes.items()),
    ],
  )
  return config


def share_of(code):
  """A scorer: the share of a code in an image of codes."""

  def scorer(items):
    return [
      wire.Score(i.id, True, float((i.image[..., 0] == code).mean()))
      for i in items
    ]

  return scorer


@pytest.fixture
def codes_as_images(monkeypatch):
  """Paints code c as the pixel (c, c, c)."""

  def paint_rows(parts, codes, *args, grid, **kwargs):
    pixels = codes.astype(np.uint8).reshape(-1, *grid, 1)
    return jnp.repeat(pixels, 3, axis=-1)

  monkeypatch.setattr(painter, "paint_rows", paint_rows)


def train(config, workdir, monkeypatch, scorer):
  """Metrics of each step of a run in this process."""
  monkeypatch.setattr(rewarding, "open_scorer", lambda *args: scorer)
  cfg, arch = configure.parse(config, "test")
  stage = build.stage(cfg, arch, config, workdir)
  status = loop.train(cfg, stage, workdir, settings=config.to_dict())
  assert status == 0
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]
