"""Settings of sidecars: the repository's config, changes, and bad values."""

import importlib.util
import inspect
import socket
import sys
import types

import pytest

from xomni_jax.errors import InputError
from xomni_jax.reward_config import RewardConfig, parse_source
from xomni_jax.sidecar import engines, ray_app
from xomni_jax.sidecar.settings import App, read_app

CONFIG = "configs/sidecar.py"
APPS = [
  "ocr",
  "paddleocr",
  "got",
  "tesseract",
  "hps",
  "unified_reward",
  "qwen_alignment",
]


@pytest.mark.parametrize("size", ["", ":7b", ":tiny"])
def test_sidecar_config_has_applications_that_rewards_take(size):
  apps = [read_app(CONFIG + size, name) for name in APPS]
  assert len({app.port for app in apps}) == len(apps)
  for app in apps:
    known = inspect.signature(getattr(engines, app.reward)).parameters
    assert set(app.settings) <= set(known), app.name
    assert app.host == "127.0.0.1"
    if size == ":tiny":
      assert (app.replicas, app.num_gpus) == (1, 0)


def test_sidecar_has_less_time_than_a_try_of_its_client():
  """A tenth of a try is for the way; see app.py."""

  def least(reward):
    return 0.9 * (reward.try_seconds or reward.deadline / 2)

  spec = importlib.util.spec_from_file_location("grpo", "configs/grpo.py")
  config = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(config)
  apps = {app.port: app for app in (read_app(CONFIG, name) for name in APPS)}
  asked = set()
  for section in config.get_config("7b").options.rewards:
    reward = RewardConfig(**section)
    assert reward.deadline >= 2 * reward.try_seconds  # time for another
    for source in parse_source(reward.source):
      for url in source.where:
        app = apps[int(url.rpartition(":")[2])]
        assert app.timeout_s <= least(reward), app.name
        asked.add(app.name)
  assert {"unified_reward", "qwen_alignment", "got", "hps"} <= asked
  default = RewardConfig("ocr", "http://localhost:8101")
  assert App("x", "ocr").timeout_s <= least(default)
  assert read_app(CONFIG, "ocr").timeout_s <= least(default)


def test_sidecar_settings_change_by_key_and_value():
  changes = [
    "port=8200",
    "settings.threads=2",
    "settings.model=a=b",
    "host=::1",
  ]
  app = read_app(CONFIG, "ocr", changes)
  assert (app.port, app.host) == (8200, "::1")
  assert app.settings == {"engine": "rapidocr", "threads": 2, "model": "a=b"}
  assert read_app(CONFIG, "ocr").settings["threads"] == 1


@pytest.mark.parametrize(
  "spec, name, changes, message",
  [
    ("none.py", "ocr", [], "no such file"),
    ("README.md", "ocr", [], "no such file"),
    (f"{CONFIG}:huge", "ocr", [], "expected one of 7b, tiny"),
    (CONFIG, "ocrr", [], "expected one of got, hps, ocr"),
    (CONFIG, "ocr", ["prot=3"], "names no setting"),
    (CONFIG, "ocr", ["port"], "names no setting"),
    (CONFIG, "ocr", ["settings=3"], "names no setting"),
    (CONFIG, "ocr", ["limits.items=3"], "names no setting"),
    (
      CONFIG,
      "ocr",
      ["port=-1"],
      "port is -1, expected a whole number of at least 0",
    ),
    (CONFIG, "ocr", ["port=80000"], "and at most 65535"),
    (CONFIG, "ocr", ["max_items=1.5"], "max_items is 1.5"),
    (CONFIG, "ocr", ["replicas=True"], "replicas is True"),
    (CONFIG, "ocr", ["timeout_s=1e999"], "timeout_s is inf"),
  ],
)
def test_sidecar_settings_that_are_wrong_are_one_line(
  spec, name, changes, message
):
  with pytest.raises(InputError) as e:
    read_app(spec, name, changes)
  assert message in str(e.value)
  assert len(str(e.value).splitlines()) == 1


def test_sidecar_settings_report_all_problems_at_once():
  with pytest.raises(InputError) as e:
    App("x", "ocr", port="80", replicas=0, max_aspect=float("nan"))
  for name in ("port is '80'", "replicas is 0", "max_aspect is nan"):
    assert name in str(e.value)


@pytest.mark.parametrize(
  "host, needs",
  [
    ("127.0.0.1", False),
    ("127.8.0.1", False),
    ("::1", False),
    ("localhost", False),
    ("0.0.0.0", True),
    ("::", True),
    ("10.0.0.1", True),
    ("localhost.example.org", True),
    ("", True),
  ],
)
def test_sidecar_needs_a_token_beyond_loopback(monkeypatch, host, needs):
  app = App("x", "ocr", host=host, token_env="TOKEN_OF_THE_TEST")
  monkeypatch.setenv("TOKEN_OF_THE_TEST", " ")
  if needs:
    with pytest.raises(InputError, match="without a token"):
      app.token()
  else:
    assert app.token() == ""
  monkeypatch.setenv("TOKEN_OF_THE_TEST", "secret\n")
  assert app.token() == "secret"


@pytest.mark.parametrize("token", ["secret-€", "sec\nret", "secret\x7f"])
def test_sidecar_token_that_no_header_can_bear_is_not_shown(monkeypatch, token):
  monkeypatch.setenv("TOKEN_OF_THE_TEST", token)
  settings = {"url": "http://127.0.0.1:9", "key_env": "TOKEN_OF_THE_TEST"}
  for ask in (
    App("x", "ocr", token_env="TOKEN_OF_THE_TEST").token,
    lambda: engines.open_reward("unified_reward", settings),
  ):
    with pytest.raises(InputError, match="in TOKEN_OF_THE_TEST has") as e:
      ask()
    assert "sec" not in str(e.value) and len(str(e.value).splitlines()) == 1


@pytest.fixture
def ray(monkeypatch):
  """In Ray's place: there is no cluster, or one whose proxy is for all."""
  http = types.SimpleNamespace(host="0.0.0.0", port=8000)
  fake = types.SimpleNamespace(
    init=lambda **_: None,
    shutdown=lambda: None,
    serve=types.SimpleNamespace(start=lambda **_: None),
  )
  context = types.SimpleNamespace(
    _get_global_client=lambda: types.SimpleNamespace(http_config=http)
  )
  monkeypatch.setitem(sys.modules, "ray", fake)
  monkeypatch.setitem(sys.modules, "ray.serve", fake.serve)
  monkeypatch.setitem(sys.modules, "ray.serve.context", context)
  return fake


def test_sidecar_takes_its_port_from_nobody(ray):
  with socket.socket() as other:
    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    other.bind(("127.0.0.1", 0))
    other.listen()
    app = App("x", "ocr", port=other.getsockname()[1])
    with pytest.raises(InputError, match="can't listen on 127"):
      ray_app.run(app, "")


def test_sidecar_that_joins_no_cluster_says_so(ray):
  def init(**_):
    raise ConnectionError("Failed.\nCould not find any running Ray instance.")

  ray.init = init
  with pytest.raises(InputError, match=r"ray_address=auto \(Could not") as e:
    ray_app.run(App("x", "ocr", ray_address="auto"), "")
  assert len(str(e.value).splitlines()) == 1


def test_sidecar_is_not_open_to_others_where_its_cluster_is(ray, monkeypatch):
  monkeypatch.delenv("TOKEN_OF_THE_TEST", raising=False)
  app = App("x", "ocr", ray_address="auto", token_env="TOKEN_OF_THE_TEST")
  with pytest.raises(InputError, match=r"serve 0\.0\.0\.0 without a token"):
    ray_app.run(app, "")
