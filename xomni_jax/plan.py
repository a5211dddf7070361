"""`xomni plan`: compiles for hardware that is not there, and says what fits.

XLA's TPU compiler comes with libtpu and needs no TPU: programs are lowered for
the devices of a named slice, with abstract arrays that carry the shardings the
real ones would have, and the compiled program tells its bytes per device.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from xomni_jax import mesh as mesh_lib
from xomni_jax import params as params_lib
from xomni_jax.config import ARConfig, Compute, FluxConfig
from xomni_jax.config_files import load_architecture
from xomni_jax.errors import InputError
from xomni_jax.inference import flow, sampling
from xomni_jax.models import ar, flux

LIBTPU = "libtpu==0.0.52"  # what jax 0.10.2 goes with
_TEXT = 512  # T5 tokens of a prompt, padding included
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


def main(argv: list[str]) -> int:
  """Compiles the programs that are asked for and prints their plans.

  Raises:
    InputError: bad arguments, no libtpu, or a program that does not fit.
  """
  args = _parse(argv)
  arch = load_architecture(args.config)
  cell = 2 * arch.vae.factor
  if min(args.batch, args.cache) < 1 or args.size < cell or args.size % cell:
    raise InputError(
      f"batch {args.batch}, cache {args.cache} and size {args.size} px: "
      f"expected at least 1, 1 and a multiple of {cell}"
    )
  grid = (args.size // cell, args.size // cell)
  target = open_target(args.target)
  mesh = mesh_of(target, args.mesh) if args.mesh else None
  programs = {
    "decode": lambda: plan_decode(
      arch.ar, target, mesh, batch=args.batch, cache=args.cache
    ),
    "flux": lambda: plan_flux(arch.flux, target, mesh, grid=grid),
  }
  # Compiled anew whatever a cache holds, so that the seconds are true.
  jax.config.update("jax_enable_compilation_cache", False)
  plans = []
  for name, compile_it in programs.items():
    if args.program in (name, "all"):
      plans.append(compile_it())
      print(plans[-1], flush=True)
  if args.json:
    text = json.dumps([dataclasses.asdict(p) for p in plans], indent=2)
    pathlib.Path(args.json).write_text(text + "\n")
  return 0


class _Parser(argparse.ArgumentParser):
  def error(self, message):
    raise InputError(message)


def _parse(argv):
  parser = _Parser(
    prog="xomni plan",
    description="Compile for TPUs without one; print bytes per device.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add("--config", metavar="FILE[:SIZE]", help="default: configs/model.py:7b")
  add("--target", default="v5e:2x4", help="TPU slice, or cpu:COUNT")
  add("--program", choices=("decode", "flux", "all"), default="all")
  add("--batch", type=int, default=64, help="sequences of a decoding step")
  add("--cache", type=int, default=6000, help="positions of its cache")
  add("--size", type=int, default=1152, help="side of the painted image, px")
  add(
    "--mesh",
    metavar="data=N,fsdp=N,tensor=N",
    help="default: what was measured best for each program",
  )
  add("--json", metavar="FILE", help="write the plans there too")
  return parser.parse_args(argv)


def open_target(name: str) -> Target:
  """The devices of a TPU slice or of the CPU.

  From here on this process computes on the CPU.

  Raises:
    InputError: there is no such slice, or libtpu is not installed.
  """
  kind, _, shape = name.partition(":")
  if kind == "cpu":
    return Target(name, _cpu_devices(name, shape), None)
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
    _collectives(compiled),
    tuple(replicated),
  )


def _collectives(compiled) -> dict[str, int] | None:
  try:
    text = compiled.as_text()
  except Exception:  # fails on some very large programs; the bytes are known
    return None
  return dict(collections.Counter(_COLLECTIVE.findall(text)).most_common())
