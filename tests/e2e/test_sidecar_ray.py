"""The same application under Ray Serve: batches, replicas, faults."""

import concurrent.futures
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import requests

from tests.sidecar_client import ROOT, TOKEN, grey, post, scores, served
from xomni_jax.rewards import wire

pytest.importorskip(
  "ray.serve", reason="needs ray[serve], see launch/requirements-sidecar.txt"
)


def free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def brightness(**settings):
  """tests/sidecar_program.py under Ray Serve."""
  said = {"port": free_port(), "num_cpus": 0.2, "ray": True, **settings}
  return served(["tests.sidecar_program", json.dumps(said)], seconds=90)


def test_sidecar_under_ray_batches_over_requests_and_refuses_as_without():
  with brightness(
    max_batch=4, batch_wait_s=0.3, max_bytes=100_000, timeout_s=5.0
  ) as url:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      items = [[grey("same id", level)] for level in (0, 51, 102, 153)]
      found = [s[0] for s in pool.map(lambda i: scores(url, i), items)]
    assert [s.score for s in found] == [0.0, 0.2, 0.4, 0.6]
    assert max(s.raw["batch"] for s in found) > 1
    mixed = [grey("a", 51), grey("b", 1, "poison"), grey("c", 102)]
    assert [s.score for s in scores(url, mixed)] == [0.2, None, 0.4]
    body = wire.to_json(mixed)
    assert post(url, body, "wrong").status_code == 401
    assert post(url, body + b" " * 300_000).status_code == 413
    assert post(url, b"{").status_code == 400
    headers = {"Authorization": f"Bearer {TOKEN}"}
    info = requests.get(f"{url}/info", headers=headers).json()
    assert info["model_rev"] == "brightness-1"
    assert requests.get(f"{url}/health").json()["ok"]


@pytest.mark.slow
def test_sidecar_under_ray_comes_back_after_a_replica_died():
  with brightness(max_batch=2, replicas=2, timeout_s=5.0) as url:
    start = time.monotonic()
    reply = post(url, wire.to_json([grey("a", 1, "die")]))
    assert reply.status_code >= 500 and time.monotonic() - start < 20
    # The other replica goes on at once, and in a while both are there.
    end = time.monotonic() + 60
    good = 0
    while good < 20 and time.monotonic() < end:
      reply = post(url, wire.to_json([grey("a", 51)]))
      if reply.status_code == 200:
        assert reply.json()["items"][0]["score"] == 0.2
        good += 1
    assert good == 20


@pytest.mark.slow
def test_sidecar_under_ray_goes_on_beside_a_batch_that_hangs():
  with brightness(max_batch=1, replicas=2, timeout_s=2.0) as url:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      slow = pool.submit(scores, url, [grey("a", 1, "sleep 30")])
      time.sleep(0.5)
      start = time.monotonic()
      rest = [pool.submit(scores, url, [grey("b", 51)]) for _ in range(16)]
      found = [f.result()[0] for f in rest]
      assert time.monotonic() - start < 15
    assert slow.result()[0].error_kind == "timeout"
    # Some were sent to the replica that hangs; none has a false score.
    assert {(s.score, s.error_kind) for s in found} <= {
      (0.2, None),
      (None, "timeout"),
    }
    assert any(s.ok for s in found)


@pytest.mark.slow
def test_sidecar_under_ray_returns_the_batches_that_are_done_in_time():
  with brightness(max_batch=1, max_batches=2, timeout_s=2.0) as url:
    items = [grey("slow", 1, "sleep 4"), *(grey(c, 51) for c in "abc")]
    found = scores(url, items)
    assert [s.score for s in found] == [None, 0.2, 0.2, 0.2]
    assert found[0].error_kind == "timeout"
    assert requests.get(f"{url}/health").status_code == 503
    time.sleep(2.5)
    assert requests.get(f"{url}/health").status_code == 200


@pytest.mark.slow
def test_sidecar_under_ray_ends_with_all_its_processes():
  said = {"port": free_port(), "num_cpus": 0.2, "ray": True}
  with served(["tests.sidecar_program", json.dumps(said)], seconds=90) as url:
    me = psutil.Process(os.getpid())
    ours = me.children(recursive=True)
    assert any("raylet" in p.name() for p in ours)
    (program,) = [
      p for p in me.children() if "sidecar_program" in p.cmdline()[2]
    ]
    program.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(ours, timeout=20)
    assert not alive
    with pytest.raises(requests.ConnectionError):
      requests.get(f"{url}/health", timeout=5)


def test_sidecar_under_ray_shares_no_port():
  """Ray's proxy would share it with another of its kind, and take turns."""
  with socket.socket() as other:
    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    other.bind(("127.0.0.1", 0))
    other.listen()
    with (
      pytest.raises(AssertionError, match="can't listen on 127"),
      brightness(port=other.getsockname()[1]),
    ):
      pass


@pytest.mark.slow
def test_sidecars_share_a_cluster_each_at_a_route_of_its_own(monkeypatch):
  monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # alike for all that join
  port, first, second = free_port(), free_port(), free_port()
  command = "start --head --block --num-cpus=2 --include-dashboard=false --port"
  head = subprocess.Popen(
    [
      pathlib.Path(sys.executable).with_name("ray"),
      *command.split(),
      str(port),
    ],
    env=os.environ | {"PYTHONPATH": str(ROOT)},  # replicas open the reward
  )
  join = {"ray_address": f"127.0.0.1:{port}", "num_cpus": 0.2}
  try:
    with (
      brightness(**join, name="one", port=first) as one,
      brightness(**join, name="two", port=second, max_items=1) as two,
    ):
      base = f"http://127.0.0.1:{first}"
      assert (one, two) == (f"{base}/one", f"{base}/two")
      items = [grey("a", 51), grey("b", 102)]
      assert [s.score for s in scores(one, items)] == [0.2, 0.4]
      assert post(two, wire.to_json(items)).status_code == 413
      for url in (one, two):
        assert requests.get(f"{url}/health").json()["app"] == url[-3:]
  finally:
    head.terminate()
    head.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes, message",
  [
    (["num_gpus=0"], "does not start: xomni_jax.errors.InputError: "),
    (["replicas=900"], "asks for 900 replicas of 1 CPU"),
    (["num_gpus=99"], "asks for 1 replicas of 99 GPU"),
  ],
)
def test_sidecar_under_ray_that_cannot_start_says_why(changes, message):
  command = ["xomni_jax.sidecar", "--app", "hps"]
  more = [f"port={free_port()}", "settings.checkpoint=/nowhere.pt", *changes]
  for change in more:
    command += ["--set", change]
  pattern = f"sidecar: error: application 'hps' {message}"
  with pytest.raises(AssertionError, match=pattern), served(command, 120):
    pass
