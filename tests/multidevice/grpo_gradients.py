"""The loss of stage `grpo` and its gradients on rows that were drawn before.

  python -m tests.multidevice.grpo_gradients CONFIG ROWS OUT MESH [ADDRESS]

reads the rows of a global batch from ROWS, an .npz file, and writes to OUT, by
process 0, the loss and all gradients: of the policy where it starts ("first"),
and of one that has moved ("moved"), whose ratios and KL are not trivial. MESH
is the mesh's sizes as JSON, ADDRESS that of `xomni train --distributed`.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from xomni_jax import mesh as mesh_lib
from xomni_jax.training import build, command, configure, start
from xomni_jax.training import step as step_lib
from xomni_jax.training.layout import flatten, make_layout


def main(config, rows, out, sizes, address=None):
  command.connect(address)
  mesh_lib.PIECE_BYTES = 2**10  # so that gradients come in pieces
  config = configure.read(config)
  cfg, arch = configure.parse(config, "test")
  out = pathlib.Path(out)
  stage = build.stage(cfg, arch, config, out.with_suffix(""))
  mesh = mesh_lib.make_mesh(**json.loads(sizes))
  layout = make_layout(stage.program.parts, cfg.phases, mesh, cfg.frozen_dtype)
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  with jax.set_mesh(mesh), np.load(rows) as rows:
    batch = step_lib.place_whole(rows, mesh)
    params = flatten(stage.load(mesh, {"ar": "float32", "ref": "float32"}))
    first = {path: params[path] for path in layout.trained}
    frozen = {path: params[path] for path in layout.frozen}
    own = {path: layout.sharding(path) for path in first}
    move = jax.jit(_moved, out_shardings=own)
    run = jax.jit(
      step_lib._on_rows(cfg, stage.program, layout, grads=True),
      out_shardings=(whole, whole, whole, own),
    )
    found = {"sum": int(start._sums(frozen)["ref"])}
    for name, policy in (("first", first), ("moved", move(first))):
      loss, metrics, _, gradients = run(
        policy, frozen, batch, jax.random.key(0), jnp.zeros((), jnp.int32)
      )
      found |= {f"{name}/loss": loss, f"{name}/ratio_off": metrics["ratio_off"]}
      found |= {f"{name}/grad/{path}": x for path, x in gradients.items()}
    found = jax.tree.map(
      lambda x: mesh_lib.to_host(x) if isinstance(x, jax.Array) else x, found
    )
  stage.close()
  if jax.process_index() == 0:
    np.savez(out, **found)


def _moved(params):
  """Each parameter a little off, by where it stands: the same on any mesh."""
  return {
    path: x
    * (1 + 0.05 * jnp.sin(jnp.arange(x.size, dtype=jnp.float32) * 1.7 + 1))
    .reshape(x.shape)
    for path, x in params.items()
  }  # fmt: skip


if __name__ == "__main__":
  main(*sys.argv[1:])
