"""The demo; in its short form it draws less, and learns for two steps."""

import os
import re
import subprocess
import sys

import pytest
from PIL import Image

from tests.train_runs import ROOT
from xomni_jax import demo
from xomni_jax.checkpoints import run_config
from xomni_jax.errors import InputError

OWN = (
  'A blue sign that says "HELLO".',
  'A white poster with the lines "ONE", "TWO", "THREE", "FOUR" in black.',
  "A red sign & no more.",
)
PROMPTS = [part for prompt in OWN for part in ("--prompt", prompt)]
LEVELS = demo._LEVELS


def test_run_of_another_length_is_told_at_once(tmp_path):
  folder = tmp_path / "grpo" / "checkpoints"
  run_config.save_config(folder, {"phases": {"1_all": {"steps": 40}}})
  demo._check_steps(folder.parent, 3)  # nothing was learned yet
  (folder / "40").mkdir()
  with pytest.raises(InputError, match=r"--steps is 3, .* give --steps 40"):
    demo.main(["--steps", "3", "--out", str(tmp_path)])


def test_demo_page_holds_every_part(tmp_path, monkeypatch):
  # As many are drawn as are shown: means over more take minutes.
  few = {k: (shown, shown, asked) for k, (_, shown, asked) in LEVELS.items()}
  monkeypatch.setattr(demo, "_LEVELS", few)
  monkeypatch.setattr(demo.signal, "signal", lambda *_: None)
  monkeypatch.delenv("XLA_FLAGS", raising=False)  # of the run that learns
  assert demo.main(["--out", str(tmp_path), "--steps", "2", *PROMPTS]) == 0
  _check_page(tmp_path)


@pytest.mark.slow
def test_demo_learns_as_a_newcomer_runs_it(tmp_path):
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    [sys.executable, "-m", "xomni_jax", "demo", "--out", tmp_path, *PROMPTS],
    env=env,
    capture_output=True,
    text=True,
    check=True,
  )
  said = r"reward of signs (0\.\d{3}) before, (0\.\d{3}) after"
  before, after = map(float, re.search(said, done.stdout).groups())
  assert after > before
  _check_page(tmp_path)


def _check_page(folder):
  page = (folder / "index.html").read_text()
  # Codes and three images of each prompt, the curves, six images asked about.
  assert page.count("<img") == 4 * (12 + 6 + len(OWN)) + 1 + 6
  assert "A red sign &amp; no more." in page
  # The shipped model writes what it is asked for; OCR looks for what is quoted.
  assert 'shipped: <span class="good">hello (1.00)' in page.lower()
  assert '<span class="good">one / two / three / four (1.00)' in page.lower()
  assert page.count("nothing in quotes") == 3
  with Image.open(folder / "drawings.png") as drawings:
    assert drawings.width > 6 * 128  # posters are 128 px wide
  for heading in (
    *("Your prompts", "Signs and", "Reinforcement", "Answers", "What"),
    "Timings",
  ):
    assert f"<h2>{heading}" in page
  # No word of them is promised to be new.
  assert page.rindex("A red sign &amp;") < page.index("<h2>Signs and")
