"""Eight fake CPU devices compute what one does.

One process (run_eight.py) computes it all; the tests here judge its results
against the golden values, which one device matches too.
"""

import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest

from tests import helpers
from tests.multidevice.run_eight import ALL_AXES, RUNS

DEVICES = "--xla_force_host_platform_device_count=8"
CASES = [(sizes, *run[:2]) for sizes, runs in RUNS.items() for run in runs]
# f32, of logits of order ten: other devices add up in another order. Seen is
# 1e-5; a shard in a wrong place gives differences of order one.
LOGITS = 2e-4


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
  """What run_eight.py wrote: arrays and facts."""
  out = tmp_path_factory.mktemp("eight")
  flags = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()
  run = subprocess.run(
    [sys.executable, "-m", "tests.multidevice.run_eight", str(out)],
    cwd=helpers.GOLDEN.parents[2],
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert run.returncode == 0, run.stderr[-3000:]
  facts = json.loads((out / "facts.json").read_text())
  assert facts["devices"] == 8
  return types.SimpleNamespace(arrays=np.load(out / "arrays.npz"), facts=facts)


def test_parameters_are_split_over_the_axes_of_the_table(eight):
  ar, flux = (eight.facts[f"{ALL_AXES}/{n}/shards"] for n in ("ar", "flux"))
  # [layers, embed, heads, head_dim]: embed over fsdp, heads over tensor.
  assert ar["lm/q_proj/kernel"] == [[3, 64, 4, 16], [3, 32, 2, 16], 4]
  assert ar["lm/down_proj/kernel"] == [[3, 160, 64], [3, 80, 32], 4]
  assert ar["lm_head"] == [[448, 64], [224, 32], 4]
  assert ar["lm_norm/scale"] == [[64], [64], 1]
  assert flux["double/ff_in/kernel"] == [[2, 48, 192], [2, 24, 96], 4]
  size = lambda i: sum(np.prod(leaf[i]) for leaf in ar.values())
  # A quarter, but for norms; data replicates, for each of its two values.
  assert size(1) < 0.26 * size(0)


def test_axes_that_do_not_divide_are_whole_and_listed(eight):
  flux = eight.facts[f"{ALL_AXES}/flux/shards"]
  # 3 heads over 2: every device has all of them; embed is split all the same.
  assert flux["double/to_q/kernel"] == [[2, 48, 3, 16], [2, 24, 3, 16], 2]
  listed = eight.facts[f"{ALL_AXES}/flux/replicated"]
  assert "double/to_q/kernel (heads 3 over 2)" in listed
  assert {line.split(" (")[1] for line in listed} == {"heads 3 over 2)"}
  assert eight.facts[f"{ALL_AXES}/ar/replicated"] == []
  listed = eight.facts["tensor=4/ar/replicated"]
  assert "lm/k_proj/kernel (kv_heads 2 over 4)" in listed
  assert not [line for line in listed if "q_proj" in line]


@pytest.mark.parametrize("sizes", RUNS)
def test_logits_equal_one_device(eight, golden, sizes):
  ours = eight.arrays[f"{sizes}/logits"][..., :448]
  theirs = golden["ar/batch/logits_text"][..., :448]
  real = golden["ar/batch/attention_mask"] == 1
  assert helpers.max_difference(ours[real], theirs[real]) < LOGITS


@pytest.mark.parametrize(("sizes", "run", "count"), CASES)
def test_greedy_codes_equal_one_device(eight, golden, sizes, run, count):
  drawn = {
    name: eight.arrays[f"{sizes}/{run}/{name}"]
    for name in ("codes", "raw_logprobs")
  }
  repeat = lambda name: np.repeat(golden[f"gen/{run}/{name}"], count, axis=0)
  codes = repeat("new_tokens").reshape(-1, 4, 5) - 448
  np.testing.assert_array_equal(drawn["codes"], codes)
  assert helpers.max_difference(drawn["raw_logprobs"],
                                repeat("logprobs")) < LOGITS  # fmt: skip


def test_decoded_image_equals_one_device(eight, golden):
  # One level: rounding to 8 bits may tip.
  ours = eight.arrays["image"]
  assert helpers.max_difference(ours, golden["pipe/square/image_u8"]) <= 1


def test_loops_are_compiled_once(eight):
  # A state or latents laid out otherwise than they came would be a new program
  # at the second step.
  programs = {k: v for k, v in eight.facts.items() if k.endswith("/programs")}
  for where, counts in programs.items():
    loop = "euler_step" if "/decode/" in where else "image_steps"
    assert counts[loop] == 1, (where, counts)
  assert len(programs) == len(CASES) + 1


def test_stacks_made_on_devices_equal_those_made_on_the_host(eight):
  assert eight.facts["load"] == []
