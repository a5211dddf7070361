"""A reward as a Ray Serve application: replicas, GPU share, dynamic batches."""

import asyncio
import concurrent.futures
import dataclasses
import signal
import threading
from collections.abc import Callable

from xomni_jax.errors import InputError
from xomni_jax.sidecar import engines, settings
from xomni_jax.sidecar.engines import Reward
from xomni_jax.sidecar.settings import App


def open_reward(app: App) -> Reward:
  """The reward of the settings."""
  return engines.open_reward(app.reward, app.settings)


def deployment(app: App, token: str, open_it: Callable[[App], Reward]):
  """The Ray Serve application of one reward, opened on each replica."""
  from ray import serve

  def build():  # Ray takes a plain function for a builder
    return _on_replica(app, token, open_it(app))

  ingress = serve.ingress(build)()
  # Beyond a replica's requests, Ray says 503 itself, from a queue as long.
  return serve.deployment(
    name=app.name,
    num_replicas=app.replicas,
    ray_actor_options={"num_gpus": app.num_gpus, "num_cpus": app.num_cpus},
    max_ongoing_requests=app.max_ongoing,
    max_queued_requests=app.max_ongoing * app.replicas,
  )(ingress).bind()


def _on_replica(app, token, reward):
  """The HTTP application in a replica's process."""
  from ray import serve

  from xomni_jax.sidecar.app import make_app

  reward = engines.watched(reward, app.timeout_s)
  pool = concurrent.futures.ThreadPoolExecutor(app.max_batches)

  # Images of all requests that a replica has at hand share a batch.
  @serve.batch(
    max_batch_size=app.max_batch,
    batch_wait_timeout_s=app.batch_wait_s,
    max_concurrent_batches=app.max_batches,
  )
  async def score_one(items):
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(pool, reward.score, items)

  async def alone(item):
    return [await score_one(item)]

  def start(items):
    return [([item], asyncio.ensure_future(alone(item))) for item in items]

  return make_app(app, reward, start, token)


def run(
  app: App, token: str, open_it: Callable[[App], Reward] = open_reward
) -> None:
  """Serves until the process is told to stop; says on stdout where.

  A cluster that is joined has one proxy for all applications, at the host and
  port of the first: each has a route of its own there, its name.

  Args:
    open_it: called on each replica.
  Raises:
    InputError: Ray is missing, there is no such cluster, the port is taken, or
      the application does not start.
  """
  try:
    import ray
    from ray import serve
  except ImportError as e:
    raise InputError(
      f"Ray Serve can't be loaded ({e}); pip install 'ray[serve]', or serve "
      "with --no-ray"
    ) from None
  alone, ours = app.ray_address == "local", False
  if alone:
    # Ray's proxy shares its port with any other that does so too, and then each
    # has some of the requests.
    settings.listen(app).close()
  _init(ray, app)
  quiet = {"log_level": "WARNING", "enable_access_log": False}
  try:
    if alone:
      _check_room(app, ray.cluster_resources())
    serve.start(
      http_options={"host": app.host, "port": app.port}, logging_config=quiet
    )
    url = f"http://{app.host}:{app.port}" if alone else _route(app)
    ours = True
    try:
      serve.run(
        deployment(app, token, open_it),
        name=app.name,
        route_prefix="/" if alone else f"/{app.name}",
        logging_config=quiet,
      )
    except (RuntimeError, ValueError, serve.exceptions.RayServeException) as e:
      raise InputError(
        f"application {app.name!r} does not start: "
        f"{_why(serve, app) or _last_line(e)}"
      ) from None
    print(f"serving {app.name} on {url}", flush=True)
    _wait_until_told()
  finally:
    if ours and not alone:  # others' applications stay
      serve.delete(app.name)
    ray.shutdown()


def _init(ray, app):
  """Starts Ray, or joins a cluster."""
  try:
    # Ray's own ports are open to the network, and ask for Ray's own token.
    ray.init(
      address=app.ray_address, include_dashboard=False, logging_level="warning"
    )
  except (ConnectionError, RuntimeError, ValueError) as e:
    raise InputError(
      f"application {app.name!r} can't start or join Ray at ray_address="
      f"{app.ray_address} ({_last_line(e)[:200]}); start a cluster (ray start "
      "--head), or choose --set ray_address=local"
    ) from None


def _route(app):
  """Where a cluster that was joined serves the application.

  Raises:
    InputError: its proxy listens beyond loopback, and there is no token.
  """
  from ray.serve.context import _get_global_client  # nothing public says it

  client = _get_global_client()
  http = client.http_config  # whoever came first has chosen it
  dataclasses.replace(app, host=http.host, port=http.port).token()
  return f"{client.root_url}/{app.name}"


def _check_room(app, room):
  """Raises InputError where Ray would wait for ever for a larger machine."""
  for kind, each in (("CPU", app.num_cpus), ("GPU", app.num_gpus)):
    if each * app.replicas > room.get(kind, 0):
      raise InputError(
        f"application {app.name!r} asks for {app.replicas} replicas of "
        f"{each:g} {kind}, and this machine has {room.get(kind, 0):g}; set "
        f"replicas or num_{kind.lower()}s"
      )


def _wait_until_told():
  """Waits for SIGTERM or SIGINT; Ray has handlers of its own, that end hard."""
  told = threading.Event()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: told.set())
  while not told.wait(0.5):
    pass


def _why(serve, app):
  """The last line of what broke a deployment: the exception of a replica."""
  try:
    status = serve.status().applications[app.name]
    message = status.deployments[app.name].message
  except KeyError:
    return ""
  lines = [line.strip() for line in message.splitlines() if line.strip()]
  return next((line for line in reversed(lines) if "Error" in line), "")


def _last_line(error):
  return str(error).strip().split("\n")[-1]
