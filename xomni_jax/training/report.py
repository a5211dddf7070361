"""What a run is about to do, printed at its start."""

import collections
import math
import pathlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from xomni_jax import mesh as mesh_lib

_HEADS = ("parameters", "shape", "dtype", "", "sharding", "bytes/device")


def start_report(
  config: Mapping[str, Any],
  mesh,
  params: Mapping[str, Any],
  trains: Callable[[str], bool],
  others: Mapping[str, Any],
  workdir,
) -> str:
  """Config, mesh, parameters and bytes per device, as lines of text.

  Parameters are summed up by part and first name in it; the table of all goes
  to `<workdir>/parameters.txt` (written by process 0).

  Args:
    config: settings, nested.
    params: {part: tree} of arrays, or of ShapeDtypeStructs with shardings.
    trains: path such as "ar/lm/q_proj/kernel" -> a phase trains it.
    others: {name: tree}, what else stays on the devices, such as the
      optimiser's state.
  """
  flat = {_path(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
  state = {path: "trained" if trains(path) else "frozen" for path in flat}
  rows = [
    (
      path,
      "x".join(map(str, x.shape)) or "1",
      np.dtype(x.dtype).name,
      state[path],
      _spec(x),
      f"{_bytes(x):,}",
    )
    for path, x in flat.items()
  ]
  if jax.process_index() == 0:
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "parameters.txt").write_text(_table([_HEADS, *rows]) + "\n")
  sums: dict[tuple, list] = collections.defaultdict(lambda: [0, 0])
  for path, x in flat.items():
    group = "/".join(path.split("/")[:2])
    entry = sums[group, np.dtype(x.dtype).name, state[path]]
    entry[0] += math.prod(x.shape)
    entry[1] += _bytes(x)
  held = {"parameters": sum(map(_bytes, flat.values()))}
  held |= {n: sum(map(_bytes, jax.tree.leaves(x))) for n, x in others.items()}
  shown = [f"{name} {size(n)}" for name, n in held.items() if n]
  return "\n".join(
    [
      "config",
      *_config(config),
      f"mesh {mesh_lib.describe(mesh)}",
      _table(
        [
          ("parameters", "count", "dtype", "", "per device"),
          *(
            (*key[:1], f"{count:,}", *key[1:], size(held))
            for key, (count, held) in sums.items()
          ),
        ]
      ),
      f"on every device: {', '.join(shown)}; in all {size(sum(held.values()))}",
    ]
  )


def size(count: int) -> str:
  """Bytes for people: 3 digits, and binary units."""
  for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
    if count >= 1024**power:
      return f"{count / 1024**power:.3g} {unit}"
  return f"{count} B"


def _path(keys) -> str:
  return jax.tree_util.keystr(keys, simple=True, separator="/")


def _spec(x) -> str:
  """Mesh axes of each axis, such as "-,fsdp,tensor"."""
  spec = getattr(getattr(x, "sharding", None), "spec", ())
  names = ["+".join([p] if isinstance(p, str) else p or ["-"]) for p in spec]
  return ",".join(names) if any(n != "-" for n in names) else "whole"


def _bytes(x) -> int:
  """Of an array, on one device."""
  sharding = getattr(x, "sharding", None)
  shape = sharding.shard_shape(x.shape) if sharding else x.shape
  return math.prod(shape) * np.dtype(x.dtype).itemsize


def _table(rows: Sequence[Sequence[str]]) -> str:
  """Columns as wide as needed; numbers to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  right = [
    all(row[i][:1].isdigit() for row in rows[1:]) for i in range(len(widths))
  ]
  lines = [
    "  ".join(
      cell.rjust(width) if to_right else cell.ljust(width)
      for cell, width, to_right in zip(row, widths, right, strict=True)
    ).rstrip()
    for row in rows
  ]
  return "\n".join(lines)


def _config(config: Mapping[str, Any]) -> list[str]:
  """Settings, those of a section in one paragraph."""
  lines = []
  for section, value in config.items():
    is_list = isinstance(value, (list, tuple)) and value
    if is_list and isinstance(value[0], Mapping):
      items = {f"{section}.{i}": item for i, item in enumerate(value)}
    else:
      items = {section: value}
    for name, item in items.items():
      settings = ", ".join(_settings(item, ""))
      lines += textwrap.wrap(
        f"{name}: {settings}",
        width=100,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
      )
  return lines


def _settings(value, path) -> list[str]:
  """Every setting below, as name=value."""
  if isinstance(value, Mapping) and value:
    return [
      text
      for name, item in value.items()
      for text in _settings(item, f"{path}.{name}" if path else name)
    ]
  return [f"{path}={value!r}" if path else repr(value)]
