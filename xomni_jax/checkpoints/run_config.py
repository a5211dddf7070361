"""The config of a run, beside its checkpoints."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from xomni_jax.checkpoints.manifest import write_json
from xomni_jax.errors import InputError

FILE = "config.json"
_ABSENT = "(absent)"


def has_made(workdir) -> bool:
  """Whether a run has left what its config stands for.

  Args:
    workdir: of the run, with a checkpoint or the model in it, or without.
  """
  return has_saved(workdir) or (pathlib.Path(workdir) / "model").exists()


def has_saved(workdir) -> bool:
  """Whether there is a checkpoint of a run, good or not."""
  folder = pathlib.Path(workdir) / "checkpoints"
  return any(p.name.isdigit() for p in folder.glob("*"))


def save_config(folder, mapping: Mapping[str, Any]) -> None:
  """Writes `<folder>/config.json`, by process 0, all of it or nothing."""
  if jax.process_index() == 0:
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, mapping)


def check_config(folder, mapping: Mapping[str, Any], allow: bool) -> list[str]:
  """Compares a run's config with the saved one, then saves it.

  Args:
    folder: of `save_config`; without a config in it, there is none to compare.
    mapping: nested settings, of JSON's types (tuples count as lists).
    allow: take the new config where they differ.
  Returns:
    Changed settings, "optim.lr: 0.001 -> 0.0003" each.
  Raises:
    InputError: they differ and `allow` is False, or the file is unreadable.
  """
  path = pathlib.Path(folder) / FILE
  old = None
  try:
    old = json.loads(path.read_text("utf-8"))
  except FileNotFoundError:
    pass
  except (OSError, ValueError) as e:
    raise InputError(
      f"config {path} is unreadable ({type(e).__name__}); remove it to go on "
      "with the config given"
    ) from None
  changes = (
    [] if old is None else _changes(old, json.loads(json.dumps(mapping)))
  )
  if changes and not allow:
    raise InputError(
      f"the config differs from that of the run in {folder}: "
      f"{'; '.join(changes)}; give another folder, or allow the change "
      "(--allow-config-change)"
    )
  if jax.process_count() > 1:  # all have read it
    multihost_utils.sync_global_devices("config")
  if changes or old is None:
    save_config(folder, mapping)
  return changes


def _changes(old, new) -> list[str]:
  old, new = _settings(old), _settings(new)
  return [
    f"{name}: {old.get(name, _ABSENT)} -> {new.get(name, _ABSENT)}"
    for name in [*old, *(n for n in new if n not in old)]
    if old.get(name, _ABSENT) != new.get(name, _ABSENT)
  ]


def _settings(value, path="") -> dict[str, str]:
  """{dotted path: JSON text} of every setting; an empty list is one, too."""
  if isinstance(value, (dict, list)) and value:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    out = {}
    for key, item in items:
      out |= _settings(item, f"{path}.{key}" if path else str(key))
    return out
  return {path: json.dumps(value, ensure_ascii=False)}
