"""Writes a language model of a gigabyte, or loads it, and tells the memory.

  python -m tests.e2e.load_memory write|load FOLDER

prints one line of JSON, sizes in bytes. A process of its own for each, since
the peak of a process never falls.
"""

import json
import pathlib
import re
import sys

import jax
import ml_dtypes
import numpy as np

from xomni_jax import params
from xomni_jax.checkpoints import released, tensor_files
from xomni_jax.config import ARConfig
from xomni_jax.mesh import make_mesh
from xomni_jax.models import ar

# Stacks of up to 200 MB, layers of up to 34 MB, shards of up to 300 MB.
CFG = ARConfig(
  vocab_size=16384,
  image_vocab_size=4096,
  mm_vocab_size=4160,
  hidden_size=2048,
  intermediate_size=8192,
  num_hidden_layers=8,
  num_mm_adap_layers=1,
  num_mm_head_layers=1,
  num_attention_heads=16,
  num_key_value_heads=4,
  rope_theta=1e6,
  rms_norm_eps=1e-6,
  max_position_embeddings=4096,
)
SHARD = 300 * 10**6


def memory(field: str) -> int:
  """Bytes in memory, of mapped files too: "VmRSS" now, "VmHWM" at most.

  Not getrusage, whose maximum a process inherits from the one that started it.
  """
  status = pathlib.Path("/proc/self/status").read_text()
  return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def tensors(shapes):
  """(key, bfloat16 array), each filled with the key's index."""
  for i, (key, shape) in enumerate(shapes.items()):
    yield key, np.full(shape, i, ml_dtypes.bfloat16)


def write(folder):
  shapes = params.torch_shapes(ar.rows(CFG), ar.abstract(CFG))
  before = memory("VmRSS")
  released.write_safetensors(folder, "model", tensors(shapes), SHARD)
  return {"beyond": memory("VmHWM") - before}


def load(folder):
  table, tree = ar.rows(CFG), ar.abstract(CFG)
  part = released.Part(
    "language model", table, tree, tensor_files.folder_files(folder, "model")
  )
  mesh = make_mesh()
  jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
  before = memory("VmRSS")
  loaded = jax.block_until_ready(released.load(part, mesh, "bfloat16"))
  most = memory("VmHWM")
  placed = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
  index = {key: i for i, key in enumerate(params.torch_shapes(table, tree))}
  wrong = []
  for row, leaf in params.matched(table, loaded):
    layers = np.asarray(leaf) if row.stacked else np.asarray(leaf)[None]
    for key, layer in zip(row.keys(leaf.shape), layers, strict=True):
      if {layer.flat[0], layer.flat[-1]} != {np.float32(index[key])}:
        wrong.append(key)
  return {
    "placed": placed,
    "beyond": most - before - placed,
    "wrong": wrong,
    "stacks": sum(
      leaf.nbytes > released.HOST_STACK_BYTES
      for leaf in jax.tree.leaves(loaded)
    ),
  }


if __name__ == "__main__":
  verb, folder = sys.argv[1:]
  print(json.dumps({"write": write, "load": load}[verb](pathlib.Path(folder))))
