"""Bad input: one line that says what, got and expected; exit status 2; no
traceback, and nothing half-written."""

import json
import pathlib
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from xomni_jax import cli

TINY = pathlib.Path(__file__).parents[1] / "golden" / "tiny-a"
SHARD = "xomni/model-00002-of-00004.safetensors"


@pytest.fixture
def tree(tmp_path):
  """A copy of the tiny checkpoint whose files may be replaced."""
  shutil.copytree(
    TINY, tmp_path / "tiny", ignore=shutil.ignore_patterns("golden.*")
  )
  return tmp_path / "tiny"


@pytest.fixture
def fails(tmp_path, capsys):
  """Runs the command and returns its one-line error."""

  def run(*argv, writes=()):
    before = sorted(p for p in tmp_path.rglob("*") if "tiny" not in p.parts)
    try:
      status = cli.main([str(a) for a in argv])
    except SystemExit as e:
      status = e.code
    out, err = capsys.readouterr()
    assert status == 2, (status, out, err)
    assert err.endswith("\n") and len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    after = sorted(p for p in tmp_path.rglob("*") if "tiny" not in p.parts)
    assert set(after) - set(before) <= set(writes), "left something behind"
    return err

  return run


def models(tree, flux=True):
  flags = ["--model", tree / "xomni"]
  return [*flags, "--flux", tree / "flux1"] if flux else flags


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


def truncate(path):
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])


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
  name, tree, fails, tmp_path, monkeypatch
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


GENERATE = {
  "empty prompt": (["--prompt", " "], ["prompt 1 of 1 is empty"]),
  "size between tokens": (
    ["--prompt", "x", "--image-size", "64", "90"],
    ["64 x 90", "multiples of the 16 px", "try 64 x 96"],
  ),
  "negative size": (["--prompt", "x", "--image-size", "-16"], ["-16 x -16"]),
  "three sizes": (
    ["--prompt", "x", "--image-size", "16", "16", "16"],
    ["expected H [W]"],
  ),
  "too long for the model": (
    ["--prompt", "x", "--image-size", "1152"],
    ["4096 positions"],
  ),
  "temperature 0": (
    ["--prompt", "x", "--temperature", "0"],
    ["temperature is 0.0", "above 0"],
  ),
  "negative temperature and cfg below 1": (
    ["--prompt", "x", "--temperature", "-1", "--cfg-scale", "0.5"],
    ["temperature is -1.0", "cfg_scale is 0.5"],
  ),
  "cfg not a number": (
    ["--prompt", "x", "--cfg-scale", "nan"],
    ["cfg_scale is nan"],
  ),
  "top-p above 1": (["--prompt", "x", "--top-p", "1.5"], ["top_p is 1.5"]),
  "min-p of 1": (["--prompt", "x", "--min-p", "1"], ["min_p is 1.0"]),
  "negative top-k": (["--prompt", "x", "--top-k", "-1"], ["top_k is -1"]),
  "negative seed": (["--prompt", "x", "--seed", "-1"], ["seed is -1"]),
  "no images": (["--prompt", "x", "--num-images", "0"], ["num_images is 0"]),
  "neither prompt nor file": ([], ["--prompt"]),
  "unknown flag": (["--prompt", "x", "--colour", "red"], ["--colour"]),
  "unknown image format": (
    ["--prompt", "x", "--output-path", "a.xyz"],
    ["'.xyz'"],
  ),
  "mesh without devices": (
    ["--prompt", "x", "--mesh", "data=64"],
    ["needs 64 devices"],
  ),
  "unknown mesh axis": (
    ["--prompt", "x", "--mesh", "model=2"],
    ["'model=2'", "tensor"],
  ),
}


@pytest.mark.parametrize("name", GENERATE)
def test_request_out_of_range_is_refused(name, fails, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  flags, words = GENERATE[name]
  error = fails("generate", *models(TINY), *flags)
  for word in words:
    assert word in error


PROMPTS = {
  "no file": (None, "p.txt", ["not readable"]),
  "no prompt": ("\n \n", "p.txt", ["holds no prompt"]),
  "no text": (b"\xff\xfe\xff", "p.txt", ["not readable as UTF-8"]),
  "bad lines, all named": (
    '{"prompt": "a"}\n{"prompt": 3}\nnope\n',
    "p.jsonl",
    ["line 2 has prompt 3", "line 3 is no JSON"],
  ),
  "an id that is a path": (
    '{"prompt": "a", "id": "../x"}',
    "p.jsonl",
    ["no file name"],
  ),
  "an id twice": (
    '{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}',
    "p.jsonl",
    ["twice: 1"],
  ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_file_that_is_none_is_refused(name, fails, tmp_path):
  content, file, words = PROMPTS[name]
  if content is not None:
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / file).write_bytes(data)
  error = fails(
    "generate",
    *models(TINY),
    "--prompts-file",
    tmp_path / file,
    "--output-path",
    tmp_path / "o.png",
  )
  for word in words:
    assert word in error


def picture(path, size, mode="RGB"):
  Image.new(mode, size).save(path)


IMAGES = {
  "no file": (lambda p: None, ["x.png"]),
  "not an image": (lambda p: p.write_text("hello"), ["x.png"]),
  "cut short": (lambda p: (picture(p, (96, 96)), truncate(p)), ["x.png"]),
  "too small": (lambda p: picture(p, (20, 30)), ["20", "32"]),
  "too elongated": (lambda p: picture(p, (40, 200)), ["3"]),
  "huge": (
    lambda p: picture(p, (20000, 20000), "1"),
    ["at most 89478485 pixels"],
  ),
}


@pytest.mark.parametrize("verb", ["tokenize", "chat"])
@pytest.mark.parametrize("name", IMAGES)
def test_image_that_can_not_be_read_is_refused(name, verb, fails, tmp_path):
  make, words = IMAGES[name]
  make(tmp_path / "x.png")
  flags = ["--prompt", "What is it?"] if verb == "chat" else []
  error = fails(
    verb, *models(TINY, False), "--image-path", tmp_path / "x.png", *flags
  )
  for word in words:
    assert word in error


CODES = {
  "more than h*w": (
    {"height": 2, "width": 2, "codes": [1] * 5},
    ["5 codes for 2 x 2, expected 4"],
  ),
  "fewer than h*w": (
    {"height": 2, "width": 2, "codes": [1]},
    ["1 codes for 2 x 2"],
  ),
  "outside the codebook": (
    {"height": 1, "width": 2, "codes": [0, 64]},
    ["0..64, expected 0..63"],
  ),
  "negative": ({"height": 1, "width": 2, "codes": [0, -1]}, ["-1..0"]),
  "no width": ({"height": 1, "codes": [0]}, ["'width'"]),
  "fractions": ({"height": 1, "width": 1, "codes": [0.5]}, ["whole numbers"]),
  "a list": ([1, 2], ["not readable as codes"]),
}


@pytest.mark.parametrize("name", CODES)
def test_codes_that_are_none_are_refused(name, fails, tmp_path):
  value, words = CODES[name]
  path = tmp_path / "codes.json"
  path.write_text(json.dumps(value))
  error = fails(
    "tokenize",
    *models(TINY),
    "--codes",
    path,
    "--output-path",
    tmp_path / "o.png",
  )
  for word in words:
    assert word in error


def test_painting_without_flux_says_what_is_missing(fails):
  assert "--flux" in fails(
    "generate", "--model", TINY / "xomni", "--prompt", "x"
  )


def test_empty_question_is_refused(fails):
  assert "question is empty" in fails(
    "chat", *models(TINY, False), "--prompt", ""
  )


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


def test_unknown_model_is_refused_in_one_line(fails):
  assert "no such folder" in fails(
    "generate", "--model", "./nowhere", "--codes-only", "--prompt", "x"
  )
