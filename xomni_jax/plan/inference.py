"""Plans of the programs of inference: a decoding step, a denoising step."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from xomni_jax import mesh as mesh_lib
from xomni_jax import params as params_lib
from xomni_jax.config import ARConfig, Compute
from xomni_jax.flux_config import FluxConfig
from xomni_jax.inference import flow, sampling
from xomni_jax.models import ar, flux
from xomni_jax.plan.compiling import (
  Plan,
  Target,
  compile_plan,
  place,
  place_params,
)

_TEXT = 512  # T5 tokens of a prompt, padding included


def plan_decode(
  cfg: ARConfig,
  target: Target,
  mesh: Mesh | None = None,
  *,
  batch: int,
  cache: int,
) -> Plan:
  """One image token for each of `batch` sequences, in bfloat16.

  Args:
    cfg: of the AR transformer.
    target, mesh: None: tensor as wide as key/value heads go, the rest data.
    batch: sequences; guided ones count twice.
    cache: positions.
  """
  if mesh is None:
    count = len(target.devices)
    # Wider, and the cache would be whole on every device of a group.
    tensor = math.gcd(count, cfg.num_key_value_heads)
    mesh = mesh_lib.make_mesh(
      data=count // tensor, tensor=tensor, devices=target.devices
    )
  how = dict(cfg=cfg, compute=Compute(dtype="bfloat16", scan_layers=True))
  table, tree = ar.rows(cfg), ar.abstract(cfg)
  params = place_params(table, tree, mesh)
  state = jax.eval_shape(
    partial(sampling.prefill, **how, steps=cache, copies=(1,) * batch),
    params,
    jax.ShapeDtypeStruct((batch, 1), jnp.int32),
    jax.ShapeDtypeStruct((batch, 1), bool),
    jax.eval_shape(partial(sampling.sequence_keys, 0, batch)),
  )
  state = jax.tree.map(partial(place, mesh), state, state.axes())
  step = partial(sampling.image_step, **how, sampling=sampling.Sampling())
  return compile_plan(
    "decode",
    f"one token, {batch} sequences, cache {cache}, bfloat16",
    target,
    mesh,
    jax.jit(step, donate_argnums=1),
    (params, state),
    replicated=params_lib.replicated(table, tree, mesh),
  )


def plan_flux(
  cfg: FluxConfig,
  target: Target,
  mesh: Mesh | None = None,
  *,
  grid: tuple[int, int],
) -> Plan:
  """One guided Euler step of one image, in bfloat16.

  Args:
    cfg: of the FLUX transformer.
    target, mesh: None: the two branches of the guidance over fsdp, heads over
      tensor as far as they go, the rest data.
    grid: (rows, columns) of image tokens.
  """
  if mesh is None:
    count = len(target.devices)
    # On v5e:2x4 the least bytes (2.98 GiB; tensor=8 3.01) and the least time.
    fsdp = math.gcd(count, 2)
    tensor = math.gcd(count // fsdp, cfg.num_attention_heads)
    mesh = mesh_lib.make_mesh(
      count // fsdp // tensor, fsdp, tensor, devices=target.devices
    )
  table, tree = flux.rows(cfg), flux.abstract(cfg)

  def array(dtype, *shape):
    axes = ("batch", "length", None)[: len(shape)]
    return place(mesh, jax.ShapeDtypeStruct(shape, dtype), axes)

  tokens = math.prod(grid)
  args = (
    place_params(table, tree, mesh),
    array(jnp.float32, 1, tokens, cfg.in_channels),
    array(jnp.float32),
    array(jnp.float32),
    array(jnp.bfloat16, 2, _TEXT, cfg.joint_attention_dim),
    array(jnp.bfloat16, 2, cfg.pooled_projection_dim),
    array(jnp.bfloat16, 1, tokens, cfg.siglip_channels),
  )
  step = partial(
    flow.euler_step,
    cfg=cfg,
    compute=Compute(dtype="bfloat16", scan_layers=True),
    grid=grid,
    cfg_scale=2.0,  # any but 1, which has no second branch
  )
  return compile_plan(
    "flux",
    f"one guided step, {grid[0]} x {grid[1]} tokens, bfloat16",
    target,
    mesh,
    jax.jit(step, donate_argnums=1),
    args,
    replicated=params_lib.replicated(table, tree, mesh),
  )
