"""A training step on eight fake devices equals one device's.

One process (train_eight.py) computes it all; the tests here judge its facts.
"""

import json
import os
import subprocess
import sys

import pytest

from tests import helpers
from tests.multidevice.train_eight import RUNS, compared

DEVICES = "--xla_force_host_platform_device_count=8"
OTHERS = [name for name in RUNS if name != compared(name)]


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
  """What train_eight.py wrote."""
  out = tmp_path_factory.mktemp("train_eight")
  flags = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()
  run = subprocess.run(
    [sys.executable, "-m", "tests.multidevice.train_eight", str(out)],
    cwd=helpers.GOLDEN.parents[2],
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    capture_output=True,
    text=True,
    timeout=1200,
  )
  assert run.returncode == 0, run.stderr[-3000:]
  return json.loads((out / "facts.json").read_text())


@pytest.mark.parametrize("name", OTHERS)
def test_losses_and_gradients_equal_one_device(facts, name):
  for ours, theirs in zip(
    facts[name]["metrics"], facts[compared(name)]["metrics"], strict=True
  ):
    for key in theirs:
      # f32 sums in another order, of losses of order ten. The greatest ratio
      # is one token's: the rounding of its log-prob is its own relative error.
      rel = 1e-5 if key == "ratio_off_max" else 2e-6
      near = pytest.approx(theirs[key], abs=2e-5, rel=rel)
      assert ours[key] == near, (name, key)


@pytest.mark.parametrize("name", OTHERS)
def test_parameters_after_steps_equal_one_device(facts, name):
  # Adam divides by the size of a gradient, so that the smallest gradients'
  # rounding shows; two steps of 1e-2 move a parameter by about 2e-2.
  assert facts[name]["params"] < 5e-4


def test_a_step_is_compiled_once(facts):
  assert {name: f["programs"] for name, f in facts.items()} == dict.fromkeys(
    facts, 1
  )


def test_parameters_are_split_over_fsdp_and_tensor(facts):
  # Of q_proj [3, 64, 4, 16]: embed over fsdp, heads over tensor.
  shard = lambda name: facts[name]["shard"]["ar/lm/q_proj/kernel"]
  assert shard("fsdp") == [3, 8, 4, 16]
  assert shard("fsdp_tensor") == [3, 32, 2, 16]
  assert shard("context") == [3, 64, 4, 16]
  # Of lm_head [448, 64]: vocabulary over tensor, embed over fsdp.
  assert facts["fsdp_tensor"]["shard"]["ar/lm_head"] == [224, 32]
