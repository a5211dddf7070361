"""The loop on a stage of two numbers: what it does in which order."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import train_configs, train_runs
from xomni_jax.checkpoints import manifest
from xomni_jax.data.feed import Rows
from xomni_jax.errors import InputError
from xomni_jax.params import Row
from xomni_jax.train_config import CheckpointConfig, ReportConfig
from xomni_jax.training import log, loop
from xomni_jax.training.preemption import EXIT_PREEMPTED, Preemption
from xomni_jax.training.stage import Part, Program, Stage

STEPS = 4


class Batches:
  """The numbers 1, 2, ... by step."""

  def __getitem__(self, step):
    rows = {"x": np.full((8, 2), step + 1, np.float32), "real": np.ones(8)}
    return Rows(rows, [])

  def iterate(self, first=0):
    while True:
      yield self[first]
      first += 1


def stage(**how):
  """A stage that fits two numbers to 1."""
  tree = {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}

  def loss(params, batch, context):
    errors = (batch["x"] @ params["m"]["w"] - 1) ** 2
    return jnp.sum(errors) / context.totals["rows"], {}

  program = Program(
    parts={"m": Part([Row("w", "w", "a -> a")], tree)},
    init=lambda key: {"m": {"w": jax.random.normal(key, (2,))}},
    totals=lambda batch: {"rows": jnp.sum(batch["real"])},
    loss=loss,
    batch={},
    tokens=0,
    flops=0.0,
  )
  given = {"batches": lambda phase: Batches(), "held_out": Batches(), **how}
  return Stage(program, **given)


def config(**report):
  report = {"log_every": 1, "eval_every": 2, "eval_batches": 1, **report}
  return train_configs.train_config(
    STEPS,
    "m/",
    eval_data=train_configs.data(),
    checkpoint=CheckpointConfig(every=2),
    report=ReportConfig(**report),
  )


def train(folder, made=None, settings=None, **report):
  return loop.train(
    config(**report), made or stage(), folder, settings=settings or {}
  )


def stop_at(monkeypatch, step):
  """Tells the next run to stop after a step."""
  told = lambda _, now: now == step
  monkeypatch.setattr(Preemption, "should_stop", told)


def test_config_of_a_run_that_saved_nothing_may_be_mended(tmp_path):
  class Fails(Batches):
    def __getitem__(self, step):
      raise InputError("no data")

  with pytest.raises(InputError, match="no data"):
    train(tmp_path, stage(batches=lambda phase: Fails()), {"lr": 1})
  assert train(tmp_path, settings={"lr": 2}) == 0
  with pytest.raises(InputError, match=r"lr: 2 -> 3; .*--allow-config-change"):
    train(tmp_path, settings={"lr": 3})


def test_profile_ends_in_every_process_at_once(monkeypatch):
  """What is read may be gathered: the others would be in the next step."""
  read = []
  run = object.__new__(loop._Run)
  run.cfg, run.workdir = config(profile=(1, 3)), "none"
  run.log, run.profiling = log.Log("none", False), False
  monkeypatch.setattr(run, "_read", lambda: read.append(run.step), False)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  monkeypatch.setattr(jax.profiler, "start_trace", None)  # of process 0 alone
  monkeypatch.setattr(jax.profiler, "stop_trace", None)
  for run.step in range(STEPS):
    run._profile()
  assert read == [3]


def test_profile_ends_with_a_run_that_is_told_to_stop(tmp_path, monkeypatch):
  stop_at(monkeypatch, 3)
  assert train(tmp_path, profile=(2, 100)) == EXIT_PREEMPTED
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_no_profile_begins_as_the_run_ends(tmp_path, monkeypatch):
  monkeypatch.setattr(loop, "start_profile", None)
  assert train(tmp_path, profile=(STEPS, STEPS + 1)) == 0


def test_held_out_rows_know_the_last_step_that_is_done(tmp_path):
  """A loss that changes in the run is measured as it was trained."""

  def loss(params, batch, context):
    return jnp.sum(params["m"]["w"]), {"at": context.step}

  made = stage()
  program = dataclasses.replace(made.program, loss=loss)
  assert train(tmp_path, dataclasses.replace(made, program=program)) == 0
  lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
  found = {x["step"]: x["held_out/at"] for x in lines if "held_out/at" in x}
  assert found == {2: 1, 4: 3}


def test_run_is_said_to_be_saved_once_its_checkpoint_is_there(
  tmp_path, monkeypatch
):
  write, there = manifest.write, []

  def slow(folder):
    time.sleep(0.5)
    write(folder)

  def line(_, text):
    if text.startswith("stopped at step 3"):
      there.append((tmp_path / "checkpoints" / "3").exists())

  monkeypatch.setattr(manifest, "write", slow)
  monkeypatch.setattr(log.Log, "line", line)
  stop_at(monkeypatch, 3)
  assert train(tmp_path) == EXIT_PREEMPTED
  assert there == [True]


def test_told_to_stop_a_run_reports_when_it_goes_on(tmp_path, monkeypatch):
  """Evaluations may take longer than a machine has left."""
  assert train(tmp_path / "alone") == 0
  with monkeypatch.context() as m:
    stop_at(m, 2)
    never = lambda *_: pytest.fail("there was no time for it")
    made = stage(evaluate=never, preview=never)
    status = train(tmp_path / "stopped", made, preview_every=2)
    assert status == EXIT_PREEMPTED
  assert train(tmp_path / "stopped") == 0
  logged = train_runs.metrics(tmp_path / "stopped")
  assert logged == train_runs.metrics(tmp_path / "alone")
  assert [x["step"] for x in logged if "held_out/loss" in x] == [2, 4]
  assert train(tmp_path / "stopped") == 0
  assert train_runs.metrics(tmp_path / "stopped") == logged


def test_checkpoint_comes_before_a_report_that_fails(tmp_path):
  def fails(params, step):
    raise InputError("no reward server")

  with pytest.raises(InputError, match="no reward server"):
    train(tmp_path, stage(evaluate=fails))
  assert train_runs.checkpoints(tmp_path) == [2]
  assert train(tmp_path) == 0
  held_out = [x for x in train_runs.metrics(tmp_path) if "held_out/loss" in x]
  assert [x["step"] for x in held_out] == [2, 4]


def test_another_config_has_its_model_written_anew(tmp_path):
  def export(params, folder):
    folder.mkdir()
    written.append(float(params["m"]["w"][0]))

  written, made = [], stage(export=export)
  go_on = lambda settings: loop.train(
    *(config(), made, tmp_path),
    settings=settings,
    allow_config_change=True,
  )
  assert [go_on({"form": x}) for x in ("a", "a", "b", "b")] == [0] * 4
  assert len(written) == 2
