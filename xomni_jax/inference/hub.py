"""Folders, by path or from the Hugging Face hub."""

import pathlib

from xomni_jax.errors import InputError


def resolve(
  path_or_id: str | pathlib.Path, patterns: list[str] | None = None
) -> pathlib.Path:
  """The local folder of a path or a Hugging Face hub id.

  Args:
    path_or_id: a folder, or `owner/name`, which is fetched into the hub cache.
    patterns: fetch only files that match.
  Raises:
    InputError: neither; or the hub can't give it.
  """
  path = pathlib.Path(path_or_id)
  if path.is_dir():
    return path
  text = str(path_or_id)
  if path.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
    raise InputError(
      f"{text}: no such folder; expected a folder in the released layout or a "
      "Hugging Face hub id 'owner/name'"
    )
  import huggingface_hub

  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(text, allow_patterns=patterns)
    )
  except Exception as e:  # proxies and broken connections have their own
    reason = (str(e).strip() or type(e).__name__).splitlines()[0]
    raise InputError(
      f"{text}: no such folder, and the hub can't give it ({reason})"
    ) from None
