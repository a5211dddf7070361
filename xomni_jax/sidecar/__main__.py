"""Serves one reward:

python -m xomni_jax.sidecar --config configs/sidecar.py --app ocr

Sets up nothing; launch/sidecar.sh makes an environment for each reward.
"""

import sys

from xomni_jax.errors import ArgumentParser, InputError
from xomni_jax.sidecar import engines, settings


def main(argv: list[str] | None = None) -> int:
  """Returns the exit status: 0, or 2 for bad input."""
  try:
    args = _parser().parse_args(argv)
    app = settings.read_app(args.config, args.app, args.set)
    token = app.token()
    if args.no_ray:
      serve_alone(app, token)
    else:
      from xomni_jax.sidecar import ray_app

      ray_app.run(app, token)
  except InputError as e:
    print(f"sidecar: error: {e}", file=sys.stderr)
    return 2
  return 0


def serve_alone(app: settings.App, token: str, reward=None) -> None:
  """Serves in this process by uvicorn; says on stdout where.

  Args:
    reward: None opens the one of the settings.
  Raises:
    InputError: the reward can't be opened, or the port is taken.
  """
  import uvicorn

  from xomni_jax.sidecar.app import in_threads, make_app

  reward = reward or engines.open_reward(app.reward, app.settings)
  reward = engines.watched(reward, app.timeout_s)
  http = make_app(app, reward, in_threads(reward, app), token)
  listener = settings.listen(app)
  listener.listen()  # who is told the port may ask at once
  port = listener.getsockname()[1]
  print(f"serving {app.name} on http://{app.host}:{port}", flush=True)
  config = uvicorn.Config(http, log_level="warning", access_log=False)
  uvicorn.Server(config).run(sockets=[listener])


def _parser():
  parser = ArgumentParser(
    prog="python -m xomni_jax.sidecar", description="Serves one reward."
  )
  parser.add_argument(
    "--config", default="configs/sidecar.py", metavar="FILE[:SIZE]"
  )
  parser.add_argument("--app", required=True, help="application of the config")
  parser.add_argument(
    "--set",
    action="append",
    default=[],
    metavar="KEY=VALUE",
    help="changes a setting, such as port=8200 or settings.threads=2",
  )
  parser.add_argument(
    "--no-ray", action="store_true", help="one process, without Ray Serve"
  )
  return parser


if __name__ == "__main__":
  sys.exit(main())
