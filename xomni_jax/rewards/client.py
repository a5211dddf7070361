"""A scorer that asks servers over HTTP, and is on time whatever they do."""

import json
import queue
import random
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

from xomni_jax.rewards import wire
from xomni_jax.rewards.endpoints import Endpoints
from xomni_jax.rewards.wire import Item, Score

PATH = "/v1/score"
_MAX_REPLY = 64 * 2**20  # bytes
_FIRST_WAIT = 0.2  # seconds before the first retry; doubles each time
_CONNECT_SECONDS = 5.0  # a machine that is gone costs no whole try
_SERVERS = ("timeout", "http", "engine")  # failures that are the server's
_CHUNK = 2**18  # bytes that are sent between two looks at the clock


class Settings(NamedTuple):
  """How a reward is asked; the fields of RewardConfig of the same names."""

  deadline: float = 120.0
  try_seconds: float = 0.0
  retries: int = 3
  concurrency: int = 8
  batch_items: int = 16
  batch_bytes: int = 32 * 2**20


class _Trouble(Exception):
  """A request that brought no scores.

  Attributes:
    kind: of the failed Scores.
    again: the same request may succeed later.
    split: some of its items may be the reason.
    healthy: what it says about the endpoint: True, False or None.
  """

  def __init__(self, kind, message, again=False, split=False, healthy=False):
    super().__init__(message)
    self.kind, self.again, self.split = kind, again, split
    self.healthy = healthy


def open_client(
  urls: Sequence[str],
  settings: Settings,
  token: str = "",
  clock: Callable[[], float] = time.monotonic,
  endpoints: Endpoints | None = None,
  stop: threading.Event | None = None,
) -> Callable[[Sequence[Item]], list[Score]]:
  """A scorer that asks one of several equal servers for each batch.

  What it does with a batch that fails: a server that answers 4xx or 5xx may
  choke on one image, so the batch is cut in half until that one is alone.
  Anything else (no connection, no answer in time, an answer that is no reply),
  and a 5xx to a single image, is tried again, on another endpoint if there is
  one, at most `retries` times, after a random and growing wait. A reply in
  which the server failed on all images is tried again only where there is
  another endpoint. While all endpoints are left alone by their circuit
  breakers, it waits for one. At the deadline the call returns with what it has;
  what is missing is a "timeout".

  Args:
    urls: "http://HOST:PORT/ROUTE" of each server; PATH is added.
    token: bearer token; "": none.
    clock: seconds; a test may pass its own.
    endpoints: with other breakers than the default ones.
    stop: once it is set, calls return within a second.
  """
  import httpx2

  # Unpacked replies have no size limit; so none is to come packed.
  headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
  if token:
    headers["Authorization"] = f"Bearer {token}"
  # No proxy from the environment: servers of rewards stand beside the trainer.
  http = httpx2.Client(
    headers=headers,
    trust_env=False,
    limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
  )
  places = endpoints or Endpoints([u.rstrip("/") + PATH for u in urls])
  stop = stop or threading.Event()
  slots = threading.Semaphore(settings.concurrency)  # of all calls together

  def score(items: Sequence[Item]) -> list[Score]:
    call = _Call(http, places, settings, clock, stop, slots, list(items))
    return call.scores()

  return score


class _Call:
  """One call of the scorer: threads fill in scores until the deadline."""

  def __init__(self, http, places, settings, clock, stop, slots, items):
    self._http, self._places, self._slots = http, places, slots
    self._settings, self._clock, self._stop = settings, clock, stop
    self._end = clock() + settings.deadline
    self._items = items
    self._found: dict[int, Score] = {}
    self._change = threading.Condition()
    self._over = threading.Event()
    self._batches: queue.SimpleQueue = queue.SimpleQueue()
    size = settings.batch_items
    starts = range(0, len(items), size)
    for start in starts:
      self._batches.put(range(start, min(start + size, len(items))))
    self._threads = min(settings.concurrency, len(starts))

  def scores(self):
    for _ in range(self._threads):
      # Daemons: a thread that hangs on a dead server holds nothing up.
      threading.Thread(target=self._work, daemon=True).start()
    with self._change:
      while len(self._found) < len(self._items) and self._left() > 0:
        self._change.wait(min(self._left(), 1.0))
      self._over.set()
      found = dict(self._found)  # what comes later does not count
    late = f"no score within {self._settings.deadline} s"
    return [
      found.get(i) or wire.failed(item.id, "timeout", late)
      for i, item in enumerate(self._items)
    ]

  def _left(self):
    return 0.0 if self._stop.is_set() else self._end - self._clock()

  def _done(self):
    return self._over.is_set() or self._left() <= 0

  def _deliver(self, indices, scores):
    with self._change:
      self._found.update(zip(indices, scores, strict=True))
      self._change.notify()

  def _fail(self, indices, kind, message):
    self._deliver(
      indices,
      [wire.failed(self._items[i].id, kind, message) for i in indices],
    )

  def _work(self):
    while not self._done():
      try:
        indices = self._batches.get_nowait()
      except queue.Empty:
        return
      while not self._slots.acquire(timeout=max(0.0, min(self._left(), 0.5))):
        if self._done():
          return
      try:
        self._send_in_parts(indices)
      except Exception as e:  # else its items would wait for the deadline
        rest = [i for i in indices if i not in self._found]
        self._fail(rest, "client", f"{type(e).__name__}: {e}")
      finally:
        self._slots.release()

  def _send_in_parts(self, indices):
    """Encodes a batch and sends it, in parts of at most `batch_bytes`."""
    part, entries, size = [], [], 0
    for i in indices:
      try:
        entry = wire.entry_json(self._items[i])
      except Exception as e:  # no image, no text: this item's own fault
        self._fail([i], "bad_image", f"{type(e).__name__}: {e}")
        continue
      if part and size + len(entry) > self._settings.batch_bytes:
        self._send(part, entries)
        part, entries, size = [], [], 0
      part.append(i)
      entries.append(entry)
      size += len(entry)
    if part:
      self._send(part, entries)

  def _send(self, part, entries, tries=0):
    """Sends a part until it is scored, split or given up."""
    last = None
    while not self._done():
      taken = self._places.take(avoid=last)
      if isinstance(taken, float):
        if taken >= self._left():
          message = "all endpoints failed before and are left alone"
          return self._fail(part, "circuit_open", message)
        self._over.wait(min(taken, 0.5))
        continue
      last = taken.number
      try:
        scores = self._ask(taken, part, entries)
        return self._deliver(part, scores)
      except _Trouble as e:
        trouble = e
      if trouble.split and len(part) > 1:
        # Halves have failed before: they are tried again once at most.
        half, tries = len(part) // 2, max(tries, self._settings.retries - 1)
        self._send(part[:half], entries[:half], tries)
        return self._send(part[half:], entries[half:], tries)
      tries += 1
      if not trouble.again or tries > self._settings.retries:
        return self._fail(part, trouble.kind, str(trouble))
      wait = _FIRST_WAIT * 2 ** (tries - 1) * random.uniform(0.5, 1.5)
      self._over.wait(max(0.0, min(wait, self._left())))
    return None

  def _ask(self, taken, part, entries):
    """The scores of one request; tells the endpoint's breaker how it went."""
    healthy = None
    try:
      status, body = self._post(taken.url, entries)
      scores = self._parse(status, body, part)
      healthy = True
      return scores
    except _Trouble as e:
      healthy = None if e.split and len(part) > 1 else e.healthy
      raise
    finally:
      self._places.give_back(taken, healthy)

  def _post(self, url, entries):
    """(status, body) of a request that takes no longer than it may."""
    import httpx2

    request_id = uuid.uuid4().hex
    seconds = self._settings.try_seconds or self._settings.deadline / 2
    seconds = max(0.001, min(seconds, self._left()))
    end, reply = self._clock() + seconds, bytearray()
    body = wire.request_json(entries, request_id)
    headers = {
      "X-Request-Id": request_id,
      "Content-Length": str(len(body)),
      wire.WAITS_HEADER: f"{seconds:.3f}",
    }

    late = f"{url} did not answer {request_id} in {seconds:.3g} s"

    def check_time():  # the timeouts below are those of a single read or write
      if self._clock() > end or self._done():
        raise _Trouble("timeout", late, again=True)

    def chunks():
      for start in range(0, len(body), _CHUNK):
        check_time()
        yield body[start : start + _CHUNK]

    try:
      with self._http.stream(
        "POST",
        url,
        content=chunks(),
        headers=headers,
        timeout=httpx2.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS)),
      ) as response:
        for chunk in response.iter_raw():
          reply += chunk
          if len(reply) > _MAX_REPLY:
            raise _Trouble("bad_reply", f"{url} answers without end")
          check_time()
        return response.status_code, bytes(reply)
    except httpx2.TimeoutException as e:
      message = f"{late} ({type(e).__name__})"
      raise _Trouble("timeout", message, again=True) from None
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as e:
      message = f"{url}: {type(e).__name__}: {e}"
      raise _Trouble("http", message, again=True) from None

  def _parse(self, status, body, part):
    if status != 200:
      # Some servers repeat what they were sent; errors are shown.
      sent = self._http.headers.get("Authorization", "").encode()
      token = sent.removeprefix(b"Bearer ")
      raise _refusal(status, body.replace(token, b"...") if token else body)
    ids = [self._items[i].id for i in part]
    scores = wire.scores_from_json(body, ids)
    if all(score.error_kind == "bad_reply" for score in scores):
      raise _Trouble("bad_reply", scores[0].raw["error"], again=True)
    if all(score.error_kind in _SERVERS for score in scores):
      # It answers, but its engine hangs or its judge is gone. The same server
      # is not asked again: it may still be at work on them.
      message = f"server said of all images: {json.dumps(scores[0].raw)[:200]}"
      again = len(self._places) > 1
      raise _Trouble(scores[0].error_kind, message, again)
    return scores


def _refusal(status, body):
  said = " ".join(body[:200].decode(errors="replace").split())
  message = f"status {status}: {said}"
  if status == 413:
    return _Trouble("too_large", message, split=True, healthy=True)
  if status in (401, 403, 404, 405):  # it is not about the items
    return _Trouble("http", message, healthy=True)
  if status == 429 or status in (502, 503, 504):  # a server that is not there
    return _Trouble("http", message, again=True)
  server = status >= 500
  return _Trouble("http", message, again=server, split=True, healthy=not server)
