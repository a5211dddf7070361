"""The device mesh, and which logical axis lies on which mesh axis.

`RULES` is the only place that names mesh axes for arrays; models speak of
logical axes. An axis whose size its mesh axes do not divide is replicated.
"""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xomni_jax.errors import InputError

AXES = ("data", "fsdp", "tensor", "context")

RULES: Mapping[str, tuple[str, ...]] = {
  # activations
  "batch": ("data", "fsdp"),
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
) -> Mesh:
  """A mesh over the first `data * fsdp * tensor * context` devices.

  Raises:
    InputError: a size is below 1, or there are too few devices.
  """
  sizes = (data, fsdp, tensor, context)
  devices = jax.devices() if devices is None else list(devices)
  count = math.prod(sizes)
  if min(sizes) < 1 or count > len(devices):
    given = ", ".join(f"{a}={n}" for a, n in zip(AXES, sizes, strict=True))
    raise InputError(
      f"mesh {given} needs {count} devices, got {len(devices)}; "
      "lower a size (each at least 1)"
    )
  try:
    return jax.make_mesh(
      sizes,
      AXES,
      axis_types=(AxisType.Auto,) * len(AXES),
      devices=devices[:count],
    )
  except AssertionError:  # JAX's, for a part of a TPU slice that is no block
    raise InputError(
      f"mesh of {count} of {len(devices)} devices is no block of the slice; "
      f"use all {len(devices)}"
    ) from None


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
    chosen, ways = [], 1
    for axis in RULES.get(name, ()):
      ways *= mesh.shape.get(axis, 1)
      if size % ways:
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
  return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def describe(mesh: Mesh) -> str:
  """One line: devices and the size of each mesh axis above 1."""
  sizes = [f"{a}={n}" for a, n in mesh.shape.items() if n > 1]
  kind = mesh.devices.flat[0].device_kind
  return f"{mesh.size} x {kind}" + (f" ({', '.join(sizes)})" if sizes else "")
