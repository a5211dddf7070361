"""What the recipe runs, without running it."""

import fcntl
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from xomni_jax import cli, recipe
from xomni_jax.errors import InputError, RunError
from xomni_jax.recipe import jobs, running
from xomni_jax.training import configure


def _write(run, rows):
  run.mkdir(parents=True)
  lines = [json.dumps(row) for row in rows]
  (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("base", [None, "runs", jobs.SHIPPED])
def test_control_trains_for_as_long_as_reinforcement_learning(tmp_path, base):
  step, model = "time/step_seconds", f"{tmp_path}/joined"
  if base == "runs":
    base = tmp_path / "base"
    model = f"{base}/joined"
  elif base:
    model = base
  # The first steps have compilation in them, which medians leave out.
  sft = [(20, 2.5), (40, 0.5), (60, 0.5)]
  _write(tmp_path / "timing", [{"step": s, step: t} for s, t in sft])
  grpo = [{"step": 1, step: 5.0}, {"step": 2, "held_out/reward": 0.9}]
  _write(tmp_path / "grpo", [*grpo, {"step": 3, step: 4.0}])
  job = jobs.control(jobs.Wanted(seed=3, base=base), tmp_path)
  assert "--config.phases.2_all.steps=24" in job.argv  # 12 s of 0.5 s each
  assert "--config.seed=1003" in job.argv
  assert job.argv.count("--workdir=runs/control") == 1
  starts = [a for a in job.argv if "init.model" in a]
  assert starts == [f"--config.init.model={model}"]
  assert not any(a == "--workdir=runs/sft" for a in job.argv)


def test_reinforcement_learning_goes_on_from_the_model_that_ships():
  """The control needs codes besides, and to know how long a step takes."""
  wanted = jobs.Wanted(base=jobs.SHIPPED)
  assert not jobs.before_rl(wanted)
  (grpo,) = jobs.rl(wanted)
  assert "--config.init.model=tiny-sft" in grpo.argv
  assert "--config.init.flux=tiny-sft" in grpo.argv
  first, *codes, timing = jobs.rl(wanted, with_control=True)
  assert first == grpo and len(codes) == 4
  assert all("tiny-sft" in job.argv for job in codes)
  assert "--config.init.model=tiny-sft" in timing.argv
  assert timing.leaves == "timing/model"


def test_base_leaves_reinforcement_learning_alone(tmp_path):
  wanted = jobs.Wanted(seed=2, base=tmp_path, rl_steps=150)
  assert not jobs.before_rl(wanted)
  (job,) = jobs.rl(wanted)
  assert job.name == "grpo"
  assert "--workdir=runs/grpo" in job.argv
  assert f"--config.init.model={tmp_path}/joined" in job.argv
  assert f"--config.init.flux={tmp_path}/decoder/flux1" in job.argv
  assert "--config.seed=2" in job.argv
  assert "--config.phases.1_all.steps=150" in job.argv


def _base(folder):
  """What reinforcement learning needs of a recipe's runs/."""
  for name in ("joined", "decoder/flux1", "codes"):
    (folder / name).mkdir(parents=True)
  return folder


@pytest.mark.parametrize("lost", ["decoder/flux1", "codes", "joined"])
def test_base_that_lacks_something_is_refused(tmp_path, lost):
  base, out = _base(tmp_path / "runs"), tmp_path / "out"
  (base / lost).rename(tmp_path / "elsewhere")
  with pytest.raises(InputError, match=f"has no {lost}"):
    recipe.main(["--base", str(base), "--out", str(out)])
  assert not out.exists()


def test_bad_arguments_are_one_line(capsys):
  for argv in (["--bogus"], ["--seed", "x"], ["--rl-steps", "0"]):
    assert cli.main(["recipe", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("xomni recipe: error: ") and argv[0] in line


def test_base_is_not_what_is_written_to(tmp_path):
  base = _base(tmp_path / "runs")
  with pytest.raises(InputError, match="name another --out"):
    recipe.main(["--base", str(base), "--out", str(tmp_path)])


def _no_jobs(monkeypatch):
  ran: list[str] = []
  monkeypatch.setattr(
    running, "run", lambda todo, *_: ran.extend(label for label, _ in todo)
  )
  monkeypatch.setattr(recipe, "join", lambda *_: None)
  monkeypatch.setattr(recipe, "assemble", lambda *_: None)
  monkeypatch.setattr(recipe.signal, "signal", lambda *_: None)
  return ran


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
  monkeypatch.setattr(running, "_PATIENCE", 0.0)
  (tmp_path / "runs").mkdir()
  with (tmp_path / "runs" / "recipe.lock").open("ab") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    stage = subprocess.Popen(["sleep", "60"], pass_fds=(lock.fileno(),))
  with pytest.raises(InputError, match="left running"):
    recipe.main(["--out", str(tmp_path)])
  assert not ran
  # One that is about to end is waited for.
  monkeypatch.setattr(running, "_PATIENCE", 60.0)
  threading.Timer(1.0, stage.kill).start()
  recipe.main(["--out", str(tmp_path)])
  assert ran
  stage.wait()


@pytest.mark.parametrize("quick", [False, True])
def test_settings_of_all_stages_are_accepted(quick):
  wanted = jobs.Wanted(quick)
  found = [*jobs.before_rl(wanted), *jobs.rl(wanted)]
  found += jobs.rl(wanted._replace(base=jobs.SHIPPED), with_control=True)
  stages = [job for job in found if job.argv[0] == "train"]
  assert len(stages) == 8
  for job in stages:
    given = dict(a.lstrip("-").split("=", 1) for a in job.argv[1:])
    config = configure.read(given.pop("config"))
    given.pop("workdir")
    configure.override(
      config, [f"{k.removeprefix('config.')}={v}" for k, v in given.items()]
    )
    configure.parse(config, job.name)


def test_jobs_need_what_others_leave():
  """In the order that they are listed in, two of them beside each other."""
  wanted = jobs.Wanted()
  found = [*jobs.before_rl(wanted), *jobs.rl(wanted, with_control=True)]
  by_name = {job.name: job for job in found}
  left = {jobs.JOINED, "decoder/flux1", ""}
  for job in found:
    assert set(job.needs) <= left, job.name
    left.add(job.leaves)
  codes = {job.leaves for job in found if job.name.startswith("codes")}
  assert len(codes) == 4
  assert codes < set(by_name["pretrain"].needs)
  assert not by_name["vae"].needs and not by_name["tokenizer"].needs
  # The two branches: neither waits for the other.
  assert "decoder/model" not in by_name["pretrain"].needs


def _job(name, code, *needs):
  """A job that waits for `needs`, runs some Python, and leaves its name."""
  return (name, jobs.Job(name, (code,), name, needs))


@pytest.fixture
def python(monkeypatch, tmp_path):
  """Jobs are Python programs in place of `xomni` commands."""
  program = tmp_path / "python"
  program.write_text(f'#!/bin/sh\nshift 2; exec {sys.executable} -c "$@"\n')
  program.chmod(0o755)
  monkeypatch.setattr(running.sys, "executable", str(program))
  monkeypatch.setattr(running, "_POLL", 0.05)
  (tmp_path / "runs").mkdir()
  with (tmp_path / "lock").open("ab") as lock:
    yield lambda todo, at_once: running.run(
      todo, tmp_path, lock, time.monotonic(), at_once
    )


_LEAVE = """
import os, pathlib, time
left = pathlib.Path("runs", NAME)
pathlib.Path(NAME).write_text(repr(sorted(os.sched_getaffinity(0))))
"""


def _leaving(name, then=""):
  return f"NAME = {name!r}{_LEAVE}{then}\nleft.touch()"


def test_jobs_run_beside_each_other_once_they_can(python, tmp_path):
  meet = "while not pathlib.Path({!r}).exists(): time.sleep(0.01)"
  python(
    [
      _job("a", _leaving("a", meet.format("b"))),
      _job("b", _leaving("b", meet.format("a"))),
      _job("c", _leaving("c"), "a", "b"),
    ],
    2,
  )
  a, b, c = ((tmp_path / name).read_text() for name in "abc")
  assert (tmp_path / "runs" / "c").exists() and c in (a, b)
  if len(os.sched_getaffinity(0)) > 1:
    assert a != b  # each has CPUs of its own


def test_job_that_fails_stops_the_others_and_is_named(python, tmp_path):
  waits = "try: time.sleep(60)\nfinally: pathlib.Path('told').touch()"
  told = "import signal, sys\nsignal.signal(15, lambda *_: sys.exit(143))\n"
  fails = "while not pathlib.Path('a').exists(): time.sleep(0.01)\n1 / 0"
  with pytest.raises(RunError, match=r"b failed .exit status 1.: Zero"):
    python(
      [_job("a", told + _leaving("a", waits)), _job("b", _leaving("b", fails))],
      2,
    )
  assert (tmp_path / "told").exists()
  assert "ZeroDivisionError" in (tmp_path / "runs/logs/b.log").read_text()


def test_job_whose_needs_nobody_leaves_is_an_error(python):
  with pytest.raises(RunError, match=r"b needs a in .* no other job leaves"):
    python([_job("b", _leaving("b"), "a")], 2)
