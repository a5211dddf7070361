"""GRPO raises what real OCR, in a running sidecar, says of drawn signs."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests import train_runs as runs
from tests.sidecar_client import TOKEN, served
from xomni_jax.data import prompts

pytest.importorskip("fastapi", reason="needs fastapi and uvicorn")
pytest.importorskip("uvicorn", reason="needs fastapi and uvicorn")

STEPS, SIGNS = 40, 8
SIDECAR = (
  *("xomni_jax.sidecar", "--config", "configs/sidecar.py", "--app", "ocr"),
  *("--no-ray", "--set", "port=0", "--set", "settings.spaces=False"),
)


def train(config, workdir, *settings):
  """`xomni train`, compiled with all optimisations, unlike in other tests."""
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  argv = runs.arguments(config, workdir, *(f"--config.{s}" for s in settings))
  command = [sys.executable, "-m", "xomni_jax", *argv]
  env |= {"JAX_PLATFORMS": "cpu"}
  subprocess.run(command, cwd=runs.ROOT, env=env, check=True)


@pytest.mark.slow
def test_reward_of_an_ocr_sidecar_rises(tmp_path, monkeypatch):
  """Eight signs, drawn so hot that the model before RL errs at often."""
  monkeypatch.setenv("XOMNI_SIDECAR_TOKEN", TOKEN)
  known = prompts.open_prompts("world:signs:test")
  file = tmp_path / "prompts.jsonl"
  lines = [
    {"prompt": p.text, "targets": list(p.targets), "lang": p.lang}
    for p in (known[i] for i in range(SIGNS))
  ]
  file.write_text("".join(json.dumps(line) + "\n" for line in lines))
  with served(SIDECAR) as url:
    reward = {"name": "ocr", "source": url, "deadline": 60.0}
    reward["token_env"] = "XOMNI_SIDECAR_TOKEN"
    config = tmp_path / "run.py"
    config.write_text(
      "from xomni_jax.config_files import read_config\n"
      "def get_config(size=None):\n"
      f"  config = read_config({str(runs.ROOT / 'configs/grpo.py')!r}, 'tiny')\n"
      f"  config.data.sources = ({{'path': {str(file)!r}, 'task': 'prompt'}},)\n"
      f"  config.options.rewards = ({reward!r},)\n"
      "  return config\n"
    )
    train(
      config,
      tmp_path / "run",
      "init.model=tiny-sft",
      "init.flux=tiny-sft",
      f"phases.1_all.steps={STEPS}",
      "optim.lr=3e-4",
      "options.beta=0.0",
      "options.temperature=1.4",
      "report.eval_every=0",
      "report.preview_every=20",
    )
  found = runs.metrics(tmp_path / "run")
  rewards = np.array([m["reward/ocr"] for m in found])
  assert len(rewards) == STEPS
  assert all(m["reward/ocr_failed"] == 0 for m in found)
  # A step's mean is of 64 images of deviation 0.3 at most: 0.04; of ten, 0.012.
  assert rewards[-10:].mean() > rewards[:5].mean() + 0.06
  assert list((tmp_path / "run" / "pictures").glob("curves-*.png"))
