"""The client against a server of its own that misbehaves in every way."""

import concurrent.futures
import contextlib
import http.server
import json
import socket
import threading
import time

import numpy as np
import pytest

from xomni_jax.rewards import client as client_lib
from xomni_jax.rewards import wire
from xomni_jax.rewards.client import Settings, open_client
from xomni_jax.rewards.endpoints import Endpoints
from xomni_jax.rewards.wire import Item, Score
from xomni_jax.training import rewarding

FAST = Settings(
  deadline=5.0, try_seconds=1.0, retries=2, concurrency=4, batch_items=4
)


def _items(count, size=8):
  rng = np.random.default_rng(0)
  return [
    Item(f"i{n}", rng.integers(0, 256, (size, size, 3), np.uint8), f"p{n}")
    for n in range(count)
  ]


def _true_score(item):
  """What an honest server says: something that depends on the pixels."""
  return float(item.image.mean()) / 255


def _honest(items):
  return wire.scores_to_json(
    [Score(i.id, True, _true_score(i), {"n": 1}, None, "m1") for i in items],
    1.0,
  )


class _Server:
  """Answers with `behave(items, handler) -> (status, body)`."""

  def __init__(self, behave, port=0):
    self.behave, self.requests = behave, []
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        _, items = wire.items_from_json(body)
        outer.requests.append((self.path, dict(self.headers), items, len(body)))
        answer = outer.behave(items, self)
        if answer is None:  # the connection just ends
          self.close_connection = True
          return
        status, reply = answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        with contextlib.suppress(OSError):
          self.wfile.write(reply)

      def log_message(self, *args):
        pass

    class Quiet(http.server.ThreadingHTTPServer):
      daemon_threads = True

      def handle_error(self, request, address):
        pass  # clients that hang up are what is tested

    self.http = Quiet(("127.0.0.1", port), Handler)
    self.port = self.http.server_address[1]
    self.url = f"http://127.0.0.1:{self.port}/ocr"
    self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,))
    self.thread.start()

  def stop(self):
    self.http.shutdown()
    self.http.server_close()
    self.thread.join()


@pytest.fixture
def serve():
  servers = []

  def start(behave, port=0):
    servers.append(_Server(behave, port))
    return servers[-1]

  yield start
  for server in servers:
    server.stop()


def _ask(urls, items, settings=FAST, **kwargs):
  """(scores, seconds) of one call, checked for what always holds."""
  start = time.monotonic()
  scores = open_client(urls, settings, **kwargs)(items)
  seconds = time.monotonic() - start
  assert seconds < settings.deadline + 0.5
  assert [score.id for score in scores] == [item.id for item in items]
  for score, item in zip(scores, items, strict=True):
    if score.ok:  # nothing is invented, and nothing is another item's
      assert score.score == pytest.approx(_true_score(item))
    else:
      assert score.score is None
      assert "\n" not in score.raw["error"]
  return scores, seconds


def _kinds(scores):
  return {score.error_kind for score in scores}


def test_client_brings_every_score_home(serve):
  server = serve(lambda items, _: (200, _honest(items)))
  scores, _ = _ask([server.url + "/"], _items(11))
  assert all(score.ok for score in scores)
  assert scores[0].raw == {"n": 1}
  assert scores[0].model_rev == "m1"
  assert sorted(len(items) for _, _, items, _ in server.requests) == [3, 4, 4]
  paths, headers, *_ = zip(*server.requests, strict=True)
  assert set(paths) == {"/ocr/v1/score"}
  assert len({h["X-Request-Id"] for h in headers}) == 3
  assert all("Authorization" not in h for h in headers)


def test_client_sends_pixels_unchanged_and_texts(serve):
  server = serve(lambda items, _: (200, _honest(items)))
  item = _items(1)[0]._replace(targets=("打折", "50%"), lang="zh", prompt='"')
  _ask([server.url], [item])
  got = server.requests[0][2][0]
  assert np.array_equal(got.image, item.image)
  assert got[2:] == item[2:]


def test_client_of_no_items_asks_nobody():
  assert open_client(["http://127.0.0.1:9"], FAST)([]) == []


def test_client_splits_batches_by_bytes(serve):
  server = serve(lambda items, _: (200, _honest(items)))
  items = _items(4, size=40)
  entry = max(len(wire.entry_json(item)) for item in items)
  settings = FAST._replace(batch_bytes=2 * entry)
  scores, _ = _ask([server.url], items, settings)
  assert all(score.ok for score in scores)
  assert [len(i) for _, _, i, _ in server.requests] == [2, 2]


def test_client_sends_its_token_and_stops_at_a_wrong_one(serve):
  def behave(items, handler):
    right = handler.headers.get("Authorization") == "Bearer secret"
    return (200, _honest(items)) if right else (401, b'{"error": "token"}')

  server = serve(behave)
  assert all(s.ok for s in _ask([server.url], _items(2), token="secret")[0])
  scores, _ = _ask([server.url], _items(4), token="wrong")
  assert _kinds(scores) == {"http"}
  assert "401" in scores[0].raw["error"]
  assert len(server.requests) == 2  # a wrong token is not tried again


@pytest.mark.parametrize("status", [400, 422, 500])
def test_client_isolates_one_poisoned_image(serve, status):
  def behave(items, _):
    if any(item.id == "i5" for item in items):
      return status, b"boom"
    return 200, _honest(items)

  server = serve(behave)
  settings = FAST._replace(batch_items=8, deadline=10.0)
  scores, _ = _ask([server.url], _items(8), settings)
  assert [s.id for s in scores if not s.ok] == ["i5"]
  assert (scores[5].error_kind, str(status) in scores[5].raw["error"]) == (
    "http",
    True,
  )
  assert len(server.requests) <= 8


def test_client_isolates_an_item_that_is_no_image(serve):
  server = serve(lambda items, _: (200, _honest(items)))
  items = _items(3)
  bad = items[1]._replace(image=np.zeros((4, 4), np.float32))
  scores = open_client([server.url], FAST)([items[0], bad, items[2]])
  assert [s.error_kind for s in scores] == [None, "bad_image", None]


def test_client_fault_of_its_own_fails_what_has_no_score_yet(
  serve, monkeypatch
):
  server = serve(lambda items, _: (200, _honest(items)))
  whole, calls = wire.request_json, []

  def breaks_second(entries, request_id):
    calls.append(request_id)
    if len(calls) == 2:
      raise RuntimeError("no\nmemory")
    return whole(entries, request_id)

  monkeypatch.setattr(wire, "request_json", breaks_second)
  endpoints = Endpoints([f"{server.url}/v1/score"], threshold=1)
  settings = FAST._replace(batch_bytes=1)
  scores, _ = _ask([server.url], _items(3), settings, endpoints=endpoints)
  assert [s.ok for s in scores] == [True, False, False]
  assert _kinds(scores[1:]) == {"client"} <= set(wire.FAILURES)
  assert scores[1].raw == {"error": "RuntimeError: no memory"}
  assert endpoints.states() == ["closed"]  # it is not the server's fault


def test_failures_of_every_kind_are_told_by_their_names():
  failed = [wire.failed(str(i), k, "x") for i, k in enumerate(wire.FAILURES)]
  failed.append(wire.failed("x", "a kind of another version", "x"))
  column = rewarding._column(rewarding._table(dict(enumerate(failed)), 12))
  assert column.reasons == {kind: 1 for kind in (*wire.FAILURES, "other")}


def test_client_cuts_a_request_that_is_too_large(serve):
  items = _items(4, size=30)
  limit = 2.5 * len(wire.entry_json(items[0]))

  def behave(items, handler):
    if int(handler.headers["Content-Length"]) > limit:
      return 413, b"too large"
    return 200, _honest(items)

  server = serve(behave)
  assert all(s.ok for s in _ask([server.url], items)[0])
  scores, _ = _ask([server.url], [*items[:3], _items(4, size=60)[3]])
  assert [s.error_kind for s in scores] == [None, None, None, "too_large"]


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
    reply = json.loads(_honest(items))
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
  behave, kinds = FAULTS[fault]
  server = serve(behave)
  settings = FAST._replace(deadline=1.5, try_seconds=0.5, retries=1)
  scores, _ = _ask([server.url], _items(4), settings)
  assert not any(score.ok for score in scores)
  assert _kinds(scores) <= kinds


def test_client_told_to_stop_waits_no_longer(serve):
  server, stop = serve(lambda items, _: time.sleep(3)), threading.Event()
  threading.Timer(0.2, stop.set).start()
  settings = FAST._replace(deadline=30.0, try_seconds=30.0)
  scores, seconds = _ask([server.url], _items(4), settings, stop=stop)
  assert seconds < 1.5 and not any(score.ok for score in scores)


def test_client_fails_only_the_item_with_a_bad_score(serve):
  bad = _reply(lambda e: [e[0] | {"score": float("nan")}, *e[1:]])
  server = serve(bad)
  scores, _ = _ask([server.url], _items(4))
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
  failed, left_out, scored = open_client([server.url], FAST)(_items(3))
  assert (failed.ok, failed.error_kind) == (False, "engine")
  assert left_out == Score("i1", True, None, {"n": 1}, "absent", "m1")
  assert scored.score == pytest.approx(_true_score(_items(3)[2]))
  assert len(server.requests) == 1


def test_client_tries_again_after_a_hiccup(serve):
  answers = iter([(503, b""), None, (200, b"{"), (200, b"[]")])

  def behave(items, _):
    return next(answers, (200, _honest(items)))

  server = serve(behave)
  settings = FAST._replace(retries=3)
  scores, _ = _ask([server.url], _items(3), settings)
  assert _kinds(scores) == {"bad_reply"}  # three retries and no more
  assert len(server.requests) == 4
  assert all(s.ok for s in _ask([server.url], _items(3), settings)[0])


@pytest.mark.parametrize("fault", ["hangs", "drips", "hangs_up", "busy"])
def test_client_goes_round_an_endpoint_that(serve, fault):
  bad = serve(FAULTS[fault][0])
  good = serve(lambda items, _: (200, _honest(items)))
  settings = FAST._replace(try_seconds=0.4)
  scores, seconds = _ask([bad.url, good.url], _items(12), settings)
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
  good = serve(lambda items, _: (200, _honest(items)))
  monkeypatch.setattr(client_lib, "_CONNECT_SECONDS", 0.3)
  settings = FAST._replace(try_seconds=4.0)
  with _listening(0) as (listener, url), contextlib.ExitStack() as stack:
    for _ in range(4):  # it answers no more once its backlog is full
      waiting = stack.enter_context(socket.socket())
      waiting.setblocking(False)
      waiting.connect_ex(listener.getsockname())
    scores, seconds = _ask([url, good.url], _items(4), settings)
  assert all(s.ok for s in scores)
  assert seconds < 2


@pytest.mark.parametrize("stopped", [False, True])
def test_client_sends_no_more_of_a_request_that_is_over(stopped):
  """A server that reads slowly: each write is in time, all are not."""
  stop, got = threading.Event(), [0]
  items = _items(3, size=1200)
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
    scores, seconds = _ask([url], items, settings, stop=stop)
    over.set()  # whatever comes now is read at once
    thread.join(10)
  assert _kinds(scores) == {"timeout"}
  assert got[0] < whole
  assert seconds < 2.5 or not stopped


@pytest.mark.parametrize("kind", ["timeout", "http", "engine"])
def test_client_goes_round_a_server_whose_engine_fails(serve, kind):
  """It answers at once, so that it would be the least loaded for ever."""
  failure = {"ok": False, "score": None, "error_kind": kind, "raw": "x"}
  bad = serve(_reply(lambda entries: [e | failure for e in entries]))
  good = serve(lambda items, _: (time.sleep(0.1), (200, _honest(items)))[1])
  settings = FAST._replace(batch_items=1, concurrency=2)
  client = open_client([bad.url, good.url], settings)
  assert all(s.ok for s in client(_items(16)))
  assert len(bad.requests) <= 7  # 5 failures in a row, and 2 at once
  # Alone, it is asked once for each: it may be at work on them still.
  asked = len(bad.requests)
  scores = open_client([bad.url], FAST)(_items(8))
  assert _kinds(scores) == {kind} and len(bad.requests) == asked + 2


def test_client_spreads_requests_by_load(serve):
  def slow(items, _):
    time.sleep(0.15)
    return 200, _honest(items)

  servers = [serve(slow) for _ in range(3)]
  settings = FAST._replace(batch_items=1, concurrency=3)
  _ask([s.url for s in servers], _items(12), settings)
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
    return 200, _honest(items)

  server = serve(behave)
  settings = FAST._replace(batch_items=1, concurrency=3)
  _ask([server.url], _items(20), settings)
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
    return 200, _honest(items)

  settings = FAST._replace(batch_items=1, concurrency=3)
  client = open_client([serve(behave).url], settings)
  with concurrent.futures.ThreadPoolExecutor(5) as pool:
    for scores in pool.map(client, [_items(4)] * 5):
      assert all(s.ok for s in scores)
  assert most[0] == 3


def test_client_finds_a_server_that_comes_back(serve):
  server = serve(lambda items, _: (200, _honest(items)))
  port = server.port
  endpoints = Endpoints([f"{server.url}/v1/score"], threshold=2, cooldown=0.3)
  client = open_client([server.url], FAST, endpoints=endpoints)
  assert all(s.ok for s in client(_items(4)))
  server.http.shutdown()
  server.http.server_close()
  dead = open_client(
    [server.url], FAST._replace(deadline=0.6), endpoints=endpoints
  )
  assert _kinds(dead(_items(4))) <= {"http", "timeout", "circuit_open"}
  assert endpoints.states() != ["closed"]
  serve(lambda items, _: (200, _honest(items)), port)
  assert all(s.ok for s in client(_items(4)))
  assert endpoints.states() == ["closed"]
