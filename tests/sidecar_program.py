"""A sidecar that does as its items say, for tests: `--no-ray` without a model.

  python -m tests.sidecar_program '{"port": 0, "max_items": 4}'

and with "ray": true under Ray Serve.

The score is the image's mean brightness; a prompt may ask for trouble:
"poison" makes the whole batch raise, "nan" scores NaN, "lost" gives no score
for the batch, "die" ends the process, "sleep 2" takes 2 s. Some spoil the reply
as a whole, without Ray only: "says 500", "says half", "says nan", "says html".
"""

import json
import os
import sys
import time

from xomni_jax.rewards import wire
from xomni_jax.rewards.wire import Score
from xomni_jax.sidecar import __main__ as program
from xomni_jax.sidecar import engines, ray_app
from xomni_jax.sidecar.settings import App

REV = "brightness-1"


def brightness(items):
  """Raises, sleeps or lies if one of the prompts says so."""
  prompts = [item.prompt for item in items]
  if "poison" in prompts:
    raise RuntimeError("poisoned\nimage")
  if "die" in prompts:
    os._exit(1)
  if "lost" in prompts:
    return []
  for prompt in prompts:
    if prompt.startswith("sleep "):
      time.sleep(float(prompt.removeprefix("sleep ")))
  return [
    Score(
      item.id,
      True,
      float("nan") if item.prompt == "nan" else float(item.image.mean()) / 255,
      {"batch": len(items), "prompt": item.prompt},
      None,
      REV,
    )
    for item in items
  ]


def reward(app):
  """The reward of an application of this program."""
  return engines.Reward(engines.isolated(brightness, REV), REV, {"scale": 255})


def spoiled(to_json):
  """`wire.scores_to_json`, but for replies that are asked to be bad."""

  def reply(scores, latency_ms):
    body = to_json(scores, latency_ms)
    asked = {s.raw["prompt"] for s in scores if s.ok}
    entries = json.loads(body)["items"]
    if "says 500" in asked:
      raise RuntimeError("broken")
    if "says html" in asked:
      return b"<html>"
    if "says half" in asked:
      entries = entries[: len(entries) // 2]
    for entry in entries:
      if entry["ok"] and entry["raw"]["prompt"] == "says nan":
        entry["score"] = float("nan")
    return json.dumps({"items": entries, "latency_ms": latency_ms}).encode()

  return reply


def main():
  said = json.loads(sys.argv[1])
  wire.scores_to_json = spoiled(wire.scores_to_json)
  under_ray = said.pop("ray", False)
  app = App(**{"name": "brightness", "reward": "brightness", **said})
  if under_ray:
    ray_app.run(app, app.token(), reward)
  else:
    program.serve_alone(app, app.token(), reward(app))


if __name__ == "__main__":
  main()
