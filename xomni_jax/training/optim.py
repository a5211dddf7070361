"""AdamW, and Muon for the matrices that a config names, over phases.

Parameters that train in the same phases share an optimiser state with a count
of its own. A group's state stands still in phases that freeze it: moments are
carried over a phase boundary where a parameter goes on training, and start
from zero, bias correction included, where it is unfrozen.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
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
_MUON_RMS, _MUON_MOMENTUM = 0.2, 0.95
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
      contrib.scale_by_muon(
        beta=_MUON_MOMENTUM,
        mu_dtype=jnp.float32,
        weight_dimension_numbers=lambda _: sides,
      ),
      optax.stateless(
        lambda steps, _: {
          path: step * _MUON_RMS * _longer(step.shape, sides[path]) ** 0.5
          for path, step in steps.items()
        }
      ),
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


def muon_sharding(path: str, layout: Layout) -> NamedSharding:
  """Where a matrix lies while Muon finds its step.

  Devices along `slice` and `data` hold the same gradient, and would all compute
  the same from it, which may take longer than the gradient did. Each has a part
  of it instead: layers, or else what comes first of a side, the longer if it
  can, so that the matrix is split along that side.
  """
  where, shape = layout.sharding(path), layout.shapes[path]
  sides = _sides(layout.rows[path])
  axes = tuple(a for a in _ALIKE if where.mesh.shape[a] > 1)
  ways = math.prod(where.mesh.shape[a] for a in axes)
  spec = [*where.spec, *(None,) * (len(shape) - len(where.spec))]
  layers = set(range(len(shape))).difference(*sides)
  longer_first = sorted(sides, key=lambda s: -math.prod(shape[i] for i in s))
  for i in (*sorted(layers), *(side[0] for side in longer_first)):
    if axes and spec[i] is None and shape[i] % ways == 0:
      spec[i] = axes
      break
  return NamedSharding(where.mesh, PartitionSpec(*spec))


def _longer(shape, sides):
  return max(math.prod(shape[i] for i in side) for side in sides)


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
    if label.endswith(_MUON):
      given = {
        path: jax.lax.with_sharding_constraint(g, muon_sharding(path, layout))
        for path, g in given.items()
      }
    step, state[label] = _transform(cfg, layout, label, paths).update(
      given, state[label], own
    )
    params |= {path: own[path] - lr * step[path] for path in paths}
  return params, state, norm
