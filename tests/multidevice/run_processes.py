"""One of several connected processes, for test_runs_processes.py.

  python -m tests.multidevice.run_processes WHAT INDEX COUNT PORT FOLDER

Each has two fake CPU devices. WHAT is "save:STEP", "restore" or "preempted".
"""

import os
import pathlib
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from xomni_jax import mesh as mesh_lib
from xomni_jax.checkpoints import run_config, runs
from xomni_jax.train_config import CheckpointConfig
from xomni_jax.training.preemption import EXIT_PREEMPTED, Preemption

ROWS = 24


def expected(seed):
  """The state as host arrays: sharded, replicated, and in bfloat16."""
  rng = np.random.default_rng(seed)
  bits = rng.integers(0, 2**32, (ROWS, 6), np.uint32)
  return {
    "w": bits.view(np.float32),
    "h": bits[:, :4].astype(np.uint16).view(jnp.bfloat16),
    "step": np.int32(seed),
  }


def abstract(mesh):
  """The state with its first axis split over all devices."""
  rows = PartitionSpec(("data", "fsdp"))
  return {
    name: jax.ShapeDtypeStruct(
      x.shape,
      x.dtype,
      sharding=NamedSharding(mesh, rows if x.ndim else PartitionSpec()),
    )
    for name, x in expected(0).items()
  }


def placed(seed, mesh):
  values = expected(seed)
  return {
    name: jax.make_array_from_callback(
      values[name].shape, x.sharding, lambda i, v=values[name]: v[i]
    )
    for name, x in abstract(mesh).items()
  }


def check(state, seed):
  for name, want in expected(seed).items():
    for shard in state[name].addressable_shards:
      ours = np.asarray(shard.data)
      assert ours.tobytes() == want[shard.index].tobytes(), name


def main(what, index, count, port, folder):
  index, count = int(index), int(count)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, index)
  mesh = mesh_lib.make_mesh(data=count, fsdp=2)
  folder = pathlib.Path(folder)
  saver = runs.Runs(folder, CheckpointConfig(keep_last=2))
  verb, _, step = what.partition(":")
  if verb == "save":
    found = saver.restore(abstract(mesh))
    if found:
      check(found[1], found[0])
    for seed in range(found[0] + 1 if found else 1, int(step) + 1):
      saver.save(seed, placed(seed, mesh))
    saver.close()
    changes = run_config.check_config(folder, {"count": count}, allow=True)
    print(f"saved {saver.steps()} from {found and found[0]} {changes}")
  elif verb == "restore":
    step, state = saver.restore(abstract(mesh))
    check(state, step)
    print(f"restored {step}")
  elif verb == "preempted":
    with Preemption() as preemption:
      for step in range(1, 1000):
        if step == 5 and index == 1:
          os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.02)
        if preemption.should_stop(step):
          saver.save(step, placed(step, mesh))
          saver.close()
          print(f"stopped {step}", flush=True)
          jax.distributed.shutdown()
          sys.exit(EXIT_PREEMPTED)


if __name__ == "__main__":
  main(*sys.argv[1:])
