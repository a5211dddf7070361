"""The first state of a run: from a checkpoint, from files, or drawn."""

import json
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from xomni_jax.checkpoints import manifest
from xomni_jax.checkpoints.runs import Runs
from xomni_jax.errors import InputError
from xomni_jax.mesh import to_host
from xomni_jax.train_config import TrainConfig
from xomni_jax.training import step as step_lib
from xomni_jax.training.layout import Layout, flatten
from xomni_jax.training.stage import Stage

_FROZEN = "frozen.json"


def begin(
  cfg: TrainConfig,
  stage: Stage,
  layout: Layout,
  key,
  runs: Runs,
  allow_change: bool = False,
):
  """(state, frozen): from a checkpoint, from files, or from nothing.

  Args:
    runs: where checkpoints are.
    allow_change: go on though frozen parameters have changed.
  Raises:
    InputError: as `Runs.restore`, and see `check_frozen`.
  """
  program = stage.program
  abstract = step_lib.abstract_state(cfg, program, layout)
  restored = runs.restore(abstract)
  needed = layout.frozen if restored else [*layout.frozen, *layout.trained]
  params = first_params(stage, layout, key, needed)
  frozen = {path: params[path] for path in layout.frozen}
  check_frozen(runs.folder, frozen, restored is not None, allow_change)
  if restored:
    return restored[1], frozen
  # Copied: files may have been placed without a copy, and steps are donated.
  state = jax.jit(
    lambda params: step_lib.init_state(cfg, program, layout, params),
    out_shardings=jax.tree.map(lambda x: x.sharding, abstract),
  )({path: params[path] for path in layout.trained})
  return state, frozen


def check_frozen(
  folder, frozen: Mapping[str, jax.Array], resumed: bool, allow: bool
) -> None:
  """Compares parameters that come from files, not from a checkpoint.

  What is compared are their values, by sums that lie beside the checkpoints:
  a folder that was copied or written again is the same, one with another
  model in it, such as another reference policy, is not.

  Args:
    folder: of the checkpoints.
    frozen: flat parameters.
    resumed: False: the run begins with them.
    allow: a line on standard output instead of an error.
  Raises:
    InputError: a run that is resumed began with others.
  """
  path = folder / _FROZEN
  sums = {part: int(to_host(x)) for part, x in _sums(dict(frozen)).items()}
  try:
    before = json.loads(path.read_text("utf-8")) if resumed else {}
  except FileNotFoundError:  # of a run of an earlier version
    before = {}
  except (OSError, ValueError) as e:
    raise InputError(
      f"{path} is unreadable ({type(e).__name__}); remove it to go on with the "
      "frozen parameters that there are"
    ) from None
  changed = [part for part in before if sums.get(part) != before[part]]
  if changed:
    line = (
      f"frozen parameters ({', '.join(changed)}) are others than the run in "
      f"{folder} began with"
    )
    if not allow:
      raise InputError(
        f"{line}; bring back the model folders of its config as they were, or "
        "allow the change (--allow-config-change)"
      )
    if jax.process_index() == 0:
      print(line, flush=True)
  if sums and sums != before and jax.process_index() == 0:
    manifest.write_json(path, sums)


@jax.jit
def _sums(flat):
  """{part: u32[]} of all bits of its parameters and where they stand.

  In whole numbers, so that it does not matter which device has which.
  """
  sums = {}
  for path, x in flat.items():
    part = path.split("/")[0]
    name = jnp.uint32(zlib.crc32(path.encode()) | 1)
    sums[part] = sums.get(part, jnp.uint32(0)) + name * _sum(x)
  return sums


def _sum(x):
  unsigned = np.dtype(f"uint{8 * x.dtype.itemsize}")
  hashed = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
  place = jnp.uint32(0)
  for axis in range(x.ndim):
    place = place * jnp.uint32(x.shape[axis])
    place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  hashed += place * jnp.uint32(0x9E3779B1)
  # The last steps of MurmurHash3, by which each bit depends on all.
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    hashed = (hashed ^ (hashed >> shift)) * jnp.uint32(factor)
  return jnp.sum(hashed ^ (hashed >> 16), dtype=jnp.uint32)


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
