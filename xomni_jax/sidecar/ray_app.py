"""A reward as a Ray Serve application: replicas, GPU share, dynamic batches."""

import asyncio
import functools
import signal

from xomni_jax.errors import InputError
from xomni_jax.sidecar import engines
from xomni_jax.sidecar.settings import App


def deployment(app: App, token: str):
  """The Ray Serve application of one reward."""
  from ray import serve

  ingress = serve.ingress(functools.partial(_on_replica, app, token))()
  return serve.deployment(
    name=app.name,
    num_replicas=app.replicas,
    ray_actor_options={"num_gpus": app.num_gpus, "num_cpus": app.num_cpus},
    max_ongoing_requests=app.max_ongoing,
  )(ingress).bind()


def _on_replica(app, token):
  """The HTTP application, built in a replica's process; loads the model."""
  from ray import serve

  from xomni_jax.sidecar.app import make_app

  reward = engines.open_reward(app.reward, app.settings)

  # Images of all requests that a replica has at hand share a batch.
  @serve.batch(
    max_batch_size=app.max_batch, batch_wait_timeout_s=app.batch_wait_s
  )
  async def score_one(items):
    return await asyncio.to_thread(reward.score, items)

  async def score(items):
    return list(await asyncio.gather(*map(score_one, items)))

  return make_app(app, reward, score, token)


def run(app: App, token: str) -> None:
  """Serves until the process is told to stop; says on stdout where.

  Raises:
    InputError: Ray is missing, or the application does not start.
  """
  try:
    import ray
    from ray import serve
  except ImportError as e:
    raise InputError(
      f"Ray Serve can't be loaded ({e}); pip install 'ray[serve]', or serve "
      "with --no-ray"
    ) from None
  stop = _stop_signals()
  ray.init(
    address=app.ray_address,
    include_dashboard=False,
    logging_level="warning",
  )
  try:
    serve.start(http_options={"host": app.host, "port": app.port})
    try:
      serve.run(deployment(app, token), name=app.name, route_prefix="/")
    except RuntimeError as e:
      reason = " ".join(str(e).split())[-400:]
      raise InputError(
        f"application {app.name!r} does not start: {reason}"
      ) from None
    print(f"serving {app.name} on http://{app.host}:{app.port}", flush=True)
    stop()
  finally:
    serve.shutdown()
    ray.shutdown()


def _stop_signals():
  """A function that waits for SIGTERM or SIGINT."""
  import threading

  told = threading.Event()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: told.set())

  def wait():
    while not told.wait(0.5):
      pass

  return wait
