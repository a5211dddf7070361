"""The files in the folder of a measurement: rows, prompts, figures."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from xomni_jax.checks import replacing
from xomni_jax.errors import InputError


def rows_path(out: pathlib.Path, name: str) -> pathlib.Path:
  """Of the measurement `name` in the folder `out`; so of all others."""
  return out / f"{name}.rows.jsonl"


def kept_rows(out: pathlib.Path, name: str) -> pathlib.Path:
  """The rows, or what gzip made of them, to be read."""
  path = rows_path(out, name)
  return path if path.exists() else path.with_name(f"{path.name}.gz")


def prompts_path(out: pathlib.Path, name: str, split: str) -> pathlib.Path:
  """What was asked, beside the rows."""
  return out / f"{name}.{split}.prompts.jsonl"


def figures_path(out: pathlib.Path, name: str) -> pathlib.Path:
  """What the rows come to."""
  return out / f"{name}.json"


def write_json(path: pathlib.Path, figures: Mapping[str, Any]) -> None:
  """Writes figures, an estimate a line; InputError if they can't be."""
  text = json.dumps(figures, indent=1, ensure_ascii=False)
  # Mean, low, high, prompts.
  short = re.compile(r"\[\s+([^\[\]{}\"]*?)\s+\]")
  text = short.sub(lambda m: f"[{' '.join(m[1].split())}]", text)
  with replacing(path) as temporary:
    temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads figures; InputError if there are none."""
  try:
    figures = json.loads(path.read_text(encoding="utf-8"))
    if not (isinstance(figures, dict) and "identity" in figures):
      raise ValueError("they have no identity")
    return figures
  except (OSError, ValueError) as e:
    raise InputError(
      f"{path} can't be read ({' '.join(str(e).split())[:120]}), expected the "
      "figures of a measurement; make them anew with `xomni eval score`"
    ) from None
