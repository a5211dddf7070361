"""Processes that read images for `xomni eval`."""

import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import GOLDEN
from xomni_jax.errors import RunError
from xomni_jax.evals import asked, reading
from xomni_jax.rewards.wire import Item

pytest.importorskip("rapidocr")


def test_readers_read_as_the_engine_does():
  some = asked.open_asked("world:signs:test", 10)
  pictures = asked.true_images("world:signs:test", range(10))
  items = [
    Item(str(i), np.asarray(picture), one.text, one.targets)
    for i, (one, picture) in enumerate(zip(some, pictures, strict=True))
  ]
  readers = reading.Readers(1)
  try:
    found = readers.hear(readers.ask(items))
  finally:
    readers.close()
  scores = reading._scorer("rapidocr")(items)
  for one, score in zip(found, scores, strict=True):
    assert one["rapidocr"]["text"] == score.raw["text"]
    assert one["rapidocr"]["score"] == pytest.approx(score.score, abs=1e-6)
  assert readers.seconds["rapidocr"] > 0


def test_readers_whose_process_was_killed_say_so():
  readers = reading.Readers(1)
  try:
    (pid,) = readers._pool._processes
    os.kill(pid, signal.SIGKILL)
    blank = Item("0", np.zeros((32, 32, 3), np.uint8), "p", ("A",))
    for _ in range(2):  # once the pool knows, it takes no more questions
      with pytest.raises(RunError, match=r"was killed.*--readers"):
        readers.hear(readers.ask([blank]))
  finally:
    readers.close()


def test_processes_that_read_load_no_jax():
  says = "import sys, xomni_jax.evals.reading; print('jax' in sys.modules)"
  out = subprocess.check_output(
    [sys.executable, "-c", says], cwd=pathlib.Path(__file__).parents[2]
  )
  assert out.decode().strip() == "False"


def test_judge_that_is_not_installed_is_left_out(monkeypatch):
  monkeypatch.setenv("PATH", os.fspath(GOLDEN))
  reading._engine.cache_clear()
  assert [*reading._revisions()] == ["rapidocr"]
  reading._engine.cache_clear()
