"""The compiled step: gradients on each device's rows, then the optimiser.

The loss runs inside `shard_map`, manual over the batch axes of the mesh and
left to XLA over `tensor` and `context`. There each device's gradient concerns
its own rows only, and a parameter that lies split over `fsdp` is gathered
layer by layer, whose transpose is a reduce-scatter. Left to XLA, whole weight
gradients were all-reduced wherever a shard is no multiple of a tile.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from xomni_jax import mesh as mesh_lib
from xomni_jax.errors import InputError
from xomni_jax.mesh import BATCH_AXES, Shard
from xomni_jax.train_config import TrainConfig
from xomni_jax.training import optim
from xomni_jax.training.layout import Layout, flatten, nest
from xomni_jax.training.stage import Context, Metrics, Program

State = dict[str, Any]  # step, params, optim, ema, extra


def init_state(cfg: TrainConfig, program: Program, layout: Layout, params):
  """The state before step 0, from flat f32 parameters of the trained paths."""
  return {
    "step": jnp.zeros((), jnp.int32),
    "params": params,
    "optim": optim.init(cfg.optim, layout, params),
    "ema": {k: v.copy() for k, v in params.items()} if cfg.optim.ema else {},
    "extra": program.extra(),
  }


def abstract_state(cfg: TrainConfig, program: Program, layout: Layout) -> State:
  """The state as ShapeDtypeStructs with shardings.

  Moments and averages lie as their parameters do; what `extra` has below a
  name "rows" is split as a batch is; the rest is on every device.
  """

  def place(path, leaf):
    # The last dict key on the way is a parameter's path if there is any.
    names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
    name = names[-1] if names else ""
    where = NamedSharding(layout.mesh, PartitionSpec())
    if name in layout.rows and leaf.shape == layout.shapes[name]:
      where = layout.sharding(name)
    elif names[:1] == ["extra"] and "rows" in names:
      where = batch_sharding(layout.mesh)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

  params = {
    path: jax.ShapeDtypeStruct(layout.shapes[path], jnp.float32)
    for path in layout.trained
  }
  whole = jax.eval_shape(
    lambda params: init_state(cfg, program, layout, params), params
  )
  return jax.tree_util.tree_map_with_path(place, whole)


def batch_sharding(mesh) -> NamedSharding:
  """Of every array of a batch: its rows over the batch axes."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_devices(cfg: TrainConfig, mesh) -> None:
  """Raises InputError where devices can't share, or not run, what is asked."""
  ways = 1
  for axis in BATCH_AXES:
    ways *= mesh.shape[axis]
  need = ways * cfg.optim.accumulate
  if cfg.global_batch % need:
    raise InputError(
      f"global_batch {cfg.global_batch} is not a multiple of {ways} batch "
      f"devices x {cfg.optim.accumulate} microbatches; try "
      f"{max(cfg.global_batch // need, 1) * need}"
    )
  held = mesh_lib.rows_held(mesh)
  count = len({device.process_index for device in mesh.devices.flat})
  if held * count != ways:
    raise InputError(
      f"mesh {mesh_lib.describe(mesh)}: a process holds {held} of {ways} "
      f"shares of a batch, expected a {count}th of them; axes tensor and "
      "context have to lie within a process"
    )
  kind = mesh.devices.flat[0].platform
  if cfg.compute.attention == "splash" and kind != "tpu":
    raise InputError(
      f"compute.attention is 'splash', a kernel for TPUs, and devices are "
      f"{kind}; set it to 'chunked'"
    )


def train_step(
  cfg: TrainConfig, program: Program, layout: Layout, phase: int
) -> Callable:
  """The jitted step of a phase, and of all that train the same parameters.

  Returns:
    (state, frozen, batch, key, lr) -> state, metrics. The state is donated;
    `frozen` are flat parameters, `batch` a global batch, `key` the run's.
  """
  active = sorted(layout.active[phase])

  def step(state, frozen, batch, key, lr):
    trained = {path: state["params"][path] for path in active}
    rest = {
      path: x for path, x in state["params"].items() if path not in trained
    }
    loss, metrics, totals, grads = _on_rows(cfg, program, layout, grads=True)(
      trained, {**rest, **frozen}, batch, key, state["step"]
    )
    before = state["params"], state["optim"]
    params, moments, norm = optim.update(
      cfg.optim, layout, phase, grads, state["optim"], state["params"], lr
    )
    # Where no row counts, momentum and decay alone would move parameters.
    some = jnp.any(jnp.stack(jax.tree.leaves(totals)) > 0)
    params, moments = jax.tree.map(
      lambda new, old: jnp.where(some, new, old), (params, moments), before
    )
    extra = state["extra"]
    if program.update:
      # Parameters that no gradient reaches, such as codes come back to life.
      tree = {**frozen, **params}
      context = Context(
        jax.random.fold_in(jax.random.fold_in(key, state["step"]), 1),
        state["step"],
        {},
      )
      tree, extra = program.update(nest(tree), extra, metrics, context)
      tree = flatten(tree)
      params = {path: tree[path] for path in params}
    ema, decay = state["ema"], cfg.optim.ema
    if decay:
      ema = {k: decay * v + (1 - decay) * params[k] for k, v in ema.items()}
    report = {
      **program.summarise(metrics),
      "loss": loss,
      "grad_norm": norm,
      # Not finite where the update was not, which no loss has seen yet.
      "param_norm": optax.global_norm({path: params[path] for path in active}),
      "lr": lr,
    }
    state = {
      "step": state["step"] + 1,
      "params": params,
      "optim": moments,
      "ema": ema,
      "extra": extra,
    }
    return state, report

  # Laid out as they came, or the next step would be another program.
  state = jax.tree.map(
    lambda x: x.sharding, abstract_state(cfg, program, layout)
  )
  whole = NamedSharding(layout.mesh, PartitionSpec())
  return jax.jit(step, donate_argnums=0, out_shardings=(state, whole))


def eval_step(cfg: TrainConfig, program: Program, layout: Layout) -> Callable:
  """(params, frozen, batch, key, done) -> metrics of held-out rows, jitted.

  `done` is the last step that the parameters have been through, i32[].
  """

  @jax.jit
  def step(params, frozen, batch, key, done):
    run = _on_rows(cfg, program, layout, grads=False)
    loss, metrics, *_ = run({}, {**params, **frozen}, batch, key, done)
    return {**program.summarise(metrics), "loss": loss}

  return step


def _on_rows(cfg, program, layout: Layout, *, grads: bool):
  """(trained, rest, batch, key, step) -> loss, metrics, totals, gradients.

  Of all microbatches and devices together, see `Program.loss`; each gradient
  lies as its parameter does; without `grads` there are none, {}.
  """
  pieces = cfg.optim.accumulate if grads else 1

  def body(trained, rest, batch, key, step):
    key = jax.random.fold_in(key, step) if grads else key
    totals = jax.lax.psum(program.totals(batch), BATCH_AXES)
    context = Context(key, step, totals, train=grads)

    def loss(trained, rows):
      tree = _view({**rest, **trained}, cfg, layout)
      return program.loss(tree, rows, context)

    def piece(rows):
      if not grads:
        return *loss({}, rows), {}
      value, gradient = jax.value_and_grad(loss, has_aux=True)(trained, rows)
      return *value, gradient

    if pieces == 1:
      out = piece(batch)
    else:
      rows = jax.tree.map(
        lambda x: x.reshape(pieces, x.shape[0] // pieces, *x.shape[1:]), batch
      )
      zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(piece, jax.tree.map(lambda x: x[0], rows)),
      )

      def add(total, rows):
        value, metrics, gradient = piece(rows)
        value, gradient = jax.tree.map(
          jnp.add, (total[0], total[2]), (value, gradient)
        )
        return (value, _joined(total[1], metrics), gradient), None

      out, _ = jax.lax.scan(add, zero, rows)
    value, metrics, gradient = out
    value = jax.lax.psum(value, BATCH_AXES)
    metrics = {
      name: (jax.lax.pmax if _is_peak(name) else jax.lax.psum)(x, BATCH_AXES)
      for name, x in metrics.items()
    }
    gradient = {path: _sum(path, g) for path, g in gradient.items()}
    return value, metrics, totals, gradient

  def _sum(path, gradient):
    where = layout.split(path)
    done = where[1] if where else None  # summed by the reduce-scatter
    return jax.lax.psum(gradient, [a for a in BATCH_AXES if a != done])

  def run(trained, rest, batch, key, step):
    whole = PartitionSpec()
    own = lambda flat: {path: layout.local(path) for path in flat}
    rows = {name: PartitionSpec(BATCH_AXES) for name in batch}
    return _by_device(
      body,
      layout,
      (own(trained), own(rest), rows, whole, whole),
      (whole, whole, whole, own(trained)),
    )(trained, rest, batch, key, step)

  return run


def _is_peak(name: str) -> bool:
  return name.endswith("_max")


def _joined(a: Metrics, b: Metrics) -> Metrics:
  """Metrics of two parts of a batch as those of both."""
  how = lambda name: jnp.maximum if _is_peak(name) else jnp.add
  return {name: how(name)(a[name], b[name]) for name in a}


def rows_step(cfg: TrainConfig, layout: Layout, fn: Callable) -> Callable:
  """What a function of parameters and rows gives for each row, jitted.

  It is computed as a loss is, to the last bit where the compiler wills.

  Args:
    fn: ({part: tree}, batch) -> arrays whose first axis is rows.
  Returns:
    (flat parameters, global batch) -> the arrays of `fn`, rows as there.
  """

  @jax.jit
  def step(params, batch):
    rows = PartitionSpec(BATCH_AXES)
    return _by_device(
      lambda flat, batch: fn(_view(flat, cfg, layout), batch),
      layout,
      (
        {path: layout.local(path) for path in params},
        {name: rows for name in batch},
      ),
      rows,
    )(params, batch)

  return step


def _view(flat, cfg: TrainConfig, layout: Layout):
  """A loss's view of parameters: small ones whole, stacks still to gather."""
  half = jnp.dtype(cfg.compute.dtype)
  out = {}
  for path, x in flat.items():
    where = layout.split(path)
    if where:
      # Half the bytes to send; a matmul would round them so anyway.
      x = Shard(x.astype(half) if x.dtype == jnp.float32 else x, *where)
      if not layout.rows[path].stacked:
        x = mesh_lib.gather(x, row_major=True)
    out[path] = x
  return nest(out)


def _by_device(body, layout, in_specs, out_specs):
  """`body` on each device's rows; over other axes XLA decides."""
  return jax.shard_map(
    body,
    mesh=layout.mesh,
    in_specs=in_specs,
    out_specs=out_specs,
    axis_names=set(BATCH_AXES),
    check_vma=False,
  )


def place_whole(rows: Mapping[str, Any], mesh) -> dict[str, jax.Array]:
  """Rows that every process has all of, as a global batch in their order."""
  where = batch_sharding(mesh)
  return {
    name: jax.make_array_from_callback(x.shape, where, lambda i, x=x: x[i])
    for name, x in rows.items()
  }


def place_batch(rows: Mapping[str, Any], mesh) -> dict[str, jax.Array]:
  """This process's rows as its part of a global batch.

  Where a process's devices do not lie side by side along the batch, its rows
  are spread over it: a batch is a set of rows, in no certain order.
  """
  make = partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
  return {name: make(x) for name, x in rows.items()}
