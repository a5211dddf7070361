"""GRPO with a real sidecar process that fails in every way.

The sidecar is tests/sidecar_program.py, whose prompts ask for trouble. A
rollout has two prompts, four images each.
"""

import json
import signal
import time

import psutil
import pytest

from tests import grpo_runs
from tests import train_runs as runs
from tests.sidecar_client import TOKEN, brightness

pytest.importorskip("fastapi", reason="needs fastapi and uvicorn")
pytest.importorskip("uvicorn", reason="needs fastapi and uvicorn")


def write_config(folder, url, prompts, **reward):
  """A config on these prompts, in their order."""
  file = folder / "prompts.jsonl"
  file.write_text(
    "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
  )
  asked = {
    "name": "bright",
    "source": url,
    "deadline": 20.0,
    "retries": 1,
    "token_env": "XOMNI_SIDECAR_TOKEN",
    **reward,
  }
  config = grpo_runs.write_config(
    folder,
    url,
    rewards=(asked,),
    combine={"window": 2, "max_failure_rate": 0.2},
  )
  text = config.read_text().replace("'world:signs'", repr(str(file)), 1)
  config.write_text(text)
  return config


def run(config, workdir, *settings):
  return runs.run(
    config,
    workdir,
    "--config.data.shuffle=False",
    "--config.data.window=16",
    *settings,
  )


@pytest.fixture(autouse=True)
def token(monkeypatch):
  monkeypatch.setenv("XOMNI_SIDECAR_TOKEN", TOKEN)


@pytest.mark.slow
def test_bad_images_are_masked_and_their_neighbours_are_not(tmp_path):
  """Of eight prompts five are good; one is late, two can't be scored."""
  # What is in a request with the late one is late too; others do not wait.
  prompts = ["good", "nan", "a", "b", "poison", "c", "d", "sleep 9"]
  with brightness(max_batch=4, max_batches=2, timeout_s=3.0) as url:
    config = write_config(tmp_path, url, prompts, deadline=15.0, batch_items=4)
    status, _, err = run(
      config,
      tmp_path / "run",
      "--config.phases.1_all.steps=4",
      "--config.options.combine.max_failure_rate=0.6",
    )
  assert status == 0, err[-3000:]
  found = runs.metrics(tmp_path / "run")
  # Half of the first, third and fourth rollout, and all others are there.
  assert [m["reward/bright_failed"] for m in found] == [0.5, 0.0, 0.5, 0.5]
  assert [m["reward/masked"] for m in found] == [0.5, 0.0, 0.5, 0.5]
  assert [m["reward/groups_dropped"] for m in found] == [0.5, 0.0, 0.5, 0.5]
  assert all(m["grpo/grad_norm"] > 0 for m in found)
  assert all(0 < m["reward/bright"] < 1 for m in found)  # never 0 or invented


def test_run_stops_while_its_sidecar_is_gone_and_goes_on_after(tmp_path):
  # "die" ends the process, at the third rollout.
  prompts = ["a", "b", "c", "d", "e", "die", *"fghijk"]
  workdir = tmp_path / "run"
  with brightness() as url:
    config = write_config(tmp_path, url, prompts, deadline=4.0)
    status, _, err = run(config, workdir)
  assert status == 1
  (line,) = (x for x in err.splitlines() if x.startswith("xomni train"))
  assert "scores of rewards failed" in line and "it goes on" in line
  assert "Traceback" not in err
  kept = runs.checkpoints(workdir)
  assert kept == [2]
  port = url.rsplit(":", 1)[1]
  config.write_text(config.read_text().replace("'die'", "'l'"))
  file = tmp_path / "prompts.jsonl"
  file.write_text(file.read_text().replace("die", "l"))
  with brightness(port=int(port)):
    status, out, err = run(config, workdir)
  assert status == 0, err[-3000:]
  assert "resumed at step 2 of 6" in out.splitlines()
  found = runs.metrics(workdir)
  assert [m["step"] for m in found] == list(range(1, grpo_runs.STEPS + 1))
  assert all(m["reward/bright_failed"] == 0 for m in found)


@pytest.mark.slow
def test_bad_replies_are_failures_and_their_neighbours_are_not(tmp_path):
  """A request is of one prompt; the sidecar spoils what it says of some."""
  prompts = ["a", "says nan", "says 500", "b", "c", "says half"]
  prompts += ["says html", "d", "e", "f"]
  with brightness() as url:
    config = write_config(tmp_path, url, prompts, batch_items=4)
    status, _, err = run(
      config,
      tmp_path / "run",
      "--config.phases.1_all.steps=5",
      "--config.options.combine.max_failure_rate=0.6",
    )
  assert status == 0, err[-3000:]
  found = runs.metrics(tmp_path / "run")
  assert [m["reward/bright_failed"] for m in found] == [0.5] * 4 + [0.0]
  assert [m["reward/groups_dropped"] for m in found] == [0.5] * 4 + [0.0]
  assert all(0 < m["reward/bright"] < 1 for m in found)
  # Twelve images of good prompts and eight of the last step have a score.
  assert len(ledger(tmp_path / "run")) == 4 * 4 + 8


def ledger(workdir):
  return (workdir / "rewards" / "scores-0.jsonl").read_text().splitlines()


@pytest.mark.slow
def test_requests_over_the_limit_are_cut_until_they_fit(tmp_path):
  """Eight images are too large for one request, one is not."""
  with brightness(max_bytes=12_000) as url:
    config = write_config(tmp_path, url, ["a", "b"])
    status, _, err = run(config, tmp_path / "run")
    assert status == 0, err[-3000:]
    found = runs.metrics(tmp_path / "run")
    assert all(m["reward/bright_failed"] == 0 for m in found)
    assert len(ledger(tmp_path / "run")) == 8 * len(found)
  with brightness(max_bytes=1000) as url:
    config = write_config(tmp_path, url, ["a", "b"])
    status, _, err = run(config, tmp_path / "none")
  assert status == 1 and "bright: too_large 8" in err, err[-3000:]


def sidecar():
  """The process that serves."""
  (found,) = [
    p
    for p in psutil.Process().children()
    if "tests.sidecar_program" in p.cmdline()
  ]
  return found


def wait_for(process, workdir, good):
  """Waits until a line of metrics is as wanted; the lines so far."""
  path = workdir / "metrics.jsonl"
  end = time.monotonic() + 240
  while process.poll() is None and time.monotonic() < end:
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(x) for x in text[: text.rfind("\n") + 1].splitlines()]
    if any(map(good, lines)):
      return
    time.sleep(0.002)
  process.kill()
  raise AssertionError(process.communicate()[1][-3000:])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hangs", "dies"])
def test_run_goes_on_through_a_sidecar_that_comes_back(tmp_path, how):
  workdir = tmp_path / "run"
  failed = lambda m: m["reward/bright_failed"] > 0
  with brightness() as url:
    config = write_config(tmp_path, url, "abcd", deadline=3.0, try_seconds=1.0)
    process = runs.start(
      *(config, workdir, "--config.data.shuffle=False"),
      *("--config.data.window=16", "--config.phases.1_all.steps=30"),
      *("--config.checkpoint.every=30", "--config.checkpoint.export=False"),
      "--config.options.combine.max_failure_rate=1.0",
    )
    wait_for(process, workdir, lambda m: m["step"] == 3)
    sidecar().send_signal(signal.SIGSTOP if how == "hangs" else signal.SIGKILL)
    wait_for(process, workdir, failed)
    if how == "hangs":
      sidecar().send_signal(signal.SIGCONT)
    else:
      again = brightness(port=int(url.rsplit(":", 1)[1]))
      again.__enter__()
    try:
      status, _, err = runs.finish(process)
    finally:
      if how == "dies":
        again.__exit__(None, None, None)
  assert status == 0, err[-3000:]
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines]
  assert [m["step"] for m in found] == list(range(1, 31))
  assert not any(map(failed, found[:3] + found[-1:])) and any(
    map(failed, found)
  )
  # No call takes longer than it may, and what was said is all there is.
  assert max(m["time/reward_wait_seconds"] for m in found) < 4
  good = sum(1 - m["reward/bright_failed"] for m in found)
  assert len(ledger(workdir)) == 8 * good


@pytest.mark.slow
def test_stopped_run_does_not_wait_for_a_sidecar_that_hangs(tmp_path):
  """It has asked ahead, for the images of the third rollout."""
  workdir = tmp_path / "run"
  prompts = ["a", "b", "c", "d", "sleep 50", "e", *"fghijk"]
  with brightness() as url:
    config = write_config(
      tmp_path, url, prompts, deadline=60.0, try_seconds=60.0
    )
    process = runs.start(
      *(config, workdir, "--config.data.shuffle=False"),
      *("--config.data.window=16", "--config.options.overlap=1"),
    )
    runs.signal_after(process, workdir, 1, signal.SIGTERM)
    start = time.monotonic()
    status, out, err = runs.finish(process)
    assert time.monotonic() - start < 30
  assert status == 143, err[-3000:]
  assert "stopped at step 2 of 6, saved" in out


@pytest.mark.slow
def test_wrong_token_stops_the_run(tmp_path, monkeypatch):
  with brightness() as url:
    config = write_config(tmp_path, url, ["a", "b"])
    monkeypatch.setenv("XOMNI_SIDECAR_TOKEN", "wrong")
    status, _, err = run(config, tmp_path / "run")
  assert status == 1
  (line,) = (x for x in err.splitlines() if x.startswith("xomni train"))
  assert "bright: http" in line
