"""The HTTP application of a reward: what is let in, and what is answered.

`POST /v1/score`, `GET /info` and `GET /health`; JSON only. Runs under Ray Serve
(ray_app.py), or under any ASGI server.
"""

import asyncio
import concurrent.futures
import hmac
import time
from collections.abc import Awaitable, Callable, Sequence

import fastapi
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from xomni_jax.errors import InputError
from xomni_jax.rewards import wire
from xomni_jax.rewards.wire import Item, Score
from xomni_jax.sidecar.engines import Reward
from xomni_jax.sidecar.settings import App

AsyncScorer = Callable[[Sequence[Item]], Awaitable[list[Score]]]

_BODY_SECONDS = 60.0


class _RefusedError(Exception):
  """A request that is answered with an HTTP status and one line."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


def make_app(
  app: App, reward: Reward, score: AsyncScorer, token: str
) -> fastapi.FastAPI:
  """The application of one reward.

  Args:
    app: its settings.
    reward: what it serves; `score` asks it.
    score: items -> one Score each.
    token: that a client has to send as bearer; "": none.
  """
  http = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
  ongoing = asyncio.Semaphore(app.max_ongoing)

  @http.post("/v1/score")
  async def score_items(request: fastapi.Request):
    start = time.perf_counter()
    try:
      if not _has_token(request, token):
        raise _RefusedError(401, _NO_TOKEN)
      # A web page can send other kinds to a server on the same machine.
      kind = request.headers.get("content-type", "").partition(";")[0]
      if kind.strip().lower() != "application/json":
        raise _RefusedError(
          415, f"content type is {kind[:40]!r}, expected application/json"
        )
      if ongoing.locked():
        raise _RefusedError(
          503, f"more than {app.max_ongoing} requests at once, try again later"
        )
      async with ongoing:
        body = await _body(request, app.max_bytes)
        entries = await run_in_threadpool(_entries, body, app)
        scores = await _scores(entries, score, app.timeout_s, reward.model_rev)
    except _RefusedError as e:
      return _json({"error": str(e)}, e.status)
    latency_ms = 1000 * (time.perf_counter() - start)
    return _response(wire.scores_to_json(scores, latency_ms))

  @http.get("/info")
  async def info(request: fastapi.Request):
    if not _has_token(request, token):
      return _json({"error": _NO_TOKEN}, 401)
    return _json(describe(app, reward))

  @http.get("/health")
  async def health():
    try:
      await asyncio.wait_for(run_in_threadpool(reward.check), app.timeout_s)
    except Exception as e:  # whatever keeps the reward from working
      reason = " ".join(str(e).split())[:300] or type(e).__name__
      return _json({"ok": False, "app": app.name, "error": reason}, 503)
    return _json({"ok": True, "app": app.name})

  return http


def describe(app: App, reward: Reward) -> dict:
  """What `GET /info` answers."""
  return {
    "app": app.name,
    "reward": app.reward,
    "model_rev": reward.model_rev,
    "preprocessing": reward.preprocessing,
    "preprocessing_hash": reward.preprocessing_hash(),
    "max_batch": app.max_batch,
    "limits": {**app.limits._asdict(), "aspect": app.max_aspect},
  }


def in_one_thread(reward: Reward, max_batch: int) -> AsyncScorer:
  """Scores the batches of all requests one after another, in one thread.

  What is still waiting when its request is given up is not scored.
  """
  pool = concurrent.futures.ThreadPoolExecutor(1)

  async def score(items):
    loop = asyncio.get_running_loop()
    batches = [
      loop.run_in_executor(pool, reward.score, items[i : i + max_batch])
      for i in range(0, len(items), max_batch)
    ]
    try:
      return [s for batch in await asyncio.gather(*batches) for s in batch]
    finally:
      for batch in batches:
        batch.cancel()

  return score


_NO_TOKEN = "no valid token, expected the header 'Authorization: Bearer TOKEN'"


async def _body(request, most):
  """The body of a request, of at most so many bytes.

  Raises:
    _RefusedError: it has more (413), is too slow (408), or was cut off.
  """
  chunks, size = [], 0
  try:
    async with asyncio.timeout(_BODY_SECONDS):
      async for chunk in request.stream():
        size += len(chunk)
        if size > most:
          raise _RefusedError(
            413, f"request has more than {most} bytes; send fewer images"
          )
        chunks.append(chunk)
  except TimeoutError:
    raise _RefusedError(
      408, f"request took more than {_BODY_SECONDS:g} s to come in"
    ) from None
  except ClientDisconnect:
    raise _RefusedError(400, "client went away") from None
  return b"".join(chunks)


def _entries(body, app):
  """Items and, for those that can't be scored, Scores."""
  try:
    _, entries = wire.items_from_json(body, app.limits)
  except wire.TooLargeError as e:
    raise _RefusedError(413, str(e)) from None
  except InputError as e:
    raise _RefusedError(400, str(e)) from None
  return [_of_good_shape(entry, app.max_aspect) for entry in entries]


def _of_good_shape(entry, most):
  if isinstance(entry, Score):
    return entry
  height, width = entry.image.shape[:2]
  if max(height, width) <= most * min(height, width):
    return entry
  return wire.failed(
    entry.id,
    "bad_image",
    f"image of {width} x {height} px, expected sides of at most {most:g} : 1",
  )


async def _scores(entries, score, timeout_s, rev):
  """One Score for each entry, in order."""
  items = [entry for entry in entries if isinstance(entry, Item)]
  found = []
  try:
    if items:
      found = await asyncio.wait_for(score(items), timeout_s)
  except TimeoutError:
    message = f"no score within {timeout_s:g} s"
    found = [wire.failed(item.id, "timeout", message, rev) for item in items]
  except Exception as e:  # one request's trouble is no other's
    message = f"{type(e).__name__}: {e}"
    found = [wire.failed(item.id, "engine", message, rev) for item in items]
  by_id = {s.id: s for s in found}
  missing = "engine gave no score"
  return [
    entry._replace(model_rev=rev)
    if isinstance(entry, Score)
    else by_id.get(entry.id) or wire.failed(entry.id, "engine", missing, rev)
    for entry in entries
  ]


def _has_token(request, token):
  scheme, _, given = request.headers.get("authorization", "").partition(" ")
  if not token:
    return True
  # Headers are decoded as Latin-1; bytes of any kind can be compared.
  given = given.strip().encode("latin-1", "replace")
  same = hmac.compare_digest(given, token.encode())
  return same and scheme.lower() == "bearer"


def _json(value, status=200):
  return JSONResponse(value, status)


def _response(body):
  return Response(body, media_type="application/json")
