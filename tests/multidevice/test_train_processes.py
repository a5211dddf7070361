"""Two processes train as one does, and either goes on where the other left."""

import socket
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from safetensors.numpy import load_file

from tests import train_runs as runs
from tests.helpers import GOLDEN, read_folder
from xomni_jax.data import pipeline, protocol
from xomni_jax.train_config import DataConfig, SourceConfig
from xomni_jax.training import configure, loop

# Losses of random codes are about 5; sums over rows come in another order.
TOLERANCE = 1e-5
# First steps of Adam and Muon make much of rounding: gradients of the steps
# behind them were seen 7e-5 apart.
STAGES = 3e-4
QUICK = "--config.report.eval_every=0"  # one program less to compile


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Data, a config, and a run straight through."""
  folder = tmp_path_factory.mktemp("processes")
  config = runs.write_config(folder, runs.write_data(folder / "data"))
  status, _, err = runs.run(config, folder / "straight", QUICK)
  assert status == 0, err[-3000:]
  return folder


def assert_close(ours, theirs, tolerance=TOLERANCE):
  assert [x.keys() for x in ours] == [x.keys() for x in theirs]
  for a, b in zip(ours, theirs, strict=True):
    for name, value in a.items():
      # One token of about 100 more or less is right where two are as likely.
      near = 0.02 if "accuracy" in name else tolerance * max(1, abs(value))
      assert abs(value - b[name]) <= near, (a["step"], name, value, b[name])


def test_processes_share_out_the_same_global_batches(tmp_path):
  data = runs.write_data(tmp_path / "data")
  tokenizer = protocol.load_tokenizer(GOLDEN / "xomni", 448, 64)
  cfg = DataConfig(
    (SourceConfig(str(data), "text_to_image"),), runs.LENGTH, window=16
  )
  make = lambda *process: pipeline.packed(
    cfg, tokenizer, seed=3, global_batch=runs.ROWS, process=process
  )
  whole, parts = make(0, 1), [make(0, 2), make(1, 2)]
  for step in (0, 1, 7, 30):
    for name, x in whole[step].arrays.items():
      ours = np.concatenate([part[step].arrays[name] for part in parts])
      assert ours.tobytes() == x.tobytes(), (step, name)


def test_process_that_comes_late_takes_part_in_the_export(
  tmp_path, monkeypatch
):
  (tmp_path / "model").mkdir()  # process 0 has just written it
  (tmp_path / "exported").write_text("9")
  met = []
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda _: 0)
  monkeypatch.setattr(multihost_utils, "sync_global_devices", met.append)
  run = object.__new__(loop._Run)
  run.workdir, run.step, run.frozen = tmp_path, 9, {}
  run.state = {"params": {}, "ema": {}}
  run.stage = SimpleNamespace(export=True)
  run.cfg = SimpleNamespace(checkpoint=SimpleNamespace(export=True))
  run.log = SimpleNamespace(line=lambda text: None)
  run._export()
  assert met == ["export"]


def test_processes_with_folders_of_their_own_are_told_at_once(folder, tmp_path):
  config = folder / "run.py"
  with socket.socket() as s:
    s.bind(("localhost", 0))
    address = f"localhost:{s.getsockname()[1]}"
  ended = runs.finish_together(
    [
      runs.start(config, tmp_path / str(i), f"--distributed={address},2,{i}")
      for i in range(2)
    ]
  )
  for status, _, err in ended:
    assert status == 2, err[-3000:]
    assert "put --workdir on a file system that all processes share" in err
  assert not list(tmp_path.glob("*/checkpoints"))


@pytest.mark.slow  # connected processes wait for one another: minutes
@pytest.mark.parametrize("counts", [(1, 2), (2, 1, 2)])
def test_runs_go_on_with_other_numbers_of_processes(folder, counts):
  workdir = folder / f"by-{counts}"
  # A picture is due at the end, when there are two processes.
  shown = "--config.report.preview_every=9"
  given = (folder / "run.py", workdir, QUICK, shown)
  for i, count in enumerate(counts):
    last = i + 1 == len(counts)
    if last:
      results = runs.together(*given, count=count)
    else:
      done = runs.checkpoints(workdir)[-1] if i else 0
      results = runs.stopped(*given, step=done + 1, count=count)
    assert {r[0] for r in results} == {0 if last else 143}, results[0][2][
      -3000:
    ]
    # Process 0 alone speaks.
    assert runs.says(results[0][1])
    assert not any(runs.says(out) for _, out, _ in results[1:])
  assert (workdir / "pictures" / "samples-0000009.png").exists()
  assert_close(runs.metrics(workdir), runs.metrics(folder / "straight"))
  ours = read_folder(workdir / "model")
  theirs = read_folder(folder / "straight" / "model")
  assert ours.keys() == theirs.keys()
  for name, x in theirs.items():
    # Adam's first steps are of the size of the learning rate (0.01) whatever
    # the gradient's: where it is next to nothing, its sign is rounding.
    assert np.abs(ours[name] - x).max() < 0.02, name
    assert np.abs(ours[name] - x).mean() < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp"])
@pytest.mark.parametrize("name", ["vae", "tokenizer", "decoder"])
def test_two_processes_train_a_stage_as_one_does(tmp_path, name, axis):
  config = runs.ROOT / "configs" / f"{name}.py:tiny"
  phases = configure.read(str(config)).phases
  each = 4 // len(phases)  # steps
  given = [
    f"--config.{setting}"
    for setting in (
      *(f"phases.{phase}.steps={each}" for phase in phases),
      *(f"phases.{phase}.warmup_steps=0" for phase in phases),
      "optim.lr=1e-4",
      "global_batch=4",
      "checkpoint.every=2",
      "report.log_every=1",
      "report.eval_every=4",
      "report.eval_batches=1",
      "report.preview_every=4",
      "mesh.data=1",
      f"mesh.{axis}=-1",
    )
  ]
  if name == "tokenizer":  # the codebook gets its start, and is revived
    given += [
      f"--config.options.{setting}"
      for setting in ("quantise_from=1", "revive_every=1", "revive_until=4")
    ]
    # One batch holds 144 features; k-means wants one a code, of 512.
    given += ["--config.options.kmeans_batches=4"]
  config_of = lambda workdir: (config, tmp_path / workdir, *given)
  alone = runs.run(*config_of("one"))
  assert alone[0] == 0, alone[2][-3000:]
  results = runs.together(*config_of("two"), count=2)
  assert {r[0] for r in results} == {0}, results[0][2][-3000:]
  of = lambda workdir: runs.metrics(tmp_path / workdir)
  assert_close(of("two"), of("one"), STAGES)
  picture = "pictures/samples-0000004.png"
  for workdir in ("one", "two"):
    assert (tmp_path / workdir / picture).exists()
  ours, theirs = (
    {
      (path.name, key): x
      for path in (tmp_path / workdir / "model").rglob("*.safetensors")
      for key, x in load_file(path).items()
    }
    for workdir in ("two", "one")
  )
  assert ours and ours.keys() == theirs.keys()
  for key, x in theirs.items():
    # As above, by four steps at a rate of 1e-4.
    assert np.abs(ours[key] - x).max() < 1e-3, key
    assert np.abs(ours[key] - x).mean() < 1e-4, key
