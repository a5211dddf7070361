"""A rollout and its update on many devices are those of one.

A rollout takes two steps here, so that the checkpoint of the first one holds
the codes. Rewards come from a server, to which the images have to come.
"""

import numpy as np
import pytest

from tests import grpo_runs
from tests import train_runs as runs

WAYS = {
  "one": {"count": 1, "devices": 1, "mesh": {}},
  "eight": {
    "count": 1,
    "devices": 8,
    "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
  },
  # Trained over fsdp, drawn and painted over tensor.
  "two_meshes": {
    "count": 1,
    "devices": 8,
    "mesh": {"data": 1, "fsdp": 8},
    "rollout_mesh": (("data", -1), ("tensor", 2)),
  },
  "two_processes": {
    "count": 2,
    "devices": 4,
    "mesh": {"data": 4, "fsdp": 2},
    "rollout_mesh": (("data", 4), ("tensor", 2)),
  },
}


def settings(mesh):
  return [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]


def run(folder, name, path):
  """(codes of the first rollout, metrics, images that were scored)."""
  way = WAYS[name]
  with grpo_runs.serve() as server:
    config = grpo_runs.write_config(
      folder,
      server.url,
      epochs=2,
      reward_path=path,
      rollout_mesh=way.get("rollout_mesh", ()),
    )
    results = runs.together(
      *(config, folder / name, "--config.phases.1_all.steps=2"),
      *("--config.checkpoint.every=1", *settings(way["mesh"])),
      count=way["count"],
      devices=way["devices"],
    )
    assert {r[0] for r in results} == {0}, results[0][2][-3000:]
    asked = sorted(map(int, server.asked))
  state = runs.state(folder / name, 1)
  drawn = {
    k.rsplit("/", 1)[1]: x for k, x in state.items() if "extra/current/" in k
  }
  return drawn, runs.metrics(folder / name), asked


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  return run(tmp_path_factory.mktemp("one"), "one", "host")


@pytest.mark.parametrize(
  ("name", "path"),
  [
    ("two_meshes", "host"),
    pytest.param("eight", "host", marks=pytest.mark.slow),
    pytest.param("eight", "fused", marks=pytest.mark.slow),
    pytest.param("two_processes", "host", marks=pytest.mark.slow),
    pytest.param("two_processes", "fused", marks=pytest.mark.slow),
  ],
)
def test_rollout_and_update_are_those_of_one_device(
  alone, tmp_path, name, path
):
  drawn, metrics, asked = run(tmp_path, name, path)
  theirs, their_metrics, their_asked = alone
  assert asked == their_asked == list(range(8))  # each image once
  for key in ("codes", "tokens", "valid", "mask"):
    assert (drawn[key] == theirs[key]).all(), key
  for key in ("logp_old", "logp_ref", "logp_sampler"):
    assert np.abs(drawn[key] - theirs[key]).max() < 1e-5, key
  # The server sees levels of 8 bits: a few pixels may round otherwise.
  assert abs(metrics[0]["reward/red"] - their_metrics[0]["reward/red"]) < 1e-4
  spread = np.abs(theirs["advantage"]).max()
  assert np.abs(drawn["advantage"] - theirs["advantage"]).max() < 0.02 * spread
  assert abs(metrics[0]["grpo/ratio_off"]) < 1e-6
  # Later steps see what Adam makes of rounding; train_eight.py compares
  # updates of equal rows.
  for key in ("grpo/entropy", "grpo/kl", "grpo/sampler_gap"):
    assert abs(metrics[0][key] - their_metrics[0][key]) < 1e-5, key
