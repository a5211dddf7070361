"""Requests and files of users that make no sense are refused.

One line that says what, got and expected; exit status 2; no traceback, and
nothing half-written.
"""

import json
import re

import numpy as np
import pytest
from PIL import Image

import xomni_jax
from tests.bad_input import models, truncate
from tests.helpers import GOLDEN as TINY
from xomni_jax.inference import loading

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
  "format that can't be written": (
    ["--prompt", "x", "--output-path", "a.psd"],
    ["'.psd'"],
  ),
  "mesh without devices": (
    ["--prompt", "x", "--mesh", "data=64"],
    ["needs 64 devices"],
  ),
  "settings that greedy ignores": (
    ["--prompt", "x", "--greedy", "--top-k", "5"],
    ["likeliest", "leave out --greedy"],
  ),
  "another size of a token": (
    ["--prompt", "x", "--image-size", "64", "--downsample-size", "8"],
    ["--downsample-size is 8", "16 px"],
  ),
  "unknown mesh axis": (
    ["--prompt", "x", "--mesh", "model=2"],
    ["'model=2'", "tensor"],
  ),
}


def _not_yet(*_):
  raise AssertionError("weights are loaded before bad input is refused")


@pytest.mark.parametrize("name", GENERATE)
def test_request_out_of_range_is_refused(name, fails, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  if name != "too long for the model":  # only its tokenizer knows
    monkeypatch.setattr(loading.released, "load", _not_yet)
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
  "an id that no file system has": (
    json.dumps({"prompt": "a", "id": "x" * 300})
    + "\n"
    + json.dumps({"prompt": "b", "id": "\0"}),
    "p.jsonl",
    ["line 1 has id 'xxx", "line 2 has id '\\x00', which is no file name"],
  ),
  "an id twice": (
    '{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}',
    "p.jsonl",
    ["twice: 1"],
  ),
  "an id that is the number of another": (
    '{"prompt": "a", "id": "0001"}\n{"prompt": "b"}',
    "p.jsonl",
    ["o-0001-0.png would be written twice"],
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


def test_settings_that_codes_ignore_are_refused(fails, tmp_path):
  picture(tmp_path / "x.png", (96, 96))
  argv = ("tokenize", *models(TINY, False), "--image-path", tmp_path / "x.png")
  error = fails(*argv, "--prompt", "red", "--steps", "4")
  assert "got --prompt, --steps" in error and "paint with --codes" in error


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


def test_empty_question_is_refused(fails, monkeypatch):
  monkeypatch.setattr(loading.released, "load", _not_yet)
  assert "question is empty" in fails(
    "chat", *models(TINY, False), "--prompt", ""
  )


def test_settings_of_sampling_are_refused_where_nothing_is_sampled(fails):
  assert "add --sample" in fails(
    "chat", *models(TINY, False), "--prompt", "x", "--temperature", "0.7"
  )


def test_unknown_model_is_refused_in_one_line(fails):
  assert "no such folder" in fails(
    "generate", "--model", "./nowhere", "--codes-only", "--prompt", "x"
  )


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda m: m.generate("x", size=96), "size is 96, expected"),
    (lambda m: m.generate("x", size=(96.0, 96.0)), "two whole numbers"),
    (lambda m: m.generate([1], size=(96, 96)), "prompt is 1, expected a text"),
    (lambda m: m.chat(None, None), "question is None, expected a text"),
    (lambda m: m.generate(None, (96, 96)), "prompts is None, expected a text"),
    (
      lambda m: m.generate("x", (96, 96), temperature="1"),
      "temperature is '1', expected a number",
    ),
    (lambda m: m.generate("x", (96, 96), seed=True), "seed is True"),
    (lambda m: m.logits([[1, 2], [3]]), "padded on the left and a mask"),
    (lambda m: m.decode([[1, 2], [3]]), "codes is no array"),
    (lambda m: m.encode([[1, 2], [3]]), "image is no array"),
  ],
)
def test_arguments_of_another_type_are_refused(call, words, tiny):
  with pytest.raises(xomni_jax.InputError, match=re.escape(words)):
    call(tiny)


def test_part_that_was_not_loaded_is_named_before_any_work(monkeypatch):
  ours, flux = TINY / "xomni", TINY / "flux1"
  for only in ("ar", ("ar", "flux"), ("ear",)):
    with pytest.raises(xomni_jax.InputError, match="expected a list of ar, "):
      xomni_jax.load(ours, only=only)
  model = xomni_jax.load(ours, flux=flux, only=("ar",))
  with pytest.raises(xomni_jax.InputError, match=r"needs the FLUX.1-dev parts"):
    model.generate("A red sign", (32, 32))
  with pytest.raises(xomni_jax.InputError, match="the part 'siglip', loaded"):
    model.encode(Image.new("RGB", (96, 96)))
  drawn = model.generate("x", (32, 32), decode=False, seed=np.int64(1))
  assert drawn.codes.shape == (1, 2, 2)


@pytest.mark.parametrize(
  ("verb", "flags", "words"),
  [
    ("demo", ["--steps", "0"], "--steps is 0"),
    ("demo", ["--prompt", " "], "prompt 1 of 1 is empty"),
    ("demo", ["--out", __file__], "the folder can't be made"),
    ("recipe", ["--seed", "-1"], "--seed is -1"),
    ("recipe", ["--out", __file__], "the folder can't be made"),
  ],
)
def test_demo_and_recipe_refuse_before_they_work(verb, flags, words, fails):
  assert words in fails(verb, *flags)


@pytest.mark.parametrize("dtype", ["int9", "int8", "float16"])
def test_dtype_that_is_none_is_refused(dtype):
  with pytest.raises(xomni_jax.InputError, match="expected 'float32' or"):
    xomni_jax.load(TINY / "xomni", dtype=dtype)
