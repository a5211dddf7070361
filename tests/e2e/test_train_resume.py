"""A training run goes on exactly where it was, whatever stopped it.

Runs are the real command in processes of their own; see tests/train_runs.py.
One is left alone and makes nine steps: the others have to end as it did, bit
by bit.
"""

import os
import random
import shutil
import signal

import jax
import numpy as np
import pytest
from safetensors import SafetensorError

import xomni_jax
from tests import train_runs as runs
from tests.released_files import SOURCE, ignored, read_all
from xomni_jax import cli
from xomni_jax.checkpoints import manifest, released
from xomni_jax.inference import fresh


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Data, a config, and the run left alone; read only."""
  folder = tmp_path_factory.mktemp("train")
  config = runs.write_config(folder, runs.write_data(folder / "data"))
  status, out, err = runs.run(config, folder / "alone")
  assert status == 0, err[-3000:]
  assert out.splitlines()[-1] == "done: 9 steps"
  return folder


@pytest.fixture
def copied(folder, tmp_path):
  """A copy of the run left alone."""
  return shutil.copytree(folder / "alone", tmp_path / "copy")


def assert_as_alone(workdir, folder):
  """State, metrics and exported model are those of the run left alone."""
  runs.assert_same_state(runs.state(workdir), runs.state(folder / "alone"))
  assert runs.metrics(workdir) == runs.metrics(folder / "alone")
  ours, theirs = read_all(workdir / "model"), read_all(folder / "alone/model")
  for part, tensors in theirs.items():
    runs.assert_same_state(ours[part], tensors)


def train(capsys, *argv):
  """(status, lines of standard output, of standard error), in this process."""
  status = cli.main(runs.arguments(*argv))
  out, err = capsys.readouterr()
  return status, out.splitlines(), err.splitlines()


def largest(folder):
  """The file that holds most of a checkpoint."""
  names = [name for name, *_ in manifest.read(folder)]
  return max((folder / n for n in names), key=lambda p: p.stat().st_size)


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def test_alone_logs_each_step_once_and_saves_as_told(folder):
  logged = runs.metrics(folder / "alone")
  steps = [x["step"] for x in logged if "pretrain/loss" in x]
  assert steps == list(range(1, 10))
  assert [x["step"] for x in logged if "held_out/loss" in x] == [3, 6, 9]
  assert runs.checkpoints(folder / "alone") == [2, 4, 6, 8, 9]
  losses = [x["pretrain/loss"] for x in logged if "pretrain/loss" in x]
  assert losses[-1] < losses[0] - 1  # it does learn


def test_trained_model_is_the_golden_one_but_for_the_ar_part(folder):
  out = folder / "alone" / "model"
  ours, theirs = read_all(out), read_all(SOURCE)
  assert ours.keys() == theirs.keys()
  for part, tensors in theirs.items():
    wanted = {k for k in tensors if not ignored(part, k)}
    assert set(ours[part]) == wanted
    for key in wanted:
      x, y = tensors[key], ours[part][key]
      assert y.shape == x.shape, key
      if part == "ar":
        assert (y.astype(np.float32) != x.astype(np.float32)).any(), key
      else:
        assert (y.dtype, y.tobytes()) == (x.dtype, x.tobytes()), key
  # Of the state it is the average that people get.
  state = runs.state(folder / "alone")
  for name in ("lm_head", "mm_head"):
    saved = state[f"ema/ar/{name}"]
    assert np.array_equal(ours["ar"][f"{name}.weight"], saved)
    assert not np.array_equal(saved, state[f"params/ar/{name}"])
  model = xomni_jax.load(out)
  drawn = model.generate(["a red sign"], (32, 32), decode=False)
  assert drawn.codes[0].shape == (2, 2)


def test_phase_freezes_parameters_and_moments_that_it_does_not_train(folder):
  four, six, nine = (runs.state(folder / "alone", s) for s in (4, 6, 9))
  two = runs.state(folder / "alone", 2)
  own = lambda name: (
    name.startswith(("params/ar/lm", "optim/1/"))
    and not name.startswith("params/ar/lm_norm")
  )
  for name in filter(own, four):
    # "1" are the parameters of the second phase, steps 4 to 6.
    assert four[name].tobytes() != six[name].tobytes(), name
    assert six[name].tobytes() == nine[name].tobytes(), name
  for name in (n for n in two if n.startswith("optim/1/")):
    assert not two[name].any(), name
  counts = {n: int(x) for n, x in nine.items() if n.endswith("count")}
  assert sorted(counts.values()) == [3, 9]


def test_killed_and_told_to_stop_the_run_ends_as_if_left_alone(folder):
  config, workdir = folder / "run.py", folder / "stopped"
  # At the boundary of step 3, where no checkpoint is.
  process = runs.start(config, workdir)
  runs.signal_after(process, workdir, 3)
  assert runs.finish(process)[0] == -signal.SIGKILL
  kept = runs.checkpoints(workdir)
  ((status, out, err),) = runs.stopped(config, workdir, step=4)
  assert status == 143, err[-3000:]
  lines = out.splitlines()
  assert [x for x in lines if x.startswith("resumed")] == [
    f"resumed at step {step} of 9" for step in kept[-1:]
  ]
  step = runs.checkpoints(workdir)[-1]
  assert lines[-1] == (
    f"stopped at step {step} of 9, saved; start again to go on (exit status "
    "143)"
  )
  assert step == runs.metrics(workdir)[-1]["step"] < 9
  status, out, err = runs.run(config, workdir)
  assert status == 0, err[-3000:]
  assert f"resumed at step {step} of 9" in out.splitlines()
  assert_as_alone(workdir, folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_any_steps_the_run_ends_as_if_left_alone(folder, seed):
  draw = random.Random(seed)
  config, workdir = folder / "run.py", folder / f"killed-{seed}"
  for step in sorted(draw.sample(range(1, 9), 2)):
    process = runs.start(config, workdir)
    runs.signal_after(process, workdir, step)
    assert runs.finish(process)[0] == -signal.SIGKILL
  status, _, err = runs.run(config, workdir)
  assert status == 0, err[-3000:]
  assert_as_alone(workdir, folder)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4, 6])
def test_resumed_at_any_checkpoint_the_run_ends_as_if_left_alone(
  folder, copied, step
):
  shutil.rmtree(copied / "model")
  for later in (s for s in runs.checkpoints(copied) if s > step):
    shutil.rmtree(copied / "checkpoints" / str(later))
  status, out, err = runs.run(folder / "run.py", copied)
  assert status == 0, err[-3000:]
  assert f"resumed at step {step} of 9" in out
  assert_as_alone(copied, folder)


def test_damaged_checkpoints_are_passed_over_for_a_good_one(folder, copied):
  shutil.rmtree(copied / "model")
  flipped = largest(copied / "checkpoints" / "9")
  flip(flipped)
  cut = largest(copied / "checkpoints" / "8")
  os.truncate(cut, 100)
  status, out, err = runs.run(folder / "run.py", copied)
  assert status == 0, err[-3000:]
  lines = out.splitlines()
  assert lines[0].endswith(
    f"step 9 passed over: {flipped} has other bytes"
  ) and lines[1].endswith(f"step 8 passed over: {cut} has another size")
  # Six is where the third phase begins.
  assert "resumed at step 6 of 9" in lines
  assert_as_alone(copied, folder)


def test_no_intact_checkpoint_never_starts_from_zero(folder, copied, capsys):
  before = (copied / "metrics.jsonl").read_bytes()
  for step in runs.checkpoints(copied):
    flip(largest(copied / "checkpoints" / str(step)))
  status, out, err = train(capsys, folder / "run.py", copied)
  assert status == 2
  assert len(out) == 5 and all("passed over" in line for line in out)
  (line,) = err
  assert line.startswith("xomni train: error: none of the checkpoints in ")
  assert "is intact (steps 2, 4, 6, 8, 9)" in line
  assert (copied / "metrics.jsonl").read_bytes() == before


def test_changed_config_is_shown_and_refused(folder, copied, capsys):
  status, out, err = train(
    capsys, folder / "run.py", copied, "--config.optim.lr=0.02"
  )
  assert (status, out) == (2, [])
  (line,) = err
  assert "optim.lr: 0.01 -> 0.02; give another folder" in line


def test_starting_anew_over_checkpoints_is_refused(folder, copied, capsys):
  status, out, err = train(capsys, folder / "run.py", copied, "--no-resume")
  assert (status, out) == (2, [])
  (line,) = err
  assert "holds checkpoints of steps [2, 4, 6, 8, 9]; resume them" in line


def test_non_finite_update_is_not_saved_and_a_better_config_goes_on(folder):
  config, workdir = folder / "run.py", folder / "burst"
  # Step 4 takes the huge step, and would be saved.
  status, out, err = runs.run(
    config, workdir, "--config.phases.2_all.lr_scale=1e30"
  )
  assert status == 1
  (line,) = (x for x in err.splitlines() if x.startswith("xomni train"))
  assert line.startswith("xomni train: step 4: param_norm not finite (inf)")
  assert "the newest checkpoint is of step 2" in line
  assert "Traceback" not in err
  assert runs.checkpoints(workdir) == [2]
  last = runs.metrics(workdir)[-1]
  assert last["nonfinite"]["pretrain/param_norm"] == "inf"
  assert not (workdir / "model").exists()
  # Without the change the run would have been this one all along.
  profile = "--config.report.profile=(7, 20)"
  status, out, err = runs.run(config, workdir, profile, "--allow-config-change")
  assert status == 0, err[-3000:]
  assert f"profile from step 7: {workdir}/profile" in out.splitlines()
  (trace,) = (workdir / "profile").rglob("*.xplane.pb")
  names = {
    event.name
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
    for line in plane.lines
    for event in line.events
  }
  assert any("dot" in name for name in names)  # what the devices did
  assert not any(name.startswith("$") for name in names)  # Python's frames
  assert "resumed at step 2 of 9" in out.splitlines()
  assert_as_alone(workdir, folder)


def test_run_that_goes_on_beyond_its_end_exports_anew(folder, copied, capsys):
  before = read_all(copied / "model")
  longer = "--config.phases.3_anneal.steps=4"
  status, out, err = train(
    capsys, folder / "run.py", copied, longer, "--allow-config-change"
  )
  assert (status, out[-1]) == (0, "done: 10 steps"), err
  after = read_all(copied / "model")
  changed = [
    k
    for k, x in after["ar"].items()
    if x.tobytes() != before["ar"][k].tobytes()
  ]
  assert changed
  names = {path.name for path in copied.iterdir()}
  assert "export.part" not in names


def test_export_that_was_cut_short_is_made_again(folder, copied, capsys):
  there = read_all(copied / "model")
  (copied / "export.part" / "model").mkdir(parents=True)  # what a kill left
  (copied / "exported").unlink()
  status, out, err = train(capsys, folder / "run.py", copied)
  assert (status, out[-1]) == (0, "done: 9 steps"), err
  assert not (copied / "export.part").exists()
  for part, tensors in read_all(copied / "model").items():
    runs.assert_same_state(tensors, there[part])
  made = (copied / "model").stat().st_mtime_ns
  assert train(capsys, folder / "run.py", copied)[0] == 0
  assert (copied / "model").stat().st_mtime_ns == made  # once is enough


@pytest.mark.parametrize(
  "error",
  [
    OSError(28, "No space left on device"),
    SafetensorError("No space left on device (os error 28)"),
  ],
)
def test_disk_that_is_full_at_the_export_is_one_line(
  folder, copied, capsys, monkeypatch, error
):
  def full(_, out, *__, **___):
    with released.staged(out):
      raise error

  monkeypatch.setattr(fresh, "replace_parts", full)
  (copied / "exported").unlink()
  status, _, err = train(capsys, folder / "run.py", copied)
  assert status == 2
  (line,) = (x for x in err if x.startswith("xomni train"))
  assert "No space left on device" in line and "start again" in line
  assert read_all(copied / "model")  # the one that was there
