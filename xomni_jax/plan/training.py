"""The plan of a training step, from its config alone."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from xomni_jax import mesh as mesh_lib
from xomni_jax import params as params_lib
from xomni_jax.plan.compiling import Plan, Target, compile_plan
from xomni_jax.training import build, configure
from xomni_jax.training import step as step_lib
from xomni_jax.training.layout import make_layout


def plan_train(
  config: ConfigDict, target: Target, mesh: Mesh | None = None
) -> Plan:
  """One step of a config's last phase but annealing: the most that trains.

  Args:
    config: of a stage.
    target, mesh: None: the config's own mesh.
  """
  cfg, arch = configure.parse(config, "config")
  if mesh is None:
    sizes = mesh_lib.fill(dict(cfg.mesh), len(target.devices))
    mesh = mesh_lib.make_mesh(**sizes, devices=target.devices)
  step_lib.check_devices(cfg, mesh)
  program = build.program(cfg, arch, config)
  layout = make_layout(program.parts, cfg.phases, mesh, cfg.frozen_dtype)
  phase = max(range(len(cfg.phases)), key=lambda i: len(layout.active[i]))

  def array(path):
    return jax.ShapeDtypeStruct(
      layout.shapes[path], layout.dtype(path), sharding=layout.sharding(path)
    )

  state = step_lib.abstract_state(cfg, program, layout)
  rows = step_lib.batch_sharding(mesh)
  batch = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)
    for name, x in program.batch.items()
  }
  key = jax.eval_shape(lambda: jax.random.key(0))
  parts = program.parts.items()
  return compile_plan(
    f"train {cfg.stage}",
    f"one step of {cfg.phases[phase].name!r}, {cfg.global_batch} rows, "
    f"{program.tokens} tokens, {cfg.compute.dtype}",
    target,
    mesh,
    step_lib.train_step(cfg, program, layout, phase),
    (
      state,
      {path: array(path) for path in layout.frozen},
      batch,
      key,
      jax.ShapeDtypeStruct((), jnp.float32),
    ),
    replicated=[
      f"{name}/{line}"
      for name, part in parts
      for line in params_lib.replicated(part.table, part.tree, mesh)
    ],
  )
