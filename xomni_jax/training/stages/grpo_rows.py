"""Rows of rollouts: whether they can be dealt out, and how they are saved."""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from xomni_jax import mesh as mesh_lib
from xomni_jax import reward_config
from xomni_jax.data.prompts import Prompt
from xomni_jax.errors import InputError
from xomni_jax.mesh import to_host
from xomni_jax.train_config import TrainConfig
from xomni_jax.training import step as step_lib

# What rows depend on, of the options and of each reward.
_MADE_BY = (
  *("group_size", "temperature", "top_k", "top_p", "min_p"),
  *("paint_steps", "paint_cfg_scale", "same_noise"),
  *("normalise", "line_advantages", "combine"),
)
_WANTED = ("name", "weight", "normalise", "low", "high", "floor")


def check(cfg: TrainConfig, rows: int) -> None:
  """Raises InputError where rows do not go into groups, passes and devices."""
  opts = cfg.options
  unknown = dict(opts.rollout_mesh).keys() - {*mesh_lib.AXES}
  if unknown:
    raise InputError(
      f"options.rollout_mesh has the axes {', '.join(sorted(unknown))}, "
      f"expected some of {', '.join(mesh_lib.AXES)}"
    )
  if rows % opts.group_size:
    raise InputError(
      f"a rollout of {rows} images (global_batch x options.minibatches) is no "
      f"multiple of group_size {opts.group_size}"
    )
  for name in ("sample_rows", "score_rows"):
    at_once = getattr(opts, name) or rows
    whole = opts.group_size if name == "sample_rows" else 1
    if rows % at_once or at_once % whole:
      raise InputError(
        f"options.{name} is {at_once}, expected a part of the {rows} images of "
        f"a rollout, in groups of {opts.group_size}"
      )
  sizes = mesh_lib.fill(dict(cfg.mesh), jax.device_count())
  ways = math.prod(sizes.get(axis, 1) for axis in mesh_lib.BATCH_AXES)
  if opts.score_rows % ways:
    raise InputError(
      f"options.score_rows is {opts.score_rows}, expected a multiple of the "
      f"{ways} batch devices"
    )
  rollout = dict(opts.rollout_mesh) or sizes
  devices = math.prod(
    mesh_lib.fill(rollout, math.prod(sizes.values())).values()
  )
  if opts.reward_path == "fused" and opts.paint_rows % devices:
    raise InputError(
      f"options.paint_rows is {opts.paint_rows}, expected a multiple of the "
      f"{devices} devices that each ask for rewards of their own; try "
      f"{-(-opts.paint_rows // devices) * devices}, or reward_path 'host'"
    )


def tight(
  rows: Mapping[str, np.ndarray], grid: tuple[int, int]
) -> dict[str, np.ndarray]:
  """Rows of one size without the columns that its images do not fill.

  They are kept as long as those of the largest size; what is computed with them
  is compiled for each size.

  Args:
    rows: see `grpo_program.shapes`.
    grid: rows and columns of their codes.
  """
  behind = rows["codes"].shape[1] - grid[0] * grid[1]
  return {
    k: x[:, : x.shape[1] - behind] if x.ndim > 1 else x for k, x in rows.items()
  }


def mark(cfg: TrainConfig, number: int, prompts: Sequence[Prompt]) -> int:
  """32 bits of what is asked for in a rollout, and of how it is drawn, painted
  and turned into advantages. Where servers are is no part of it."""
  opts = cfg.options
  how = [getattr(opts, name) for name in _MADE_BY]
  wanted = [
    [reward_config.about(r), *(getattr(r, name) for name in _WANTED)]
    for r in opts.rewards
  ]
  asked = (number, cfg.seed, how, wanted, prompts)
  return zlib.crc32(repr(asked).encode())


def keep(rows: Mapping[str, np.ndarray], mark: int, mesh) -> dict[str, Any]:
  """Rows as arrays that are saved with the state, see grpo_program.extra."""
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  value = np.uint32(mark)
  return {
    "mark": jax.make_array_from_callback((), whole, lambda _: value),
    "rows": step_lib.place_whole(rows, mesh),
  }


def kept(saved: Mapping[str, Any], mark: int) -> dict[str, np.ndarray] | None:
  """The rows that were saved with this mark; None: they are others.

  Those of the last rollout are left once a run is at its end, and those of
  other prompts or draws where the config was changed.
  """
  if int(to_host(saved["mark"])) != mark:
    return None
  return jax.tree.map(to_host, saved["rows"])
