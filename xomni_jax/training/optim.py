"""AdamW, and Muon for the matrices that a config names, over phases.

Parameters that train in the same phases share an optimiser state with a count
of its own. A group's state stands still in phases that freeze it: moments are
carried over a phase boundary where a parameter goes on training, and start
from zero, bias correction included, where it is unfrozen.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from optax import contrib

from xomni_jax.errors import InputError
from xomni_jax.params import Row
from xomni_jax.train_config import OptimConfig, Phase
from xomni_jax.training.layout import Layout

Flat = Mapping[str, jax.Array]

_MUON = "/muon"  # ends the label of a group that it moves
# The root mean square of its steps is AdamW's, so that one learning rate serves
# both (arXiv:2502.16982); an orthogonal matrix has 1 / sqrt(longer side).
_MUON_RMS, _MUON_MOMENTUM, _MUON_STEPS = 0.2, 0.95, 5
_ALIKE = "slice", "data"  # mesh axes over which no parameter is split


def rate(phase: Phase, lr: float, local: int) -> float:
  """Learning rate of a phase's step `local`, from 0.

  It rises to `lr * lr_scale` at the end of the warm-up, then stays or falls.
  """
  peak = lr * phase.lr_scale
  if local < phase.warmup_steps:
    return peak * (local + 1) / phase.warmup_steps  # step 0 is not lost
  left = max(phase.steps - phase.warmup_steps, 1)
  falling = {
    "constant": optax.constant_schedule(peak),
    "cosine": optax.cosine_decay_schedule(peak, left, phase.end_scale),
    "linear": optax.linear_schedule(peak, peak * phase.end_scale, left),
  }[phase.decay]
  return float(falling(local - phase.warmup_steps))


def _transform(cfg: OptimConfig, layout: Layout, label: str, paths):
  """What turns gradients into steps, to be subtracted."""
  if label.endswith(_MUON):
    sides = {path: _sides(layout.rows[path]) for path in paths}
    scale = optax.chain(
      # No iterations: momentum, divided by its norm.
      contrib.scale_by_muon(
        ns_steps=0,
        beta=_MUON_MOMENTUM,
        mu_dtype=jnp.float32,
        weight_dimension_numbers=lambda _: sides,
      ),
      optax.stateless(lambda steps, _: _orthogonal(steps, layout)),
    )
  else:
    scale = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=jnp.float32)
  decays = lambda path: not any(re.match(p, path) for p in cfg.no_decay)
  return optax.chain(
    scale,
    optax.add_decayed_weights(
      cfg.weight_decay, lambda params: {path: decays(path) for path in params}
    ),
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
  spec = dict(enumerate(layout.sharding(path).spec))
  size = lambda axes: math.prod(shape[i] for i in axes)
  sides = sorted(_sides(layout.rows[path]), key=size)
  layers = sorted(set(range(len(shape))).difference(*sides))
  return Matrices(
    (*layers, *sides[0], *sides[1]),
    (size(layers), size(sides[0]), size(sides[1])),
    (spec.get(sides[0][0]), spec.get(sides[1][0])),
  )


def _orthogonal(steps: Flat, layout: Layout) -> dict[str, jax.Array]:
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
    x = _newton_schulz(x) * _MUON_RMS * long**0.5
    x = jax.lax.with_sharding_constraint(x, where(None))
    first = 0
    for path in paths:
      order, (layers, *_), _ = found[path]
      part = x[first : first + layers]
      part = part.reshape([layout.shapes[path][i] for i in order])
      out[path] = part.transpose(np.argsort(order))
      first += layers
  return out


def _newton_schulz(x: jax.Array) -> jax.Array:
  """Nearly orthogonal matrices [L, shorter, longer] of any, by 5 iterations."""
  short, long = x.shape[1:]
  # 3 products an iteration with the matrix, or 2 in all and 17 of its Gram
  # matrix. In bfloat16, of which accelerators make products unless told not
  # to, the latter is not accurate enough.
  if 2 * long > 3 * short:
    return jax.lax.platform_dependent(x, cpu=_by_gram, default=_by_iterates)
  return _by_iterates(x)


# Without momentum it has no state to keep.
_PLAIN = contrib.scale_by_muon(
  ns_steps=_MUON_STEPS,
  beta=0.0,
  nesterov=False,
  weight_dimension_numbers=contrib.MuonDimensionNumbers(1, 2),
)


def _by_iterates(x):
  return _PLAIN.update(x, _PLAIN.init(x))[0]


def _by_gram(x):
  """The same: each iterate is a polynomial of x x' times x."""
  a, b, c = _PLAIN.init(x).ns_coeffs
  x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-8)
  gram = x @ x.mT
  product = None
  for step in range(1, _MUON_STEPS + 1):
    factor = b * gram + c * (gram @ gram) + a * jnp.eye(x.shape[1])
    product = factor if product is None else factor @ product
    if step < _MUON_STEPS:
      gram = factor @ gram @ factor  # they commute
  return product @ x


def _groups(cfg: OptimConfig, layout: Layout) -> dict[str, list[str]]:
  """The layout's groups; of each, what Muon moves has a state of its own."""
  found: dict[str, list[str]] = {}
  for label, paths in layout.groups().items():
    for path in paths:
      muon = any(re.match(p, path) for p in cfg.muon)
      found.setdefault(label + _MUON * muon, []).append(path)
  return found


def init(cfg: OptimConfig, layout: Layout, params: Flat) -> dict[str, Any]:
  """{group: optimiser state}.

  Raises:
    InputError: `cfg.muon` matches what is no matrix.
  """
  return {
    label: _transform(cfg, layout, label, paths).init(
      {path: params[path] for path in paths}
    )
    for label, paths in _groups(cfg, layout).items()
  }


def update(
  cfg: OptimConfig,
  layout: Layout,
  phase: int,
  grads: Flat,
  state: Mapping[str, Any],
  params: Flat,
  lr: jax.Array,
) -> tuple[dict[str, jax.Array], dict[str, Any], jax.Array]:
  """One step of a phase.

  Args:
    phase: index; static.
    grads: f32, of the paths that train in it.
    state, params: of all trained paths.
    lr: f32[].
  Returns:
    parameters, state, and the gradient's global norm before clipping.
  """
  norm = optax.global_norm(grads)
  if cfg.clip_norm:
    scale = jnp.minimum(1.0, cfg.clip_norm / jnp.maximum(norm, 1e-12))
    grads = {path: g * scale for path, g in grads.items()}
  params, state = dict(params), dict(state)
  for label, paths in _groups(cfg, layout).items():
    if paths[0] not in layout.active[phase]:
      continue
    own = {path: params[path] for path in paths}
    given = {path: grads[path] for path in paths}
    step, state[label] = _transform(cfg, layout, label, paths).update(
      given, state[label], own
    )
    params |= {path: own[path] - lr * step[path] for path in paths}
  return params, state, norm
