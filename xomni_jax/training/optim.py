"""AdamW, and Muon for the matrices that a config names, over phases.

Parameters that train in the same phases share an optimiser state with a count
of its own. A group's state stands still in phases that freeze it: moments are
carried over a phase boundary where a parameter goes on training, and start
from zero, bias correction included, where it is unfrozen.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from xomni_jax.train_config import OptimConfig, Phase
from xomni_jax.training import muon
from xomni_jax.training.layout import Layout

Flat = Mapping[str, jax.Array]

_MUON = "/muon"  # ends the label of a group that it moves


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
    scale = muon.scale_by_muon(layout, paths)
  else:
    scale = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=jnp.float32)
  decays = lambda path: not any(re.match(p, path) for p in cfg.no_decay)
  return optax.chain(
    scale,
    optax.add_decayed_weights(
      cfg.weight_decay, lambda params: {path: decays(path) for path in params}
    ),
  )


def _groups(cfg: OptimConfig, layout: Layout) -> dict[str, list[str]]:
  """The layout's groups; of each, what Muon moves has a state of its own."""
  found: dict[str, list[str]] = {}
  for label, paths in layout.groups().items():
    for path in paths:
      moved = any(re.match(p, path) for p in cfg.muon)
      found.setdefault(label + _MUON * moved, []).append(path)
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
