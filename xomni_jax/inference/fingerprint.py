"""Which model this is: a hash of all that its results depend on."""

import concurrent.futures
import hashlib
import pathlib
from collections.abc import Iterable, Mapping

from xomni_jax.inference import checkpoint, flux1

_SETTINGS = {".json", ".txt", ".model", ".jinja"}  # configs and tokenizers


def fingerprint(
  model: str,
  decoder: str | None = None,
  only: Iterable[str] = ("ar", "siglip", "vq"),
) -> str:
  """16 hex digits of weights, configs and tokenizers; all bytes count.

  Args:
    model: as for `xomni_jax.load`.
    decoder: FLUX.1-dev of the diffusion decoder, likewise; None: leave the
      decoder out.
    only: the parts of the model whose weights count.
  Raises:
    InputError: the files do not make a model.
  """
  return _hash(_files(model, decoder, only))


def _files(model, decoder, only) -> dict[str, pathlib.Path]:
  """All files that count, by names that do not say where they lie."""
  opened = checkpoint.open_checkpoint(model)
  parts = {name: opened.parts[name] for name in only}
  settings = {"model": opened.folder}
  if decoder is not None:
    whole = checkpoint.open_decoder(opened, decoder)
    parts |= whole.parts
    settings["flux"] = opened.folder / opened.config.flux_path
    settings |= {name: whole.folder / name for name in flux1.FOLDERS}
  found = {
    f"{name}/{file.path.name}": file.path
    for name, part in parts.items()
    for file in part.files
  }
  return found | {
    f"{name}/{path.name}": path
    for name, folder in settings.items()
    for path in _settings(folder)
  }


def _hash(files: Mapping[str, pathlib.Path]) -> str:
  names = sorted(files)
  found = hashlib.sha256()
  with concurrent.futures.ThreadPoolExecutor() as pool:
    digests = pool.map(_digest, [files[name] for name in names])
    for name, digest in zip(names, digests, strict=True):
      found.update(f"{name}:".encode() + digest)
  return found.hexdigest()[:16]


def _settings(folder: pathlib.Path) -> list[pathlib.Path]:
  """Files that are no weights, and say nothing of where weights lie."""
  return [
    path
    for path in folder.glob("*")
    if path.suffix in _SETTINGS and not path.name.endswith(".index.json")
  ]


def _digest(path: pathlib.Path) -> bytes:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").digest()
