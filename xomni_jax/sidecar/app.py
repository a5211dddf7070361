"""The HTTP application of a reward: what is let in, and what is answered.

`POST /v1/score`, `GET /info` and `GET /health`; JSON only. Runs under Ray Serve
(ray_app.py), or under any ASGI server.
"""

import asyncio
import concurrent.futures
import hmac
import time
from collections.abc import Callable, Sequence

import fastapi
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from xomni_jax.errors import InputError
from xomni_jax.rewards import wire
from xomni_jax.rewards.wire import Item, Score
from xomni_jax.sidecar.engines import Reward
from xomni_jax.sidecar.settings import App

# Starts to score items: batches of them, each with its scores to come.
Batches = list[tuple[Sequence[Item], asyncio.Future[list[Score]]]]
Starter = Callable[[Sequence[Item]], Batches]

_BODY_SECONDS = 60.0


class _RefusedError(Exception):
  """A request that is answered with an HTTP status and one line."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


def make_app(
  app: App, reward: Reward, start: Starter, token: str
) -> fastapi.FastAPI:
  """The application of one reward.

  Args:
    app: its settings.
    reward: what it serves.
    start: asks it.
    token: that a client has to send as bearer; "": none.
  """
  http = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
  ongoing = asyncio.Semaphore(app.max_ongoing)
  check: asyncio.Future | None = None

  @http.post("/v1/score")
  async def score_items(request: fastapi.Request):
    came = time.perf_counter()
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
      waits = _client_waits(request)
      async with ongoing:
        body = await _body(request, app.max_bytes)
        entries = await run_in_threadpool(_entries, body, app)
        spent = time.perf_counter() - came
        # A tenth is for the way to and from the client.
        seconds = min(app.timeout_s, 0.9 * waits - spent)
        scores = await _scores(entries, start, seconds, reward.model_rev)
    except _RefusedError as e:
      return _json({"error": str(e)}, e.status)
    latency_ms = 1000 * (time.perf_counter() - came)
    return _response(wire.scores_to_json(scores, latency_ms))

  @http.get("/info")
  async def info(request: fastapi.Request):
    if not _has_token(request, token):
      return _json({"error": _NO_TOKEN}, 401)
    return _json(describe(app, reward))

  @http.get("/health")
  async def health(request: fastapi.Request):
    nonlocal check
    # It needs no token: whoever asks meanwhile waits for the same check, so
    # that strangers can't take the threads that requests are read in.
    if check is None or check.done():
      check = asyncio.ensure_future(run_in_threadpool(reward.check))
    answer = {"ok": True, "app": app.name}
    try:
      await asyncio.wait_for(asyncio.shield(check), app.timeout_s)
    except Exception as e:  # whatever keeps the reward from working
      answer["ok"] = False
      if _has_token(request, token):  # it may name other servers
        answer["error"] = " ".join(str(e).split())[:300] or type(e).__name__
    return _json(answer, 200 if answer["ok"] else 503)

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
    "timeout_s": app.timeout_s,
    "limits": {**app.limits._asdict(), "aspect": app.max_aspect},
  }


def in_threads(reward: Reward, app: App) -> Starter:
  """Scores the batches of all requests, `app.max_batches` at once.

  What is still waiting when its request is given up is not scored.
  """
  pool = concurrent.futures.ThreadPoolExecutor(app.max_batches)

  def start(items):
    loop, size = asyncio.get_running_loop(), app.max_batch
    parts = [items[i : i + size] for i in range(0, len(items), size)]
    return [(p, loop.run_in_executor(pool, reward.score, p)) for p in parts]

  return start


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


def _client_waits(request):
  """The seconds that the client waits for its answer.

  Raises:
    _RefusedError: it says something else.
  """
  said = request.headers.get(wire.WAITS_HEADER, "inf")
  try:
    if (waits := float(said)) > 0:
      return waits
  except ValueError:
    pass
  raise _RefusedError(
    400, f"{wire.WAITS_HEADER} is {said[:40]!r}, expected seconds above 0"
  )


async def _scores(entries, start, seconds, rev):
  """One Score for each entry, in order; what is late has failed."""
  batches = start([entry for entry in entries if isinstance(entry, Item)])
  futures = [future for _, future in batches]
  try:
    if futures:
      await asyncio.wait(futures, timeout=max(0.0, seconds))
    late = f"no score within {seconds:.3g} s"
    by_id = {
      score.id: score
      for items, future in batches
      for score in _of_batch(items, future, late, rev)
    }
  finally:
    for future in futures:
      future.cancel()
  missing = "engine gave no score"
  return [
    entry._replace(model_rev=rev)
    if isinstance(entry, Score)
    else by_id.get(entry.id) or wire.failed(entry.id, "engine", missing, rev)
    for entry in entries
  ]


def _of_batch(items, future, late, rev):
  """The scores of a batch, or a failure of each of its items."""
  if not future.done():
    return [wire.failed(item.id, "timeout", late, rev) for item in items]
  try:
    return future.result()
  except (Exception, asyncio.CancelledError) as e:  # no other batch's trouble
    message = f"{type(e).__name__}: {e}"
    return [wire.failed(item.id, "engine", message, rev) for item in items]


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
