"""A model's hash: it changes with any byte that results depend on."""

import shutil

import pytest

from tests.helpers import GOLDEN
from xomni_jax.inference import fingerprint as lib
from xomni_jax.inference.fingerprint import fingerprint


@pytest.fixture
def folders(tmp_path):
  """(model, FLUX.1-dev) folders to change."""
  for name in ("xomni", "flux1"):
    shutil.copytree(GOLDEN / name, tmp_path / name)
  return tmp_path / "xomni", tmp_path / "flux1"


def _files(model, flux):
  return lib._files(model, flux, ("ar", "siglip", "vq"))


def _flip(path, place=-1):
  data = bytearray(path.read_bytes())
  data[place] ^= 1
  path.write_bytes(data)


def test_weights_of_all_parts_count(folders):
  files = _files(*folders)
  seen = {lib._hash(files)}
  weights = [p for f in folders for p in sorted(f.rglob("*.safetensors"))]
  assert len(weights) >= 7
  for path in weights:
    # In the middle of the tensors, and at their end.
    for place in (-1, -(path.stat().st_size // 3)):
      _flip(path, place)
      seen.add(lib._hash(files))
  assert len(seen) == 1 + 2 * len(weights)


def test_configs_and_tokenizers_count(folders):
  model, flux = folders
  files = _files(model, flux)
  seen = {lib._hash(files)}
  changed = [
    model / "config.json",
    model / "vocab.json",
    model / "flux" / "config.json",
    flux / "scheduler" / "scheduler_config.json",
    flux / "tokenizer" / "vocab.json",
    flux / "tokenizer_2" / "spiece.model",
  ]
  for path in changed:
    with path.open("a") as file:
      file.write(" ")
    seen.add(lib._hash(files))
  (model / "chat_template.jinja").write_text("{{ messages }}")
  seen.add(lib._hash(_files(model, flux)))
  assert len(seen) == 2 + len(changed)


def test_what_is_left_out_does_not_count(folders):
  model, flux = folders
  whole, some = fingerprint(model), fingerprint(model, only=("siglip", "vq"))
  for folder in (flux / "vae", model / "flux"):
    _flip(sorted(folder.glob("*.safetensors"))[0])
  assert fingerprint(model) == whole
  _flip(sorted(model.glob("*.safetensors"))[0])
  assert fingerprint(model) != whole
  assert fingerprint(model, only=("siglip", "vq")) == some
