"""The check behind `GET /health`, in one event loop: no clock decides."""

import asyncio
import itertools
import threading

import httpx2
import pytest

pytest.importorskip("fastapi", reason="needs fastapi")

from xomni_jax.sidecar import engines
from xomni_jax.sidecar.app import in_threads, make_app
from xomni_jax.sidecar.settings import App

TOKEN = "secret"


def test_all_who_ask_at_once_share_one_check_and_strangers_learn_nothing():
  """Whoever comes after it gets a check of its own."""
  numbers, told = itertools.count(1), threading.Event()

  def gone():
    number = next(numbers)
    told.wait()
    raise RuntimeError(f"model is\ngone {number}")

  reward = engines.Reward(lambda items: [], "rev", {}, check=gone)
  app = App("ocr", "ocr")
  http = make_app(app, reward, in_threads(reward, app), TOKEN)

  async def ask(headers):
    transport = httpx2.ASGITransport(app=http)
    async with httpx2.AsyncClient(transport=transport) as client:
      return await client.get("http://sidecar/health", headers=headers)

  async def asked():
    own, none = {"Authorization": f"Bearer {TOKEN}"}, {}
    asking = [asyncio.create_task(ask(h)) for h in [own, none] * 25]
    for _ in range(1000):  # until all of them wait for it
      await asyncio.sleep(0)
    told.set()
    return await asyncio.gather(*asking), await ask(own)

  replies, later = asyncio.run(asked())
  assert {reply.status_code for reply in replies} == {503}
  assert {r.json()["error"] for r in replies[::2]} == {"model is gone 1"}
  assert not any("error" in reply.json() for reply in replies[1::2])
  assert later.json()["error"] == "model is gone 2"
