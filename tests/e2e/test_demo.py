"""The demo, as a newcomer runs it, but for the number of steps."""

import os
import re
import subprocess
import sys

from PIL import Image

from tests.train_runs import ROOT


def test_demo_page_holds_every_part(tmp_path):
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  command = [sys.executable, "-m", "xomni_jax", "demo", "--out", tmp_path]
  own = 'A blue sign that says "HELLO" & more.'
  done = subprocess.run(
    [*command, "--steps", "2", "--prompt", own],
    env=env,
    capture_output=True,
    text=True,
    check=True,
  )
  assert re.search(r"reward 0\.\d{3} before, 0\.\d{3} after", done.stdout)
  page = (tmp_path / "index.html").read_text()
  # Codes and three images of each prompt, the curves, six images asked about.
  assert page.count("<img") == 4 * (12 + 6 + 1) + 1 + 6
  assert "says &quot;HELLO&quot; &amp; more." in page
  with Image.open(tmp_path / "drawings.png") as drawings:
    assert drawings.width > 6 * 128  # posters are 128 px wide
  for heading in ("Signs and", "Reinforcement", "Answers", "What", "Timings"):
    assert f"<h2>{heading}" in page
