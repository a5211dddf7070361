"""Where a run's parameters lie, and which of them train when.

Inside a run parameters are a flat dict {"part/path": array}; a stage's loss
sees {part: tree}.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xomni_jax import mesh as mesh_lib
from xomni_jax import params as params_lib
from xomni_jax.errors import InputError
from xomni_jax.params import Row
from xomni_jax.train_config import Phase
from xomni_jax.training.stage import Params, Part


@dataclasses.dataclass(frozen=True)
class Layout:
  """Every parameter of a stage on a mesh.

  Attributes:
    mesh: the mesh.
    rows: {path: its row of the parameter table}.
    shapes: {path: shape}.
    active: for each phase, the paths that train in it.
    frozen_dtype: of the paths that never train; the others are float32.
  """

  mesh: Mesh
  rows: Mapping[str, Row]
  shapes: Mapping[str, tuple[int, ...]]
  active: Sequence[frozenset[str]]
  frozen_dtype: str

  @property
  def trained(self) -> list[str]:
    """Paths that train in some phase, in a fixed order."""
    return sorted(frozenset().union(*self.active))

  @property
  def frozen(self) -> list[str]:
    """Paths that never train, in a fixed order."""
    return sorted(set(self.rows) - set(self.trained))

  def groups(self) -> dict[str, list[str]]:
    """Trained paths by the phases they train in, such as "0+2".

    A group is what shares an optimiser state with a count of its own.
    """
    out: dict[str, list[str]] = {}
    for path in self.trained:
      label = "+".join(str(i) for i, a in enumerate(self.active) if path in a)
      out.setdefault(label, []).append(path)
    return out

  def dtype(self, path: str) -> jnp.dtype:
    """What a parameter is stored as."""
    return jnp.dtype(
      self.frozen_dtype if path in set(self.frozen) else "float32"
    )

  def sharding(self, path: str) -> NamedSharding:
    """Where a parameter, its gradient and its moments lie."""
    return mesh_lib.sharding(self.rows[path].axes, self.shapes[path], self.mesh)

  def local(self, path: str) -> PartitionSpec:
    """Of that, what concerns the axes that a training step is manual over."""
    keep = lambda part: tuple(
      a for a in _names(part) if a in mesh_lib.BATCH_AXES
    )
    return PartitionSpec(*(keep(p) or None for p in self.sharding(path).spec))

  def split(self, path: str) -> tuple[int, str] | None:
    """(axis from the end, mesh axis) along which a step has to gather it."""
    parts = self.local(path)
    found = [(i, _names(p)) for i, p in enumerate(parts) if p]
    if not found:
      return None
    if len(found) > 1 or len(found[0][1]) > 1:
      raise ValueError(f"{path} is split over two batch axes: {parts}")
    axis, (over,) = found[0]
    if self.mesh.shape[over] == 1:
      return None
    return axis - len(self.shapes[path]), over


def _names(part) -> tuple[str, ...]:
  return () if part is None else (part,) if isinstance(part, str) else part


def make_layout(
  parts: Mapping[str, Part],
  phases: Sequence[Phase],
  mesh: Mesh,
  frozen_dtype: str,
) -> Layout:
  """The layout of a stage's parts.

  Raises:
    InputError: a phase's expression matches no parameter, or none is left to
      train.
  """
  rows, shapes = {}, {}
  for name, part in parts.items():
    for row, leaf in params_lib.matched(part.table, part.tree):
      rows[f"{name}/{row.path}"] = row
      shapes[f"{name}/{row.path}"] = tuple(leaf.shape)
  problems, active = [], []
  for phase in phases:
    hits = {
      p: [x for x in rows if re.match(p, x)]
      for p in (*phase.train, *phase.freeze)
    }
    problems += [
      f"phase {phase.name!r}: {p!r} matches no parameter"
      for p, found in hits.items()
      if not found
    ]
    chosen = {x for p in phase.train for x in hits[p]}
    chosen -= {x for p in phase.freeze for x in hits[p]}
    if not chosen:
      problems.append(f"phase {phase.name!r} trains nothing")
    active.append(frozenset(chosen))
  if problems:
    raise InputError(
      f"{'; '.join(problems)}; paths begin with one of "
      f"{', '.join(f'{name}/' for name in parts)}"
    )
  return Layout(mesh, rows, shapes, active, frozen_dtype)


def flatten(params: Params) -> dict[str, jax.Array]:
  """{part: tree} as {"part/path": array}."""
  return params_lib.flatten(params)


def nest(flat: Mapping[str, Any]) -> Params:
  """The reverse of `flatten`."""
  return params_lib.unflatten(flat)
