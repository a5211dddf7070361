"""Model folders from live parameters: fresh ones, and partly trained ones."""

import dataclasses
import json
import re
import shutil

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects

import xomni_jax
from tests.helpers import GOLDEN, read_folder
from tests.released_files import assert_same_bits, read_all, read_json
from xomni_jax import params
from xomni_jax.checkpoints import released, released_config, released_json
from xomni_jax.config import DecoderConfig, TransformConfig
from xomni_jax.config_files import load_architecture
from xomni_jax.errors import InputError
from xomni_jax.inference import checkpoint, flux1, fresh

TRANSFORM = TransformConfig(64, 112, 16, 32, 3.0, True)
DECODER = DecoderConfig(4, 2, 1.5)
SOURCE, FLUX1 = GOLDEN / "xomni", GOLDEN / "flux1"


@pytest.fixture(scope="module")
def arch():
  sizes = load_architecture("configs/model.py:tiny")
  return dataclasses.replace(
    sizes,
    # The world's pieces are more than the golden tokenizer's.
    t5=dataclasses.replace(sizes.t5, vocab_size=256),
    # Two levels, 2 px a latent: compiles in half the time.
    vae=dataclasses.replace(sizes.vae, block_out_channels=(16, 24)),
  )


@pytest.fixture(scope="module")
def live(arch):
  return fresh.random_params(arch, jax.random.key(3))


@pytest.fixture(scope="module")
def folders(arch, live, tmp_path_factory):
  """A model from nothing; read only."""
  out = tmp_path_factory.mktemp("fresh")
  given = {name: tree for name, tree in live.items() if name != "vq"}
  fresh.write_fresh(
    out / "xomni",
    out / "flux1",
    arch,
    jax.random.key(3),
    transform=TRANSFORM,
    decoder=DECODER,
    params=given,  # the quantiser alone is drawn, which is quick
  )
  return out / "xomni", out / "flux1"


@pytest.fixture(scope="module")
def model(folders):
  return xomni_jax.load(folders[0], flux=folders[1], dtype="float32")


def test_fresh_folders_hold_the_parameters_bit_by_bit(live, model):
  ours, theirs = params.flatten(model.params), params.flatten(live)
  assert ours.keys() == theirs.keys()
  for path, leaf in theirs.items():
    assert np.asarray(ours[path]).tobytes() == np.asarray(leaf).tobytes(), path


def test_fresh_parameters_differ_by_part_and_start_the_features_at_zero(live):
  assert not np.any(live["flux"]["siglip_embed"]["kernel"])
  kernels = [
    np.asarray(leaf)
    for path, leaf in params.flatten(live).items()
    if not re.search(r"(bias|scale|siglip_embed/kernel)$", path)
  ]
  assert all(np.std(x) > 1e-3 for x in kernels)
  assert len({x.ravel()[:4].tobytes() for x in kernels}) == len(kernels)


def test_fresh_folders_say_the_sizes_they_were_made_with(arch, folders, model):
  opened = checkpoint.open_checkpoint(folders[0])
  decoder = checkpoint.open_decoder(opened, folders[1])
  assert opened.config.ar == arch.ar and opened.config.vq == arch.vq
  assert opened.config.transform == TRANSFORM
  assert opened.config.decoder == DECODER and opened.siglip == arch.siglip
  for part in ("flux", "vae", "clip", "t5"):
    assert getattr(decoder, part) == getattr(arch, part)
  assert decoder.scheduler == fresh.FLUX_SCHEDULER
  end = model.tokenizer.encode("<|im_end|>")
  assert opened.config.eos_token_ids == tuple(end)


def test_fresh_model_encodes_generates_and_decodes(model):
  out = model.generate('A sign that says "HI"', (8, 12))
  assert out.images[0].size == (12, 8)  # 4 px a code
  assert out.codes.shape == (1, 2, 3)
  codes = model.encode(out.images[0].resize((64, 64)))
  assert codes.shape == (4, 4)


def golden_config():
  raw = read_json(SOURCE / "config.json")
  return raw, released_config.xomni_config(raw, "golden")


def test_configs_out_of_golden_configs_equal_their_files():
  raw, cfg = golden_config()
  ours = released_json.xomni_json(cfg, "float32")
  assert ours == {k: v for k, v in raw.items() if k != "bos_token_id"}
  kinds = (
    (SOURCE / "flux", "flux", "flux"),
    (FLUX1 / "vae", "vae", "vae"),
    (FLUX1 / "text_encoder", "clip", "clip"),
    (FLUX1 / "text_encoder_2", "t5", "t5"),
  )
  for folder, read, write in kinds:
    theirs = read_json(folder / "config.json")
    cfg = getattr(released_config, f"{read}_config")(theirs, "golden")
    dtype = ("float32",) if write in ("clip", "t5") else ()
    assert getattr(released_json, f"{write}_json")(cfg, *dtype) == theirs
  theirs = read_json(FLUX1 / "scheduler/scheduler_config.json")
  cfg = released_config.scheduler_config(theirs, "golden")
  assert released_json.scheduler_json(cfg) == theirs
  assert released_json.model_index_json() == read_json(
    FLUX1 / "model_index.json"
  )


def load_part(part):
  mesh = xomni_jax.make_mesh(devices=jax.devices()[:1])
  return released.load(part, mesh, None)


def test_replacing_the_language_model_changes_its_tensors_alone(
  original, tmp_path
):
  opened = checkpoint.open_checkpoint(SOURCE)
  trained = jax.tree.map(lambda x: x + 1, load_part(opened.parts["ar"]))
  out = tmp_path / "out"
  fresh.replace_parts(opened, out, {"ar": trained})
  expected = {**original}
  expected["ar"] = {k: v + np.float32(1) for k, v in original["ar"].items()}
  assert_same_bits(read_all(out), expected)
  assert read_json(out / "config.json") == read_json(SOURCE / "config.json")
  for name in ("tokenizer.json", "merges.txt", "flux/config.json"):
    assert (out / name).read_bytes() == (SOURCE / name).read_bytes()


def test_replaced_parts_are_cast_and_others_are_not(original, tmp_path):
  opened = checkpoint.open_checkpoint(SOURCE)
  parts = {"ar": opened.parts["ar"], "flux": checkpoint.open_flux(opened)[1]}
  trained = {name: load_part(part) for name, part in parts.items()}
  fresh.replace_parts(SOURCE, tmp_path / "out", trained, dtype="bfloat16")
  found = read_all(tmp_path / "out")
  half = lambda tensors: {
    k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()
  }
  expected = {**original}
  expected |= {name: half(original[name]) for name in trained}
  assert_same_bits(found, expected)
  config = read_json(tmp_path / "out/config.json")
  assert config["torch_dtype"] == "bfloat16"
  assert config["vision_config"]["dtype"] == "float32"


def test_replacing_the_autoencoder_changes_it_and_its_scale_alone(tmp_path):
  opened = flux1.open_flux1(FLUX1)
  trained = jax.tree.map(
    lambda x: x * 2, load_part(flux1.parts_of(opened)["vae"])
  )
  source, out = tmp_path / "source", tmp_path / "out"
  shutil.copytree(FLUX1, source)
  (source / "transformer").mkdir()
  (source / "transformer/model.safetensors").write_bytes(b"huge")
  fresh.replace_flux1(source, out, {"vae": trained}, (0.5, -0.25))
  theirs = read_folder(FLUX1 / "vae")
  found = {"vae": read_folder(out / "vae")}
  assert_same_bits(found, {"vae": {k: v * 2 for k, v in theirs.items()}})
  config = read_json(FLUX1 / "vae/config.json")
  config |= {"scaling_factor": 0.5, "shift_factor": -0.25}
  assert read_json(out / "vae/config.json") == config
  names = lambda folder: {
    str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()
  }
  assert names(out) == names(FLUX1)
  for name in names(FLUX1) - {
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
  }:
    assert (out / name).read_bytes() == (FLUX1 / name).read_bytes(), name


def test_copied_flux_folder_has_the_index_of_the_hubs(tmp_path, monkeypatch):
  source = shutil.copytree(FLUX1, tmp_path / "source")
  index = source / "model_index.json"
  index.write_text('{"_class_name": "Theirs"}')

  def download(name, allow_patterns):
    names = [p.relative_to(source).as_posix() for p in source.rglob("*.*")]
    for each in filter_repo_objects(names, allow_patterns=allow_patterns):
      (tmp_path / "cache" / each).parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(source / each, tmp_path / "cache" / each)
    return tmp_path / "cache"

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  fresh.replace_flux1("owner/flux", tmp_path / "out", {})
  assert read_json(tmp_path / "out/model_index.json") == read_json(index)
  index.unlink()  # such as an earlier download left
  fresh.replace_flux1(source, tmp_path / "other", {})
  found = read_json(tmp_path / "other/model_index.json")
  assert found == released_json.model_index_json()


def test_configs_are_not_those_of_the_model_that_a_tokenizer_lies_in(tmp_path):
  opened, out = checkpoint.open_checkpoint(SOURCE), tmp_path / "out"
  parts = {**opened.parts, "flux": checkpoint.open_flux(opened)[1]}
  golden = {name: load_part(part) for name, part in parts.items()}
  sizes = load_architecture("configs/model.py:tiny")
  fresh.write_xomni(out, sizes, TRANSFORM, DECODER, SOURCE, golden)
  cfg = checkpoint.open_checkpoint(out).config
  assert (cfg.transform, cfg.decoder) == (TRANSFORM, DECODER)
  assert opened.config.decoder != DECODER
  ours = released_json.generation_json(cfg)
  assert read_json(out / "generation_config.json") == ours


def test_folders_that_exist_are_refused(arch, live, folders, tmp_path):
  out = tmp_path / "out"
  out.mkdir()
  (out / "kept").write_text("mine")
  for write in (
    lambda: fresh.replace_parts(SOURCE, out, {}),
    lambda: fresh.replace_flux1(FLUX1, out, {}),
    lambda: fresh.write_xomni(out, arch, TRANSFORM, DECODER, folders[0], live),
  ):
    with pytest.raises(InputError, match="exists already"):
      write()
  assert [p.name for p in tmp_path.rglob("*")] == ["out", "kept"]


def test_sizes_that_do_not_fit_are_refused_before_anything_is_written(
  arch, live, folders, tmp_path
):
  out = tmp_path / "out"
  taller = dataclasses.replace(arch.ar, num_hidden_layers=7)
  other = dataclasses.replace(arch, ar=taller)
  with pytest.raises(InputError, match=r"parameters of ar.*missing"):
    fresh.write_xomni(out, other, TRANSFORM, DECODER, folders[0], live)
  wide = dataclasses.replace(
    arch, clip=dataclasses.replace(arch.clip, hidden_size=48)
  )
  with pytest.raises(InputError, match=r"clip\.hidden_size 48") as e:
    fresh.write_fresh(
      out,
      tmp_path / "flux1",
      wide,
      jax.random.key(0),
      transform=TRANSFORM,
      decoder=DECODER,
    )
  assert len(str(e.value).splitlines()) == 1
  with pytest.raises(InputError, match="no parts vae"):
    fresh.replace_parts(SOURCE, out, {"vae": {}})
  with pytest.raises(InputError, match="no parameters of flux"):
    parts = {k: v for k, v in live.items() if k != "flux"}
    fresh.write_xomni(out, arch, TRANSFORM, DECODER, folders[0], parts)
  assert not list(tmp_path.iterdir())


def test_written_json_is_stable(folders):
  text = (folders[0] / "config.json").read_text("utf-8")
  assert json.dumps(json.loads(text), indent=2) + "\n" == text
