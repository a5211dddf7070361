"""A rollout and its update on many devices are those of one.

A rollout takes two steps here, so that the checkpoint of the first one holds
the codes. Rewards come from a server, to which the images have to come.
"""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

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
      "--config.report.preview_every=2",
      count=way["count"],
      devices=way["devices"],
    )
    assert {r[0] for r in results} == {0}, results[0][2][-3000:]
    asked = sorted(map(int, server.asked))
  state = runs.state(folder / name, 1)
  drawn = {
    k.rsplit("/", 1)[1]: x for k, x in state.items() if "extra/current/" in k
  }
  grid = np.array(
    Image.open(folder / name / "pictures" / "samples-0000002.png")
  )
  return drawn, runs.metrics(folder / name), asked, grid


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
  drawn, metrics, asked, grid = run(tmp_path, name, path)
  theirs, their_metrics, their_asked, their_grid = alone
  assert asked == their_asked == list(range(8))  # each image once
  for key in ("codes", "tokens", "valid", "mask"):
    assert (drawn[key] == theirs[key]).all(), key
  for key in ("logp_old", "logp_ref", "logp_sampler"):
    assert np.abs(drawn[key] - theirs[key]).max() < 1e-5, key
  # The server sees levels of 8 bits: a few pixels may round otherwise.
  assert abs(metrics[0]["reward/red"] - their_metrics[0]["reward/red"]) < 1e-4
  spread = np.abs(theirs["advantage"]).max()
  assert np.abs(drawn["advantage"] - theirs["advantage"]).max() < 0.02 * spread
  assert metrics[0]["grpo/ratio_off_max"] < 1e-6
  assert metrics[0]["grpo/tokens"] == their_metrics[0]["grpo/tokens"]
  # All images with all lines, whichever process painted them.
  off = np.abs(grid.astype(int) - their_grid).max(-1)
  assert grid.shape == their_grid.shape and (off > 2).mean() < 1e-3
  # Later steps see what Adam makes of rounding; train_eight.py compares
  # updates of equal rows.
  for name in ("entropy", "kl", "sampler_gap", "sampler_gap_max"):
    key = f"grpo/{name}"
    assert abs(metrics[0][key] - their_metrics[0][key]) < 1e-5, key


def gradients(folder, config, rows, name):
  """What grpo_gradients.py finds on these devices."""
  way, out = WAYS[name], folder / f"{name}.npz"
  np.savez(folder / "rows.npz", **rows)
  with socket.socket() as s:
    s.bind(("localhost", 0))
    address = f"localhost:{s.getsockname()[1]}"
  flag = f"--xla_force_host_platform_device_count={way['devices']}"
  started = [
    subprocess.Popen(
      [
        *(sys.executable, "-m", "tests.multidevice.grpo_gradients"),
        *map(str, (config, folder / "rows.npz", out)),
        json.dumps(way["mesh"]),
        *([f"{address},{way['count']},{i}"] if way["count"] > 1 else []),
      ],
      cwd=runs.ROOT,
      env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(way["count"])
  ]
  for status, _, err in runs.finish_together(started):
    assert status == 0, err[-3000:]
  with np.load(out) as found:
    return dict(found)


@pytest.fixture(scope="module")
def alone_gradients(alone, tmp_path_factory):
  """(config, rows of the first rollout, what one device makes of them)."""
  folder, rows = tmp_path_factory.mktemp("gradients"), dict(alone[0])
  rows.pop("mark")
  config = grpo_runs.write_config(folder, "http://nowhere/red")
  return config, rows, gradients(folder, config, rows, "one")


@pytest.mark.parametrize(
  "name", ["eight", pytest.param("two_processes", marks=pytest.mark.slow)]
)
def test_loss_and_gradients_of_equal_tokens_are_those_of_one_device(
  alone_gradients, tmp_path, name
):
  config, rows, theirs = alone_gradients
  ours = gradients(tmp_path, config, rows, name)
  assert ours.keys() == theirs.keys() and ours["sum"] == theirs["sum"]
  assert theirs["first/ratio_off"] < 1e-5 and theirs["moved/ratio_off"] > 0.01
  for key, x in theirs.items():
    # Of a gradient, of its largest element: sums come in another order.
    size = np.abs(x).max() if "/grad/" in key else 1
    assert np.abs(ours[key] - x).max() <= 1e-5 * size, key
    assert size > 0 or "/lm_" in key, key  # text that nobody learns


def overlapped(folder, name, steps=4):
  """(states after every step, metrics, lines of each process's ledger)."""
  way = WAYS[name] | {"mesh": {"data": 4, "fsdp": 2}}
  workdir = folder / name
  with grpo_runs.serve() as server:
    config = grpo_runs.write_config(
      folder,
      server.url,
      overlap=1,
      rollout_mesh=(("data", 4), ("tensor", 2)),
    )
    results = runs.together(
      *(config, workdir, f"--config.phases.1_all.steps={steps}"),
      # AdamW would make a step of what rounding left of a gradient near 0.
      *("--config.optim.eps=1e-4", "--config.checkpoint.every=1"),
      *settings(way["mesh"]),
      count=way["count"],
      devices=way["devices"],
    )
    assert {r[0] for r in results} == {0}, results[0][2][-3000:]
    # Each image of each rollout is asked about once, by one process.
    assert sorted(map(int, server.asked)) == sorted([*range(8)] * steps)
  ledgers = [
    [json.loads(line) for line in path.read_text().splitlines()]
    for path in sorted((workdir / "rewards").glob("scores-*.jsonl"))
  ]
  states = [runs.state(workdir, step) for step in range(1, steps + 1)]
  return states, runs.metrics(workdir), ledgers


@pytest.mark.slow
def test_two_processes_overlap_as_one_does(tmp_path):
  """Four updates, all but the first of a policy that is one step ahead."""
  states, metrics, ledgers = overlapped(tmp_path, "two_processes")
  theirs, their_metrics, _ = overlapped(tmp_path, "eight")
  for step, (ours, other) in enumerate(zip(states, theirs, strict=True), 1):
    assert ours.keys() == other.keys()
    waiting = [key for key in other if "extra/next/" in key]
    assert len(waiting) == 9
    for key, x in other.items():
      if key in waiting and not np.issubdtype(x.dtype, np.floating):
        assert (ours[key] == x).all(), (step, key)
      elif key in waiting or "/params/" in f"/{key}":
        # Sums come in another order; an update moves parameters by 3e-3.
        assert np.abs(ours[key] - x).max() < 5e-5, (step, key)
  for ours, other in zip(metrics, their_metrics, strict=True):
    assert ours.keys() == other.keys()
    for key, value in other.items():
      near = 1e-5 * max(1, abs(value))
      assert abs(ours[key] - value) < near, (ours["step"], key)
  off = [m["grpo/ratio_off"] for m in metrics]
  assert off[0] < 1e-6 and min(off[1:]) > 0.1, off
  # The ledgers of both processes together hold each sample of a step once.
  assert len(ledgers) == 2 and all(ledgers)
  samples = [tuple(line[:4]) for lines in ledgers for line in lines]
  assert len(samples) == len(set(samples)) == 8 * len(states)
