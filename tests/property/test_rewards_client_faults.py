"""The client against a server of its own that misbehaves in every way."""

import contextlib
import json
import socket
import threading
import time

import pytest

from tests import reward_server
from tests.reward_server import FAST, ask, honest, kinds, make_items, true_score
from xomni_jax.rewards import client as client_lib
from xomni_jax.rewards import wire
from xomni_jax.rewards.client import open_client
from xomni_jax.rewards.wire import Score

serve = reward_server.serve  # a fixture


def _drip(items, handler):
  """Sends one byte now and then, so that no single read times out."""
  handler.send_response(200)
  handler.send_header("Content-Length", "1000")
  handler.end_headers()
  with contextlib.suppress(OSError):
    for _ in range(100):
      handler.wfile.write(b" ")
      handler.wfile.flush()
      time.sleep(0.1)


def _reply(change):
  """An honest reply with a change to its list of items."""

  def behave(items, _):
    reply = json.loads(honest(items))
    reply["items"] = change(reply["items"])
    return 200, json.dumps(reply).encode()

  return behave


FAULTS = {
  "hangs": (lambda items, _: time.sleep(4), {"timeout"}),
  "drips": (_drip, {"timeout"}),
  "hangs_up": (lambda items, _: None, {"http"}),
  "busy": (lambda items, _: (503, b""), {"http", "circuit_open"}),
  "broken": (lambda items, _: (500, b"x" * 1000), {"http", "circuit_open"}),
  "moved": (lambda items, _: (307, b""), {"http"}),
  "no_json": (lambda items, _: (200, b"<html>"), {"bad_reply"}),
  "no_list": (lambda items, _: (200, b'{"items": 3}'), {"bad_reply"}),
  "deep": (lambda items, _: (200, b"[" * 100000), {"bad_reply"}),
  "nothing": (lambda items, _: (200, b""), {"bad_reply"}),
  "short": (_reply(lambda e: e[:-1]), {"bad_reply"}),
  "long": (_reply(lambda e: [*e, e[0]]), {"bad_reply"}),
  "swapped": (_reply(lambda e: [e[0] | {"id": "x"}, *e[1:]]), {"bad_reply"}),
  "list_ids": (_reply(lambda e: [x | {"id": [1]} for x in e]), {"bad_reply"}),
  "nan": (
    _reply(lambda e: [x | {"score": float("nan")} for x in e]),
    {"bad_reply"},
  ),
  "text": (_reply(lambda e: [x | {"score": "1"} for x in e]), {"bad_reply"}),
  "true": (_reply(lambda e: [x | {"score": True} for x in e]), {"bad_reply"}),
  "ok_number": (_reply(lambda e: [x | {"ok": 1} for x in e]), {"bad_reply"}),
  "ok_null": (
    _reply(lambda e: [x | {"score": None} for x in e]),
    {"bad_reply"},
  ),
  "huge": (
    _reply(lambda e: [x | {"score": 10**400} for x in e]),
    {"bad_reply"},
  ),
  "fail_with_score": (
    _reply(lambda e: [x | {"ok": False} for x in e]),
    {"bad_reply"},
  ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_client_is_on_time_and_invents_nothing_when_its_server(serve, fault):
  behave, expected = FAULTS[fault]
  server = serve(behave)
  settings = FAST._replace(deadline=1.5, try_seconds=0.5, retries=1)
  scores, _ = ask([server.url], make_items(4), settings)
  assert not any(score.ok for score in scores)
  assert kinds(scores) <= expected


def test_client_told_to_stop_waits_no_longer(serve):
  server, stop = serve(lambda items, _: time.sleep(3)), threading.Event()
  threading.Timer(0.2, stop.set).start()
  settings = FAST._replace(deadline=30.0, try_seconds=30.0)
  scores, seconds = ask([server.url], make_items(4), settings, stop=stop)
  assert seconds < 1.5 and not any(score.ok for score in scores)


def test_client_fails_only_the_item_with_a_bad_score(serve):
  bad = _reply(lambda e: [e[0] | {"score": float("nan")}, *e[1:]])
  server = serve(bad)
  scores, _ = ask([server.url], make_items(4))
  assert [s.error_kind for s in scores] == ["bad_reply", None, None, None]
  assert len(server.requests) == 1


def test_client_passes_on_what_the_server_could_not_score(serve):
  failure = {
    "ok": False,
    "score": None,
    "error_kind": "engine",
    "raw": {"error": "x"},
  }
  absent = {"score": None, "error_kind": "absent"}
  server = serve(_reply(lambda e: [e[0] | failure, e[1] | absent, *e[2:]]))
  failed, left_out, scored = open_client([server.url], FAST)(make_items(3))
  assert (failed.ok, failed.error_kind) == (False, "engine")
  assert left_out == Score("i1", True, None, {"n": 1}, "absent", "m1")
  assert scored.score == pytest.approx(true_score(make_items(3)[2]))
  assert len(server.requests) == 1


def test_client_tries_again_after_a_hiccup(serve):
  answers = iter([(503, b""), None, (200, b"{"), (200, b"[]")])

  def behave(items, _):
    return next(answers, (200, honest(items)))

  server = serve(behave)
  settings = FAST._replace(retries=3)
  scores, _ = ask([server.url], make_items(3), settings)
  assert kinds(scores) == {"bad_reply"}  # three retries and no more
  assert len(server.requests) == 4
  assert all(s.ok for s in ask([server.url], make_items(3), settings)[0])


@pytest.mark.parametrize("fault", ["hangs", "drips", "hangs_up", "busy"])
def test_client_goes_round_an_endpoint_that(serve, fault):
  bad = serve(FAULTS[fault][0])
  good = serve(lambda items, _: (200, honest(items)))
  settings = FAST._replace(try_seconds=0.4)
  scores, seconds = ask([bad.url, good.url], make_items(12), settings)
  assert all(s.ok for s in scores)
  assert seconds < 3


@contextlib.contextmanager
def _listening(backlog):
  with socket.socket() as listener:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
    listener.bind(("127.0.0.1", 0))
    listener.listen(backlog)
    yield listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_client_leaves_a_machine_that_does_not_connect(serve, monkeypatch):
  good = serve(lambda items, _: (200, honest(items)))
  monkeypatch.setattr(client_lib, "_CONNECT_SECONDS", 0.3)
  settings = FAST._replace(try_seconds=4.0)
  with _listening(0) as (listener, url), contextlib.ExitStack() as stack:
    for _ in range(4):  # it answers no more once its backlog is full
      waiting = stack.enter_context(socket.socket())
      waiting.setblocking(False)
      waiting.connect_ex(listener.getsockname())
    scores, seconds = ask([url, good.url], make_items(4), settings)
  assert all(s.ok for s in scores)
  assert seconds < 2


@pytest.mark.parametrize("stopped", [False, True])
def test_client_sends_no_more_of_a_request_that_is_over(stopped):
  """A server that reads slowly: each write is in time, all are not."""
  stop, got = threading.Event(), [0]
  items = make_items(3, size=1200)
  whole = len(wire.to_json(items))

  def read(listener, over):
    connection, _ = listener.accept()
    with connection:
      while data := connection.recv(2**16):
        got[0] += len(data)
        over.wait(0.05)

  with _listening(1) as (listener, url):
    over = threading.Event()
    listener.settimeout(5)
    thread = threading.Thread(target=read, args=(listener, over), daemon=True)
    thread.start()
    settings = FAST._replace(deadline=3.0, try_seconds=3.0, retries=0)
    if stopped:
      threading.Timer(1.0, stop.set).start()
    scores, seconds = ask([url], items, settings, stop=stop)
    over.set()  # whatever comes now is read at once
    thread.join(10)
  assert kinds(scores) == {"timeout"}
  assert got[0] < whole
  assert seconds < 2.5 or not stopped


@pytest.mark.parametrize("kind", ["timeout", "http", "engine"])
def test_client_goes_round_a_server_whose_engine_fails(serve, kind):
  """It answers at once, so that it would be the least loaded for ever."""
  failure = {"ok": False, "score": None, "error_kind": kind, "raw": "x"}
  bad = serve(_reply(lambda entries: [e | failure for e in entries]))
  good = serve(lambda items, _: (time.sleep(0.1), (200, honest(items)))[1])
  settings = FAST._replace(batch_items=1, concurrency=2)
  client = open_client([bad.url, good.url], settings)
  assert all(s.ok for s in client(make_items(16)))
  assert len(bad.requests) <= 7  # 5 failures in a row, and 2 at once
  # Alone, it is asked once for each: it may be at work on them still.
  asked = len(bad.requests)
  scores = open_client([bad.url], FAST)(make_items(8))
  assert kinds(scores) == {kind} and len(bad.requests) == asked + 2
