"""GRPO with a real sidecar process that fails in every way.

The sidecar is tests/sidecar_program.py, whose prompts ask for trouble. A
rollout has two prompts, four images each.
"""

import json

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
  # What is in a request with the late one, or waits behind it, is late too.
  prompts = ["good", "nan", "a", "b", "poison", "c", "d", "sleep 9"]
  with brightness(max_batch=4, timeout_s=3.0) as url:
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
def test_wrong_token_stops_the_run(tmp_path, monkeypatch):
  with brightness() as url:
    config = write_config(tmp_path, url, ["a", "b"])
    monkeypatch.setenv("XOMNI_SIDECAR_TOKEN", "wrong")
    status, _, err = run(config, tmp_path / "run")
  assert status == 1
  (line,) = (x for x in err.splitlines() if x.startswith("xomni train"))
  assert "bright: http" in line
