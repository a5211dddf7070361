"""GRPO killed anywhere goes on as if nothing had happened.

Runs are the real command on the golden checkpoint, six steps, a checkpoint
every second; the reward is asked over HTTP. See tests/train_runs.py.
"""

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
}


@pytest.fixture(scope="module")
def server():
  with grpo_runs.serve() as server:
    yield server


@pytest.fixture(scope="module", params=WAYS)
def alone(request, server, tmp_path_factory):
  """A config, and the folder of its run left alone."""
  folder = tmp_path_factory.mktemp(request.param)
  config = grpo_runs.write_config(folder, server.url, **WAYS[request.param])
  server.asked.clear()
  status, _, err = runs.run(config, folder / "alone")
  assert status == 0, err[-3000:]
  losses = [m["grpo/grad_norm"] for m in runs.metrics(folder / "alone")]
  assert len(losses) == STEPS and all(losses)
  per_rollout = WAYS[request.param].get("minibatches", 1) * 8
  rollouts = -(-STEPS // (4 if request.param == "epochs" else 1))
  assert len(server.asked) == rollouts * per_rollout  # each image once
  return config, folder


def assert_as_alone(workdir, folder):
  runs.assert_same_state(
    runs.state(workdir, STEPS), runs.state(folder / "alone", STEPS)
  )
  assert runs.metrics(workdir) == runs.metrics(folder / "alone")


def killed(server, config, workdir, when, step):
  """Kills a run at a step: as its metrics are there, or as it is scored."""
  process = runs.start(config, workdir)
  if when == "drawing":  # the next rollout
    runs.signal_after(process, workdir, step)
  else:
    # The requests of a step after the next are held until the run is dead.
    first, dead = len(server.asked), threading.Event()

    def on_request(count):
      if count - first > 8 * step and not dead.is_set():
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
    pytest.param("drawing", 1, marks=pytest.mark.slow),
    pytest.param("drawing", 4, marks=pytest.mark.slow),
  ],
)
def test_killed_run_ends_as_if_left_alone(alone, server, when, step):
  config, folder = alone
  if when == "scoring" and "epochs" in folder.name:
    step = 1  # there are two rollouts alone
  workdir = folder / f"{when}-{step}"
  killed(server, config, workdir, when, step)
  status, _, err = runs.run(config, workdir)
  assert status == 0, err[-3000:]
  assert_as_alone(workdir, folder)


def test_preempted_run_saves_and_goes_on(alone, server):
  config, folder = alone
  workdir = folder / "preempted"
  ((status, *_),) = runs.stopped(config, workdir, step=2)
  assert status == 143
  status, _, err = runs.run(config, workdir)
  assert status == 0, err[-3000:]
  assert_as_alone(workdir, folder)
