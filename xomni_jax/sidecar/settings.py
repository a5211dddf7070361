"""Settings of one server of a reward, from a config file's applications."""

import ast
import dataclasses
import importlib.util
import ipaddress
import math
import pathlib
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from xomni_jax.errors import InputError
from xomni_jax.rewards.wire import Limits, secret


@dataclasses.dataclass(frozen=True)
class App:
  """One application: a reward, and how it is served.

  Attributes:
    name: of the application.
    reward: "ocr", "hps", "unified_reward" or "qwen_alignment".
    settings: keyword arguments of that function of `engines`.
    host: address to listen on; only loopback goes without a token.
    port: 0 takes a free one (without Ray only).
    token_env: the environment variable that holds the bearer token.
    replicas: processes, each with a model of its own (with Ray only).
    num_gpus: of each replica; 0.25 puts four on one GPU.
    num_cpus: of each replica.
    max_batch: images that the model sees at once.
    max_batches: batches at once in a replica, each in a thread; more than one
      where the model is elsewhere, as a judge's.
    batch_wait_s: how long Ray waits for more images to fill a batch.
    max_ongoing: requests in a replica at once; more wait or get a 503.
    timeout_s: after this, or before the client stops waiting, the images of a
      request whose batch is not done are failures ("timeout"). The server is
      not healthy while a batch takes longer. A client's try should be longer.
    max_items: of a request.
    max_bytes: of a request.
    max_pixels: of an image.
    max_aspect: long side over short side of an image. Engines bring the short
      side to a fixed length, so that a line of pixels would fill the memory.
    ray_address: "local" starts Ray on this machine; "auto" or an address joins
      a cluster, whose proxy serves the application at the route /NAME.
  """

  name: str
  reward: str
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  host: str = "127.0.0.1"
  port: int = 8100
  token_env: str = "XOMNI_SIDECAR_TOKEN"
  replicas: int = 1
  num_gpus: float = 0.0
  num_cpus: float = 1.0
  max_batch: int = 8
  max_batches: int = 1
  batch_wait_s: float = 0.02
  max_ongoing: int = 32
  timeout_s: float = 50.0  # less than a client's try, by default 60 s
  max_items: int = 64
  max_bytes: int = 64 * 2**20
  max_pixels: int = 2048 * 2048
  max_aspect: float = 16.0
  ray_address: str = "local"

  def __post_init__(self):
    problems = []
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      good = {
        str: isinstance(value, str),
        int: type(value) is int,
        float: type(value) in (int, float) and math.isfinite(value),
      }.get(field.type, isinstance(value, Mapping))
      least, most = _LEAST.get(field.name), _MOST.get(field.name)
      beyond = good and (
        (least is not None and value < least)
        or (most is not None and value > most)
      )
      if not good or beyond:
        kind = _KINDS.get(field.type, "mapping")
        bound = "" if least is None else f" of at least {least}"
        bound += "" if most is None else f" and at most {most}"
        problems.append(f"{field.name} is {value!r}, expected a {kind}{bound}")
    if problems:
      raise InputError(f"application {self.name!r}: {'; '.join(problems)}")

  @property
  def limits(self) -> Limits:
    """Of a request."""
    return Limits(self.max_items, self.max_bytes, self.max_pixels)

  def token(self) -> str:
    """The bearer token; "": none is asked for.

    Raises:
      InputError: none is set, and the host is not loopback; or it is no
        token.
    """
    token = secret(self.token_env)
    if not token and not _is_loopback(self.host):
      raise InputError(
        f"application {self.name!r} would serve {self.host} without a token; "
        f"set {self.token_env}, or use host 127.0.0.1"
      )
    return token


_KINDS = {str: "text", int: "whole number", float: "finite number"}
_LEAST = {
  "port": 0,
  "replicas": 1,
  "num_gpus": 0,
  "num_cpus": 0,
  "max_batch": 1,
  "max_batches": 1,
  "batch_wait_s": 0,
  "max_ongoing": 1,
  "timeout_s": 0.001,
  "max_items": 1,
  "max_bytes": 1,
  "max_pixels": 1,
  "max_aspect": 1,
}
_MOST = {"port": 65535}


def read_app(spec: str, name: str, changes: Sequence[str] = ()) -> App:
  """An application of the config "FILE[:SIZE]".

  Args:
    changes: "key=value" strings, such as "port=8200" or "settings.threads=2";
      values are read as Python where they can be, else as text.
  Raises:
    InputError: no such file, size or application, or a setting is wrong.
  """
  path, _, size = spec.partition(":")
  config = _read_config(path, size)
  apps = config.pop("applications", {})
  if name not in apps:
    raise InputError(
      f"config {spec} has no application {name!r}, expected one of "
      f"{', '.join(apps) or 'none'}"
    )
  section = {**config, **apps[name], "name": name}
  known = {field.name for field in dataclasses.fields(App)}
  for change in changes:
    _change(section, change, known)
  unknown = sorted(set(section) - known)
  if unknown or "reward" not in section:
    raise InputError(
      f"application {name!r} in {spec}: "
      + (f"unknown settings {', '.join(unknown)}" if unknown else "no reward")
    )
  return App(**section)


def listen(app: App) -> socket.socket:
  """A socket that is bound to the application's host and port.

  Raises:
    InputError: another program has the port, or the host is not here.
  """
  family = socket.AF_INET6 if ":" in app.host else socket.AF_INET
  listener = socket.socket(family)
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind((app.host, app.port))
  except OSError as e:
    listener.close()
    raise InputError(
      f"application {app.name!r} can't listen on {app.host} port {app.port} "
      f"({e.strerror}); choose another with --set port=..."
    ) from None
  return listener


def _change(section, change, known):
  key, equals, text = change.partition("=")
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  head, dot, inner = key.partition(".")
  good = head == "settings" and inner if dot else key in known - {"settings"}
  if not equals or not good:
    raise InputError(
      f"--set {change!r} names no setting, expected KEY=VALUE with KEY one of "
      f"{', '.join(sorted(known))} or settings.NAME"
    )
  if inner:
    section["settings"] = {**section.get("settings", {}), inner: value}
  else:
    section[key] = value


def _read_config(name, size):
  """What `get_config(size)` of a Python file returns, as a dict."""
  path = pathlib.Path(name)
  if not path.is_file() or path.suffix != ".py":
    raise InputError(f"config {name}: no such file, expected FILE.py[:SIZE]")
  found = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(found)
  try:
    found.loader.exec_module(module)
    return dict(module.get_config(*filter(None, [size])).to_dict())
  except Exception as e:  # whatever a file of a user's may raise
    raise InputError(f"config {name}: {type(e).__name__}: {e}") from e


def _is_loopback(host):
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"
