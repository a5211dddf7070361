"""What the recipe runs, without running it."""

import fcntl
import json
import subprocess
import threading

import pytest

from xomni_jax import checks, cli, recipe
from xomni_jax.errors import InputError, RunError
from xomni_jax.recipe import jobs, running
from xomni_jax.training import configure


def _write(run, rows):
  run.mkdir(parents=True, exist_ok=True)
  lines = [json.dumps(row) for row in rows]
  (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("base", [None, "runs", jobs.SHIPPED])
def test_control_trains_for_as_long_as_reinforcement_learning(
  tmp_path, base, monkeypatch
):
  # A clone may lie anywhere.
  monkeypatch.setattr(jobs, "CONFIGS", "/workdir/init.model")
  step = "time/step_seconds"
  timed, model = tmp_path / "sft", f"{tmp_path}/sft/model"
  if base == "runs":
    base = tmp_path / "base"
    timed, model = tmp_path / "timing", f"{base}/sft/model"
  elif base:
    timed, model = tmp_path / "timing", base
  # The first steps of a size have compilation in them, which does not count.
  sft = [(20, 2.5), (40, 0.4), (60, 0.6), (80, 0.5)]
  _write(timed, [{"step": s, step: t} for s, t in sft])
  seconds = [2.0 if n % 2 else 6.0 for n in range(110)]
  seconds[0], seconds[1] = 40.0, 30.0
  grpo = [{"step": n + 1, step: t} for n, t in enumerate(seconds)]
  grpo.insert(50, {"step": 50, "held_out/reward": 0.9})
  _write(tmp_path / "grpo", grpo)
  job = jobs.control(jobs.Wanted(seed=3, base=base), tmp_path)
  assert "--config.phases.2_all.steps=880" in job.argv  # 440 s of 0.5 s each
  assert "--config.seed=1003" in job.argv
  assert "--config=/workdir/init.model/sft.py:tiny" in job.argv
  assert job.argv.count("--workdir=runs/control") == 1
  starts = [a for a in job.argv if a.startswith("--config.init.model")]
  assert starts == [f"--config.init.model={model}"]
  assert not any(a == "--workdir=runs/sft" for a in job.argv)


def test_few_steps_are_timed_without_those_that_compile(tmp_path):
  step = "time/step_seconds"
  _write(tmp_path / "sft", [{"step": 20, step: 2.5}, {"step": 30, step: 0.5}])
  _write(tmp_path / "grpo", [{"step": 2, step: 10.0}])
  job = jobs.control(jobs.Wanted(quick=True), tmp_path)
  assert "--config.phases.2_all.steps=40" in job.argv  # 20 s of 0.5 s each


def test_reinforcement_learning_goes_on_from_the_model_that_ships():
  """The control needs codes besides, and to know how long a step takes."""
  wanted = jobs.Wanted(base=jobs.SHIPPED)
  (grpo,) = jobs.in_order(wanted)
  assert "--config.init.model=tiny-sft" in grpo.argv
  assert "--config.init.flux=tiny-sft" in grpo.argv
  first, *codes, timing = jobs.in_order(wanted, with_control=True)
  assert first == grpo and len(codes) == 4
  assert all("tiny-sft" in job.argv for job in codes)
  assert "--config.init.model=tiny-sft" in timing.argv
  assert timing.leaves == "timing/model"


def test_base_leaves_reinforcement_learning_alone(tmp_path):
  wanted = jobs.Wanted(seed=2, base=tmp_path, rl_steps=150)
  (job,) = jobs.in_order(wanted)
  assert job.name == "grpo"
  assert "--workdir=runs/grpo" in job.argv
  assert f"--config.init.model={tmp_path}/sft/model" in job.argv
  assert f"--config.init.flux={tmp_path}/decoder/flux1" in job.argv
  assert "--config.seed=2" in job.argv
  assert "--config.phases.1_all.steps=150" in job.argv
  same, timing = jobs.in_order(wanted, with_control=True)
  assert same == job and timing.leaves == "timing/model"
  assert f"--config.init.model={tmp_path}/sft/model" in timing.argv


def _base(folder):
  """What reinforcement learning needs of a recipe's runs/."""
  for name in ("sft/model", "decoder/flux1", "codes"):
    (folder / name).mkdir(parents=True)
  return folder


@pytest.mark.parametrize("lost", ["decoder/flux1", "codes", "sft/model"])
def test_base_that_lacks_something_is_refused(tmp_path, lost):
  base, out = _base(tmp_path / "runs"), tmp_path / "out"
  (base / lost).rename(tmp_path / "elsewhere")
  with pytest.raises(InputError, match=f"has no {lost}"):
    recipe.main(["--base", str(base), "--out", str(out)])
  assert not out.exists()


def test_bad_arguments_are_one_line(capsys):
  bad = ["--bogus"], ["--seed", "x"], ["--rl-steps", "0"], ["--base", ""]
  for argv in bad:
    assert cli.main(["recipe", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("xomni recipe: error: ") and argv[0] in line


def test_base_is_not_what_is_written_to(tmp_path):
  base = _base(tmp_path / "runs")
  with pytest.raises(InputError, match="name another --out"):
    recipe.main(["--base", str(base), "--out", str(tmp_path)])


def _no_jobs(monkeypatch):
  ran = []
  monkeypatch.setattr(running, "run", lambda job, *_: ran.append(job.name))
  monkeypatch.setattr(recipe, "assemble", lambda *_: None)
  monkeypatch.setattr(recipe.signal, "signal", lambda *_: None)
  return ran


def test_control_comes_last_and_is_made_once(tmp_path, monkeypatch):
  ran, assembled = [], []

  def run(job, out, log, label, start):
    ran.append((label, job.name))
    (out / "runs" / job.leaves).mkdir(parents=True)
    if job.name in ("grpo", "timing"):
      _write(out / "runs" / job.name, [{"step": 9, "time/step_seconds": 1.0}])

  def assemble(sft, flux, model, made):
    assembled.append((sft, flux, model))
    made.mkdir()

  _no_jobs(monkeypatch)
  monkeypatch.setattr(running, "run", run)
  monkeypatch.setattr(recipe, "assemble", assemble)
  for _ in range(2):
    recipe.main(["--base", "tiny-sft", "--control", "--out", str(tmp_path)])
  labels, names = zip(*ran, strict=True)
  assert labels == tuple(f"[{n}/7]" for n in range(1, 8))
  assert names[0] == "grpo" and names[-2:] == ("timing", "control")
  model = tmp_path / "runs" / "grpo" / "model"
  assert assembled == [("tiny-sft", "tiny-sft", model)]


@pytest.mark.parametrize(
  "end, said",
  [
    ("kill -9 $$", r"vae was stopped \(exit status -9\): step 3; .*goes on$"),
    ("exit 1", r"vae failed \(exit status 1\): step 3; all of it is in \S+$"),
  ],
)
def test_job_that_ends_badly_says_whether_to_go_on(
  tmp_path, monkeypatch, end, said
):
  program = tmp_path / "python"
  program.write_text(f"#!/bin/sh\necho step 3\n{end}\n")
  program.chmod(0o755)
  monkeypatch.setattr(running.sys, "executable", str(program))
  job = jobs.Job("vae", (), "vae/model")
  with (
    (tmp_path / "log").open("ab") as log,
    pytest.raises(RunError, match=said),
  ):
    running.run(job, tmp_path, log, "[1/1]", 0.0)


@pytest.mark.parametrize(
  "other", [["--quick"], ["--seed", "1"], ["--rl-steps", "9"], ["--base"]]
)
def test_folder_of_another_recipe_is_refused(tmp_path, monkeypatch, other):
  ran, out = _no_jobs(monkeypatch), str(tmp_path / "out")
  recipe.main(["--out", out])
  count = len(ran)
  recipe.main(["--out", out])  # goes on
  assert count > 0 and len(ran) == 2 * count
  if other == ["--base"]:
    other.append(str(_base(tmp_path / "runs")))
  with pytest.raises(InputError, match="holds the recipe of"):
    recipe.main(["--out", out, *other])
  assert len(ran) == 2 * count


def test_folder_of_runs_that_no_recipe_made_is_refused(tmp_path, monkeypatch):
  ran = _no_jobs(monkeypatch)
  (tmp_path / "runs" / "tokenizer").mkdir(parents=True)
  with pytest.raises(InputError, match="no recipe made"):
    recipe.main(["--out", str(tmp_path)])
  assert not ran


def test_stage_that_a_killed_recipe_left_running_is_waited_for(
  tmp_path, monkeypatch
):
  ran = _no_jobs(monkeypatch)
  monkeypatch.setattr(checks, "PATIENCE", 0.0)
  (tmp_path / "runs").mkdir()
  # A stage has the log as its standard output.
  with (tmp_path / "runs" / "recipe.log").open("ab") as log:
    fcntl.flock(log, fcntl.LOCK_EX)
    stage = subprocess.Popen(["sleep", "60"], stdout=log)
  with pytest.raises(InputError, match="left running"):
    recipe.main(["--out", str(tmp_path)])
  assert not ran
  # One that is about to end is waited for.
  monkeypatch.setattr(checks, "PATIENCE", 60.0)
  threading.Timer(1.0, stage.kill).start()
  recipe.main(["--out", str(tmp_path)])
  assert ran
  stage.wait()


@pytest.mark.parametrize("quick", [False, True])
def test_settings_of_all_stages_are_accepted(quick):
  wanted = jobs.Wanted(quick)
  found = jobs.in_order(wanted)
  few = wanted._replace(base=jobs.SHIPPED, rl_steps=1)
  found += jobs.in_order(few, with_control=True)
  stages = [job for job in found if job.argv[0] == "train"]
  assert len(stages) == 8
  for job in stages:
    given = dict(a.lstrip("-").split("=", 1) for a in job.argv[1:])
    config = configure.read(given.pop("config"))
    given.pop("workdir")
    assert given.pop("cpu-devices") == "auto"
    configure.override(
      config, [f"{k.removeprefix('config.')}={v}" for k, v in given.items()]
    )
    configure.parse(config, job.name)
