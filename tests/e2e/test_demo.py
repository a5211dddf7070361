"""The demo, as a newcomer runs it; in its short form it learns for two steps."""

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


def test_run_of_another_length_is_told_at_once(tmp_path):
  folder = tmp_path / "grpo" / "checkpoints"
  run_config.save_config(folder, {"phases": {"1_all": {"steps": 40}}})
  with pytest.raises(InputError, match=r"--steps is 3, .* give --steps 40"):
    demo.main(["--steps", "3", "--out", str(tmp_path)])


# The demo as it is takes minutes.
@pytest.mark.parametrize(
  "steps", [2, pytest.param(None, marks=pytest.mark.slow)]
)
def test_demo_page_holds_every_part(tmp_path, steps):
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  command = [sys.executable, "-m", "xomni_jax", "demo", "--out", tmp_path]
  command += ["--steps", str(steps)] if steps else []
  for prompt in OWN:
    command += ["--prompt", prompt]
  done = subprocess.run(
    command, env=env, capture_output=True, text=True, check=True
  )
  before, after = map(
    float,
    re.search(
      r"reward of signs (0\.\d{3}) before, (0\.\d{3}) after", done.stdout
    ).groups(),
  )
  assert steps or after > before
  page = (tmp_path / "index.html").read_text()
  # Codes and three images of each prompt, the curves, six images asked about.
  assert page.count("<img") == 4 * (12 + 6 + len(OWN)) + 1 + 6
  assert "A red sign &amp; no more." in page
  # The shipped model writes what it is asked for; OCR looks for what is quoted.
  assert 'shipped: <span class="good">hello (1.00)' in page.lower()
  assert '<span class="good">one / two / three / four (1.00)' in page.lower()
  assert page.count("nothing in quotes") == 3
  with Image.open(tmp_path / "drawings.png") as drawings:
    assert drawings.width > 6 * 128  # posters are 128 px wide
  for heading in ("Signs and", "Reinforcement", "Answers", "What", "Timings"):
    assert f"<h2>{heading}" in page
