"""Plans of what stage `grpo` runs besides its step: draw, paint, measure."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from xomni_jax import mesh as mesh_lib
from xomni_jax import params as params_lib
from xomni_jax.inference import flux1, painter, sampling
from xomni_jax.models import ar, flux, vq
from xomni_jax.plan.compiling import (
  Plan,
  Target,
  compile_plan,
  place,
  place_params,
)
from xomni_jax.training import configure
from xomni_jax.training import step as step_lib
from xomni_jax.training.layout import make_layout
from xomni_jax.training.stages import grpo_program

_TEXT = 512  # T5 tokens of a prompt, padding included


def plan_rollout(
  config: ConfigDict, target: Target, mesh: Mesh | None = None
) -> list[Callable[[], Plan]]:
  """What makes a rollout of images of the largest size, each to be compiled.

  Args:
    config: of stage `grpo`.
    target: on whose devices the run's mesh and its rollout's mesh lie.
    mesh: the run's; None: the config's own.
  """
  cfg, arch = configure.parse(config, "config")
  count, opts = len(target.devices), cfg.options
  make = lambda sizes: mesh_lib.make_mesh(
    **mesh_lib.fill(dict(sizes), count), devices=target.devices
  )
  mesh = mesh or make(cfg.mesh)
  rollout = make(opts.rollout_mesh) if opts.rollout_mesh else mesh
  px = arch.siglip.patch
  h, w = max(
    ((h // px, w // px) for h, w in opts.sizes), key=lambda g: g[0] * g[1]
  )

  def draw():
    n = opts.sample_rows or cfg.global_batch * opts.minibatches
    table, tree = ar.rows(arch.ar), ar.abstract(arch.ar)
    how = dict(cfg=arch.ar, compute=cfg.compute)
    params = place_params(table, tree, rollout, cfg.compute.dtype)
    prompts = n // opts.group_size
    state = jax.eval_shape(
      partial(
        sampling.prefill,
        **how,
        steps=h * w,
        copies=(opts.group_size,) * prompts,
      ),
      params,
      jax.ShapeDtypeStruct((prompts, opts.prompt_len), jnp.int32),
      jax.ShapeDtypeStruct((prompts, opts.prompt_len), bool),
      jax.eval_shape(partial(sampling.sequence_keys, 0, n)),
    )
    state = jax.tree.map(partial(place, rollout), state, state.axes())
    filters = sampling.Sampling(
      opts.temperature, opts.top_k, opts.top_p, opts.min_p
    )
    steps = partial(
      sampling.image_steps,
      **how,
      sampling=filters,
      steps=h * w,
      keep_support=grpo_program.has_support(cfg),
    )
    return compile_plan(
      "grpo draw",
      f"{h * w} codes of {n} images, {cfg.compute.dtype}",
      target,
      rollout,
      jax.jit(steps, donate_argnums=1),
      (params, state),
      replicated=params_lib.replicated(table, tree, rollout),
    )

  def paint():
    n, guided = opts.paint_rows, opts.paint_cfg_scale != 1
    tables = {
      "vq": (vq.rows(arch.vq), vq.abstract(arch.vq)),
      "flux": (flux.rows(arch.flux), flux.abstract(arch.flux)),
      **flux1.tables_of(arch.vae, arch.clip, arch.t5),
    }
    rows = lambda *shape: place(
      rollout,
      jax.ShapeDtypeStruct(shape, jnp.int32),
      ("batch", None)[: len(shape)],
    )
    texts = 2 * n if guided else n
    program = partial(
      painter.paint_rows,
      arch=arch,
      compute=cfg.compute,
      grid=(h, w),
      cfg_scale=opts.paint_cfg_scale,
    )
    return compile_plan(
      "grpo paint",
      f"{n} images of {h} x {w} codes, {opts.paint_steps} steps, "
      f"{cfg.compute.dtype}",
      target,
      rollout,
      jax.jit(program),
      (
        {
          name: place_params(*table, rollout, cfg.compute.dtype)
          for name, table in tables.items()
        },
        rows(n, h * w),
        rows(texts, _TEXT),
        rows(texts, arch.clip.max_position_embeddings),
        jax.eval_shape(partial(sampling.sequence_keys, 0, n)),
        jax.ShapeDtypeStruct((opts.paint_steps + 1,), jnp.float32),
      ),
    )

  def measure():
    n = opts.score_rows or cfg.global_batch
    program = grpo_program.program(cfg, arch)
    layout = make_layout(program.parts, cfg.phases, mesh, cfg.frozen_dtype)
    split = step_lib.batch_sharding(mesh)
    batch = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split)
      for name, x in grpo_program.shapes(cfg, arch, n).items()
      if name not in ("logp_old", "logp_ref")
    }
    params = {
      path: jax.ShapeDtypeStruct(
        layout.shapes[path], layout.dtype(path), sharding=layout.sharding(path)
      )
      for path in layout.rows
    }
    return compile_plan(
      "grpo measure",
      f"log-probs of {n} images, policy and reference, {cfg.compute.dtype}",
      target,
      mesh,
      step_lib.rows_step(cfg, layout, program.measure),
      (params, batch),
    )

  return [draw, paint, measure]
