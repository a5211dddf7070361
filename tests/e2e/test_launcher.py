"""launch/run.sh: what it installs is another matter; here, how it trains.

A script stands for Python, in a virtual environment that looks set up.
"""

import hashlib
import os
import pathlib
import signal
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "run.sh"


@pytest.fixture
def launch(tmp_path):
  """Starts `run.sh train --steps=3` with this for a program, in bash.

  It finds in $count how often it was started, this time included.
  """
  venv = tmp_path / "venv"
  (venv / "bin").mkdir(parents=True)
  says = [ROOT / "setup.py", ROOT / "launch/requirements-cpu.txt", SCRIPT]
  stamp = hashlib.sha256(b"".join(path.read_bytes() for path in says))
  (venv / ".xomni-setup").write_text(f"{stamp.hexdigest()}  -\n")

  def start(program):
    python = venv / "bin" / "python"
    python.write_text(
      "#!/usr/bin/env bash\n"
      f'echo "$@" >>{tmp_path}/calls; count=$(wc -l <{tmp_path}/calls)\n'
      + program
    )
    python.chmod(0o755)
    return subprocess.Popen(
      ["bash", SCRIPT, "train", "--steps=3"],
      env={**os.environ, "XOMNI_VENV": str(venv)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  start.calls = lambda: (tmp_path / "calls").read_text().splitlines()
  return start


def test_training_starts_again_while_it_is_preempted(launch):
  run = launch("[ $count -lt 3 ] && exit 143; echo done")
  out, err = run.communicate(timeout=20)
  assert (run.returncode, out) == (0, "done\n")
  assert launch.calls() == ["-m xomni_jax train --steps=3"] * 3
  line = "run.sh: training was preempted (exit status 143); starting it again"
  assert err.splitlines() == [line] * 2


@pytest.mark.parametrize("status", [0, 1, 2, 137])
def test_any_other_exit_status_is_the_launchers(launch, status):
  run = launch(f"exit {status}")
  assert run.communicate(timeout=20) == ("", "")
  assert run.returncode == status
  assert len(launch.calls()) == 1


def test_runs_that_are_preempted_at_once_end(launch):
  run = launch("exit 143")
  _, err = run.communicate(timeout=20)
  assert run.returncode == 143
  assert len(launch.calls()) == 5
  assert "giving up" in err.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("status", [143, 0])
def test_launcher_told_to_stop_passes_it_on_and_ends(launch, number, status):
  run = launch(
    f"trap 'echo saved; exit {status}' TERM\n"
    "echo started; while true; do sleep 0.05; done"
  )
  assert run.stdout.readline() == "started\n"
  run.send_signal(number)
  out, err = run.communicate(timeout=20)
  assert (run.returncode, out, err) == (status, "saved\n", "")
  assert len(launch.calls()) == 1


def test_launcher_told_twice_kills(launch):
  run = launch(
    "trap 'echo busy' TERM\necho started; while true; do sleep 0.05; done"
  )
  assert run.stdout.readline() == "started\n"
  run.send_signal(signal.SIGTERM)
  assert run.stdout.readline() == "busy\n"
  run.send_signal(signal.SIGTERM)
  run.communicate(timeout=20)
  assert run.returncode == 137


@pytest.mark.parametrize(
  ("device", "verb", "pins"),
  [
    ("null", "setup", "launch/requirements-cpu.txt"),
    ("accel0", "setup", "requirements-tpu.txt"),
    ("vfio/0", "train", "requirements-tpu.txt"),
    ("accel0", "lint", "launch/requirements-cpu.txt"),
  ],
)
def test_tpu_machines_get_their_own_packages(tmp_path, device, verb, pins):
  there = tmp_path / "dev" / device
  there.parent.mkdir(parents=True)
  there.touch()
  (tmp_path / "launch").mkdir()
  for name in (
    "setup.py",
    "requirements-tpu.txt",
    "launch/requirements-cpu.txt",
  ):
    (tmp_path / name).write_text((ROOT / name).read_text())
  script = SCRIPT.read_text().replace("'/dev/", f"'{tmp_path}/dev/")
  (tmp_path / "launch" / "run.sh").write_text(script)
  bin_ = tmp_path / ".venv" / "bin"
  bin_.mkdir(parents=True)
  for name in ("python", "ruff", "lint-imports"):
    (bin_ / name).write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n')
    (bin_ / name).chmod(0o755)
  env = {k: v for k, v in os.environ.items() if k != "XOMNI_VENV"}
  subprocess.run(
    ["bash", tmp_path / "launch" / "run.sh", verb],
    env={**env, "PYTHON": str(bin_ / "python")},
    check=True,
    capture_output=True,
  )
  files = [
    line.partition(" -r ")[2]
    for line in (tmp_path / "calls").read_text().splitlines()
    if " -r " in line
  ]
  assert files == [str(tmp_path / pins)]


def test_help_names_every_verb():
  run = subprocess.run(
    ["bash", SCRIPT], capture_output=True, text=True, check=True
  )
  verbs = "setup lint test train recipe demo eval VERB"
  for verb in verbs.split():
    assert f"run.sh {verb}" in run.stdout
  assert "XOMNI_VENV" in run.stdout
