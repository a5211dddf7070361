"""Checkpoints that do not fit are refused.

One line that says what, got and expected; exit status 2; no traceback, and
nothing half-written.
"""

import json
import pathlib
import pickle
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.bad_input import models, truncate
from tests.helpers import GOLDEN as TINY

SHARD = "xomni/model-00002-of-00004.safetensors"


def edit_json(path, change):
  value = json.loads(path.read_text())
  change(value)
  path.write_text(json.dumps(value))


def edit_tensors(path, change):
  tensors = load_file(path)
  change(tensors)
  save_file(tensors, path, metadata={"format": "pt"})


def edit_index(tree, change):
  edit_json(
    tree / "xomni/model.safetensors.index.json",
    lambda v: change(v["weight_map"]),
  )


def config(tree, change):
  edit_json(tree / "xomni/config.json", change)


def misshapen(tree):
  key = "model.layers.1.mlp.up_proj.weight"
  edit_tensors(tree / SHARD, lambda t: t.update({key: t[key].T.copy()}))


def two_problems(tree):
  def change(t):
    t["extra.weight"] = np.zeros(3, np.float32)
    del t["model.layers.1.mlp.up_proj.weight"]

  edit_tensors(tree / SHARD, change)
  edit_index(
    tree,
    lambda m: (
      m.update({"extra.weight": SHARD[6:]}),
      m.pop("model.layers.1.mlp.up_proj.weight"),
    ),
  )


def save_pt(path, tensor, **how):
  torch = pytest.importorskip("torch")
  torch.save({"a": torch.ones(40, dtype=getattr(torch, tensor))}, path, **how)


class Evil:
  def __reduce__(self):
    return (pathlib.Path.touch, (pathlib.Path("evil"),))


CHECKPOINTS = {
  "missing shard": (
    lambda t: (t / SHARD).unlink(),
    ["missing shards", "model-00002-of-00004"],
  ),
  "truncated shard": (
    lambda t: truncate(t / SHARD),
    ["model-00002-of-00004", "not a whole safetensors"],
  ),
  "index out of folder": (
    lambda t: edit_index(
      t, lambda m: m.update({"lm_head.weight": "../other.safetensors"})
    ),
    ["outside its folder", "../other.safetensors"],
  ),
  "index names the wrong shard": (
    lambda t: edit_index(t, lambda m: m.update({"lm_head.weight": SHARD[6:]})),
    ["lm_head.weight", "not in the shard"],
  ),
  "index is no JSON": (
    lambda t: truncate(t / "xomni/model.safetensors.index.json"),
    ["not readable as JSON"],
  ),
  "misshapen tensor": (
    misshapen,
    ["1 misshapen", "up_proj.weight [64, 160] instead of [160, 64]"],
  ),
  "missing and extra tensors at once": (
    two_problems,
    ["1 missing: model.layers.1.mlp.up_proj", "1 unused: extra.weight"],
  ),
  "integer tensor": (
    lambda t: edit_tensors(
      t / SHARD,
      lambda d: d.update({k: v.astype(np.int8) for k, v in d.items()}),
    ),
    ["I8", "expected one of"],
  ),
  "no config": (
    lambda t: (t / "xomni/config.json").unlink(),
    ["config.json", "no such file"],
  ),
  "another model": (
    lambda t: config(t, lambda c: c.update(model_type="qwen2")),
    ["model_type", "'x-omni'"],
  ),
  "missing setting": (
    lambda t: config(t, lambda c: c.pop("rope_theta")),
    ["rope_theta is missing"],
  ),
  "setting of the wrong type": (
    lambda t: config(t, lambda c: c.update(hidden_size="64")),
    ["hidden_size is '64'", "expected a int"],
  ),
  "number in the place of a list": (
    lambda t: config(
      t, lambda c: c["vision_config"]["decoder"].update(image_size=96)
    ),
    ["image_size is 96", "expected a list of whole numbers"],
  ),
  "text in a list of numbers": (
    lambda t: config(
      t, lambda c: c["vision_config"]["decoder"].update(image_size=["96", 96])
    ),
    ["image_size is ['96', 96]", "expected a list of whole numbers"],
  ),
  "end token by its text": (
    lambda t: config(t, lambda c: c.update(eos_token_id="<|im_end|>")),
    ["eos_token_id is ['<|im_end|>', 378]", "expected ids of 0 to 447"],
  ),
  "end token beyond the vocabulary": (
    lambda t: edit_json(
      t / "xomni/generation_config.json", lambda c: c.update(eos_token_id=999)
    ),
    ["eos_token_id is [378, 999]"],
  ),
  "no end token": (
    lambda t: [
      edit_json(t / "xomni" / name, lambda c: c.pop("eos_token_id"))
      for name in ("config.json", "generation_config.json")
    ],
    ["eos_token_id is []", "no answer would end"],
  ),
  "heads that do not divide": (
    lambda t: config(t, lambda c: c.update(num_key_value_heads=3)),
    ["4 attention heads", "3 key/value heads"],
  ),
  "unequal guidance scales": (
    lambda t: config(
      t, lambda c: c["vision_config"]["decoder"].update(cfg_scale_2=2.0)
    ),
    ["cfg_scale 1.5", "cfg_scale_2 2.0", "only equal ones"],
  ),
  "unknown ViT without heads": (
    lambda t: config(t, lambda c: c["vision_config"].pop("siglip_heads")),
    ["vision_config.siglip_heads", "siglip2_giant_patch16_384"],
  ),
  "sliding window in force": (
    lambda t: config(t, lambda c: c.update(use_sliding_window=True)),
    ["use_sliding_window"],
  ),
  "path out of the folder": (
    lambda t: config(
      t,
      lambda c: c["vision_config"]["encoder"].update(
        projector_path="../../x.pt"
      ),
    ),
    ["leads out"],
  ),
  "truncated .pt": (
    lambda t: truncate(t / "xomni/vit/projector.pt"),
    ["projector.pt", "not a whole file"],
  ),
  "truncated .pt of an old form": (
    lambda t: (
      save_pt(
        t / "xomni/vit/projector.pt",
        "float32",
        _use_new_zipfile_serialization=False,
      ),
      truncate(t / "xomni/vit/projector.pt"),
    ),
    ["projector.pt", "not a whole file"],
  ),
  "float8 .pt": (
    lambda t: save_pt(t / "xomni/vit/projector.pt", "float8_e4m3fn"),
    ["projector.pt", "a is float8_e4m3fn", "expected one of F64, F32"],
  ),
  "a pickle with code": (
    lambda t: (t / "xomni/vit/projector.pt").write_bytes(pickle.dumps(Evil())),
    ["projector.pt", "not a whole file of weights"],
  ),
  "missing .pt": (
    lambda t: (t / "xomni/vit/projector.pt").unlink(),
    ["projector.pt", "no such file"],
  ),
  "no tokenizer": (
    lambda t: [
      (t / "xomni" / n).unlink() for n in ("tokenizer.json", "vocab.json")
    ],
    ["tokenizer.json"],
  ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_that_does_not_fit_is_refused(
  name, tree, fails, tmp_path, monkeypatch, recwarn
):
  monkeypatch.chdir(tmp_path)
  spoil, words = CHECKPOINTS[name]
  spoil(tree)
  error = fails(
    "generate",
    *models(tree, False),
    "--codes-only",
    "--prompt",
    "x",
    "--output-path",
    tmp_path / "o.json",
  )
  for word in words:
    assert word in error
  assert not (tmp_path / "evil").exists()
  assert not [w for w in recwarn if "pickle" in str(w.message)]


FLUX = {
  "no folder": (
    lambda t: shutil.rmtree(t / "flux1"),
    ["flux1", "no such folder"],
  ),
  "wrong folder": (
    lambda t: shutil.rmtree(t / "flux1/vae"),
    ["vae/config.json", "no such file"],
  ),
  "static shift": (
    lambda t: edit_json(
      t / "flux1/scheduler/scheduler_config.json",
      lambda c: c.update(use_dynamic_shifting=False),
    ),
    ["use_dynamic_shifting is False"],
  ),
  "shift without a slope": (
    lambda t: edit_json(
      t / "flux1/scheduler/scheduler_config.json",
      lambda c: c.update(max_image_seq_len=c["base_image_seq_len"]),
    ),
    ["max_image_seq_len is", "expected above base_image_seq_len"],
  ),
  "channels of a level": (
    lambda t: edit_json(
      t / "flux1/vae/config.json", lambda c: c.update(block_out_channels=128)
    ),
    ["block_out_channels is 128", "expected a list of whole numbers"],
  ),
  "axes of the transformer": (
    lambda t: edit_json(
      t / "xomni/flux/config.json", lambda c: c.update(axes_dims_rope=16)
    ),
    ["axes_dims_rope is 16", "expected a list of whole numbers"],
  ),
  "other width of T5": (
    lambda t: edit_json(
      t / "flux1/text_encoder_2/config.json", lambda c: c.update(d_model=40)
    ),
    ["joint_attention_dim 32", "40 of T5"],
  ),
  "truncated autoencoder": (
    lambda t: truncate(t / "flux1/vae/diffusion_pytorch_model.safetensors"),
    ["not a whole safetensors"],
  ),
  "missing shard of the transformer": (
    lambda t: (
      t / "xomni/flux/diffusion_pytorch_model-00001-of-00002.safetensors"
    ).unlink(),
    ["missing shards"],
  ),
  "upscale factor of another autoencoder": (
    lambda t: config(
      t, lambda c: c["vision_config"]["decoder"].update(upscale_factor=8)
    ),
    ["upscale_factor 8", "16 of the VAE"],
  ),
}


@pytest.mark.parametrize("name", FLUX)
def test_decoder_that_does_not_fit_is_refused(name, tree, fails, tmp_path):
  spoil, words = FLUX[name]
  spoil(tree)
  error = fails(
    "generate",
    *models(tree),
    "--prompt",
    "x",
    "--output-path",
    tmp_path / "o.png",
  )
  for word in words:
    assert word in error


def test_export_does_not_touch_what_exists(fails, tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out/keep").write_text("me")
  assert "exists already" in fails("export", TINY / "xomni", tmp_path / "out")
  assert (tmp_path / "out/keep").read_text() == "me"


def test_export_of_a_broken_source_leaves_nothing(tree, fails, tmp_path):
  truncate(
    tree / "xomni/flux/diffusion_pytorch_model-00001-of-00002.safetensors"
  )
  assert "not a whole safetensors" in fails(
    "export", tree / "xomni", tmp_path / "new" / "out"
  )
