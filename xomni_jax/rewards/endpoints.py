"""Which of a reward's endpoints is asked next, and which are left alone."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Taken(NamedTuple):
  """An endpoint that one request has taken."""

  number: int
  url: str


class Endpoints:
  """The endpoints of a reward, each with a circuit breaker; for threads.

  An endpoint is closed (asked), open (left alone, after so many failures in a
  row), or half-open: once its time is over one request tries it, which closes
  it or opens it again.
  """

  def __init__(
    self,
    urls: Sequence[str],
    threshold: int = 5,
    cooldown: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Args: threshold: failures in a row; cooldown: seconds left alone."""
    self._urls, self._clock = tuple(urls), clock
    self._threshold, self._cooldown = threshold, cooldown
    self._lock = threading.Lock()
    self._running = [0] * len(urls)
    self._failures = [0] * len(urls)
    self._open_until: list[float | None] = [None] * len(urls)
    # The request that tries a half-open endpoint; it is known by identity.
    self._trials: list[Taken | None] = [None] * len(urls)
    self._turn = 0

  def __len__(self) -> int:
    return len(self._urls)

  def take(self, avoid: int | None = None) -> Taken | float:
    """The least loaded endpoint that may be asked, for `give_back`.

    Args:
      avoid: an endpoint that is taken only if there is no other.
    Returns:
      Instead, the seconds until one may be tried, if all are left alone.
    """
    with self._lock:
      now = self._clock()
      free = [i for i in range(len(self._urls)) if self._may_take(i, now)]
      if not free:
        # Those that are being tried have no time: look again soon.
        waits = [
          max(until - now, 0.01)
          for until, trial in zip(self._open_until, self._trials, strict=True)
          if until is not None and trial is None
        ]
        return min(waits, default=0.05)
      count = len(self._urls)
      best = min(
        free,
        key=lambda i: (i == avoid, self._running[i], (i - self._turn) % count),
      )
      self._turn = (best + 1) % count
      self._running[best] += 1
      taken = Taken(best, self._urls[best])
      if self._open_until[best] is not None:
        self._trials[best] = taken
      return taken

  def give_back(self, taken: Taken, ok: bool | None) -> None:
    """Ends a request; ok None: it says nothing about the endpoint."""
    number = taken.number
    with self._lock:
      self._running[number] -= 1
      trial = self._trials[number] is taken  # an older request ends no trial
      if trial or ok:
        self._trials[number] = None
      if ok:
        self._failures[number], self._open_until[number] = 0, None
      elif ok is False:
        self._failures[number] += 1
        if trial or self._failures[number] >= self._threshold:
          self._open_until[number] = self._clock() + self._cooldown

  def _may_take(self, i, now):
    until = self._open_until[i]
    return until is None or (now >= until and self._trials[i] is None)
