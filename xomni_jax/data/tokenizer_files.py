"""Files of tokenizers, and what it takes to fill them."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xomni_jax.errors import InputError

BYTES = 256  # the alphabet of a byte-level tokenizer
# Of a special token, as `tokenizers` writes it.
FLAGS = {
  "single_word": False,
  "lstrip": False,
  "rstrip": False,
  "normalized": False,
  "special": True,
}


def room(where: Any, name: str, size: int, least: int) -> None:
  """Raises InputError where a vocabulary is smaller than what it must hold."""
  if size < least:
    raise InputError(
      f"{where}: {name} is {size}, expected at least {least}, the ids that are "
      "taken; enlarge it"
    )


def train_bpe(
  tokenizer, lines: Iterable[str], vocab_size: int, **options: Any
) -> dict[str, Any]:
  """The tokenizer.json of a byte-level tokenizer trained on lines."""
  from tokenizers import pre_tokenizers, trainers

  # Threads of its own would make `tokenizers` warn at a later fork.
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    min_frequency=2,
    show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    **options,
  )
  tokenizer.train_from_iterator(lines, trainer)
  return json.loads(tokenizer.to_str())


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file; InputError if there is none."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as e:
    raise InputError(f"{path}: not readable as JSON ({e})") from None
  if not isinstance(value, dict):
    raise InputError(f"{path}: holds a {type(value).__name__}, not an object")
  return value


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes indented JSON, keys in the order given."""
  text = json.dumps(value, indent=2, ensure_ascii=False)
  path.write_text(text + "\n", encoding="utf-8", newline="\n")


def write_merges(path: pathlib.Path, merges: Iterable[Sequence[str]]) -> None:
  """Writes merges.txt, first merge first."""
  lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
  path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def by_id(added: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
  """Added tokens as `tokenizer_config.json` lists them."""
  return {
    str(token["id"]): {k: v for k, v in token.items() if k != "id"}
    for token in added
  }


def write_added(
  folder: pathlib.Path,
  tokenizer: Mapping[str, Any],
  config: Mapping[str, Any],
  added: Sequence[Mapping[str, Any]],
) -> None:
  """Writes the three files that list added tokens.

  Args:
    folder: an existing one.
    tokenizer, config: of `tokenizer.json` and `tokenizer_config.json`; their
      lists are replaced.
    added: tokens with id, content and flags, in the order of ids.
  """
  write_json(folder / "tokenizer.json", {**tokenizer, "added_tokens": added})
  write_json(
    folder / "tokenizer_config.json",
    {**config, "added_tokens_decoder": by_id(added)},
  )
  write_json(
    folder / "added_tokens.json",
    {token["content"]: token["id"] for token in added},
  )
