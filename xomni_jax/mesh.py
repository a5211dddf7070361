"""The device mesh, and which logical axis lies on which mesh axis.

`RULES` is the only place that names mesh axes for arrays; models speak of
logical axes. An axis whose size its mesh axes do not divide is replicated.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from xomni_jax.errors import InputError

# `slice` counts TPU slices, which only a data-centre network (DCN) joins.
AXES = ("slice", "data", "fsdp", "tensor", "context")
# The axes that a batch's rows are split over: every device along them has
# other rows, and a training step sums gradients over them.
BATCH_AXES = ("slice", "data", "fsdp")
PIECE_BYTES = 2**28

RULES: Mapping[str, tuple[str, ...]] = {
  # activations
  "batch": BATCH_AXES,
  "length": ("context",),
  # parameters, and activations split by head
  "embed": ("fsdp",),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "mlp": ("tensor",),
  "vocab": ("tensor",),
  "fan_in": ("fsdp",),
  "fan_out": ("tensor",),
}


def make_mesh(
  data: int = 1,
  fsdp: int = 1,
  tensor: int = 1,
  context: int = 1,
  devices: Sequence[jax.Device] | None = None,
  *,
  slice: int = 1,  # the axis's name, as all others
) -> Mesh:
  """A mesh over the first `slice * data * fsdp * tensor * context` devices.

  Raises:
    InputError: a size is below 1, there are too few devices, several processes
      would leave some of theirs out, or `slice` is not the number of TPU slices
      they lie on.
  """
  sizes = (slice, data, fsdp, tensor, context)
  of_all = devices is None
  devices = jax.devices() if of_all else list(devices)
  count = math.prod(sizes)
  given = ", ".join(f"{a}={n}" for a, n in zip(AXES, sizes, strict=True))
  if of_all and count < len(devices) and jax.process_count() > 1:
    # Each process holds what lies on its devices, and some had nothing.
    raise InputError(
      f"mesh {given} has {count} of {len(devices)} devices, expected all of "
      f"{jax.process_count()} processes; -1 gives an axis what is left"
    )
  if min(sizes) < 1 or count > len(devices):
    raise InputError(
      f"mesh {given} needs {count} devices, got {len(devices)}; "
      "lower a size (each at least 1)"
    )
  slices = {getattr(d, "slice_index", 0) for d in devices[:count]}
  if len(slices) > 1:
    return _over_slices(sizes, devices[:count], len(slices))
  types = (AxisType.Auto,) * len(AXES)
  try:
    return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices[:count])
  except NotImplementedError:
    # An axis that is no product of the slice's own, such as 32 of 16 x 16.
    array = mesh_utils.create_device_mesh(
      sizes, devices[:count], allow_split_physical_axes=True
    )
    return Mesh(array, AXES, axis_types=types)
  except AssertionError:  # JAX's, for a part of a TPU slice that is no block
    raise InputError(
      f"mesh of {count} of {len(devices)} devices is no block of the slice; "
      f"use all {len(devices)}"
    ) from None


def to_host(x: jax.Array) -> np.ndarray:
  """The whole of an array, on the host of every process; all call it.

  Between processes it goes through every device whole: a large one in pieces
  of its second axis, which are about `PIECE_BYTES` each.
  """
  if x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  gather = functools.partial(multihost_utils.process_allgather, tiled=True)
  return _in_pieces(x, gather, PIECE_BYTES)


def _in_pieces(x, gather, most):
  """`gather(x)`, of pieces of at most so many bytes, or of a column."""
  if x.nbytes <= most or x.ndim < 2:
    return gather(x)
  out, count = np.empty(x.shape, x.dtype), x.shape[1]
  size = max(1, count * most // x.nbytes)
  for first in range(0, count, size):
    # The last one overlaps the one before: one program cuts them all.
    first = min(first, count - size)
    out[:, first : first + size] = gather(_columns(x, first, size))
  return out


@functools.partial(jax.jit, static_argnums=2)
def _columns(x, first, size):
  return jax.lax.dynamic_slice_in_dim(x, first, size, 1)


def rows_held(mesh: Mesh) -> int:
  """Of the shares that a batch is split into, those of the first process."""
  first = mesh.devices.flat[0].process_index
  split = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
  ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  return len(
    {
      index[0].start
      for device, index in split.devices_indices_map((ways,)).items()
      if device.process_index == first
    }
  )


def fill(sizes: Mapping[str, int], count: int) -> dict[str, int]:
  """Axis sizes in which one -1 stands for what is left of `count` devices.

  Raises:
    InputError: an axis is unknown or its size neither -1 nor above 0, several
      are -1, or the others do not divide `count`.
  """
  good = all(n == -1 or n > 0 for n in sizes.values())
  if not good or not sizes.keys() <= {*AXES}:
    raise InputError(
      f"mesh {dict(sizes)}: expected some of the axes {', '.join(AXES)}, each "
      "of a size above 0, or -1 for what is left"
    )
  fixed = math.prod(n for n in sizes.values() if n != -1)
  free = [axis for axis, n in sizes.items() if n == -1]
  if len(free) > 1 or (free and count % fixed):
    raise InputError(
      f"mesh {dict(sizes)} does not fit {count} devices; expected one -1 at "
      "most, and sizes whose product divides them"
    )
  return dict(sizes) | {axis: count // fixed for axis in free}


def _over_slices(sizes, devices, count):
  """A mesh whose first axis goes from slice to slice."""
  if sizes[0] != count:
    raise InputError(
      f"mesh axis slice={sizes[0]}, but the devices lie on {count} slices; "
      f"give slice={count}"
    )
  array = mesh_utils.create_hybrid_device_mesh(
    (1, *sizes[1:]), (count, 1, 1, 1, 1), devices
  )
  return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse_sizes(text: str) -> dict[str, int]:
  """{axis: size} of "data=2,fsdp=2,tensor=2"; axes may be left out."""
  sizes = {}
  for item in filter(None, text.split(",")):
    name, _, value = item.partition("=")
    if name not in AXES or not value.isdigit() or name in sizes:
      raise InputError(
        f"mesh {text!r}: {item!r} is not one of {', '.join(AXES)} = a count, "
        "each at most once; write for example data=2,fsdp=2,tensor=2"
      )
    sizes[name] = int(value)
  return sizes


def parse_mesh(text: str) -> Mesh:
  """A mesh from "data=2,fsdp=2,tensor=2" (axes left out are 1)."""
  return make_mesh(**parse_sizes(text))


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh):
  """PartitionSpec of an array with these logical axes.

  Of an axis's mesh axes the longest prefix that divides its size is used.
  """
  parts = []
  for name, size in zip(axes, shape, strict=True):
    chosen, count = [], 1
    for axis in RULES.get(name, ()):
      if axis not in mesh.shape:
        continue
      count *= mesh.shape[axis]
      if size % count:
        break
      chosen.append(axis)
    parts.append(tuple(chosen) or None)
  return PartitionSpec(*parts)


def sharding(axes, shape, mesh: Mesh) -> NamedSharding:
  """`spec` on its mesh."""
  return NamedSharding(mesh, spec(axes, shape, mesh))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """`x` with its logical axes laid out by RULES on the mesh in force.

  Without a mesh (`jax.set_mesh`) it is `x` itself.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  # Inside `shard_map` an array holds this device's part of its manual axes:
  # only the others are left to lay out.
  auto = {a: n for a, n in mesh.shape.items() if a not in mesh.manual_axes}
  if not auto:
    return x
  sizes = types.SimpleNamespace(shape=auto)
  return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, sizes))


def ways(name: str) -> int:
  """Over how many devices a logical axis is split on the mesh in force.

  Manual axes (inside `shard_map`) do not count.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return 1
  return math.prod(
    mesh.shape[a]
    for a in RULES.get(name, ())
    if a in mesh.shape and a not in mesh.manual_axes
  )


def fits(name: str, size: int) -> bool:
  """Whether an axis of this size is split over all of its devices."""
  return size % ways(name) == 0


def run_split(function, args, axes, out_axes, kernel=None):
  """`function(*args)` on each device's part of the arguments.

  For kernels that XLA can't split by itself. Inside another `shard_map` the
  axes that are manual there stay so.

  Args:
    function: of the parts.
    args: arrays; the first may be a kernel that splits itself.
    axes: logical axes of each argument.
    out_axes: of the result, whose axes are named in an argument too.
    kernel: sharding -> spec of the first argument, named by its last two axes.
  """
  mesh = jax.sharding.get_abstract_mesh()
  auto = () if mesh.empty else set(mesh.axis_names) - set(mesh.manual_axes)
  if not auto:  # axes of one device count: XLA asks for them all the same
    return function(*args)
  sizes = types.SimpleNamespace(shape={a: mesh.shape[a] for a in auto})
  length = {}
  for names, x in zip(axes, args, strict=True):
    if hasattr(x, "shape"):
      length |= dict(zip(names, x.shape, strict=True))
  specs = [
    spec(names, [length.get(n, 1) for n in names], sizes) for names in axes
  ]
  if kernel is not None:
    pair = PartitionSpec(*specs[0][1:])
    plain = AbstractMesh(tuple(sizes.shape.values()), tuple(sizes.shape))
    specs[0] = kernel(NamedSharding(plain, pair))
  out = spec(out_axes, [length.get(n, 1) for n in out_axes], sizes)
  return jax.shard_map(
    function,
    in_specs=tuple(specs),
    out_specs=out,
    axis_names=set(auto),
    check_vma=False,
  )(*args)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Shard:
  """A device's part of a parameter that is whole along one axis only together.

  Attributes:
    part: the part.
    axis: which axis of `part`, counted from the end so that it holds for a
      layer of a stack too.
    over: the mesh axis it is split over.
  """

  part: jax.Array
  axis: int = dataclasses.field(metadata={"static": True})
  over: str = dataclasses.field(metadata={"static": True})


def gather(tree, *, row_major: bool = False):
  """A tree with every Shard in it gathered (inside `shard_map`).

  The transpose is a reduce-scatter: a gradient never exists whole on a device
  for longer than its layer.

  Args:
    row_major: of matrices that are no matmul's alone, such as embeddings; see
      `_scatter_rows`.
  """

  def whole(x):
    if not isinstance(x, Shard):
      return x
    axis = x.part.ndim + x.axis
    if row_major and x.part.ndim == 2 and axis == 1:
      return _gather_columns(x.part, x.over)
    return jax.lax.all_gather(x.part, x.over, axis=axis, tiled=True)

  return jax.tree.map(whole, tree, is_leaf=lambda x: isinstance(x, Shard))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_columns(part, over):
  return jax.lax.all_gather(part, over, axis=1, tiled=True)


def _scatter_rows(over, _, gradient):
  """The transpose of `_gather_columns`.

  XLA for TPU reduce-scatters only along an axis whose shard is a multiple of
  a tile; else it sums the whole gradient and cuts the shard out. Of 3584
  columns 32 devices have 112 each, no multiple of the 128 lanes of the last
  axis, but of the 16 rows of the one before. Inside a block XLA picks the
  layout so by itself; an embedding's lookup pins it the other way.
  """
  upright = with_layout_constraint(gradient.T, Layout((0, 1)))
  return (jax.lax.psum_scatter(upright, over, tiled=True).T,)


_gather_columns.defvjp(
  lambda part, over: (_gather_columns(part, over), None), _scatter_rows
)


def describe(mesh: Mesh) -> str:
  """One line: devices and the size of each mesh axis above 1."""
  sizes = [f"{a}={n}" for a, n in mesh.shape.items() if n > 1]
  kind = mesh.devices.flat[0].device_kind
  return f"{mesh.size} x {kind}" + (f" ({', '.join(sizes)})" if sizes else "")
