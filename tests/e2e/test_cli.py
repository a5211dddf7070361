"""The command line: what a user types, and the files that come of it."""

import errno
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.helpers import GOLDEN
from xomni_jax import cli
from xomni_jax.errors import InputError
from xomni_jax.inference import files, loading

MODEL = ["--model", str(GOLDEN / "xomni")]
FLUX = ["--flux", str(GOLDEN / "flux1")]
PNG = ["--output-path", "out.png"]


@pytest.mark.parametrize(
  ("flags", "parts"),
  [
    (["generate", *FLUX, "--prompt", "x", *PNG], "ar vq flux vae clip t5"),
    (["generate", "--codes-only", "--prompt", "x", *PNG], "ar"),
    (["chat", "--prompt", "x"], "ar"),
    (["chat", "--prompt", "x", "--image-path", "x.png"], "ar siglip vq"),
    (["tokenize", "--image-path", "x.png"], "siglip vq"),
    (["tokenize", *FLUX, "--codes", "x.json", *PNG], "vq flux vae clip t5"),
  ],
)
def test_verb_loads_what_it_uses(flags, parts, tmp_path, monkeypatch, fails):
  loaded = []

  def model(opened, decoder, tokenizer, params, *_):
    loaded.extend(params)
    raise InputError("that will do")

  monkeypatch.chdir(tmp_path)
  Image.new("RGB", (64, 64)).save("x.png")
  files.write_codes(pathlib.Path("x.json"), np.zeros((2, 3), np.int32))
  monkeypatch.setattr(loading.released, "load", lambda *_: {})
  monkeypatch.setattr(loading, "Model", model)
  verb, *rest = flags
  made = [tmp_path / "x.png", tmp_path / "x.json"]
  assert "that will do" in fails(verb, *MODEL, *rest, writes=made)
  assert loaded == parts.split()


@pytest.fixture
def xomni(capsys):
  """Runs the command; returns what it printed to standard output."""

  def run(*argv):
    assert cli.main([str(a) for a in argv]) == 0
    return capsys.readouterr().out

  return run


def test_generate_takes_the_official_flags(xomni, tmp_path):
  out = tmp_path / "new" / "image.png"
  line = xomni(
    "generate",
    "--model_name_or_path", GOLDEN / "xomni",
    "--flux_model_name_or_path", GOLDEN / "flux1",
    "--prompt", "a red square on a blue gradient background",
    "--image-size", 64, 80,
    "--cfg-scale", 1.0, "--min-p", 0.03, "--top-p", 0.99, "--temperature", 1.1,
    "--seed", 1234,
    "--output-path", out,
  )  # fmt: skip
  assert Image.open(out).size == (80, 64)
  assert str(out) in line and "20 tokens" in line and "tokens/s" in line
  assert [p.name for p in out.parent.iterdir()] == ["image.png"]


def test_generate_greedy_gives_the_golden_codes(xomni, tmp_path, golden):
  prompt = "a red square on a blue gradient background"
  out = tmp_path / "codes.json"
  xomni(
    "generate", *MODEL, "--prompt", prompt, "--image-size", 64, 80,
    "--greedy", "--codes-only", "--output-path", out,
  )  # fmt: skip
  want = golden["gen/g1/new_tokens"][0] - 448
  assert json.loads(out.read_text()) == {
    "height": 4,
    "width": 5,
    "codes": want.tolist(),
  }


def test_generate_names_images_after_their_prompts(xomni, tmp_path):
  file = tmp_path / "p.jsonl"
  records = [{"prompt": "a house", "id": "house"}, {"prompt": "a cat"}]
  file.write_text("\n".join(map(json.dumps, records)))
  flags = ["--image-size", 32, "--num-images", 2, "--batch-size", 2]
  xomni(
    "generate", *MODEL, *FLUX, "--prompts-file", file, *flags,
    "--output-path", tmp_path / "out",
  )  # fmt: skip
  names = sorted(p.name for p in (tmp_path / "out").iterdir())
  assert names == ["0001-0.png", "0001-1.png", "house-0.png", "house-1.png"]
  # The batch does not matter: a line a prompt, all at once, gives the same.
  file = tmp_path / "p.txt"
  file.write_text("a house\n\na cat\n")
  xomni(
    "generate", *MODEL, *FLUX, "--prompts-file", file,
    *flags[:-1], 4, "--output-path", tmp_path / "all.webp",
  )  # fmt: skip
  names = sorted(p.name for p in tmp_path.glob("*.webp"))
  assert names == [f"all-000{i}-{j}.webp" for i in (0, 1) for j in (0, 1)]


def test_generate_does_not_depend_on_the_batch(xomni, tmp_path):
  file = tmp_path / "p.txt"
  file.write_text("a house\na cat\n")
  for size in (1, 2):
    xomni(
      "generate", *MODEL, "--prompts-file", file, "--image-size", 32,
      "--codes-only", "--batch-size", size, "--output-path", tmp_path / f"{size}",
    )  # fmt: skip
  for name in ("0000-0.json", "0001-0.json"):
    one, two = (tmp_path / f"{size}" / name for size in (1, 2))
    assert one.read_text() == two.read_text()


def test_generate_without_a_size_is_as_large_as_training_images(
  xomni, tmp_path
):
  out = tmp_path / "o.json"
  xomni(
    "generate", *MODEL, "--prompt", "x", "--codes-only", "--output-path", out
  )
  assert json.loads(out.read_text())["height"] == 112 // 16


def test_tokenize_goes_there_and_back(xomni, tmp_path, golden):
  out = tmp_path / "codes.json"
  xomni(
    "tokenize",
    *MODEL,
    "--image-path",
    GOLDEN / "images/wide.png",
    "--output-path",
    out,
  )
  record = json.loads(out.read_text())
  want = golden["tok/wide/indices"]
  assert (record["height"], record["width"]) == want.shape
  assert record["codes"] == want.reshape(-1).tolist()
  printed = xomni(
    "tokenize", *MODEL, "--image-path", GOLDEN / "images/wide.png"
  )
  assert json.loads(printed) == record
  image = tmp_path / "back.png"
  xomni(
    "tokenize",
    *MODEL,
    *FLUX,
    "--codes",
    out,
    "--steps",
    2,
    "--output-path",
    image,
  )
  assert Image.open(image).size == (112, 80)


def test_chat_prints_the_answer_alone(xomni, golden_json):
  image = GOLDEN / "images/square.png"
  out = xomni(
    "chat", *MODEL, *FLUX, "--image-path", image, "--max-new-tokens", 15,
    "--prompt", "Describe this image in detail.",
  )  # fmt: skip
  assert out == golden_json["protocol"]["chat_square"]["response"] + "\n"


def test_export_writes_a_model_that_loads(xomni, tmp_path):
  out = tmp_path / "copy"
  xomni("export", GOLDEN / "xomni", out, "--dtype", "bfloat16")
  xomni(
    "generate", "--model", out, "--prompt", "x", "--image-size", 32,
    "--codes-only", "--output-path", tmp_path / "o.json",
  )  # fmt: skip


def test_help_says_which_top_k_the_official_script_has(capsys):
  with pytest.raises(SystemExit) as e:
    cli.main(["generate", "--help"])
  assert e.value.code == 0
  assert "--top-k 50" in " ".join(capsys.readouterr().out.split())


def test_package_and_help_import_nothing_heavy():
  code = (
    "import sys, xomni_jax, xomni_jax.cli as c\n"
    "try: c.main(['--help'])\n"
    "except SystemExit: pass\n"
    "print(*(m for m in ('jax', 'torch', 'tensorflow', 'transformers')"
    " if m in sys.modules), file=sys.stderr)"
  )
  run = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True
  )
  assert run.stderr.strip() == ""


def test_generation_needs_no_torch_and_no_tensorflow(tmp_path):
  """A torch-free install runs a model whose `.pt` files are safetensors."""
  cli.main(
    [
      "export",
      str(GOLDEN / "xomni"),
      str(tmp_path / "m"),
      "--vit-format",
      "safetensors",
    ]
  )
  code = (
    "import importlib.machinery as m\n"
    "path_finder = m.PathFinder.find_spec\n"
    "absent = ('torch', 'tensorflow', 'tensorflow_text', 'diffusers')\n"
    "m.PathFinder.find_spec = lambda name, *a: ("
    "None if name.split('.')[0] in absent else path_finder(name, *a))\n"
    "import xomni_jax, numpy as np\n"
    f"m = xomni_jax.load({str(tmp_path / 'm')!r}, flux={str(GOLDEN / 'flux1')!r})\n"
    "g = m.generate('a house', (32, 32), seed=3)\n"
    f"c = m.encode({str(GOLDEN / 'images/wide.png')!r})\n"
    "print(g.images[0].size, c.shape, len(m.chat(g.images[0], 'What?', max_new_tokens=4)) > 0)\n"
  )
  run = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True
  )
  assert run.stdout.split("\n")[-2] == "(32, 32) (5, 7) True", run.stderr[
    -2000:
  ]


def test_launcher_explains_itself_without_setting_up():
  script = pathlib.Path(__file__).parents[2] / "launch/run.sh"
  run = subprocess.run([script, "help"], capture_output=True, text=True)
  assert run.returncode == 0 and "./launch/run.sh demo" in run.stdout


def test_prompts_of_a_file_are_drawn_in_order(xomni, tmp_path):
  file = tmp_path / "p.txt"
  file.write_text("a house\na cat\n")
  xomni(
    "generate", *MODEL, "--prompts-file", file, "--image-size", 32, "--greedy",
    "--codes-only", "--output-path", tmp_path / "both",
  )  # fmt: skip
  xomni(
    "generate", *MODEL, "--prompt", "a cat", "--image-size", 32, "--greedy",
    "--codes-only", "--output-path", tmp_path / "cat.json",
  )  # fmt: skip
  both = json.loads((tmp_path / "both/0001-0.json").read_text())["codes"]
  assert np.array_equal(
    both, json.loads((tmp_path / "cat.json").read_text())["codes"]
  )


@pytest.mark.parametrize(
  ("number", "status"), [(errno.ENOSPC, 2), (errno.EROFS, 2), (errno.EIO, None)]
)
def test_disk_that_takes_nothing_is_one_line(
  monkeypatch, capsys, number, status
):
  def plan(rest):
    raise OSError(number, os.strerror(number), "/full/plan.json")

  monkeypatch.setattr("xomni_jax.plan.main", plan)
  if status is None:  # no matter of rights or room
    with pytest.raises(OSError):
      cli.main(["plan"])
    return
  assert cli.main(["plan"]) == status
  (line,) = capsys.readouterr().err.splitlines()
  assert f"/full/plan.json can't be written ({os.strerror(number)})" in line
