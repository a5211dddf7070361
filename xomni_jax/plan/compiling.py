"""Programs compiled for devices that are not there, and what they need."""

import collections
import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from xomni_jax import mesh as mesh_lib
from xomni_jax import params as params_lib
from xomni_jax.errors import InputError

LIBTPU = "libtpu==0.0.52"  # compiles for all slices below
_GIB = 2**30
# Per JAX device; of a TPU7x chip's 192 GiB each of its two devices has half.
_HBM_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96}
# Without these libtpu asks a metadata server that only a TPU machine has, and
# refuses to be loaded by two processes at once.
_LIBTPU_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "TPU_ACCELERATOR_TYPE": "v5litepod-1",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
}
_COLLECTIVE = re.compile(
  r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
  r"(?:-start)?\("
)
_ALL_REDUCE = re.compile(r"= (.*?) all-reduce(?:-start)?\(")
_SHAPE = re.compile(r"[a-z]+[0-9]+\[[0-9,]+\]")


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices to compile for.

  Attributes:
    name: "v5e:2x4", a TPU slice by its topology; or "cpu:8".
    devices: what a mesh is made of.
    hbm: bytes of memory per device; None: not known.
  """

  name: str
  devices: Sequence[Any]
  hbm: int | None


@dataclasses.dataclass(frozen=True)
class Plan:
  """What one compiled program needs.

  Attributes:
    name, what: of the program: "decode", and its sizes in words.
    target, mesh: what it was compiled for.
    arguments, outputs, temporaries, aliased, peak: bytes per device; `aliased`
      are outputs that take the place of donated arguments.
    hbm: bytes there are per device; None: not known.
    compile_seconds: of XLA, without tracing.
    collectives: {operation: how many in the program}, a loop's body counted
      once; None: the program can't be printed.
    all_reduced: shapes of the arrays that all-reduces sum, such as
      "f32[4,112,18944]", each once; None likewise.
    replicated: parameters that lie whole on each device because their size is
      not divisible.
  """

  name: str
  what: str
  target: str
  mesh: str
  arguments: int
  outputs: int
  temporaries: int
  aliased: int
  peak: int
  hbm: int | None
  compile_seconds: float
  collectives: dict[str, int] | None
  all_reduced: tuple[str, ...] | None
  replicated: tuple[str, ...]

  def __str__(self) -> str:
    peak = _size(self.peak)
    if self.hbm:
      peak += f" of {self.hbm // _GIB} GiB ({self.peak / self.hbm:.0%})"
    counts = "not known, the program can't be printed"
    if self.collectives is not None:
      counts = ", ".join(f"{n} {op}" for op, n in self.collectives.items())
    lines = [
      f"{self.name}: {self.what}",
      f"  on {self.target}: {self.mesh}, compiled in "
      f"{self.compile_seconds:.0f} s",
      f"  peak per device  {peak}",
      f"    arguments      {_size(self.arguments)}",
      f"    output         {_size(self.outputs)}, {_size(self.aliased)} of it "
      "in place of arguments",
      f"    temporaries    {_size(self.temporaries)}",
      f"  collectives      {counts or 'none'}",
    ]
    if self.replicated:
      lines.append(f"  on every device  {', '.join(self.replicated)}")
    return "\n".join(lines)


def _size(count: int) -> str:
  """Bytes in words."""
  if count < _GIB / 10:
    return f"{count / 2**20:.2f} MiB"
  return f"{count / _GIB:.2f} GiB"


def open_target(name: str) -> Target:
  """The devices of a TPU slice or of the CPU.

  From here on this process computes on the CPU.

  Raises:
    InputError: there is no such slice, or libtpu is not installed.
  """
  kind, _, shape = name.partition(":")
  if kind == "cpu":
    return Target(name, _cpu_devices(name, shape), None)
  if re.search("(?<![0-9])0+(?![0-9])", name):  # libtpu would divide by it
    raise InputError(
      f"target {name!r}: no such TPU slice (a side is 0); expected for example "
      "v5e:2x4, v6e:4x4 or v5p:2x2x1"
    )
  if importlib.util.find_spec("libtpu") is None:
    raise InputError(
      f"target {name}: compiling for a TPU needs libtpu; pip install {LIBTPU}"
    )
  jax.config.update("jax_platforms", "cpu")
  for key, value in _LIBTPU_ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  from jax.experimental import topologies

  # By default a v4 chip would count as two devices, which JAX gave up.
  options = {"chip_config_name": "megacore"} if kind == "v4" else {}
  try:
    topology = topologies.get_topology_desc(name, "tpu", **options)
  except (jax.errors.JaxRuntimeError, NotImplementedError) as e:
    reason = str(e).splitlines()[0]
    raise InputError(
      f"target {name!r}: no such TPU slice ({reason}); expected for example "
      "v5e:2x4, v6e:4x4 or v5p:2x2x1"
    ) from None
  hbm = _HBM_GIB.get(kind)
  return Target(name, topology.devices, hbm and hbm * _GIB)


def _cpu_devices(name, count):
  if not count.isdigit() or not int(count):
    raise InputError(f"target {name!r}: expected cpu:COUNT, for example cpu:8")
  jax.config.update("jax_platforms", "cpu")
  # Too late, and no harm, in a process that has used its devices already.
  with contextlib.suppress(RuntimeError):
    jax.config.update("jax_num_cpu_devices", int(count))
  devices = jax.devices("cpu")
  if len(devices) < int(count):
    raise InputError(f"target {name}: this process has {len(devices)} devices")
  return devices[: int(count)]


def mesh_of(target: Target, sizes: str) -> Mesh:
  """The mesh "data=2,tensor=4" over all devices of a target."""
  parsed = mesh_lib.parse_sizes(sizes)
  count, wanted = len(target.devices), math.prod(parsed.values())
  if wanted != count:
    raise InputError(
      f"mesh {sizes!r} is for {wanted} devices, {target.name} has {count}; "
      "expected all of them in the mesh"
    )
  return mesh_lib.make_mesh(**parsed, devices=target.devices)


def place(mesh: Mesh, x, axes) -> jax.ShapeDtypeStruct:
  """An abstract array with the sharding of its logical axes."""
  return jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=mesh_lib.sharding(axes, x.shape, mesh)
  )


def place_params(table, tree, mesh: Mesh, dtype=jnp.bfloat16):
  """Abstract parameters as they would be loaded."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s),
    tree,
    params_lib.shardings(table, tree, mesh),
  )


def compile_plan(
  name: str,
  what: str,
  target: Target,
  mesh: Mesh,
  program: Any,
  args: Sequence[Any],
  replicated: Sequence[str] = (),
) -> Plan:
  """Compiles a jitted program for abstract arguments.

  Raises:
    InputError: XLA finds no way to fit it into the memory of a device.
  """
  with jax.set_mesh(mesh):
    lowered = program.lower(*args)
    start = time.perf_counter()
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      reason = str(e).splitlines()[0]
      raise InputError(
        f"{name} on {target.name}, {mesh_lib.describe(mesh)}: {reason}; "
        "split it over more devices with --mesh"
      ) from None
    seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  return Plan(
    name,
    what,
    target.name,
    mesh_lib.describe(mesh),
    memory.argument_size_in_bytes,
    memory.output_size_in_bytes,
    memory.temp_size_in_bytes,
    memory.alias_size_in_bytes,
    memory.peak_memory_in_bytes,
    target.hbm,
    round(seconds, 1),
    *_collectives(compiled),
    tuple(replicated),
  )


def _collectives(compiled):
  """{operation: count} and the shapes of what is all-reduced, or None twice."""
  try:
    text = compiled.as_text()
  except Exception:  # fails on some very large programs; the bytes are known
    return None, None
  counts = collections.Counter(_COLLECTIVE.findall(text)).most_common()
  shapes = {
    shape
    for result in _ALL_REDUCE.findall(text)
    for shape in _SHAPE.findall(result)
  }
  return dict(counts), tuple(sorted(shapes))
