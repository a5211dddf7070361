"""A reward for tests, over HTTP: how red an image is."""

import contextlib
import http.server
import threading

from xomni_jax.rewards import wire


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def do_POST(self):
    body = self.rfile.read(int(self.headers["Content-Length"]))
    _, items = wire.items_from_json(body)
    self.server.asked.extend(item.id for item in items)
    self.server.on_request(len(self.server.asked))
    scores = [
      wire.Score(item.id, True, float(item.image[..., 0].mean()) / 255)
      for item in items
    ]
    reply = wire.scores_to_json(scores, 0.0)
    self.send_response(200)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(reply)))
    self.end_headers()
    self.wfile.write(reply)

  def log_message(self, *args):
    """Says nothing."""


@contextlib.contextmanager
def serve():
  """A running server: `url`, `asked` (ids of all items), `on_request`.

  `on_request(items so far)` is called before a request is answered.
  """
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
  server.asked, server.on_request = [], lambda count: None
  server.url = f"http://127.0.0.1:{server.server_port}/red"
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()
