"""Configs out of mappings, and out of Python files with a `get_config`."""

import dataclasses
import importlib.util
import pathlib
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from xomni_jax.config import Architecture
from xomni_jax.errors import InputError

_MODEL = pathlib.Path(__file__).parents[1] / "configs" / "model.py"


def from_mapping(cls, mapping: Mapping[str, Any], where: str, **known: Any):
  """A config dataclass from a mapping (parsed JSON or a ConfigDict).

  Args:
    cls: the dataclass; its fields are looked up by name, others are ignored.
    mapping: the settings.
    where: named in errors.
    **known: settings that exist upstream but of which only one value is
      implemented; an absent one counts as that value.
  Raises:
    InputError: fields are missing, of the wrong type, or not implemented.
  """
  problems, values = [], {}
  for field in dataclasses.fields(cls):
    if field.name in mapping:
      value = mapping[field.name]
      if isinstance(value, (list, tuple)):
        value = tuple(value)
      kind = field.type
      if kind is float and type(value) is int:
        value = float(value)
      if isinstance(kind, type) and type(value) is not kind:
        problems.append(
          f"{field.name} is {value!r}, expected a {kind.__name__}"
        )
      # Lists of whole numbers are all there is in these files.
      if typing.get_origin(kind) is tuple and not (
        isinstance(value, tuple) and all(type(x) is int for x in value)
      ):
        problems.append(
          f"{field.name} is {mapping[field.name]!r}, expected a list of whole "
          "numbers"
        )
      values[field.name] = value
    elif field.default is dataclasses.MISSING:
      problems.append(f"{field.name} is missing")
  for name, only in known.items():
    if name in mapping and mapping[name] != only:
      problems.append(f"{name} is {mapping[name]!r}, only {only!r} is known")
  if problems:
    raise InputError(f"{where}: " + "; ".join(problems))
  try:
    return cls(**values)
  except InputError as e:
    raise InputError(f"{where}: {e}") from None


def architecture(config: Mapping[str, Any], where: str) -> Architecture:
  """An Architecture from an `ml_collections` config with a section a part.

  Raises:
    InputError: a section or a setting is missing, unknown or wrong.
  """
  parts = {f.name: f.type for f in dataclasses.fields(Architecture)}
  missing = [name for name in parts if name not in config]
  unknown = [
    f"{part}.{name}"
    for part, cls in parts.items()
    if part in config
    for name in config[part]
    if name not in {f.name for f in dataclasses.fields(cls)}
  ]
  if missing or unknown:
    raise InputError(
      f"{where}: missing sections {missing}, unknown settings {unknown}"
    )
  return Architecture(
    **{
      name: from_mapping(cls, config[name], f"{where}: {name}")
      for name, cls in parts.items()
    }
  )


def load_architecture(spec: str | None) -> Architecture:
  """The Architecture of "FILE[:SIZE]", a Python file with `get_config`.

  None: `configs/model.py` of the repository, at full size.

  Raises:
    InputError: no such file, no such size, or it does not fit.
  """
  name, _, size = (spec or str(_MODEL)).partition(":")
  return architecture(read_config(name, size), name)


def of_size(
  size: str, sizes: Mapping[str, Callable[[], dict[str, Any]]]
) -> ConfigDict:
  """What a config file gives for one of its sizes."""
  if size not in sizes:
    raise ValueError(f"size is {size!r}, expected one of {', '.join(sizes)}")
  return ConfigDict(sizes[size]())


def model_sections(size: str) -> dict[str, Any]:
  """The repository's `configs/model.py` as sections of a run's config.

  Returns:
    {"architecture": {part: sizes}, "transform": ..., "decoder": ...}.
  """
  sections = read_config(str(_MODEL), size).to_dict()
  parts = {f.name for f in dataclasses.fields(Architecture)}
  return {
    "architecture": {k: v for k, v in sections.items() if k in parts},
    **{k: v for k, v in sections.items() if k not in parts},
  }


def world_sources(
  split: str, task: str, weights: tuple[float, float] = (0.7, 0.3)
) -> tuple[dict[str, Any], ...]:
  """Both levels of the drawn world as `data.sources`, of these weights."""
  return tuple(
    {"path": f"world:{level}:{split}", "task": task, "weight": weight}
    for level, weight in zip(("signs", "posters"), weights, strict=True)
  )


def read_config(name: str, size: str = "") -> ConfigDict:
  """What `get_config(size)` of a Python file returns; "": its default size.

  Raises:
    InputError: no such file, no such size, or the file fails.
  """
  path = pathlib.Path(name)
  if not path.is_file() or path.suffix != ".py":
    raise InputError(
      f"config {name}: no such Python file; expected FILE.py[:SIZE], or a "
      "clone of the repository, whose configs/ has them"
    )
  found = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(found)
  try:
    found.loader.exec_module(module)
    config = module.get_config(*filter(None, [size]))
  except Exception as e:  # whatever a file of a user's may raise
    reason = " ".join(str(e).split())  # ml_collections says it in two lines
    raise InputError(f"config {name}: {type(e).__name__}: {reason}") from e
  if not isinstance(config, ConfigDict):
    raise InputError(
      f"config {name}: get_config gave a {type(config).__name__}, expected an "
      "ml_collections.ConfigDict"
    )
  return config
