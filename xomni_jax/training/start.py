"""The first state of a run: from a checkpoint, from files, or drawn."""

import jax

from xomni_jax.train_config import TrainConfig
from xomni_jax.training import step as step_lib
from xomni_jax.training.layout import Layout, flatten
from xomni_jax.training.stage import Stage


def begin(cfg: TrainConfig, stage: Stage, layout: Layout, key, restore):
  """(state, frozen): from a checkpoint, from files, or from nothing.

  Args:
    restore: abstract state -> (step, state), or None if there is none.
  """
  program = stage.program
  abstract = step_lib.abstract_state(cfg, program, layout)
  restored = restore(abstract)
  needed = layout.frozen if restored else [*layout.frozen, *layout.trained]
  params = first_params(stage, layout, key, needed)
  frozen = {path: params[path] for path in layout.frozen}
  if restored:
    return restored[1], frozen
  # Copied: files may have been placed without a copy, and steps are donated.
  state = jax.jit(
    lambda params: step_lib.init_state(cfg, program, layout, params),
    out_shardings=jax.tree.map(lambda x: x.sharding, abstract),
  )({path: params[path] for path in layout.trained})
  return state, frozen


def first_params(stage: Stage, layout: Layout, key, paths):
  """Flat parameters before step 0: loaded where there are files, else drawn."""
  trained = set(layout.trained)
  parts = {path.split("/")[0] for path in paths}
  kinds = {
    part: "float32"
    if any(path.startswith(f"{part}/") for path in trained)
    else layout.frozen_dtype
    for part in parts
  }
  found = flatten(stage.load(layout.mesh, kinds))
  missing = [path for path in paths if path not in found]
  drawn = {}
  if missing:
    draw = jax.jit(
      lambda key: {
        path: x
        for path, x in flatten(stage.program.init(key)).items()
        if path in missing
      },
      out_shardings={path: layout.sharding(path) for path in missing},
    )
    drawn = draw(key)
  return {
    path: (drawn[path] if path in drawn else found[path]).astype(
      layout.dtype(path)
    )
    for path in paths
  }
