"""Import and export: every tensor, config value and file comes back.

Bits are compared, not values: -0.0 and NaN payloads count.
"""

import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import xomni_jax
from tests.helpers import GOLDEN, read_folder
from tests.released_files import (
  PROJECTOR,
  SOURCE,
  VIT,
  assert_same_bits,
  read_all,
  read_json,
  read_pt,
)
from xomni_jax import params
from xomni_jax.checkpoints import released, tensor_files
from xomni_jax.inference import checkpoint

torch = pytest.importorskip("torch")

COPIED = (
  "tokenizer.json",
  "tokenizer_config.json",
  "vocab.json",
  "merges.txt",
  "added_tokens.json",
  "special_tokens_map.json",
  "generation_config.json",
)


def size(folder):
  return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_export_equals_the_source_bit_by_bit(original, exported):
  assert_same_bits(read_all(exported), original)


def test_export_in_the_stored_dtype_equals_the_source(original, tmp_path):
  checkpoint.export(SOURCE, tmp_path / "out", "float32")
  assert_same_bits(read_all(tmp_path / "out"), original)
  config = "config.json"
  assert read_json(tmp_path / "out" / config) == read_json(SOURCE / config)


def test_export_keeps_configs_and_tokenizer_files(exported):
  for name in ("config.json", "flux/config.json"):
    assert read_json(exported / name) == read_json(SOURCE / name)
  for name in COPIED:
    assert (exported / name).read_bytes() == (SOURCE / name).read_bytes()


def test_export_has_the_files_of_the_layout_and_no_others(exported):
  found = {
    str(p.relative_to(exported)) for p in exported.rglob("*") if p.is_file()
  }
  assert found == {
    *COPIED,
    "config.json",
    "model.safetensors",  # below 5 GB it is one file, without an index
    f"{VIT}.pt",
    f"{PROJECTOR}.pt",
    "flux/config.json",
    "flux/diffusion_pytorch_model.safetensors",
  }


def loaded(parts):
  """{part: tensors} of parts that were placed on a device."""
  mesh = xomni_jax.make_mesh(devices=jax.devices()[:1])
  return {
    name: dict(
      params.to_torch(part.table, released.load(part, mesh, dtype=None))
    )
    for name, part in parts.items()
  }


def test_live_parameters_equal_the_source_bit_by_bit(original):
  opened = checkpoint.open_checkpoint(SOURCE)
  decoder = checkpoint.open_decoder(opened, GOLDEN / "flux1")
  theirs = original | {
    "vae": read_folder(GOLDEN / "flux1/vae"),
    "clip": read_folder(GOLDEN / "flux1/text_encoder"),
    "t5": read_folder(GOLDEN / "flux1/text_encoder_2"),
  }
  assert_same_bits(loaded({**opened.parts, **decoder.parts}), theirs)


def test_live_parameters_export_to_the_same_files(original, tmp_path):
  opened = checkpoint.open_checkpoint(SOURCE)
  parts = {**opened.parts, "flux": checkpoint.open_flux(opened)[1]}
  tensors = {name: state.items() for name, state in loaded(parts).items()}
  out = tmp_path / "out"
  checkpoint.write_released(out, opened, tensors, dtype=None, vit_format="pt")
  assert_same_bits(read_all(out), original)
  for stem in (VIT, PROJECTOR):
    state = torch.load(out / f"{stem}.pt", weights_only=True)
    assert all(t.is_contiguous() for t in state.values())


@pytest.mark.parametrize("zipped", [True, False])
def test_pt_file_of_parameters_is_read_in_both_of_its_formats(tmp_path, zipped):
  tensors = {"a": np.ones(3, np.float32), "b": np.zeros(2, ml_dtypes.bfloat16)}
  state = {
    key: torch.nn.Parameter(torch.tensor(x.tolist(), dtype=kind))
    for (key, x), kind in zip(
      tensors.items(), (torch.float32, torch.bfloat16), strict=True
    )
  }
  path = tmp_path / "x.pt"
  torch.save(state, path, _use_new_zipfile_serialization=zipped)
  file = tensor_files.pt_file(path)
  with file.open() as read:
    assert_same_bits({"": {k: read(k) for k in file.shapes}}, {"": tensors})


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_writers_take_views_and_read_only_arrays(tmp_path, suffix):
  view = np.arange(6, dtype=np.float32).reshape(2, 3).T
  low = view.astype(ml_dtypes.bfloat16)[::-1]
  tensors = {"view": view, "low": low, "device": np.asarray(jax.numpy.ones(2))}
  path = tmp_path / f"model{suffix}"
  released.write_pt(path, tensors.items())
  read = load_file if suffix == ".safetensors" else read_pt
  assert_same_bits({"": read(path)}, {"": tensors})
  released.write_safetensors(tmp_path, "shards", tensors.items(), max_bytes=30)
  assert len(list(tmp_path.glob("shards-*"))) == 2
  found = {}
  for shard in tmp_path.glob("shards-*"):
    found |= load_file(shard)
  assert_same_bits({"": found}, {"": tensors})


def test_stacks_written_on_the_device_equal_the_source(original, monkeypatch):
  monkeypatch.setattr(released, "HOST_STACK_BYTES", 0)
  part = checkpoint.open_checkpoint(SOURCE).parts["siglip"]
  assert_same_bits(loaded({"siglip": part}), {"siglip": original["siglip"]})


def to_bfloat16(array):
  """Rounded to nearest, ties to even, by PyTorch."""
  t = torch.from_numpy(array).to(torch.bfloat16)
  return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
  """The golden checkpoint exported in bfloat16."""
  out = tmp_path_factory.mktemp("half") / "bf16"
  checkpoint.export(SOURCE, out, "bfloat16")
  return out


def test_bfloat16_export_rounds_to_nearest(original, half):
  assert_same_bits(read_all(half), original, to_bfloat16)


def test_bfloat16_export_halves_the_weights_and_says_so(half, exported):
  weights = lambda folder: (
    size(folder) - sum(p.stat().st_size for p in folder.rglob("*.json"))
  )
  # Headers and the merges are as long as before.
  assert 0.5 < weights(half) / weights(exported) < 0.53
  config = read_json(half / "config.json")
  expected = read_json(SOURCE / "config.json")
  assert config["torch_dtype"] == config["vision_config"]["dtype"] == "bfloat16"
  expected["torch_dtype"] = expected["vision_config"]["dtype"] = "bfloat16"
  assert config == expected


def test_bfloat16_source_exports_as_it_is(half, tmp_path):
  checkpoint.export(half, tmp_path / "again")
  assert_same_bits(read_all(tmp_path / "again"), read_all(half))


def test_mixed_dtypes_export_as_they_are(original, half, tmp_path):
  mixed = tmp_path / "mixed"
  shutil.copytree(SOURCE, mixed)
  shard = mixed / "model-00002-of-00004.safetensors"
  tensors = {k: to_bfloat16(v) for k, v in load_file(shard).items()}
  save_file(tensors, shard)
  shutil.copyfile(half / f"{VIT}.pt", mixed / f"{VIT}.pt")
  projector = {k: torch.from_numpy(v).half() for k, v in original["vq"].items()}
  torch.save(projector, mixed / f"{PROJECTOR}.pt")
  theirs = read_all(mixed)
  dtypes = {str(x.dtype) for part in theirs.values() for x in part.values()}
  assert dtypes == {"float32", "bfloat16", "float16"}
  checkpoint.export(mixed, tmp_path / "out")
  assert_same_bits(read_all(tmp_path / "out"), theirs)


def test_reloaded_export_generates_the_golden_codes(
  exported, golden, golden_json
):
  model = xomni_jax.load(exported, dtype="float32")
  out = model.generate(
    golden_json["gen"]["prompt_en"], (64, 80), greedy=True, decode=False
  )
  expected = golden["gen/g1/new_tokens"] - model.config.ar.vocab_size
  np.testing.assert_array_equal(out.codes.reshape(1, 20), expected)
