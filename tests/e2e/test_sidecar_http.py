"""A running sidecar over a real socket: what it answers, and refuses."""

import base64
import concurrent.futures
import http.client
import io
import json
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import requests
from PIL import Image

from tests.sidecar_client import (
  ROOT,
  TOKEN,
  brightness,
  grey,
  post,
  scores,
  served,
)
from xomni_jax.rewards import client, wire

pytest.importorskip("fastapi", reason="needs fastapi and uvicorn")
pytest.importorskip("uvicorn", reason="needs fastapi and uvicorn")

POOL = concurrent.futures.ThreadPoolExecutor
LIMIT = 200_000  # bytes of a request


@pytest.fixture(scope="module")
def url():
  with brightness(
    max_items=6, max_bytes=LIMIT, max_pixels=10_000, max_batch=4, timeout_s=1.0
  ) as found:
    yield found


def body(*entries, request_id="r"):
  return json.dumps({"request_id": request_id, "items": entries}).encode()


def entry(id, png, **more):
  return {"id": id, "image_png_b64": base64.b64encode(png).decode(), **more}


def encoded(image, format="PNG"):
  out = io.BytesIO()
  Image.fromarray(image).save(out, format)
  return out.getvalue()


def bomb(width, height):
  """A PNG of a few bytes that says it has so many pixels."""

  def chunk(kind, data):
    sum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", sum)

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  data = zlib.compress(b"\0" * 1000)
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", data)
    + chunk(b"IEND", b"")
  )


def test_sidecar_scores_pixels_exactly_and_in_order(url):
  levels = [0, 51, 255, 102, 204, 1]  # two batches
  items = [grey(f"{i}", level) for i, level in enumerate(levels)]
  found = scores(url, items)
  assert [s.id for s in found] == [i.id for i in items]
  assert [s.score for s in found] == [level / 255 for level in levels]
  assert [s.raw["batch"] for s in found] == [4, 4, 4, 4, 2, 2]
  assert {s.model_rev for s in found} == {"brightness-1"}


def test_sidecar_reply_tells_its_time_in_milliseconds(url):
  start = time.perf_counter()
  reply = post(url, wire.to_json([grey("a", 1, "sleep 0.3")])).json()
  assert 300 <= reply["latency_ms"] <= 1000 * (time.perf_counter() - start)


def test_sidecar_answers_a_request_without_items(url):
  assert post(url, wire.to_json([])).json()["items"] == []


@pytest.mark.parametrize(
  "token", [None, "", "token-of-the-test", f"{TOKEN}s", "tökén", "\x80"]
)
def test_sidecar_wrong_token_is_401(url, token):
  token = token if token is None else token.encode().decode("latin-1")
  for size in (10, LIMIT // 2, 3 * LIMIT):  # heard also by one that sends a lot
    reply = post(url, b" " * size, token)
    assert reply.status_code == 401 and "token" in reply.json()["error"]
  headers = {"Authorization": f"Basic {TOKEN}"}
  assert requests.get(f"{url}/info", headers=headers).status_code == 401


@pytest.mark.parametrize("times", [1, 3.5])
@pytest.mark.parametrize("chunked", [False, True])
def test_sidecar_oversized_request_is_413(url, times, chunked):
  data = wire.to_json([grey("a", 1)]) + b" " * int(LIMIT * times)
  reply = post(
    url,
    (data[i : i + 9999] for i in range(0, len(data), 9999))
    if chunked
    else data,
  )
  assert reply.status_code == 413 and str(LIMIT) in reply.json()["error"]


def test_sidecar_refusal_is_heard_by_a_client_that_still_sends():
  with brightness(max_bytes=8 * 2**20) as url:  # more than sockets hold
    for token, status in ((TOKEN, 413), ("wrong", 401)):
      # Plain: other clients hide that the connection broke.
      client = http.client.HTTPConnection(url.removeprefix("http://"))
      headers = {
        "Authorization": f"Bearer {token}",
        "Content-Type": "application/json",
      }
      client.request("POST", "/v1/score", b" " * (20 * 2**20), headers)
      assert client.getresponse().status == status


def test_sidecar_request_at_the_limit_is_answered(url):
  data = wire.to_json([grey("a", 51)])
  reply = post(url, data + b" " * (LIMIT - len(data)))
  assert reply.json()["items"][0]["score"] == 0.2


@pytest.mark.parametrize("kind", ["text/plain", "", "multipart/form-data"])
def test_sidecar_other_content_types_are_415(url, kind):
  headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": kind}
  data = wire.to_json([grey("a", 1)])
  reply = requests.post(f"{url}/v1/score", data=data, headers=headers)
  assert reply.status_code == 415


def test_sidecar_too_many_items_is_413(url):
  reply = post(url, wire.to_json([grey(f"{i}", 1) for i in range(7)]))
  assert reply.status_code == 413 and "7 items" in reply.json()["error"]


@pytest.mark.parametrize(
  "data",
  [
    b"",
    b"{",
    b"[]",
    b"\xff\xfe",
    b'{"items": 3}',
    b'{"items": [3]}',
    b'{"items": [{"id": ""}]}',
    b'{"items": [{"id": "a"}, {"id": "a"}]}',
    b"[" * 100_000,
    b"\x80\x04K\x01.",  # a pickle
  ],
)
def test_sidecar_broken_request_is_400_with_one_line(url, data):
  reply = post(url, data)
  assert reply.status_code == 400
  assert list(reply.json()) == ["error"]
  assert len(reply.json()["error"].splitlines()) == 1


def test_sidecar_isolates_images_that_it_cannot_read(url):
  good = np.full((4, 4, 3), 51, np.uint8)
  png = encoded(good)
  reply = post(
    url,
    body(
      entry("cut", png[:-30]),
      entry("jpeg", encoded(good, "JPEG")),
      entry("bomb", bomb(5000, 5000)),
      entry("line", encoded(np.zeros((1, 17, 3), np.uint8))),
      {"id": "nothing"},
      entry("good", png),
    ),
  )
  assert reply.status_code == 200
  ids = ["cut", "jpeg", "bomb", "line", "nothing", "good"]
  found = wire.scores_from_json(reply.content, ids)
  kinds = [s.error_kind for s in found]
  assert kinds == [
    "bad_image",
    "bad_image",
    "too_large",
    "bad_image",
    "bad_request",
    None,
  ]
  assert found[-1].score == 0.2


def test_sidecar_isolates_an_image_that_breaks_the_batch(url):
  items = [grey("a", 51), grey("b", 1, "poison"), grey("c", 102)]
  found = scores(url, items)
  assert [s.score for s in found] == [0.2, None, 0.4]
  assert found[1].error_kind == "engine"
  assert found[1].raw == {"error": "RuntimeError: poisoned image"}


@pytest.mark.parametrize("prompt", ["nan", "lost"])
def test_sidecar_engine_that_gives_no_number_has_failed(url, prompt):
  found = scores(url, [grey("a", 51), grey("b", 51, prompt)])
  assert [(s.ok, s.score) for s in found] == [(True, 0.2), (False, None)]
  assert found[1].error_kind == "engine"


def test_sidecar_slow_engine_is_a_timeout_and_later_requests_pass(url):
  start = time.monotonic()
  found = scores(url, [grey("a", 1, "sleep 1.5")])
  assert found[0].error_kind == "timeout"
  assert 0.9 < time.monotonic() - start < 1.4
  time.sleep(0.6)
  assert scores(url, [grey("a", 51)])[0].score == 0.2


def test_sidecar_returns_the_batches_that_are_done_in_time(url):
  items = [grey(f"{i}", 51) for i in range(4)]  # a batch
  items += [grey("slow", 51, "sleep 1.5"), grey("beside it", 51)]
  found = scores(url, items)
  assert [s.score for s in found] == [0.2] * 4 + [None] * 2
  assert {s.error_kind for s in found[4:]} == {"timeout"}
  time.sleep(0.6)


def test_sidecar_batches_at_once_do_not_wait_for_each_other():
  with brightness(max_batch=1, max_batches=3, timeout_s=1.0) as url:
    items = [grey("slow", 51, "sleep 1.5"), *(grey(c, 51) for c in "abcd")]
    found = scores(url, items)
  assert [s.score for s in found] == [None] + [0.2] * 4
  assert found[0].error_kind == "timeout"


def test_sidecar_answers_before_its_client_stops_waiting():
  """Else all would be lost, and asked again while it is still at work."""
  items = [grey("good", 51), grey("slow", 51, "sleep 5")]
  settings = client.Settings(deadline=6.0, try_seconds=2.0)
  with brightness(max_batch=1, timeout_s=30.0) as url:
    start = time.monotonic()
    good, slow = client.open_client([url], settings, TOKEN)(items)
    seconds = time.monotonic() - start
  assert (good.score, slow.error_kind) == (0.2, "timeout")
  assert slow.model_rev == "brightness-1"  # the server said so
  assert seconds < 3  # and the client asked once


@pytest.mark.parametrize("said", ["soon", "nan", "0", "-1", ""])
def test_sidecar_told_no_seconds_to_wait_says_400(url, said):
  headers = {
    "Authorization": f"Bearer {TOKEN}",
    "Content-Type": "application/json",
    wire.WAITS_HEADER: said,
  }
  reply = requests.post(f"{url}/v1/score", wire.to_json([]), headers=headers)
  assert reply.status_code == 400
  assert "expected seconds above 0" in reply.json()["error"]


def test_sidecar_parallel_requests_get_their_own_scores(url):
  def ask(level):
    return scores(url, [grey("same id", level)])[0].score

  with POOL(8) as pool:
    assert list(pool.map(ask, range(60))) == [x / 255 for x in range(60)]


def test_sidecar_above_its_requests_at_once_says_503():
  with brightness(max_ongoing=1) as url:
    with POOL(1) as pool:
      slow = pool.submit(scores, url, [grey("a", 51, "sleep 1")])
      time.sleep(0.4)
      assert post(url, wire.to_json([grey("b", 1)])).status_code == 503
      assert slow.result()[0].score == 0.2
    assert scores(url, [grey("b", 51)])[0].score == 0.2


def test_sidecar_info_and_health(url):
  assert requests.get(f"{url}/health").json() == {
    "ok": True,
    "app": "brightness",
  }
  headers = {"Authorization": f"Bearer {TOKEN}"}
  info = requests.get(f"{url}/info", headers=headers).json()
  assert info["model_rev"] == "brightness-1"
  assert info["preprocessing"] == {"scale": 255}
  assert len(info["preprocessing_hash"]) == 16
  assert info["timeout_s"] == 1.0
  assert info["limits"] == {
    "items": 6,
    "bytes": LIMIT,
    "pixels": 10_000,
    "aspect": 16.0,
  }
  for path in ("", "/docs", "/openapi.json", "/v1/score"):
    assert requests.get(f"{url}{path}").status_code in (404, 405)


def test_sidecar_whose_engine_hangs_is_unhealthy_until_it_goes_on(url):
  def health():
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return requests.get(f"{url}/health", headers=headers)

  found = scores(url, [grey("a", 1, "sleep 2")])  # it is given up after 1 s
  assert found[0].error_kind == "timeout"
  time.sleep(0.2)
  reply = health()
  assert reply.status_code == 503
  assert "a batch has been running for 1 s" in reply.json()["error"]
  time.sleep(1)
  assert health().status_code == 200
  assert scores(url, [grey("a", 51)])[0].score == 0.2


def test_sidecar_on_loopback_needs_no_token_and_elsewhere_it_does():
  env = {"XOMNI_SIDECAR_TOKEN": ""}
  said = json.dumps({"port": 0})
  with served(["tests.sidecar_program", said], **env) as url:
    assert post(url, wire.to_json([]), None).status_code == 200
  run = subprocess.run(
    [
      sys.executable,
      "-m",
      "xomni_jax.sidecar",
      "--app",
      "ocr",
      "--no-ray",
      "--set",
      "host=0.0.0.0",
    ],
    cwd=ROOT,
    env={"PATH": "/usr/bin"},
    capture_output=True,
    text=True,
    timeout=30,
  )
  assert run.returncode == 2 and run.stdout == ""
  assert "without a token" in run.stderr and len(run.stderr.splitlines()) == 1


def test_sidecar_reads_signs_with_a_real_engine():
  pytest.importorskip("rapidocr", reason="needs rapidocr")
  from PIL import ImageDraw, ImageFont

  def sign(id, text, *targets):
    image = Image.new("RGB", (240, 80), "white")
    font = ImageFont.load_default(40)
    ImageDraw.Draw(image).text((20, 15), text, "black", font)
    return wire.Item(id, np.asarray(image), text, targets)

  items = [
    sign("right", "OPEN", "OPEN"),
    sign("wrong", "OPEN", "BAKERY"),
    sign("empty", "", "OPEN"),
    sign("absent", "OPEN"),
  ]
  command = ["xomni_jax.sidecar", "--config", "configs/sidecar.py:tiny"]
  more = ["--app", "ocr", "--no-ray", "--set", "port=0"]
  with served([*command, *more]) as url:
    right, wrong, empty, absent = scores(url, items)
  assert right.score == 1.0 and right.raw["text"] == "OPEN"
  assert wrong.ok and wrong.score < 0.4
  assert empty.ok and empty.score == 0.0
  assert absent.ok and absent.score is None and absent.error_kind == "absent"


def test_sidecar_never_loads_jax():
  code = (
    "import sys, pathlib, importlib\n"
    "from xomni_jax.rewards import ocr\n"
    "for path in pathlib.Path('xomni_jax/sidecar').glob('*.py'):\n"
    "  importlib.import_module(f'xomni_jax.sidecar.{path.stem}')\n"
    "from xomni_jax.sidecar import settings\n"
    "settings.read_app('configs/sidecar.py', 'ocr')\n"
    "assert 'xomni_jax.sidecar.app' in sys.modules\n"
    "heavy = {'jax', 'jaxlib', 'flax', 'torch', 'ray', 'tensorflow'}\n"
    "print(sorted(heavy & set(sys.modules)))\n"
    "print(sorted(m for m in sys.modules if m.startswith('xomni_jax.') "
    "and not m.startswith(('xomni_jax.sidecar', 'xomni_jax.rewards'))))\n"
  )
  run = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
  )
  assert run.stdout.splitlines() == ["[]", "['xomni_jax.errors']"], run.stderr
