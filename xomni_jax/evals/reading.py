"""Engines that read images in processes of their own, beside the drawing.

Nothing here imports jax: the processes are light, and start quickly.
"""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from xomni_jax.errors import InputError, RunError
from xomni_jax.rewards import ocr
from xomni_jax.rewards.wire import Item

# The one that models are rewarded by, and the one that is independent of it.
REWARD, JUDGE = "rapidocr", "tesseract"
ENGINES = (REWARD, JUDGE)
_CHUNK = 8  # images that a process reads at once

# Of an image, by engine: {"text", "score"}, or {"error"} where it failed.
Readings = dict[str, dict[str, Any]]


class Readers:
  """Processes that read.

  Attributes:
    engines: {name: revision}, without those that are not installed.
    seconds: {name: that it has read, over all processes}.
  """

  def __init__(self, workers: int):
    """Starts them.

    Raises:
      InputError: the reward's engine is not installed.
      RunError: a process has died.
    """
    self._pool = concurrent.futures.ProcessPoolExecutor(
      workers, multiprocessing.get_context("spawn"), _end_with_parent
    )
    self.engines: Mapping[str, str] = {}
    try:
      with _alive():
        self.engines = self._pool.submit(_revisions).result()
    except BaseException:
      self.close()
      raise
    self.seconds = dict.fromkeys(self.engines, 0.0)

  def ask(self, items: Sequence[Item]) -> list[concurrent.futures.Future]:
    """Starts reading; `hear` has the result, and raises the same errors."""
    chunks = [items[i : i + _CHUNK] for i in range(0, len(items), _CHUNK)]
    with _alive():
      return [self._pool.submit(_read, (*self.engines,), c) for c in chunks]

  def hear(self, asked: list[concurrent.futures.Future]) -> list[Readings]:
    """The readings of all items, in their order.

    Raises:
      RunError: a process has died.
    """
    found = []
    for future in asked:
      with _alive():
        readings, seconds = future.result()
      found += readings
      for name, spent in seconds.items():
        self.seconds[name] += spent
    return found

  def close(self) -> None:
    """Ends the processes; what they still have to read is left."""
    self._pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _alive():
  """RunError where a process has died; then nothing more can be asked."""
  try:
    yield
  except BrokenProcessPool:
    raise RunError(
      "a process that reads images was killed; make room in memory, or ask "
      "for fewer --readers, and start again: it goes on where it was"
    ) from None


def _end_with_parent():
  """A process whose parent was killed would wait for work for ever."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the parent to act on
  parent = multiprocessing.parent_process()

  def watch():
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


@functools.cache
def _engine(name):
  return ocr.open_engine(name)


@functools.cache
def _scorer(name):
  # Letters of the drawn world stand so far apart that spaces are read.
  return ocr.make_scorer(_engine(name), spaces=False)


def _revisions():
  found = {REWARD: _engine(REWARD).rev}
  with contextlib.suppress(InputError):  # its column says that it is absent
    found[JUDGE] = _engine(JUDGE).rev
  return found


def _read(names, items):
  """([Readings of each item], {engine: seconds})."""
  found: list[Readings] = [{} for _ in items]
  seconds = {}
  for name in names:
    start = time.perf_counter()
    for readings, score in zip(found, _scorer(name)(items), strict=True):
      readings[name] = (
        {"text": score.raw["text"], "score": round(score.score, 6)}
        if score.ok and score.score is not None
        else {"error": str(score.raw)[:300]}
      )
    seconds[name] = time.perf_counter() - start
  return found, seconds
