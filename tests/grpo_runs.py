"""Small runs of stage `grpo` by the real command, and a reward over HTTP.

The policy is the golden checkpoint's; an image is rewarded for being red.
"""

import contextlib
import http.server
import threading

from tests.helpers import GOLDEN
from xomni_jax.rewards import wire
from xomni_jax.training import configure

STEPS = 6


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


def write_config(folder, url, **options):
  """A config of six steps of 8 images, a checkpoint every second."""
  config = configure.read("configs/grpo.py:tiny")
  sizes = configure.read("configs/model.py:tiny").to_dict()
  config.architecture = {k: sizes[k] for k in config.architecture}
  config.options.update(
    {
      "sizes": ((32, 32),),
      "group_size": 4,
      "prompt_len": 80,
      "paint_rows": 8,
      "paint_steps": 2,
      "rewards": ({"name": "red", "source": url, "deadline": 60.0},),
      **options,
    }
  )
  settings = config.to_dict() | {
    "global_batch": 8,
    "phases": {"1_all": {"steps": STEPS, "train": ("ar/",)}},
    "init": {"model": str(GOLDEN / "xomni"), "flux": str(GOLDEN / "flux1")},
    "checkpoint": {"every": 2, "keep_last": STEPS},
    "report": {"log_every": 1},
  }
  signs = {"path": "world:signs", "task": "prompt"}
  settings["data"]["sources"] = (signs,)
  settings["eval_data"]["sources"] = ({**signs, "path": "world:signs:test"},)
  settings["optim"]["lr"] = 3e-3
  path = folder / "run.py"
  path.write_text(
    "from ml_collections import ConfigDict\n\n\n"
    f"def get_config(size=''):\n  return ConfigDict({settings!r})\n"
  )
  return path
