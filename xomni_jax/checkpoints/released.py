"""Import and export of weights in the released layout, through the table.

Import streams: each file is read once, tensor by tensor, cast, and placed with
its sharding. Export writes into a staging folder that becomes the real one
when all of it is there.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from xomni_jax import mesh as mesh_lib
from xomni_jax.checkpoints.tensor_files import TensorFile
from xomni_jax.errors import InputError
from xomni_jax.params import Row, check, matched, unflatten

# A stack up to this size is collected on the host and placed once, which needs
# no compilation; a larger one is written on the device layer by layer, so that
# the host never holds more of it than one layer.
HOST_STACK_BYTES = 32 * 2**20
MAX_SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Part:
  """One model of a checkpoint and the files that hold its weights.

  Attributes:
    name: what progress and errors call it.
    table, tree: its parameter table and abstract parameters.
    files: its weight files.
    ignore: regular expression of tensors that may be there unused.
  """

  name: str
  table: Sequence[Row]
  tree: Any
  files: Sequence[TensorFile]
  ignore: str = ""

  def __post_init__(self):
    found = {k: s for file in self.files for k, s in file.shapes.items()}
    where = self.files[0].path
    where = where if len(self.files) == 1 else where.parent
    check(self.table, self.tree, found, str(where), self.ignore)

  @property
  def tensors(self) -> int:
    """How many tensors an import reads."""
    return sum(
      len(row.keys(leaf.shape)) for row, leaf in matched(self.table, self.tree)
    )


def load(
  part: Part,
  mesh: jax.sharding.Mesh,
  dtype: str | None,
  progress: Callable[[], Any] = lambda: None,
):
  """The parameters of a part, placed on a mesh.

  Host memory beyond the placed arrays stays below the largest file plus the
  stacks of at most HOST_STACK_BYTES that span files.

  Args:
    part: what to read.
    mesh: where to place it, by the table's shardings.
    dtype: "float32" or "bfloat16"; None: as each tensor is stored (the widest
      of a stack).
    progress: called after each tensor.
  """
  stored = {k: d for file in part.files for k, d in file.dtypes.items()}
  entries, leaves = {}, {}
  for row, leaf in matched(part.table, part.tree):
    keys = row.keys(leaf.shape)
    kind = jnp.dtype(dtype or jnp.result_type(*(stored[k] for k in keys)))
    place = _Leaf(row, leaf.shape, kind, mesh)
    leaves[row.path] = place
    entries |= {key: (place, i) for i, key in enumerate(keys)}
  for file in part.files:
    with file.open() as read:
      for key in file.shapes:
        if key in entries:
          place, i = entries[key]
          place.add(i, read(key))
          progress()
  return unflatten({path: place.array for path, place in leaves.items()})


class _Leaf:
  """One array under construction; `array` once every layer was added."""

  def __init__(self, row, shape, dtype, mesh):
    self.row, self.shape, self.dtype = row, shape, dtype
    self.sharding = mesh_lib.sharding(row.axes, shape, mesh)
    size = int(np.prod(shape)) * dtype.itemsize
    self.on_host = not row.stacked or size <= HOST_STACK_BYTES
    self.left = len(row.keys(shape))
    self.array = None
    if row.stacked:
      self.layer_sharding = mesh_lib.sharding(row.axes[1:], shape[1:], mesh)

  def add(self, i: int, tensor: np.ndarray) -> None:
    layer = self.row.from_torch(tensor, self.shape)
    self.left -= 1
    if not self.on_host:
      if self.array is None:
        self.array = _zeros(self.shape, self.dtype, self.sharding)
      layer = np.ascontiguousarray(layer, self.dtype)
      layer = jax.device_put(layer, self.layer_sharding)
      self.array = _write(self.sharding)(self.array, layer, i)
      # Without waiting, the host would read ahead of the device.
      self.array.block_until_ready()
      return
    if self.array is None:
      # Never a view of the file: on CPU the device array may share it.
      self.array = np.empty(self.shape, self.dtype)
    self.array[i if self.row.stacked else ...] = layer
    if not self.left:
      self.array = jax.device_put(self.array, self.sharding)


def _zeros(shape, dtype, sharding):
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.cache
def _write(sharding):
  def write(whole, layer, i):
    return jax.lax.dynamic_update_index_in_dim(whole, layer, i, 0)

  return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def read_tensors(
  part: Part, dtype: str | None
) -> Iterator[tuple[str, np.ndarray]]:
  """(key, tensor) of a part through the table and back, file by file.

  Args:
    part: what to read; ignored tensors are left out.
    dtype: to cast to; None: as stored.
  """
  rows = {
    key: (row, leaf.shape)
    for row, leaf in matched(part.table, part.tree)
    for key in row.keys(leaf.shape)
  }
  for file in part.files:
    with file.open() as read:
      for key in file.shapes:
        if key in rows:
          row, shape = rows[key]
          layer = row.from_torch(read(key), shape)
          yield key, cast(row.to_torch(layer), dtype)


def cast(array: np.ndarray, dtype: str | None) -> np.ndarray:
  """`array`, contiguous, in another dtype (None: its own)."""
  return np.ascontiguousarray(array, jnp.dtype(dtype or array.dtype))


def write_safetensors(
  folder: pathlib.Path,
  stem: str,
  tensors: Iterable[tuple[str, np.ndarray]],
  max_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Writes tensors as `stem`.safetensors, or as shards with an index.

  Args:
    folder: an existing folder.
    stem: "model" or "diffusion_pytorch_model".
    tensors: (key, array), read one by one; at most one shard is in memory.
    max_bytes: a shard is closed before it would grow beyond this.
  """
  shards: list[list[str]] = []
  total, size, batch = 0, 0, {}

  def flush():
    if batch:
      save_file(
        batch, folder / f"{stem}.{len(shards)}.tmp", metadata={"format": "pt"}
      )
      shards.append(list(batch))
      batch.clear()

  for key, array in tensors:
    if size + array.nbytes > max_bytes:
      flush()
      size = 0
    # safetensors writes a transposed view in the order of its memory.
    batch[key] = np.ascontiguousarray(array)
    size += array.nbytes
    total += array.nbytes
  flush()
  names = [
    f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    for i in range(len(shards))
  ]
  if len(shards) == 1:
    names = [f"{stem}.safetensors"]
  for i, name in enumerate(names):
    (folder / f"{stem}.{i}.tmp").rename(folder / name)
  if len(shards) > 1:
    where = {
      k: name for name, keys in zip(names, shards, strict=True) for k in keys
    }
    write_json(
      folder / f"{stem}.safetensors.index.json",
      {"metadata": {"total_size": total}, "weight_map": where},
    )


def write_pt(
  path: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
  """Writes a pickled state dict; `.safetensors` by that suffix."""
  if path.suffix == ".safetensors":
    whole = {key: np.ascontiguousarray(array) for key, array in tensors}
    save_file(whole, path, metadata={"format": "pt"})
    return
  try:
    import torch
  except ImportError:
    raise InputError(
      f"{path.name}: writing a .pt file needs torch; install it, or export "
      "with --vit-format safetensors"
    ) from None

  def tensor(array):
    # A device's array is read-only, which torch warns of.
    array = np.require(array, requirements=["C", "W"])
    if array.dtype == jnp.bfloat16:
      return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)

  torch.save({key: tensor(array) for key, array in tensors}, path)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes indented JSON, keys in the order given."""
  path.write_text(
    json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
  )


@contextlib.contextmanager
def staged(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder to fill, which becomes `out` if nothing fails.

  Raises:
    InputError: `out` exists and is not an empty folder, or can't be made,
      replaced or written.
  """
  out = out.resolve()  # a link to a folder stays one
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise InputError(
      f"{out}: exists already; name a new folder, or remove it first"
    )
  if os.path.ismount(out):
    raise InputError(f"{out}: is a mount point; name a new folder in it")
  # To be seen, for a kill may leave gigabytes. See `checks.beside`: no pid.
  staging = out.with_name(f"{out.name}.partial-{uuid.uuid4().hex}")
  made = [parent for parent in out.parents if not parent.exists()]
  try:
    staging.mkdir(parents=True)
  except OSError as e:
    raise InputError(f"{out}: can't be made ({e.strerror})") from None
  try:
    yield staging
    if out.exists():
      out.rmdir()
    staging.rename(out)
  except BaseException as e:
    shutil.rmtree(staging, ignore_errors=True)
    for parent in made:
      with contextlib.suppress(OSError):
        parent.rmdir()
    # safetensors has an error of its own for a full disk.
    if isinstance(e, OSError | SafetensorError):
      raise InputError(
        f"{out} can't be written ({' '.join(str(e).split())}); make room "
        "there, or name another"
      ) from None
    raise
