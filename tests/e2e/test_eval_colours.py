"""`xomni eval colours` from models to figures.

The model is the golden checkpoint, whose images are noise.
"""

import json
import weakref

import pytest
from PIL import Image

from tests.helpers import GOLDEN
from xomni_jax import cli
from xomni_jax.errors import InputError
from xomni_jax.evals import command

pytest.importorskip("rapidocr")

NOISE = str(GOLDEN / "xomni")
MODELS = ("--sft", NOISE, "--rl", NOISE, "--flux", str(GOLDEN / "flux1"))


def test_colours_hold_one_model_at_a_time(tmp_path, monkeypatch):
  alive = []

  def load(name, flux):
    assert not [x for x in alive if x() is not None]
    model = type("Model", (), {})()
    alive.append(weakref.ref(model))
    return model

  def look(wanted, some, drawer, batch, bar):
    for name in ("sft", "sft", "rl"):
      drawer(name)
    raise InputError("seen")

  monkeypatch.setattr(command.loading, "load", load)
  monkeypatch.setattr(command.drawing, "Drawer", lambda model, *_: model)
  monkeypatch.setattr(command.colours, "look", look)
  argv = ["eval", "colours", *MODELS, "--count", "2", "--out", str(tmp_path)]
  assert cli.main(argv) == 2
  assert len(alive) == 2


def test_colours_from_models_to_figures(tmp_path, capsys):
  how = ["--count", "5", "--steps", "1", "--batch", "4"]
  out = ["--out", str(tmp_path)]
  assert cli.main(["eval", "colours", *MODELS, *how, *out]) == 0
  figures = json.loads((tmp_path / "colours.json").read_text())
  right = {n: of["all"]["all"] for n, of in figures["right"].items()}
  assert right["true drawings"][0] == 1 and right["true drawings"][3] == 5
  assert right["rl T=1"][0] < 1  # noise has no colours
  sheet = tmp_path / "sheets" / "colours" / "rl-t-1.png"
  said = capsys.readouterr().out
  assert "rl T=1: 0." in said and str(sheet) in said
  with Image.open(sheet) as page:
    assert page.width > 96


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--source", "world:signs-zh:test"], "name colours in English"),
    (["--source", "prompts.jsonl"], "name colours in English"),
    (["--batch", "0"], "--batch is 0, expected 1 or more"),
    (["--count", "0"], "expected 1 to"),
    (["--rl", "nowhere"], "nowhere"),
  ],
)
def test_colours_say_what_is_wrong(flags, words, tmp_path, capsys):
  models = ["--sft", "tiny-sft", "--rl", "tiny", "--out", str(tmp_path / "x")]
  assert cli.main(["eval", "colours", *models, *flags]) == 2
  err = capsys.readouterr().err
  assert words in err and len(err.splitlines()) == 1
  assert not (tmp_path / "x").exists()
