"""The tiny tokenizer learns to read signs through its codes.

Figures are of held-out signs, with words that no training sign shows. Given
another sign's codes, a language model as good as these gets 0.51 of the
answers' tokens: what is in every caption, and the ends of answers.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.train_runs import ROOT


def held_out(workdir, *settings):
  """The last held-out metrics of a run of the real command."""
  # Tests compile with fewer optimisations; training needs them all.
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  env |= {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "default"}
  subprocess.run(
    [
      *(sys.executable, "-m", "xomni_jax", "train"),
      *("--config=configs/tokenizer.py:tiny", f"--workdir={workdir}"),
      *(f"--config.{setting}" for setting in settings),
    ],
    cwd=ROOT,
    env=env,
    check=True,
  )
  found = {}
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    values = json.loads(line)
    found |= {k: v for k, v in values.items() if k.startswith("held_out/")}
  return found


def test_tokenizer_begins_to_read(tmp_path):
  """350 steps, about a minute: colours and shapes, and some characters."""
  metrics = held_out(
    tmp_path / "run",
    "phases.1_all.steps=350",
    "options.quantise_from=150",
    "options.revive_until=300",
    "report.eval_every=350",
    "report.preview_every=0",
    "checkpoint.every=350",
    "checkpoint.export=False",
  )
  assert metrics["held_out/answer_accuracy"] > 0.58
  assert metrics["held_out/vq/codes_used"] > 60  # of 576 cells in a batch


@pytest.mark.slow
def test_tokenizer_reads(tmp_path):
  """The config as it stands."""
  metrics = held_out(tmp_path / "run")
  assert metrics["held_out/answer_accuracy"] >= 0.9
  assert metrics["held_out/vq/codes_used"] > 128
