"""The models that come with the package draw and read what they should."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import xomni_jax
from tests.train_runs import ROOT
from xomni_jax import cli
from xomni_jax.data import encoder_ids, prompts
from xomni_jax.data.world import open_world
from xomni_jax.evals import answers, measure
from xomni_jax.inference import shipped
from xomni_jax.rewards import ocr, wire

SIZE = (96, 96)
COUNT = 48


@pytest.fixture(scope="module", params=shipped.NAMES)
def model(request):
  """Each model, by its name."""
  return request.param, xomni_jax.load(request.param)


@pytest.fixture(scope="module")
def score():
  """OCR of signs and posters, whose letters stand far apart."""
  return ocr.make_scorer(ocr.open_engine("rapidocr", 2), spaces=False)


def _scores(model, score, level, count):
  known = prompts.open_prompts(f"world:{level}:test")
  asked = [known[i] for i in range(count)]
  size = asked[0].size or SIZE
  made = model.generate([p.text for p in asked], size, seed=0, batch_size=count)
  items = [
    wire.Item(p.key, np.asarray(image), p.text, p.targets, p.lang)
    for p, image in zip(asked, made.images, strict=True)
  ]
  return np.array([s.score for s in score(items)])


def test_shipped_models_write_words_they_never_saw(model, score):
  name, model = model
  exact = np.mean(_scores(model, score, "signs", COUNT) == 1)
  assert exact > {"tiny": 0.85, "tiny-sft": 0.7}[name]


def test_shipped_models_write_posters(model, score):
  _, model = model
  assert np.mean(_scores(model, score, "posters", 16)) > 0.93


def test_shipped_models_answer_about_words_they_never_saw(model):
  _, model = model
  with measure.progress(COUNT) as bar:
    found = answers.measure(model, "world:signs:test", COUNT, COUNT, bar)
  assert found["What does it say?"].mean() > 0.9
  assert found["What colour is it?"].mean() > 0.95


def test_shipped_models_share_what_rl_does_not_touch():
  one, other = (xomni_jax.load(name) for name in shipped.NAMES)
  for part, params in one.params.items():
    if part != "ar":
      assert _equal(params, other.params[part]), part
  # Texts pass these by: both models read alike.
  drawing = {"vision_out", "mm_norm", "mm_head"}
  for name, params in one.params["ar"].items():
    same = _equal(params, other.params["ar"][name])
    assert same != (name in drawing), name
  files = list(shipped.ROOT.rglob("*.safetensors"))
  assert len(files) == 8
  assert sum(p.stat().st_size for p in shipped.ROOT.rglob("*")) < 40e6


def test_shipped_decoder_reads_prompts_to_their_end():
  """Colours often come last; a poster's were cut off once."""
  folder = shipped.find("tiny").flux1 / "tokenizer_2"
  ids = encoder_ids.load_t5_tokenizer(folder)
  for level in ("signs", "posters"):
    world = open_world(level, "test")
    rows = ids([world.prompt(i) for i in range(1000)])
    assert (rows == 1).any(axis=1).all(), level  # </s> is there


def test_folder_called_like_a_shipped_model_is_no_shipped_model():
  assert shipped.find("tiny") is not None
  for name in ("./tiny", pathlib.Path("tiny"), pathlib.Path("./tiny-sft")):
    assert shipped.find(name) is None


def test_generate_and_chat_need_no_model_named(tmp_path, capsys):
  out = tmp_path / "sign.png"
  prompt = 'A yellow sign that says "OPEN 24" in blue.'
  argv = ["generate", "--prompt", prompt, "--output-path", str(out)]
  assert cli.main(argv) == 0
  assert Image.open(out).size == SIZE
  argv = ["chat", "--image-path", str(out), "--prompt", "What does it say?"]
  capsys.readouterr()
  assert cli.main(argv) == 0
  assert capsys.readouterr().out.strip()


def test_shipped_models_need_no_torch():
  code = (
    "import sys, xomni_jax; m = xomni_jax.load('tiny');"
    "m.generate(['A red sign.'], (96, 96)); assert 'torch' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def _equal(one, other):
  import jax

  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  return all(np.array_equal(a, b) for a, b in pairs)
