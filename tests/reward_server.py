"""A reward server for tests, whose answers each test chooses, and its client."""

import contextlib
import http.server
import threading
import time

import numpy as np
import pytest

from xomni_jax.rewards import wire
from xomni_jax.rewards.client import Settings, open_client
from xomni_jax.rewards.wire import Item, Score

FAST = Settings(
  deadline=5.0, try_seconds=1.0, retries=2, concurrency=4, batch_items=4
)


def make_items(count, size=8):
  rng = np.random.default_rng(0)
  return [
    Item(f"i{n}", rng.integers(0, 256, (size, size, 3), np.uint8), f"p{n}")
    for n in range(count)
  ]


def true_score(item):
  """What an honest server says: something that depends on the pixels."""
  return float(item.image.mean()) / 255


def honest(items):
  return wire.scores_to_json(
    [Score(i.id, True, true_score(i), {"n": 1}, None, "m1") for i in items],
    1.0,
  )


class Server:
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
    servers.append(Server(behave, port))
    return servers[-1]

  yield start
  for server in servers:
    server.stop()


def ask(urls, items, settings=FAST, **kwargs):
  """(scores, seconds) of one call, checked for what always holds."""
  start = time.monotonic()
  scores = open_client(urls, settings, **kwargs)(items)
  seconds = time.monotonic() - start
  assert seconds < settings.deadline + 0.5
  assert [score.id for score in scores] == [item.id for item in items]
  for score, item in zip(scores, items, strict=True):
    if score.ok:  # nothing is invented, and nothing is another item's
      assert score.score == pytest.approx(true_score(item))
    else:
      assert score.score is None
      assert "\n" not in score.raw["error"]
  return scores, seconds


def kinds(scores):
  return {score.error_kind for score in scores}
