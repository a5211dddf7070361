"""`xomni eval` from models to a report, with real engines, small.

The models are the golden checkpoint, whose images are noise, and the same with
another image head.
"""

import gzip
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests.helpers import GOLDEN
from xomni_jax import cli
from xomni_jax.evals import (
  asked,
  command,
  drawing,
  rows,
  workbench,
)
from xomni_jax.inference.sampling import Sampling

pytest.importorskip("rapidocr")

FLUX = str(GOLDEN / "flux1")
SETTINGS = 7  # of best-of-n with a control
SMALL = ["--count", "5", "--steps", "1", "--batch", "4", "--readers", "1"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """{"sft", "rl": model folder}; RL draws other codes."""
  folder = tmp_path_factory.mktemp("models")
  shutil.copytree(GOLDEN / "xomni", folder / "rl")
  path = folder / "rl" / "model-00004-of-00004.safetensors"
  state = load_file(path)
  state["mm_head.weight"] = np.roll(state["mm_head.weight"], 1, 0)
  save_file(state, path, {"format": "pt"})
  return {"sft": str(GOLDEN / "xomni"), "rl": str(folder / "rl")}


def _argv(what, folders, out, *more):
  models = ["--sft", folders["sft"], "--rl", folders["rl"], "--flux", FLUX]
  return ["eval", what, *models, *SMALL, "--out", str(out), *more]


@pytest.fixture(scope="module")
def measured(folders, tmp_path_factory):
  """Folder of a whole best-of-n."""
  out = tmp_path_factory.mktemp("eval") / "seed0"
  control = ["--control", folders["sft"], "--n", "1,2"]
  assert cli.main(_argv("best-of-n", folders, out, *control)) == 0
  return out


def test_best_of_n_from_models_to_figures(measured):
  figures = json.loads((measured / "best-of-n.json").read_text())
  engines = figures["identity"]["engines"]
  assert "rapidocr" in engines
  assert ("tesseract" in engines) == bool(shutil.which("tesseract"))
  exact = figures["scores"]["rapidocr"]["exact"]
  assert exact["true drawings"]["all"][0] >= 0.8  # signs can be read
  assert exact["rl T=1"]["all"][0] == 0  # noise can't
  _, found = rows.read_rows(measured / "best-of-n.rows.jsonl")
  assert len(found) == 5 * (SETTINGS + 1)  # one setting has two images each
  sheets = sorted(p.name for p in (measured / "sheets" / "best-of-n").iterdir())
  assert len(sheets) == SETTINGS
  with Image.open(measured / "sheets" / "best-of-n" / sheets[0]) as sheet:
    assert sheet.width > 5 * 96


def test_control_that_is_sft_draws_the_same(measured):
  """The same weights under the same keys: only so are differences paired."""
  _, found = rows.read_rows(measured / "best-of-n.rows.jsonl")
  sheets = measured / "sheets" / "best-of-n"
  pixels = {
    name: np.asarray(Image.open(sheets / f"{name}-t-1.png"))
    for name in ("sft", "control", "rl")
  }
  assert np.array_equal(pixels["sft"], pixels["control"])
  assert not np.array_equal(pixels["sft"], pixels["rl"])
  for prompt in range(5):
    same = [found[f"{m} T=1", prompt, 0] for m in ("sft", "control")]
    assert same[0] == same[1]


def _apart(folder, out, model):
  """A copy of the rows without those of a model."""
  lines = (folder / "best-of-n.rows.jsonl").read_text().splitlines(True)
  kept = [x for x in lines if f'"setting": "{model} ' not in x]
  assert 1 < len(kept) < len(lines)
  (out / "best-of-n.rows.jsonl").write_text("".join(kept))
  return out


def test_measurement_that_is_complete_draws_nothing(
  measured, folders, monkeypatch, capsys, tmp_path
):
  before = (measured / "best-of-n.json").read_bytes()
  monkeypatch.setattr(drawing.Drawer, "draw", None)
  monkeypatch.setattr(drawing.Drawer, "repaint", None)
  argv = _argv("best-of-n", folders, measured, "--control", folders["sft"])
  assert cli.main([*argv, "--n", "1,2"]) == 0
  assert (measured / "best-of-n.json").read_bytes() == before
  assert cli.main(["eval", "score", str(measured)]) == 0
  assert (measured / "best-of-n.json").read_bytes() == before
  # So are rows of which some lie elsewhere.
  apart = _apart(measured, tmp_path, "sft")
  assert cli.main(["eval", "score", str(apart)]) == 2
  assert "no row of" in capsys.readouterr().err
  reuse = ["--reuse", str(measured)]
  assert cli.main(["eval", "score", str(apart), *reuse]) == 0
  assert (apart / "best-of-n.json").read_bytes() == before
  # Another model under the same name is another measurement.
  capsys.readouterr()
  argv = _argv("best-of-n", folders, measured, "--control", folders["rl"])
  assert cli.main([*argv, "--n", "1,2"]) == 2
  err = capsys.readouterr().err
  assert "another measurement (models " in err and len(err.splitlines()) == 1


@pytest.fixture(scope="module")
def packed(measured, tmp_path_factory):
  """`measured`, as it is kept: its rows went through gzip."""
  folder = tmp_path_factory.mktemp("packed") / "seed0"
  shutil.copytree(measured, folder)
  path = folder / "best-of-n.rows.jsonl"
  path.with_name(f"{path.name}.gz").write_bytes(
    gzip.compress(path.read_bytes())
  )
  path.unlink()
  return folder


def test_packed_rows_are_scored_but_not_added_to(
  measured, packed, folders, capsys
):
  figures = packed / "best-of-n.json"
  figures.unlink()
  # What is asked can be had from its source, too, where it is the same.
  prompts = packed / "best-of-n.test.prompts.jsonl"
  kept = prompts.read_text()
  prompts.write_text(kept.replace("a", "A", 1))
  assert cli.main(["eval", "score", str(packed)]) == 2
  assert "other prompts than the rows" in capsys.readouterr().err
  prompts.unlink()
  assert cli.main(["eval", "score", str(packed)]) == 0
  assert figures.read_bytes() == (measured / figures.name).read_bytes()
  capsys.readouterr()
  assert cli.main(_argv("best-of-n", folders, packed, "--n", "1,2")) == 2
  err = capsys.readouterr().err
  assert "gunzip" in err and len(err.splitlines()) == 1
  path = packed / "best-of-n.rows.jsonl.gz"
  whole = path.read_bytes()
  for broken in (whole[:-40], b"no gzip"):
    path.write_bytes(broken)
    assert cli.main(["eval", "score", str(packed)]) == 2
    err = capsys.readouterr().err
    assert "can't be read" in err and len(err.splitlines()) == 1
  path.write_bytes(whole)


@pytest.mark.parametrize("kept", ["measured", "packed"])
def test_rows_and_sheets_of_the_same_model_are_reused(
  kept, measured, folders, tmp_path, monkeypatch, request
):
  """Another RL model, here SFT's: nothing of SFT is drawn again."""
  drawn = []
  real = workbench.Workbench._drawer
  spy = lambda self, name: drawn.append(name) or real(self, name)
  monkeypatch.setattr(workbench.Workbench, "_drawer", spy)
  models = folders | {"rl": folders["sft"]}
  out = tmp_path / "seed1"
  more = ["--n", "1,2", "--reuse", str(request.getfixturevalue(kept))]
  assert cli.main(_argv("best-of-n", models, out, *more)) == 0
  assert set(drawn) == {"rl"}
  # Fewer images of each prompt: as many of its rows.
  fewer = ["--n", "1", "--reuse", str(out)]
  assert cli.main(_argv("best-of-n", models, tmp_path / "fewer", *fewer)) == 0
  assert drawn == ["rl"] * len(drawn)
  _, found = rows.read_rows(tmp_path / "fewer" / "best-of-n.rows.jsonl")
  assert {key.sample for key in found} == {0}
  before, after = (
    json.loads((f / "best-of-n.json").read_text())["scores"]
    for f in (measured, out)
  )
  for engine, metrics in after.items():
    for metric, lines in metrics.items():
      for line, found in lines.items():
        if line != "rl T=1":
          assert found == before[engine][metric][line]
  sheet = "sheets/best-of-n/sft-greedy.png"
  assert (out / sheet).read_bytes() == (measured / sheet).read_bytes()


def test_rows_of_other_draws_are_reused_as_such(
  packed, folders, tmp_path, monkeypatch
):
  """Their images can't be drawn again, and their keys are of other draws."""
  monkeypatch.setattr(drawing.Drawer, "draw", None)
  monkeypatch.setattr(drawing.Drawer, "repaint", None)
  assert json.loads((packed / "best-of-n.json").read_text())["identity"][
    "drawing"
  ] == [drawing.VERSION]
  monkeypatch.setattr(drawing, "VERSION", drawing.VERSION + 1)
  bare = tmp_path / "bare"  # without sheets
  shutil.copytree(packed, bare, ignore=shutil.ignore_patterns("sheets"))
  out = tmp_path / "seed1"
  control = ["--control", folders["sft"], "--n", "1,2"]
  argv = _argv("best-of-n", folders, out, *control, "--reuse", str(bare))
  assert cli.main(argv) == 0
  identity = json.loads((out / "best-of-n.json").read_text())["identity"]
  assert identity["drawing"] == [drawing.VERSION - 1, drawing.VERSION]
  assert not (out / "sheets").exists()
  for folder, same in ((packed, True), (out, False)):
    report = ["eval", "report", str(folder), "--out", str(tmp_path / "report")]
    assert cli.main(report) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert ("under the same random keys" in text) == same
  # Nor does a measurement that was begun by other draws go on by these.
  begun = tmp_path / "begun"
  begun.mkdir()
  rows_of = packed / "best-of-n.rows.jsonl.gz"
  (begun / "best-of-n.rows.jsonl").write_bytes(
    gzip.decompress(rows_of.read_bytes())
  )
  assert cli.main(_argv("best-of-n", folders, begun, *control)) == 2


@pytest.mark.slow
def test_measurement_that_is_killed_goes_on_to_the_same_figures(
  measured, folders, tmp_path
):
  argv = _argv("best-of-n", folders, tmp_path, "--control", folders["sft"])
  program = [sys.executable, "-m", "xomni_jax", *argv, "--n", "1,2"]
  run = subprocess.Popen(program, cwd=pathlib.Path(__file__).parents[2])
  path, deadline = tmp_path / "best-of-n.rows.jsonl", time.time() + 300
  lines = lambda: path.read_bytes().count(b"\n") if path.exists() else 0
  while run.poll() is None and lines() < 11 and time.time() < deadline:
    time.sleep(0.005)
  children = _children(run.pid)
  run.send_signal(signal.SIGKILL)
  run.wait()
  there = lines()
  assert 11 <= there < 1 + 5 * (SETTINGS + 1) and children
  # What it had started to read with does not wait for it for ever.
  while any(map(_alive, children)) and time.time() < deadline:
    time.sleep(0.05)
  assert not any(map(_alive, children))
  with path.open("ab") as file:
    file.write(b'{"setting": "sft T')
  assert cli.main([*argv, "--n", "1,2"]) == 0
  ours, whole = (
    json.loads((f / "best-of-n.json").read_text()) for f in (tmp_path, measured)
  )
  assert ours == whole
  sort = lambda f: sorted((f / path.name).read_text().splitlines()[1:])
  assert sort(tmp_path) == sort(measured)


def _children(pid):
  path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
  return path.read_text().split()


def _alive(pid):
  try:
    state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1]
  except OSError:
    return False
  return state.split()[0] != "Z"


@pytest.mark.slow
def test_guidance_from_models_to_a_report(folders, measured, tmp_path):
  out = tmp_path / "seed0"
  more = ["--validation-count", "2", "--count", "3", "--samples", "2"]
  assert cli.main(_argv("cfg", folders, out, *more)) == 0
  figures = json.loads((out / "cfg.json").read_text())
  assert len(figures["validation"]["sft"]["rapidocr"]["exact"]) == 15
  assert figures["gain"]["rl"]["rapidocr"]["exact"]["all"][3] == 3
  shutil.copy(measured / "best-of-n.json", out)
  report = tmp_path / "report"
  assert cli.main(["eval", "report", str(out), "--out", str(report)]) == 0
  text = (report / "report.md").read_text()
  assert "# Best of N" in text and "# Guidance and filters" in text
  names = sorted(path.name for path in report.iterdir())
  assert names == ["best-of-n.png", "cfg.png", "report.md"]


def test_images_depend_on_prompt_and_sample_alone(tiny):
  some = asked.open_asked("world:signs:test", 3)
  draw = lambda places, numbers, seed=7: drawing.Drawer(tiny, seed, 2).draw(
    [some[i] for i in places], numbers, 2, Sampling()
  )
  first, second = draw([0, 1], [0, 1]), draw([2, 1], [2, 1])
  assert np.array_equal(first[2:], second[2:])
  # Another prompt, number, sample or seed is another image.
  others = [*first[:2], *draw([1, 1], [5, 6]), *draw([0, 1], [0, 1], 8)]
  for image in (*others, first[3]):
    assert not np.array_equal(image, first[2])


def test_true_codes_are_painted_as_the_model_decodes_them(tiny):
  """The same codes, and the same pixels from the same noise."""
  some = asked.open_asked("world:signs:test", 4)
  pictures = asked.true_images("world:signs:test", range(4))
  drawer = drawing.Drawer(tiny, 2**32 - 1, 2)  # a seed that is no int32
  seen = {}
  paint = drawer._paint

  def spy(codes, texts, keys):
    seen["codes"], seen["keys"] = codes, keys
    return paint(codes, texts, keys)

  drawer._paint = spy
  made = drawer.repaint(pictures, some, range(4))
  assert made.shape == (4, 96, 96, 3) and made.dtype == np.uint8
  rows = zip(seen["codes"], seen["keys"], some, pictures, made, strict=True)
  for codes, key, one, picture, image in rows:
    assert np.array_equal(codes, tiny.encode(picture))
    h, w = codes.shape
    noise = jax.random.normal(
      key, (1, tiny.architecture.vae.latent_channels, 2 * h, 2 * w)
    )
    alone = tiny.decode(codes, one.text, steps=2, noise=noise)
    assert np.abs(alone.astype(int) - image).max() <= 1


@pytest.mark.parametrize(
  ("more", "says"),
  [
    (["--n", "2,4"], "rising numbers"),
    (["--n", "1,x"], "list of numbers"),
    (["--count", "0"], "count is 0"),
    (["--steps", "0"], "--steps is 0"),
    (["--sft", "nowhere/at/all"], "no such folder"),
    (["--source", "world:moon"], "no level"),
    (["--rounds", "2"], "unrecognized arguments"),
  ],
)
def test_bad_argument_is_one_line(folders, tmp_path, capsys, more, says):
  assert cli.main(_argv("best-of-n", folders, tmp_path / "out", *more)) == 2
  err = capsys.readouterr().err
  assert says in err and len(err.splitlines()) == 1
  assert not (tmp_path / "out").exists()


def test_size_that_a_model_can_not_draw_is_told_at_once(
  folders, tmp_path, capsys
):
  prompts = tmp_path / "prompts.jsonl"
  prompts.write_text(
    '{"prompt": "A", "targets": ["A"], "size": [96, 96]}\n'
    '{"prompt": "B", "targets": ["B"], "size": [96, 100]}\n'
  )
  more = ["--source", str(prompts), "--count", "2"]
  assert cli.main(_argv("best-of-n", folders, tmp_path / "out", *more)) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "prompt 'B': size is 96 x 100 px, expected" in line
  assert not (tmp_path / "out").exists()


def test_model_without_a_decoder_is_one_line(folders, tmp_path, capsys):
  argv = _argv("best-of-n", folders, tmp_path / "out")
  place = argv.index("--flux")
  assert cli.main([*argv[:place], *argv[place + 2 :]]) == 2
  err = capsys.readouterr().err
  assert "--flux" in err and len(err.splitlines()) == 1


def test_model_that_is_changed_while_it_is_measured_is_refused(
  folders, tmp_path, monkeypatch, capsys
):
  rl = tmp_path / "rl"
  shutil.copytree(folders["rl"], rl)
  real = workbench.Workbench._drawer

  def changed(self, name):
    if name == "rl":
      config = rl / "generation_config.json"
      config.write_text('{"changed": true}')
    return real(self, name)

  monkeypatch.setattr(workbench.Workbench, "_drawer", changed)
  argv = _argv("best-of-n", folders | {"rl": str(rl)}, tmp_path / "out")
  assert cli.main([*argv, "--n", "1"]) == 2
  err = capsys.readouterr().err.splitlines()[-1]
  assert f"--rl {rl} was changed since this command began" in err


def test_prompts_to_choose_on_are_the_sources_or_named(
  folders, tmp_path, capsys
):
  assert command._validation_of("world:posters:test") == (
    "world:posters:validation"
  )
  argv = _argv("cfg", folders, tmp_path / "out", "--source", "world:signs")
  assert cli.main(argv) == 2
  err = capsys.readouterr().err
  assert "--validation" in err and len(err.splitlines()) == 1
  same = ["--source", "world:signs:test", "--validation", "world:signs:test"]
  assert cli.main(_argv("cfg", folders, tmp_path / "out", *same)) == 2
  err = capsys.readouterr().err
  assert "5 prompts of --validation" in err and len(err.splitlines()) == 1
  assert not (tmp_path / "out").exists()
