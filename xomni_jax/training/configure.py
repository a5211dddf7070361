"""A run's settings: a Python file's ConfigDict, overrides, frozen configs."""

import ast
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from xomni_jax import config as config_lib
from xomni_jax.config import Architecture
from xomni_jax.config_files import architecture, read_config
from xomni_jax.errors import InputError
from xomni_jax.mesh import AXES
from xomni_jax.stage_options import OPTIONS
from xomni_jax.train_config import Phase, TrainConfig

# Sections that are no field of TrainConfig.
_BESIDES = ("architecture", "lm", "transform", "decoder")


def read(spec: str) -> ConfigDict:
  """The ConfigDict of "FILE[:SIZE]"; InputError if there is none."""
  name, _, size = spec.partition(":")
  return read_config(name, size)


def override(config: ConfigDict, settings: Sequence[str]) -> None:
  """Changes a config in place by "a.b=value" strings.

  A value is read as Python where it can be, else as text. What a section
  leaves at its default can be changed, too.

  Raises:
    InputError: lists every setting that is unknown or of another type.
  """
  problems = []
  for setting in settings:
    path, equals, text = setting.partition("=")
    *parents, last = path.split(".")
    node = _section(config, parents)
    known = isinstance(node, ConfigDict) and {
      **_defaults(config, parents),
      **node,
    }
    if not equals or not known or last not in known:
      problems.append(f"{setting!r} names no setting")
      continue
    try:
      value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      value = text
    old = known[last]
    if isinstance(old, ConfigDict):
      problems.append(f"{path} is a section, change one of {', '.join(old)}")
      continue
    if isinstance(old, str) and not isinstance(value, str):
      value = text
    if isinstance(old, float) and type(value) is int:
      value = float(value)
    if isinstance(old, tuple) and isinstance(value, list):
      value = tuple(value)
    if old is not None and type(value) is not type(old):
      problems.append(
        f"{path} is {value!r}, expected a {type(old).__name__} such as {old!r}"
      )
      continue
    node[last] = value
  if problems:
    raise InputError(
      f"config: {'; '.join(problems)}; sections are {', '.join(config)}"
    )


def _section(config: ConfigDict, path: Sequence[str]) -> Any:
  """What lies at a path: an empty section where it may go unsaid as a whole."""
  node = config
  for i, name in enumerate(path):
    if not isinstance(node, ConfigDict):
      return None
    if name not in node and any(
      f.name == name and f.default_factory is not dataclasses.MISSING
      for f in _fields(config, path[:i])
    ):
      node[name] = ConfigDict()
    node = node.get(name, None)
  return node


def _defaults(config: ConfigDict, path: Sequence[str]) -> dict[str, Any]:
  """{setting: default} of a section."""
  if path == ["mesh"]:
    return dict.fromkeys(AXES, 1)
  return {
    f.name: f.default
    for f in _fields(config, path)
    if f.default is not dataclasses.MISSING
  }


def _fields(config: ConfigDict, path: Sequence[str]) -> list[dataclasses.Field]:
  """Of the dataclass that a section becomes; none where it becomes another."""
  match path:
    case ["phases"]:
      return []  # its phases have names of their own
    case ["options", *rest]:
      cls = OPTIONS.get(config.get("stage"))
    case ["phases", _, *rest]:
      cls = Phase
    case rest:
      cls = TrainConfig
  for name in rest:
    kinds = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
    cls = kinds.get(name)
  return [
    field
    for kind in (cls, *typing.get_args(cls))
    if dataclasses.is_dataclass(kind)
    for field in dataclasses.fields(kind)
  ]


def parse(config: ConfigDict, where: str) -> tuple[TrainConfig, Architecture]:
  """The frozen configs of a run.

  Raises:
    InputError: lists what is missing, unknown, of the wrong type or value.
  """
  values = config.to_dict()
  arch = values.get("architecture")
  if arch is None:
    raise InputError(f"{where}: has no section 'architecture'")
  known = {f.name for f in dataclasses.fields(TrainConfig)} | set(_BESIDES)
  unknown = sorted(values.keys() - known)
  if unknown:
    raise InputError(f"{where}: unknown sections {', '.join(unknown)}")
  stage = values.get("stage")
  if not isinstance(stage, str) or stage not in OPTIONS:
    raise InputError(
      f"{where}: stage is {stage!r}, expected one of {', '.join(OPTIONS)}"
    )
  _check_sections(values, where)
  own = {k: v for k, v in values.items() if k not in _BESIDES}
  # By name, since a ConfigDict is sorted: "1_vision", "2_all", ...
  own["phases"] = [
    {"name": name, **phase}
    for name, phase in sorted(dict(own.get("phases") or {}).items())
  ]
  own["mesh"] = tuple(sorted(dict(own.get("mesh") or {}).items()))
  options = build(OPTIONS[stage], own.pop("options", None), f"{where}: options")
  parsed = build(TrainConfig, {**own, "options": options}, where)
  return parsed, architecture(config.architecture, f"{where}: architecture")


def _check_sections(values, where):
  """InputError for what is no settings by name where only these can be."""
  sections = {name: values.get(name) or {} for name in ("phases", "mesh")}
  sections["architecture"] = values["architecture"]
  for name in ("phases", "architecture"):
    if isinstance(sections[name], Mapping):
      sections |= {f"{name}.{k}": v for k, v in sections[name].items()}
  problems = [
    f"{name} is {value!r}"
    for name, value in sections.items()
    if not isinstance(value, Mapping)
  ]
  if problems:
    raise InputError(
      f"{where}: {'; '.join(problems)}; expected settings by name"
    )


def section(config: ConfigDict, name: str, cls: str, where: str):
  """A section that only some stages have, as a dataclass of config.py."""
  if name not in config:
    raise InputError(
      f"{where}: has no section {name!r}, which this stage needs"
    )
  return build(
    getattr(config_lib, cls), config[name].to_dict(), f"{where}: {name}"
  )


def build(cls: Any, value: Any, where: str) -> Any:
  """`value` as `cls`: a dataclass, a tuple of something, or plain.

  Raises:
    InputError: a setting is missing, unknown or of the wrong type.
  """
  if isinstance(cls, type) and isinstance(value, cls):
    return value
  if isinstance(cls, types.UnionType) or typing.get_origin(cls) is typing.Union:
    kinds = [k for k in typing.get_args(cls) if k is not type(None)]
    return None if value is None else build(kinds[0], value, where)
  if dataclasses.is_dataclass(cls):
    return _dataclass(cls, value, where)
  if typing.get_origin(cls) is tuple:
    if not isinstance(value, list | tuple):
      raise InputError(f"{where} is {value!r}, expected a list")
    kinds = typing.get_args(cls)
    if kinds[-1] is Ellipsis:
      kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
      raise InputError(f"{where} has {len(value)} items, expected {len(kinds)}")
    return tuple(
      build(kind, v, f"{where}[{i}]")
      for i, (kind, v) in enumerate(zip(kinds, value, strict=True))
    )
  if cls is object:
    return value
  if cls is float and type(value) is int:
    return float(value)
  if type(value) is not cls:
    raise InputError(f"{where} is {value!r}, expected a {cls.__name__}")
  return value


def _dataclass(cls, value, where):
  if not isinstance(value, Mapping):
    raise InputError(f"{where} is {value!r}, expected settings by name")
  fields = {f.name: f for f in dataclasses.fields(cls)}
  kinds = typing.get_type_hints(cls)
  needed = {
    n for n, f in fields.items() if f.default is dataclasses.MISSING
    and f.default_factory is dataclasses.MISSING
  }  # fmt: skip
  problems = [f"{n} is missing" for n in sorted(needed - value.keys())]
  problems += [f"{n} is unknown" for n in sorted(value.keys() - fields.keys())]
  made = {}
  for name in fields.keys() & value.keys():
    try:
      made[name] = build(kinds[name], value[name], f"{where}.{name}")
    except InputError as e:
      problems.append(str(e).removeprefix(f"{where}."))
  if problems:
    raise InputError(f"{where}: {'; '.join(problems)}")
  try:
    return cls(**made)
  except InputError as e:
    raise InputError(f"{where}: {e}") from None
