"""Checks that several readers of this folder share."""

from pathlib import Path

from xomni_jax.errors import InputError


def unreadable(name: str, error: Exception, advice: str) -> InputError:
  """The error, on one line, for a file that some parser choked on."""
  reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
  return InputError(f"{name} can't be read ({reason}), expected {advice}")


def has_files(folder, *names: str) -> bool:
  """Whether a folder holds all these files."""
  return all(Path(folder, name).is_file() for name in names)


def encodable(text: str) -> str:
  """The text itself; raises InputError where it holds lone surrogates."""
  try:
    text.encode()
  except UnicodeEncodeError as e:
    raise InputError(
      f"text holds {text[e.start]!r} at character {e.start}, expected Unicode; "
      "check the encoding of its source"
    ) from None
  return text
