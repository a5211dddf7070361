"""The parameter table: one row says what a parameter is called elsewhere, how
it is laid out there, and which logical axes it has here.

Import, export, shardings and the check of a checkpoint all follow from it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from einops import rearrange

from xomni_jax import mesh as mesh_lib
from xomni_jax.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]


def abstract_tree(init: Callable[[Any], Any]) -> Callable[[Any], Any]:
  """Decorator: `init(cfg)`'s tree as shapes and dtypes, nothing allocated.

  A config is traced once in a process: that takes up to a second for each
  model. What is returned may be changed.
  """

  @functools.cache
  def traced(cfg):
    return jax.eval_shape(lambda: init(cfg))

  @functools.wraps(init)
  def abstract(cfg):
    leaf = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.tree.map(leaf, traced(cfg))

  return abstract


@dataclasses.dataclass(frozen=True)
class Row:
  """One parameter, or one stack of them.

  Attributes:
    path: ours, parts joined by "/".
    key: PyTorch's; "{i}" stands for the layer index of a stack, and our array
      then has a leading axis `layers` that `layout` does not mention.
    layout: einops pattern "theirs -> ours"; the names on the right are the
      logical axes.
    first: the index in `key` of our layer 0.
  """

  path: str
  key: str
  layout: str
  first: int = 0

  @property
  def stacked(self) -> bool:
    return "{i}" in self.key

  @property
  def axes(self) -> tuple[str, ...]:
    names = tuple(self.layout.split("->")[1].split())
    return ("layers", *names) if self.stacked else names

  @property
  def groups(self) -> list[list[str]]:
    """Of each axis of PyTorch's tensor the logical axes that it is made of."""
    theirs = self.layout.split("->")[0]
    groups = re.findall(r"\(([^)]*)\)|(\S+)", theirs)
    return [(group or single).split() for group, single in groups]

  def keys(self, shape: Sequence[int]) -> list[str]:
    """PyTorch keys, one a layer of our array of this shape."""
    if not self.stacked:
      return [self.key]
    return [self.key.format(i=i + self.first) for i in range(shape[0])]

  def sizes(self, shape: Sequence[int]) -> dict[str, int]:
    """Size of each named axis of one layer."""
    names = dict(zip(self.axes, shape, strict=True))
    names.pop("layers", None)
    return names

  def torch_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of one of the PyTorch tensors behind our array of this shape."""
    sizes = {"1": 1, **self.sizes(shape)}
    return tuple(math.prod(sizes[n] for n in group) for group in self.groups)

  def from_torch(self, tensor, shape: Sequence[int]):
    """One layer in our layout, from one PyTorch tensor."""
    names = set(re.findall(r"[a-z]\w*", self.layout.split("->")[0]))
    sizes = {n: s for n, s in self.sizes(shape).items() if n in names}
    return rearrange(tensor, self.layout, **sizes)

  def to_torch(self, layer):
    """One PyTorch tensor, from one layer of our array."""
    theirs, ours = self.layout.split("->")
    return rearrange(layer, f"{ours} -> {theirs}")


def prefixed(
  path: str, key: str, table: Iterable[tuple[str, str, str]], first: int = 0
) -> list[Row]:
  """`table` of (path, key, layout) below a path and a key prefix."""
  return [Row(path + p, key + k, layout, first) for p, k, layout in table]


def dense(path: str, key: str, layout: str) -> list[tuple[str, str, str]]:
  """A linear or convolution layer with its bias, as two table entries.

  `layout` is the kernel's; the bias has PyTorch's first axis.
  """
  theirs, ours = (side.strip() for side in layout.split("->"))
  out = re.match(r"\([^)]*\)|\S+", theirs)[0]
  order = [n for n in ours.split() if n in out.strip("()").split()]
  return [
    (f"{path}/kernel", f"{key}.weight", layout),
    (f"{path}/bias", f"{key}.bias", f"{out} -> {' '.join(order)}"),
  ]


def norm(path: str, key: str, name: str) -> list[tuple[str, str, str]]:
  """A norm with scale and bias, as two table entries."""
  return [
    (f"{path}/scale", f"{key}.weight", f"{name} -> {name}"),
    (f"{path}/bias", f"{key}.bias", f"{name} -> {name}"),
  ]


def flatten(tree) -> dict[str, Any]:
  """{path: leaf} of a nested dict."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {"/".join(k.key for k in path): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The nested dict of {path: leaf}."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def matched(table: Sequence[Row], tree) -> list[tuple[Row, Any]]:
  """Each row with its leaf of `tree`.

  Raises:
    ValueError: rows and leaves are not one to one, or an axis count differs.
  """
  flat = flatten(tree)
  paths = [row.path for row in table]
  problems = [f"no row for {p}" for p in flat.keys() - set(paths)]
  problems += [f"no parameter {p}" for p in set(paths) - flat.keys()]
  problems += [f"two rows for {p}" for p in set(paths) if paths.count(p) > 1]
  problems += [
    f"{r.path}: axes {r.axes} for shape {flat[r.path].shape}"
    for r in table
    if r.path in flat and len(r.axes) != len(flat[r.path].shape)
  ]
  if problems:
    raise ValueError("parameter table: " + "; ".join(sorted(problems)))
  return [(row, flat[row.path]) for row in table]


def torch_shapes(table: Sequence[Row], tree) -> dict[str, tuple[int, ...]]:
  """{PyTorch key: shape} of a checkpoint that fits `tree`."""
  return {
    key: row.torch_shape(leaf.shape)
    for row, leaf in matched(table, tree)
    for key in row.keys(leaf.shape)
  }


def check(
  table: Sequence[Row], tree, found: Shapes, where: str, ignore: str = ""
) -> None:
  """Compares a checkpoint's keys and shapes with what `tree` needs.

  Args:
    table, tree: the parameter table and its (abstract) parameters.
    found: {PyTorch key: shape} of the checkpoint.
    where: the checkpoint, for the error.
    ignore: regular expression of keys that may be there unused.
  Raises:
    InputError: lists every missing, unused and misshapen tensor.
  """
  wanted = torch_shapes(table, tree)
  missing = sorted(wanted.keys() - found.keys())
  unused = sorted(
    k
    for k in found.keys() - wanted.keys()
    if not (ignore and re.fullmatch(ignore, k))
  )
  misshapen = [
    f"{k} {list(found[k])} instead of {list(wanted[k])}"
    for k in sorted(wanted.keys() & found.keys())
    if tuple(found[k]) != wanted[k]
  ]
  problems = [
    f"{len(names)} {what}: {', '.join(names)}"
    for what, names in (
      ("missing", missing),
      ("unused", unused),
      ("misshapen", misshapen),
    )
    if names
  ]
  if problems:
    raise InputError(
      f"{where}: tensors do not fit the config: {'; '.join(problems)}"
    )


def shardings(table: Sequence[Row], tree, mesh):
  """The NamedSharding of every parameter, as a tree."""
  return unflatten(
    {
      row.path: mesh_lib.sharding(row.axes, leaf.shape, mesh)
      for row, leaf in matched(table, tree)
    }
  )


def to_torch(table: Sequence[Row], tree) -> Iterator[tuple[str, np.ndarray]]:
  """(PyTorch key, tensor) of every tensor, one fetched at a time."""
  for row, leaf in matched(table, tree):
    for i, key in enumerate(row.keys(leaf.shape)):
      layer = np.asarray(leaf[i] if row.stacked else leaf)
      yield key, np.ascontiguousarray(row.to_torch(layer))


def replicated(table: Sequence[Row], tree, mesh) -> list[str]:
  """Paths whose size their mesh axes do not divide, with axis and size."""
  out = []
  for row, leaf in matched(table, tree):
    parts = mesh_lib.spec(row.axes, leaf.shape, mesh)
    for name, size, part in zip(row.axes, leaf.shape, parts, strict=True):
      ways = math.prod(
        mesh.shape[a] for a in mesh_lib.RULES.get(name, ()) if a in mesh.shape
      )
      # PartitionSpec turns a tuple of one into its name.
      part = (part,) if isinstance(part, str) else part
      if ways > 1 and part != mesh_lib.RULES[name]:
        out.append(f"{row.path} ({name} {size} over {ways})")
  return out
