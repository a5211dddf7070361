"""The client: every score comes home, requests fit and are spread."""

import concurrent.futures
import threading
import time

import numpy as np
import pytest

from tests import reward_server
from tests.reward_server import (
  FAST,
  ask,
  honest,
  kinds,
  make_items,
)
from xomni_jax.rewards import wire
from xomni_jax.rewards.client import open_client
from xomni_jax.rewards.endpoints import Endpoints
from xomni_jax.training import rewarding

serve = reward_server.serve  # a fixture


def test_client_brings_every_score_home(serve):
  server = serve(lambda items, _: (200, honest(items)))
  scores, _ = ask([server.url + "/"], make_items(11))
  assert all(score.ok for score in scores)
  assert scores[0].raw == {"n": 1}
  assert scores[0].model_rev == "m1"
  assert sorted(len(items) for _, _, items, _ in server.requests) == [3, 4, 4]
  paths, headers, *_ = zip(*server.requests, strict=True)
  assert set(paths) == {"/ocr/v1/score"}
  assert len({h["X-Request-Id"] for h in headers}) == 3
  assert all("Authorization" not in h for h in headers)


def test_client_sends_pixels_unchanged_and_texts(serve):
  server = serve(lambda items, _: (200, honest(items)))
  item = make_items(1)[0]._replace(
    targets=("打折", "50%"), lang="zh", prompt='"'
  )
  ask([server.url], [item])
  got = server.requests[0][2][0]
  assert np.array_equal(got.image, item.image)
  assert got[2:] == item[2:]


def test_client_of_no_items_asks_nobody():
  assert open_client(["http://127.0.0.1:9"], FAST)([]) == []


def test_client_splits_batches_by_bytes(serve):
  server = serve(lambda items, _: (200, honest(items)))
  items = make_items(4, size=40)
  entry = max(len(wire.entry_json(item)) for item in items)
  settings = FAST._replace(batch_bytes=2 * entry)
  scores, _ = ask([server.url], items, settings)
  assert all(score.ok for score in scores)
  assert [len(i) for _, _, i, _ in server.requests] == [2, 2]


def test_client_sends_its_token_and_stops_at_a_wrong_one(serve):
  def behave(items, handler):
    right = handler.headers.get("Authorization") == "Bearer secret"
    return (200, honest(items)) if right else (401, b"I got Bearer wrong")

  server = serve(behave)
  assert all(s.ok for s in ask([server.url], make_items(2), token="secret")[0])
  scores, _ = ask([server.url], make_items(4), token="wrong")
  assert "wrong" not in scores[0].raw["error"]
  assert kinds(scores) == {"http"}
  assert "401" in scores[0].raw["error"]
  assert len(server.requests) == 2  # a wrong token is not tried again


@pytest.mark.parametrize("status", [400, 422, 500])
def test_client_isolates_one_poisoned_image(serve, status):
  def behave(items, _):
    if any(item.id == "i5" for item in items):
      return status, b"boom"
    return 200, honest(items)

  server = serve(behave)
  settings = FAST._replace(batch_items=8, deadline=10.0)
  scores, _ = ask([server.url], make_items(8), settings)
  assert [s.id for s in scores if not s.ok] == ["i5"]
  assert (scores[5].error_kind, str(status) in scores[5].raw["error"]) == (
    "http",
    True,
  )
  assert len(server.requests) <= 8


def test_client_isolates_an_item_that_is_no_image(serve):
  server = serve(lambda items, _: (200, honest(items)))
  items = make_items(3)
  bad = items[1]._replace(image=np.zeros((4, 4), np.float32))
  scores = open_client([server.url], FAST)([items[0], bad, items[2]])
  assert [s.error_kind for s in scores] == [None, "bad_image", None]


def test_client_fault_of_its_own_fails_what_has_no_score_yet(
  serve, monkeypatch
):
  server = serve(lambda items, _: (200, honest(items)))
  whole, calls = wire.request_json, []

  def breaks_second(entries, request_id):
    calls.append(request_id)
    if len(calls) == 2:
      raise RuntimeError("no\nmemory")
    return whole(entries, request_id)

  monkeypatch.setattr(wire, "request_json", breaks_second)
  endpoints = Endpoints([f"{server.url}/v1/score"], threshold=1)
  settings = FAST._replace(batch_bytes=1)
  scores, _ = ask([server.url], make_items(3), settings, endpoints=endpoints)
  assert [s.ok for s in scores] == [True, False, False]
  assert kinds(scores[1:]) == {"client"} <= set(wire.FAILURES)
  assert scores[1].raw == {"error": "RuntimeError: no memory"}
  assert endpoints._open_until == [None]  # it is not the server's fault


def test_failures_of_every_kind_are_told_by_their_names():
  failed = [wire.failed(str(i), k, "x") for i, k in enumerate(wire.FAILURES)]
  failed.append(wire.failed("x", "a kind of another version", "x"))
  column = rewarding._column(rewarding._table(dict(enumerate(failed)), 12))
  assert column.reasons == {kind: 1 for kind in (*wire.FAILURES, "other")}


def test_client_cuts_a_request_that_is_too_large(serve):
  items = make_items(4, size=30)
  limit = 2.5 * len(wire.entry_json(items[0]))

  def behave(items, handler):
    if int(handler.headers["Content-Length"]) > limit:
      return 413, b"too large"
    return 200, honest(items)

  server = serve(behave)
  assert all(s.ok for s in ask([server.url], items)[0])
  scores, _ = ask([server.url], [*items[:3], make_items(4, size=60)[3]])
  assert [s.error_kind for s in scores] == [None, None, None, "too_large"]


def test_client_spreads_requests_by_load(serve):
  def slow(items, _):
    time.sleep(0.15)
    return 200, honest(items)

  servers = [serve(slow) for _ in range(3)]
  settings = FAST._replace(batch_items=1, concurrency=3)
  ask([s.url for s in servers], make_items(12), settings)
  assert all(3 <= len(s.requests) <= 5 for s in servers)


def test_client_keeps_to_its_concurrency(serve):
  running, most, lock = [0], [0], threading.Lock()

  def behave(items, _):
    with lock:
      running[0] += 1
      most[0] = max(most[0], running[0])
    time.sleep(0.05)
    with lock:
      running[0] -= 1
    return 200, honest(items)

  server = serve(behave)
  settings = FAST._replace(batch_items=1, concurrency=3)
  ask([server.url], make_items(20), settings)
  assert most[0] == 3


def test_calls_share_a_clients_concurrency(serve):
  running, most, lock = [0], [0], threading.Lock()

  def behave(items, _):
    with lock:
      running[0] += 1
      most[0] = max(most[0], running[0])
    time.sleep(0.05)
    with lock:
      running[0] -= 1
    return 200, honest(items)

  settings = FAST._replace(batch_items=1, concurrency=3)
  client = open_client([serve(behave).url], settings)
  with concurrent.futures.ThreadPoolExecutor(5) as pool:
    for scores in pool.map(client, [make_items(4)] * 5):
      assert all(s.ok for s in scores)
  assert most[0] == 3


def test_client_finds_a_server_that_comes_back(serve):
  server = serve(lambda items, _: (200, honest(items)))
  port = server.port
  endpoints = Endpoints([f"{server.url}/v1/score"], threshold=2, cooldown=0.3)
  client = open_client([server.url], FAST, endpoints=endpoints)
  assert all(s.ok for s in client(make_items(4)))
  server.http.shutdown()
  server.http.server_close()
  dead = open_client(
    [server.url], FAST._replace(deadline=0.6), endpoints=endpoints
  )
  assert kinds(dead(make_items(4))) <= {"http", "timeout", "circuit_open"}
  assert endpoints._open_until != [None]
  serve(lambda items, _: (200, honest(items)), port)
  assert all(s.ok for s in client(make_items(4)))
  assert endpoints._open_until == [None]
