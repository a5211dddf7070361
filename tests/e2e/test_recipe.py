"""The recipe: every stage learns the drawn world and the next goes on from it.

Figures are of signs and posters with words that no training image shows. The
quick form gives every stage half a minute: losses are to be well below what
knowing nothing gets, no more. `-m slow` runs the configs as they stand, one
to two hours on 2 CPU cores. Given another sign's codes, a language model as
good as the tokenizer's gets 0.51 of the answers' tokens: what is in every
caption, and the ends of answers.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

import xomni_jax
from tests.train_runs import ROOT
from xomni_jax.data import world
from xomni_jax.inference import shipped
from xomni_jax.recipe import jobs

LEVELS = ["quick", pytest.param("whole", marks=pytest.mark.slow)]


def start(folder, *argv):
  """`xomni recipe` in a process group of its own."""
  # Tests compile with fewer optimisations; training needs them all.
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  env |= {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "default"}
  env["PYTHONPATH"] = str(ROOT)
  return subprocess.Popen(
    [sys.executable, "-m", "xomni_jax", "recipe", "--out", folder, *argv],
    env=env,
    start_new_session=True,
  )


def stop_at(process, path, text, how, times=1):
  """Stops a recipe once a file has a text so often; returns its exit status."""
  while process.poll() is None:
    if path.exists() and path.read_text().count(text) >= times:
      if how == signal.SIGKILL:
        os.killpg(process.pid, how)  # its stage too
      else:
        process.send_signal(how)
      break
    time.sleep(0.2)
  return process.wait()


@pytest.fixture(scope="module", params=LEVELS)
def recipe(request, tmp_path_factory):
  """(level, runs/) of a recipe that was killed in its first stage and told to
  stop in its second."""
  out = tmp_path_factory.mktemp(request.param)
  flags = ["--quick"] if request.param == "quick" else []
  vae, tokenizer = (
    out / "runs" / stage / "metrics.jsonl" for stage in ("vae", "tokenizer")
  )
  begun = vae.with_name("parameters.txt")
  killed = stop_at(start(out, *flags), begun, "vae/", signal.SIGKILL)
  assert killed == -signal.SIGKILL
  told = stop_at(start(out, *flags), tokenizer, '"step": 20,', signal.SIGTERM)
  assert told == 143
  log, before = out / "runs" / "recipe.log", vae.stat().st_mtime_ns
  assert start(out, *flags).wait() == 0
  assert vae.stat().st_mtime_ns == before
  again = (
    log.read_text().rpartition("] tokenizer\n")[2].partition("] decoder\n")
  )
  assert "resumed at step" in again[0]
  return request.param, out / "runs"


def held_out(runs, stage):
  """The last held-out metrics of a stage."""
  assert list((runs / stage / "pictures").glob("samples-*.png"))
  found = {}
  for line in (runs / stage / "metrics.jsonl").read_text().splitlines():
    for name, value in json.loads(line).items():
      if name.startswith("held_out/"):
        found[name.removeprefix("held_out/")] = value
  return found


def test_vae_rebuilds_signs(recipe):
  level, runs = recipe
  metrics = held_out(runs, "vae")
  assert metrics["psnr_db"] > {"quick": 15.0, "whole": 37.0}[level]


def test_tokenizer_reads_through_its_codes(recipe):
  level, runs = recipe
  metrics = held_out(runs, "tokenizer")
  quick = level == "quick"
  assert metrics["answer_accuracy"] > (0.4 if quick else 0.92)
  # Of 512, in a batch of 576 cells.
  assert metrics["vq/codes_used"] > (30 if quick else 100)


def test_pretraining_predicts_codes_of_unseen_signs(recipe):
  level, runs = recipe
  metrics = held_out(runs, "pretrain")
  assert metrics["image_loss"] < {"quick": 1.4, "whole": 0.1}[level]
  assert metrics["image_accuracy"] > {"quick": 0.6, "whole": 0.96}[level]


def test_sft_keeps_what_pretraining_learned(recipe):
  level, runs = recipe
  metrics = held_out(runs, "sft")
  assert metrics["image_loss"] < {"quick": 1.4, "whole": 0.06}[level]


def test_decoder_paints_codes(recipe):
  """Velocity loss; 1 is what predicting nothing gets, and noise more."""
  level, runs = recipe
  metrics = held_out(runs, "decoder")
  assert metrics["loss"] < {"quick": 0.85, "whole": 0.07}[level]


def test_recipe_leaves_a_model_before_and_after_rl(recipe, monkeypatch):
  _, runs = recipe
  monkeypatch.setattr(shipped, "ROOT", runs / "tiny")
  prompt = world.open_world("signs", "held-out").prompt(0)
  made = {}
  for name in shipped.NAMES:
    model = xomni_jax.load(name)
    made[name] = model.generate([prompt], (96, 96), seed=0)
    assert made[name].images[0].size == (96, 96)
    answer = model.chat(made[name].images[0], "What does the sign say?")
    assert isinstance(answer, str)
  tiny, sft = (made[n].logprobs for n in shipped.NAMES)
  assert np.abs(tiny - sft).max() > 0
  files = [load_file(path) for path in weights(runs / "tiny")]
  dtypes = {x.dtype.name for file in files for x in file.values()}
  assert dtypes == {"bfloat16"}
  size = sum(p.stat().st_size for p in (runs / "tiny").rglob("*"))
  assert size < 40e6


def test_recipe_done_does_nothing(recipe):
  level, runs = recipe
  flags = ["--quick"] if level == "quick" else []
  before = {p: p.stat().st_mtime_ns for p in runs.rglob("*")}
  assert start(runs.parent, *flags).wait() == 0
  assert {p: p.stat().st_mtime_ns for p in runs.rglob("*")} == before


@pytest.mark.slow
def test_recipe_stopped_in_every_stage_gives_the_same_weights(tmp_path):
  flags = "--quick", "--seed", "3"
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  assert start(whole, *flags).wait() == 0
  for job in jobs.in_order(jobs.Wanted(quick=True, seed=3)):
    # Told to stop, a stage saves, and is killed once it has gone on. Codes have
    # no metrics: killed as they begin.
    if job.name not in jobs.STARTS:
      log, begun = parts / "runs" / "recipe.log", f"] {job.name}\n"
      killed = stop_at(start(parts, *flags), log, begun, signal.SIGKILL)
      assert killed == -signal.SIGKILL
      continue
    metrics, line = parts / "runs" / job.name / "metrics.jsonl", '"step": '
    told = stop_at(start(parts, *flags), metrics, line, signal.SIGTERM)
    assert told == 143, job.name
    more = metrics.read_text().count(line) + 1
    killed = stop_at(start(parts, *flags), metrics, line, signal.SIGKILL, more)
    # The last has two steps, and may have been told in its second.
    assert killed == -signal.SIGKILL or job.name == "grpo", job.name
  assert start(parts, *flags).wait() == 0
  one, other = (weights(folder / "runs" / "tiny") for folder in (whole, parts))
  assert len(one) == len(other) > 5
  for a, b in zip(one, other, strict=True):
    assert a.read_bytes() == b.read_bytes(), a.name


def weights(folder: pathlib.Path):
  """Files of weights, in order."""
  return sorted(folder.rglob("*.safetensors"))
