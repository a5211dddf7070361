"""Muon: matrices move by orthogonal steps, made of their momentum.

optax has it. Here matrices that are alike go through its iterations together,
and are shared out over devices.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from optax import contrib

from xomni_jax.errors import InputError
from xomni_jax.params import Row
from xomni_jax.training.layout import Layout

Flat = Mapping[str, jax.Array]

# The root mean square of its steps is AdamW's, so that one learning rate serves
# both (arXiv:2502.16982); an orthogonal matrix has 1 / sqrt(longer side).
_RMS, _MOMENTUM, _STEPS = 0.2, 0.95, 5
_ALIKE = "slice", "data"  # mesh axes over which no parameter is split


def scale_by_muon(
  layout: Layout, paths: Sequence[str]
) -> optax.GradientTransformation:
  """Gradients of matrices to steps of Muon, to be subtracted.

  Raises:
    InputError: a parameter is no matrix.
  """
  sides = {path: _sides(layout.rows[path]) for path in paths}
  return optax.chain(
    # No iterations: momentum, divided by its norm.
    contrib.scale_by_muon(
      ns_steps=0,
      beta=_MOMENTUM,
      mu_dtype=jnp.float32,
      weight_dimension_numbers=lambda _: sides,
    ),
    optax.stateless(lambda steps, _: orthogonal(steps, layout)),
  )


def _sides(row: Row) -> contrib.MuonDimensionNumbers:
  """Our axes that make up each side of the matrix that PyTorch has.

  A convolution's has what an output is made of as its second side.

  Raises:
    InputError: it has no two sides.
  """
  first, *others = row.groups
  sides = first, [axis for group in others for axis in group]
  if not others:
    raise InputError(
      f"optim.muon matches {row.path}, which has 1 side, not the 2 of a "
      "matrix; name kernels only"
    )
  return contrib.MuonDimensionNumbers(
    *(tuple(map(row.axes.index, side)) for side in sides)
  )


class Matrices(NamedTuple):
  """A parameter as Muon moves it, matrices [L, shorter, longer].

  Attributes:
    order: its axes, those of layers first, then those of either side.
    shape: [L, shorter, longer].
    split: mesh axes over which either side is split.
  """

  order: tuple[int, ...]
  shape: tuple[int, int, int]
  split: tuple[Any, Any]


def matrices(path: str, layout: Layout) -> Matrices:
  """How a parameter is made of matrices."""
  shape = layout.shapes[path]
  where = layout.sharding(path)
  size = lambda axes: math.prod(shape[i] for i in axes)
  sides = sorted(_sides(layout.rows[path]), key=size)
  layers = sorted(set(range(len(shape))).difference(*sides))
  return Matrices(
    (*layers, *sides[0], *sides[1]),
    (size(layers), size(sides[0]), size(sides[1])),
    tuple(_split(where, side[0]) for side in sides),
  )


def _split(where: NamedSharding, axis: int):
  """The mesh axes that an axis is split over; None: it is whole."""
  names = where.spec[axis] if axis < len(where.spec) else None
  names = (names,) if isinstance(names, str) else names or ()
  return tuple(n for n in names if where.mesh.shape[n] > 1) or None


def orthogonal(steps: Flat, layout: Layout) -> dict[str, jax.Array]:
  """Momentum to Muon's steps, all matrices that are alike at once.

  Devices along `slice` and `data` hold the same momentum, and would all compute
  the same from it, which may take longer than the gradient did. Each has some
  of the matrices instead, and these whole: products of parts would have to be
  summed over devices in each iteration.
  """
  found = {path: matrices(path, layout) for path in steps}
  alike: dict[Any, list[str]] = {}
  for path, (_, (_, *sides), split) in found.items():
    alike.setdefault((*sides, split), []).append(path)
  ways = math.prod(layout.mesh.shape[axis] for axis in _ALIKE)
  out = {}
  for (short, long, split), paths in alike.items():
    held = [
      steps[path].transpose(found[path].order).reshape(found[path].shape)
      for path in paths
    ]
    # Zeros stay zeros; with them all devices have as many.
    spare = -sum(map(len, held)) % ways
    held.append(jnp.zeros((spare, short, long), held[0].dtype))
    where = lambda axes, split=split: NamedSharding(
      layout.mesh, PartitionSpec(axes, *split)
    )
    # First together, then apart: one exchange, not one a parameter.
    x = jax.lax.with_sharding_constraint(jnp.concatenate(held), where(None))
    x = jax.lax.with_sharding_constraint(x, where(_ALIKE))
    x = newton_schulz(x) * _RMS * long**0.5
    x = jax.lax.with_sharding_constraint(x, where(None))
    first = 0
    for path in paths:
      order, (layers, *_), _ = found[path]
      part = x[first : first + layers]
      part = part.reshape([layout.shapes[path][i] for i in order])
      out[path] = part.transpose(np.argsort(order))
      first += layers
  return out


def newton_schulz(x: jax.Array) -> jax.Array:
  """Nearly orthogonal matrices [L, shorter, longer] of any, by 5 iterations."""
  short, long = x.shape[1:]
  # 3 products an iteration with the matrix, or 2 in all and 17 of its Gram
  # matrix. In bfloat16, of which accelerators make products unless told not
  # to, the latter is not accurate enough.
  if 2 * long > 3 * short:
    return jax.lax.platform_dependent(x, cpu=by_gram, default=by_iterates)
  return by_iterates(x)


# Without momentum it has no state to keep.
_PLAIN = contrib.scale_by_muon(
  ns_steps=_STEPS,
  beta=0.0,
  nesterov=False,
  weight_dimension_numbers=contrib.MuonDimensionNumbers(1, 2),
)


def by_iterates(x: jax.Array) -> jax.Array:
  """The iterations as they are, for x [L, shorter, longer]."""
  return _PLAIN.update(x, _PLAIN.init(x))[0]


def by_gram(x: jax.Array) -> jax.Array:
  """The same, as each iterate is a polynomial of x x' times x."""
  a, b, c = _PLAIN.init(x).ns_coeffs
  x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-8)
  gram = x @ x.mT
  product = None
  for step in range(1, _STEPS + 1):
    factor = b * gram + c * (gram @ gram) + a * jnp.eye(x.shape[1])
    product = factor if product is None else factor @ product
    if step < _STEPS:
      gram = factor @ gram @ factor  # they commute
  return product @ x
