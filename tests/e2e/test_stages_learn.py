"""Every stage learns the drawn world, as the README's commands run them.

Figures are of held-out signs, with words that no training sign shows. In the
quick form every stage has about a minute, and the next one goes on from what
it left; `-m slow` runs the configs as they stand, 25 minutes on 2 CPU cores.
Given another sign's codes, a language model as good as the tokenizer's gets
0.51 of the answers' tokens: what is in every caption, and the ends of answers.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.train_runs import ROOT

# {stage: settings} of the quick form, beside those of `_once`.
QUICK = {
  "vae": ("phases.1_all.steps=400",),
  "tokenizer": (
    "phases.1_all.steps=350",
    "options.quantise_from=150",
    "options.revive_until=300",
  ),
  "pretrain": (
    "phases.1_vision.steps=40",
    "phases.2_all.steps=110",
    "phases.3_anneal.steps=30",
  ),
  "sft": ("phases.1_all.steps=40",),
  "decoder": ("phases.1_all.steps=220",),
}
# What a stage starts from.
STARTS = {
  "vae": {},
  "tokenizer": {},
  "pretrain": {"model": "tokenizer"},
  "sft": {"model": "pretrain"},
  "decoder": {"model": "tokenizer", "flux": "vae"},
}
SIGNS = {"quick": (3000, 300), "whole": (20_000, 2000)}  # that become codes


def _once(steps):
  """One evaluation, checkpoint and picture, at the end."""
  return (
    f"report.eval_every={steps}",
    f"report.preview_every={steps}",
    f"checkpoint.every={steps}",
  )


def command(folder, *argv):
  """`xomni ...` in a folder."""
  # Tests compile with fewer optimisations; training needs them all.
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  env |= {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "default"}
  env["PYTHONPATH"] = str(ROOT)
  argv = [sys.executable, "-m", "xomni_jax", *map(str, argv)]
  subprocess.run(argv, cwd=folder, env=env, check=True)


class Chain:
  """Runs the stages in a folder, each once, when they are asked for."""

  def __init__(self, level, folder):
    self.level, self._folder = level, folder

  def held_out(self, stage):
    """The last held-out metrics of a stage."""
    workdir = self._folder / "runs" / stage
    if not workdir.exists():
      self._run(stage)
    assert list((workdir / "pictures").glob("samples-*.png"))
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
      for name, value in json.loads(line).items():
        if name.startswith("held_out/"):
          found[name.removeprefix("held_out/")] = value
    return found

  def _run(self, stage):
    settings = [f"init.{n}=runs/{s}/model" for n, s in STARTS[stage].items()]
    for needed in STARTS[stage].values():
      self.held_out(needed)
    if stage == "pretrain":
      self._make_codes()
    if self.level == "quick":
      quick = QUICK[stage]
      steps = sum(int(s.split("=")[1]) for s in quick if ".steps=" in s)
      settings += [*quick, *_once(steps)]
    command(
      self._folder,
      "train",
      f"--config={ROOT}/configs/{stage}.py:tiny",
      f"--workdir=runs/{stage}",
      *(f"--config.{setting}" for setting in settings),
    )

  def _make_codes(self):
    splits = zip(("train", "held-out"), SIGNS[self.level], strict=True)
    for split, count in splits:
      command(
        self._folder,
        *("tokenize-dataset", "--model", "runs/tokenizer/model"),
        *("--source", f"world:signs:{split}", "--count", count),
        *("--out", f"runs/codes/{split}"),
      )


@pytest.fixture(
  scope="module",
  params=["quick", pytest.param("whole", marks=pytest.mark.slow)],
)
def chain(request, tmp_path_factory):
  """The stages at one of two levels."""
  return Chain(request.param, tmp_path_factory.mktemp(request.param))


def test_vae_rebuilds_signs(chain):
  metrics = chain.held_out("vae")
  assert metrics["psnr_db"] > {"quick": 16.5, "whole": 22.0}[chain.level]


def test_tokenizer_reads_through_its_codes(chain):
  metrics = chain.held_out("tokenizer")
  quick = chain.level == "quick"
  assert metrics["answer_accuracy"] > (0.58 if quick else 0.95)
  # Of 512, in a batch of 576 cells.
  assert metrics["vq/codes_used"] > (60 if quick else 200)


def test_pretraining_predicts_codes_of_unseen_signs(chain):
  metrics = chain.held_out("pretrain")
  assert metrics["image_loss"] < {"quick": 1.3, "whole": 0.1}[chain.level]
  assert metrics["image_accuracy"] > {"quick": 0.6, "whole": 0.96}[chain.level]


def test_sft_keeps_what_pretraining_learned(chain):
  metrics = chain.held_out("sft")
  assert metrics["image_loss"] < {"quick": 1.3, "whole": 0.08}[chain.level]


def test_decoder_paints_codes(chain):
  """Velocity loss; 1 is what predicting nothing gets, and noise more."""
  metrics = chain.held_out("decoder")
  assert metrics["loss"] < {"quick": 0.4, "whole": 0.06}[chain.level]
