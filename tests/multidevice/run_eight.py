"""The golden checkpoint on eight fake devices: what comes out of it.

  python -m tests.multidevice.run_eight OUT

writes OUT/arrays.npz and OUT/facts.json, which test_eight_devices.py judges.
A process of its own, since the count of devices is fixed when JAX starts and
all other tests are to see one.
"""

import collections
import contextlib
import dataclasses
import json
import logging
import pathlib
import sys
import time

import jax
import numpy as np

import xomni_jax
from tests import helpers
from xomni_jax import mesh as mesh_lib
from xomni_jax import params
from xomni_jax.checkpoints import released
from xomni_jax.inference import checkpoint

FOLDERS = helpers.GOLDEN / "xomni", helpers.GOLDEN / "flux1"
ALL_AXES = "data=2,fsdp=2,tensor=2"
# {mesh: [(golden run, images per prompt, layers scanned as on TPUs)]}. Rows of
# the batch, twofold by the guidance, that the mesh divides, and others.
RUNS = {
  ALL_AXES: [("g3_batch", 1, False), ("g3", 3, True)],  # 4, 6 rows over 4 ways
  "data=2": [("g1", 1, False)],  # 1 row over 2 ways
  "tensor=4": [("g3", 1, False)],  # 2 key/value heads over 4 ways
}


@contextlib.contextmanager
def compilations(facts, where):
  """Counts the programs that are compiled inside, by name."""
  counts = collections.Counter()

  class Count(logging.Handler):
    def emit(self, record):
      if "Compiling" in (text := record.getMessage()):
        counts[text.split("jit(")[1].split(")")[0]] += 1

  logger, handler = logging.getLogger("jax._src.interpreters.pxla"), Count()
  logger.addHandler(handler)
  with jax.log_compiles():
    yield
  logger.removeHandler(handler)
  facts[where] = counts


def shards(tree):
  """{path: (shape, shape of a device's part, how many different parts)}."""
  return {
    path: (
      leaf.shape,
      leaf.addressable_shards[0].data.shape,
      len({str(shard.index) for shard in leaf.addressable_shards}),
    )
    for path, leaf in params.flatten(tree).items()
  }


def differences(a, b):
  """Paths whose arrays differ in a bit, in dtype or in sharding."""
  a, b = params.flatten(a), params.flatten(b)
  same = lambda x, y: (
    x.dtype == y.dtype
    and x.sharding == y.sharding
    and np.asarray(x).tobytes() == np.asarray(y).tobytes()
  )
  return [path for path in a.keys() | b.keys() if not same(a[path], b[path])]


def load_both_ways(part, mesh):
  """Where stacks made on the host and on the devices differ."""
  on_host = released.load(part, mesh, "float32")
  limit, released.HOST_STACK_BYTES = released.HOST_STACK_BYTES, 0
  on_devices = released.load(part, mesh, "float32")
  released.HOST_STACK_BYTES = limit
  return differences(on_host, on_devices)


def run(out):
  golden, start = helpers.golden(), time.perf_counter()
  texts = json.loads((helpers.GOLDEN / "golden.json").read_text())["gen"]
  prompts = {
    "g1": [texts["prompt_en"]],
    "g3": [texts["prompt_zh"]],
    "g3_batch": [texts["prompt_en"], texts["prompt_zh"]],
  }
  arrays, facts = {}, {"devices": len(jax.devices()), "seconds": {}}

  def done(what):
    facts["seconds"][what] = round(time.perf_counter() - start, 1)

  opened = checkpoint.open_checkpoint(FOLDERS[0])
  parts = {**opened.parts, "flux": checkpoint.open_flux(opened)[1]}
  facts["load"] = load_both_ways(parts["ar"], mesh_lib.parse_mesh(ALL_AXES))
  done("load")
  for sizes, runs in RUNS.items():
    model = xomni_jax.load(FOLDERS[0], flux=FOLDERS[1],
                           mesh=mesh_lib.parse_mesh(sizes))  # fmt: skip
    for name, part in parts.items():
      tree = model.params[name]
      facts[f"{sizes}/{name}/shards"] = shards(tree)
      facts[f"{sizes}/{name}/replicated"] = params.replicated(
        part.table, tree, model.mesh
      )
    arrays[f"{sizes}/logits"] = model.logits(
      golden["ar/batch/input_ids"],
      "text",
      golden["ar/batch/attention_mask"],
    )
    done(f"{sizes}/logits")
    for name, count, scan in runs:
      model.compute = dataclasses.replace(model.compute, scan_layers=scan)
      with compilations(facts, f"{sizes}/{name}/programs"):
        drawn = model.generate(
          prompts[name],
          (64, 80),
          num_images=count,
          greedy=True,
          cfg_scale=1.0 if name == "g1" else 3.0,
          decode=False,
        )
      arrays[f"{sizes}/{name}/codes"] = drawn.codes
      arrays[f"{sizes}/{name}/raw_logprobs"] = drawn.raw_logprobs
      done(f"{sizes}/{name}")
    if sizes == ALL_AXES:
      with compilations(facts, f"{sizes}/decode/programs"):
        arrays["image"] = model.decode(
          golden["pipe/square/tokens"],
          texts["prompt_en"],
          noise=golden["pipe/square/latents_init"],
        )
      done(f"{sizes}/decode")
  np.savez(out / "arrays.npz", **arrays)
  (out / "facts.json").write_text(json.dumps(facts, indent=2))


if __name__ == "__main__":
  run(pathlib.Path(sys.argv[1]))
