"""GRPO killed anywhere goes on as if nothing had happened.

Runs are the real command on the golden checkpoint, six steps, a checkpoint
every second; the reward is asked over HTTP. See tests/train_runs.py.
"""

import pathlib
import signal
import threading

import pytest

from tests import grpo_runs
from tests import train_runs as runs
from tests.grpo_runs import STEPS

WAYS = {
  "on_policy": {},
  "overlap": {"overlap": 1},
  # A rollout takes four steps: two minibatches, twice.
  "epochs": {"minibatches": 2, "epochs": 2},
  # Two rollouts are in the state at once, with what a filter has kept.
  "both": {"overlap": 1, "minibatches": 2, "epochs": 2, "min_p": 0.1},
  "fused": {"reward_path": "fused", "paint_rows": 4},
}


@pytest.fixture(scope="module")
def server():
  with grpo_runs.serve() as server:
    yield server


@pytest.fixture(
  scope="module",
  params=[
    pytest.param(
      way, marks=() if way in ("on_policy", "both") else pytest.mark.slow
    )
    for way in WAYS
  ],
)
def alone(request, server, tmp_path_factory):
  """A config, and the folder of its run left alone."""
  folder = tmp_path_factory.mktemp(request.param)
  config = grpo_runs.write_config(folder, server.url, **WAYS[request.param])
  server.asked.clear()
  status, _, err = runs.run(config, folder / "alone")
  assert status == 0, err[-3000:]
  losses = [m["grpo/grad_norm"] for m in runs.metrics(folder / "alone")]
  assert len(losses) == STEPS and all(losses)
  rollouts = -(-STEPS // updates(folder))
  assert len(server.asked) == rollouts * images(folder)  # each image once
  return config, folder


def images(folder):
  """Of a rollout."""
  return WAYS[folder.name.rstrip("0")].get("minibatches", 1) * 8


def updates(folder):
  """Of a rollout."""
  way = WAYS[folder.name.rstrip("0")]
  return way.get("minibatches", 1) * way.get("epochs", 1)


def ledger(workdir):
  return sorted(
    (pathlib.Path(workdir) / "rewards" / "scores-0.jsonl").open().readlines()
  )


def assert_as_alone(workdir, folder):
  runs.assert_same_state(
    runs.state(workdir, STEPS), runs.state(folder / "alone", STEPS)
  )
  assert runs.metrics(workdir) == runs.metrics(folder / "alone")
  assert ledger(workdir) == ledger(folder / "alone")  # each score once


def killed(server, config, workdir, when, step):
  """Kills a run at a step: as it draws, as it is scored, or as it learns."""
  process = runs.start(config, workdir)
  if when == "drawing":  # the next rollout, as soon as there are metrics
    runs.signal_after(process, workdir, step)
  elif when == "updating":  # from a rollout whose rewards were just heard
    seen = workdir / "rewards" / "watched.jsonl"
    runs.signal_after(process, workdir, step, path=seen)
  else:
    # The request for the rollout after so many is held until the run is dead.
    first, dead = len(server.asked), threading.Event()

    def on_request(count):
      if count - first > images(workdir.parent) * step and not dead.is_set():
        process.send_signal(signal.SIGKILL)
        dead.set()

    server.on_request = on_request
  assert runs.finish(process)[0] == -signal.SIGKILL
  server.on_request = lambda count: None


@pytest.mark.parametrize(
  ("when", "step"),
  [
    ("drawing", 3),
    pytest.param("scoring", 2, marks=pytest.mark.slow),
    pytest.param("updating", 3, marks=pytest.mark.slow),
    pytest.param("drawing", 1, marks=pytest.mark.slow),
    pytest.param("drawing", 4, marks=pytest.mark.slow),
  ],
)
def test_killed_run_ends_as_if_left_alone(alone, server, when, step):
  config, folder = alone
  if updates(folder) > 1:  # there are two rollouts, at steps 0 and 4
    step = {"scoring": 1, "updating": 4}.get(when, step)
  workdir, first = folder / f"{when}-{step}", len(server.asked)
  killed(server, config, workdir, when, step)
  status, _, err = runs.run(config, workdir)
  assert status == 0, err[-3000:]
  assert_as_alone(workdir, folder)
  # What was asked when the run died is asked again, and nothing else is.
  again = len(server.asked) - first - len(ledger(workdir))
  assert 0 <= again <= images(folder)
  if when == "updating" and not WAYS[folder.name.rstrip("0")].get("overlap"):
    assert again == 0


def test_preempted_run_saves_and_goes_on(alone, server):
  config, folder = alone
  kept = [key for key in runs.state(folder / "alone", 2) if "/rows/" in key]
  waiting = {key.split("/")[1] for key in kept}
  assert waiting == {
    *(["current"] if updates(folder) > 1 else []),
    *(["next"] if WAYS[folder.name.rstrip("0")].get("overlap") else []),
  }
  assert len([key for key in kept if key.endswith("/support")]) == (
    2 if "both" in folder.name else 0
  )
  workdir = folder / "preempted"
  ((status, *_),) = runs.stopped(config, workdir, step=2)
  assert status == 143
  status, _, err = runs.run(config, workdir)
  assert status == 0, err[-3000:]
  assert_as_alone(workdir, folder)
