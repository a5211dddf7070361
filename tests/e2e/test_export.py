"""Exported folders: valid shards, readable by other libraries and without torch,
and never half-written.
"""

import dataclasses
import functools
import inspect
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import (
  GOLDEN,
  agree,
  max_difference,
  params_from_torch,
  read_folder,
)
from tests.released_files import (
  SOURCE,
  VIT,
  assert_same_bits,
  read_all,
  read_json,
)
from xomni_jax.checkpoints import released
from xomni_jax.config import Compute
from xomni_jax.errors import InputError
from xomni_jax.inference import checkpoint
from xomni_jax.models import ar

torch = pytest.importorskip("torch")

# More than 30 shards of each part.
SMALL_SHARD = 40_000


# Shards


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
  """The golden checkpoint exported in many small shards."""
  out = tmp_path_factory.mktemp("sharded") / "out"
  small = functools.partial(released.write_safetensors, max_bytes=SMALL_SHARD)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(released, "write_safetensors", small)
    checkpoint.export(SOURCE, out)
  return out


@pytest.mark.parametrize(
  ("sub", "stem"), [("", "model"), ("flux", "diffusion_pytorch_model")]
)
def test_shards_have_a_valid_index(sharded, sub, stem):
  folder = sharded / sub
  index = read_json(folder / f"{stem}.safetensors.index.json")
  names = sorted(p.name for p in folder.glob("*.safetensors"))
  n = len(names)
  assert n > 10
  assert names == [
    f"{stem}-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)
  ]
  total = 0
  for name in names:
    tensors = load_file(folder / name)
    nbytes = sum(x.nbytes for x in tensors.values())
    assert nbytes <= SMALL_SHARD or len(tensors) == 1
    assert {k for k, v in index["weight_map"].items() if v == name} == set(
      tensors
    )
    total += nbytes
  assert index["metadata"]["total_size"] == total
  assert not list(folder.glob("*.tmp"))


def test_shards_equal_the_source(original, sharded):
  assert_same_bits(read_all(sharded), original)
  reopened = checkpoint.open_checkpoint(sharded)
  assert len(reopened.parts["ar"].files) > 10


# Other libraries


def diffusers_velocity(model, golden):
  inputs = {
    name: torch.from_numpy(golden[f"flux/in/{name}"])
    for name in (
      "hidden_states",
      "encoder_hidden_states",
      "pooled_projections",
      "timestep",
      "guidance",
      "img_ids",
      "txt_ids",
    )
  }
  with torch.no_grad():
    return model(**inputs, return_dict=False)[0].numpy()


def test_exported_flux_loads_strictly_in_diffusers(exported, golden):
  diffusers = pytest.importorskip("diffusers")
  cls = diffusers.FluxTransformer2DModel
  config = read_json(exported / "flux/config.json")
  known = inspect.signature(cls.__init__).parameters
  model = cls(**{k: v for k, v in config.items() if k in known}).eval()
  state = read_folder(exported / "flux")
  assert state.pop("siglip_embed.weight").shape == (48, 64)
  model.load_state_dict(
    {k: torch.from_numpy(v) for k, v in state.items()}, strict=True
  )
  velocity = diffusers_velocity(model, golden)
  agree(
    "exported FLUX",
    "diffusers, golden values",
    "velocity without features",
    velocity,
    golden["flux/out_no_siglip"],
    1e-4,
  )


def test_sharded_flux_loads_in_diffusers_from_its_folder(sharded, golden):
  diffusers = pytest.importorskip("diffusers")
  model, info = diffusers.FluxTransformer2DModel.from_pretrained(
    sharded / "flux", output_loading_info=True, low_cpu_mem_usage=False
  )
  assert info["unexpected_keys"] == ["siglip_embed.weight"]
  assert not info["missing_keys"] and not info["mismatched_keys"]
  velocity = diffusers_velocity(model, golden)
  theirs = golden["flux/out_no_siglip"]
  assert max_difference(velocity, theirs) < 1e-4


def test_lm_stack_loads_in_transformers_with_equal_outputs(exported, tmp_path):
  transformers = pytest.importorskip("transformers")
  config = checkpoint.open_checkpoint(exported).config.ar
  before, lm = config.num_mm_adap_layers, config.num_lm_layers
  state = read_folder(exported)
  numbered = r"model\.layers\.(\d+)\.(.*)"
  alone = {}  # the middle blocks, counted from 0
  for key, array in state.items():
    match = re.fullmatch(numbered, key)
    if match is None:
      alone[key] = array
    elif before <= int(match[1]) < before + lm:
      alone[f"model.layers.{int(match[1]) - before}.{match[2]}"] = array

  theirs = {
    key.replace("lm_embed_tokens", "embed_tokens").replace("lm_norm", "norm"): x
    for key, x in alone.items()
    if "mm_" not in key
  }
  raw = read_json(exported / "config.json")
  keep = inspect.signature(transformers.Qwen2Config).parameters
  raw = {k: v for k, v in raw.items() if k in keep or k == "rope_theta"}
  raw |= {"num_hidden_layers": lm, "layer_types": None, "model_type": "qwen2"}
  released.write_json(tmp_path / "config.json", raw)
  released.write_safetensors(
    tmp_path, "model", theirs.items(), max_bytes=SMALL_SHARD
  )
  model, info = transformers.Qwen2ForCausalLM.from_pretrained(
    tmp_path, output_loading_info=True, dtype=torch.float32
  )
  assert not info["missing_keys"] and not info["unexpected_keys"]

  cfg = dataclasses.replace(
    config, num_hidden_layers=lm, num_mm_adap_layers=0, num_mm_head_layers=0
  )
  tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 23))
  ours = jax.jit(
    lambda p, t, valid: ar.text_logits(
      p,
      ar.XOmniAR(cfg, Compute()).apply(
        {"params": p}, t, ar.positions_of(valid), valid
      )[0],
    )
  )(
    params_from_torch(ar.rows(cfg), ar.abstract(cfg), alone),
    tokens.astype(np.int32),
    np.ones(tokens.shape, bool),
  )
  with torch.no_grad():
    logits = model(torch.from_numpy(tokens)).logits.numpy()
  agree(
    "exported `lm` stack", "transformers' Qwen2", "logits", ours, logits, 2e-4
  )


# Without torch


WITHOUT_TORCH = """
import importlib.machinery
import sys


class WithoutTorch(importlib.machinery.PathFinder):  # as if not installed
  @classmethod
  def find_spec(cls, name, *args):
    if name.partition(".")[0] != "torch":
      return super().find_spec(name, *args)


finder = sys.meta_path.index(importlib.machinery.PathFinder)
sys.meta_path[finder] = WithoutTorch
import xomni_jax

source, other, image = sys.argv[1:]
model = xomni_jax.load(source, dtype="float32")
print(model.encode(image).ravel().tolist())
try:
  xomni_jax.load(other)
except xomni_jax.InputError as e:
  print(e)
"""


def test_safetensors_in_place_of_pt_need_no_torch(
  original, exported, golden, tmp_path
):
  out = tmp_path / "safe"
  checkpoint.export(SOURCE, out, vit_format="safetensors")
  assert not list(out.rglob("*.pt"))
  assert_same_bits(read_all(out), original)
  image = GOLDEN / "images" / "wide.png"
  run = subprocess.run(
    [sys.executable, "-c", WITHOUT_TORCH, out, exported, image],
    check=True,
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
  )
  codes, refusal = run.stdout.splitlines()
  assert json.loads(codes) == golden["tok/wide/indices"].ravel().tolist()
  assert f"{VIT}.pt: reading a .pt file needs torch" in refusal


# Exports that fail


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("writer", ["write_pt", "write_safetensors"])
def test_failed_export_leaves_nothing(monkeypatch, tmp_path, writer, error):
  real, calls = getattr(released, writer), []

  def breaks(*args, **kwargs):
    real(*args, **kwargs)
    calls.append(args)
    if len(calls) == 2:  # the projector's file, or the FLUX folder
      raise error("disk full")

  monkeypatch.setattr(released, writer, breaks)
  with pytest.raises(error, match="disk full"):
    checkpoint.export(SOURCE, tmp_path / "out")
  assert len(calls) == 2
  assert list(tmp_path.iterdir()) == []


def test_export_never_shows_a_folder_that_is_not_complete(
  monkeypatch, tmp_path
):
  out, real = tmp_path / "out", released.write_json
  monkeypatch.setattr(
    released,
    "write_json",
    lambda *args: (real(*args), not out.exists() or pytest.fail("too early")),
  )
  checkpoint.export(SOURCE, out)
  assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_export_refuses_a_folder_that_is_not_empty(tmp_path):
  out = tmp_path / "out"
  out.mkdir()
  (out / "mine.txt").write_text("keep me")
  with pytest.raises(InputError, match="exists already"):
    checkpoint.export(SOURCE, out)
  assert [p.name for p in out.iterdir()] == ["mine.txt"]
  assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_export_fills_an_empty_folder(original, tmp_path):
  out = tmp_path / "out"
  out.mkdir()
  checkpoint.export(SOURCE, out)
  assert_same_bits(read_all(out), original)


def test_export_fills_an_empty_folder_behind_a_link(original, tmp_path):
  (tmp_path / "there").mkdir()
  (tmp_path / "out").symlink_to(tmp_path / "there")
  checkpoint.export(SOURCE, tmp_path / "out")
  assert_same_bits(read_all(tmp_path / "there"), original)


def test_export_to_a_mount_point_is_refused_before_it_works(
  monkeypatch, tmp_path
):
  """It can't be replaced by the folder that was written beside it."""
  monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
  monkeypatch.setattr(checkpoint, "write_weights", None)
  with pytest.raises(InputError, match="is a mount point; name a new folder"):
    checkpoint.export(SOURCE, tmp_path)


def test_export_without_torch_says_so_before_the_largest_file(
  monkeypatch, tmp_path
):
  written = []
  monkeypatch.setitem(sys.modules, "torch", None)
  monkeypatch.setattr(
    checkpoint.released,
    "write_safetensors",
    lambda folder, stem, _: written.append(stem),
  )
  with pytest.raises(InputError, match=r"writing a \.pt file needs torch"):
    checkpoint.export("tiny", tmp_path / "out")
  assert not written
