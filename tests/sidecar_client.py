"""Starts sidecars and sends them raw requests, for tests of several files."""

import contextlib
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time

import numpy as np
import requests

from xomni_jax.rewards import wire

ROOT = pathlib.Path(__file__).parents[1]
TOKEN = "token-of-the-tests"


def grey(id, level, prompt="", size=(4, 6), **more):
  """An item whose image has one brightness."""
  image = np.full((*size, 3), level, np.uint8)
  return wire.Item(id, image, prompt, **more)


@contextlib.contextmanager
def served(command, seconds=60, python=sys.executable, **env):
  """The base URL of `python -m command...`, once it says that it serves."""
  process = subprocess.Popen(
    [python, "-m", *command],
    cwd=ROOT,
    env={**os.environ, "XOMNI_SIDECAR_TOKEN": TOKEN, **env},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  try:
    yield _url(process, seconds)
  finally:
    process.terminate()
    try:
      process.wait(30)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()


def _url(process, seconds):
  lines = queue.Queue()

  def read():  # to the end, or a full pipe would stop the process
    with contextlib.suppress(ValueError):  # closed
      for line in process.stdout:
        lines.put(line)
    lines.put(None)

  threading.Thread(target=read, daemon=True).start()
  said, end = [], time.monotonic() + seconds
  with contextlib.suppress(queue.Empty):
    while line := lines.get(timeout=max(0, end - time.monotonic())):
      if line.startswith("serving "):
        return line.split()[-1]
      said.append(line)
  raise AssertionError(f"sidecar does not serve:\n{''.join(said)}")


def brightness(**settings):
  """The base URL of tests/sidecar_program.py with these settings."""
  said = json.dumps({"port": 0, **settings})
  return served(["tests.sidecar_program", said])


def post(url, body, token=TOKEN, **more):
  """The reply to a score request; no retries."""
  headers = {"Content-Type": "application/json"}
  if token is not None:
    headers["Authorization"] = f"Bearer {token}"
  return requests.post(
    f"{url}/v1/score", data=body, headers=headers, timeout=30, **more
  )


def scores(url, items):
  """Scores of items, through the socket."""
  reply = post(url, wire.to_json(items))
  assert reply.status_code == 200, reply.text
  return wire.scores_from_json(reply.content, [item.id for item in items])
