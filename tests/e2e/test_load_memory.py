"""Host memory while a checkpoint of a gigabyte is written and loaded."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests import helpers

# Bytes: a layer as it was read, in our order and on its way to the device (34
# MB each), and what the allocator keeps. Seen is 80 MB.
SLACK = 150 * 10**6

pytestmark = pytest.mark.skipif(
  not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's /proc"
)


def run(verb, folder):
  done = subprocess.run(
    [sys.executable, "-m", "tests.e2e.load_memory", verb, str(folder)],
    cwd=helpers.GOLDEN.parents[2],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A folder with four shards, and what writing them took."""
  folder = tmp_path_factory.mktemp("gigabyte")
  written = run("write", folder)
  yield folder, written
  for path in folder.iterdir():  # not kept for three runs, as pytest does
    path.unlink()


def largest_shard(folder):
  sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
  assert len(sizes) == 4
  return max(sizes)


def test_loading_holds_one_shard_beyond_the_placed_arrays(checkpoint):
  folder, _ = checkpoint
  loaded = run("load", folder)
  assert loaded["wrong"] == []
  assert loaded["placed"] > 1.1e9
  assert loaded["stacks"] == 7  # of the size that is stacked on the device
  assert loaded["beyond"] < largest_shard(folder) + SLACK


def test_writing_holds_one_shard(checkpoint):
  folder, written = checkpoint
  assert written["beyond"] < largest_shard(folder) + SLACK
