"""Configs of rewards, and the scorers that are opened by them."""

import numpy as np
import pytest

from tests.reward_items import items as _items
from xomni_jax import reward_config
from xomni_jax.errors import InputError
from xomni_jax.reward_config import CombineConfig, RewardConfig
from xomni_jax.rewards import ocr
from xomni_jax.rewards.open import open_scorer
from xomni_jax.rewards.replay import record
from xomni_jax.rewards.wire import Item, Score


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"name": "OCR"}, "name"),
    ({"name": "total"}, "name"),
    ({"name": "ocr_failed"}, "name"),
    ({"source": "local:hps"}, "source"),
    ({"source": "local:ocr:abbyy"}, "abbyy"),
    ({"source": "ftp://a/b"}, "source"),
    ({"source": "http://a:1/x,"}, "source"),
    ({"source": "http://user:pw@a/x"}, "source"),
    ({"source": "replay:"}, "source"),
    ({"source": ""}, "source"),
    ({"weight": -1}, "weight"),
    ({"weight": float("nan")}, "weight"),
    ({"engines": "max"}, "engines"),
    ({"normalise": "z"}, "normalise"),
    ({"low": 1.0}, "low"),
    ({"floor": 0}, "floor"),
    ({"deadline": 0}, "deadline"),
    ({"try_seconds": 1000}, "try_seconds"),
    ({"retries": 4}, "retries"),
    ({"token_env": "abc-def"}, "token_env"),
  ],
)
def test_reward_config_refuses(change, says):
  RewardConfig("ocr", "local:ocr")
  with pytest.raises(InputError, match=says) as error:
    RewardConfig(**({"name": "ocr", "source": "local:ocr"} | change))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "change",
  [{"quorum": 0}, {"max_failure_rate": 2}, {"window": 0}, {"drift_window": -1}],
)
def test_combine_config_refuses(change):
  with pytest.raises(InputError, match=next(iter(change))):
    CombineConfig(**change)


def test_rewards_need_one_that_is_optimised_and_names_that_differ():
  ocr_reward = RewardConfig("ocr", "local:ocr")
  shadow = RewardConfig("hps", "replay:x", 0.0)
  reward_config.check_rewards((ocr_reward, shadow))
  for rewards in ((), (shadow,), (ocr_reward, ocr_reward)):
    with pytest.raises(InputError):
      reward_config.check_rewards(rewards)


def test_sources_are_parsed_into_engines_and_endpoints():
  text = "local:ocr + http://a:1/x, https://b/y + replay:some file.jsonl"
  assert reward_config.parse_source(text) == (
    ("ocr", ("rapidocr",)),
    ("http", ("http://a:1/x", "https://b/y")),
    ("replay", ("some file.jsonl",)),
  )
  assert ocr.ENGINES == reward_config.OCR_ENGINES


def test_open_scorer_records_and_replays_several_sources(tmp_path):
  items = _items(3)
  a, b, out = (str(tmp_path / name) for name in "abc")
  record(lambda i: [Score(x.id, True, 1.0) for x in i], a, "ocr")(items)
  record(lambda i: [Score(x.id, True, 0.5) for x in i], b, "ocr")(items)
  cfg = RewardConfig(
    "ocr", f"replay:{a} + replay:{b}", engines="min", record=out
  )
  scores = open_scorer(cfg)(items)
  assert [s.score for s in scores] == [0.5] * 3
  again = open_scorer(RewardConfig("ocr", f"replay:{out}"))(items)
  assert again == scores


def test_open_scorer_wants_the_token_it_was_told_of(monkeypatch):
  cfg = RewardConfig(
    "ocr", "http://127.0.0.1:9/x", token_env="XOMNI_TEST_TOKEN"
  )
  monkeypatch.delenv("XOMNI_TEST_TOKEN", raising=False)
  with pytest.raises(InputError, match="XOMNI_TEST_TOKEN"):
    open_scorer(cfg)
  monkeypatch.setenv("XOMNI_TEST_TOKEN", "x")
  assert open_scorer(cfg)([]) == []
  monkeypatch.setenv("XOMNI_TEST_TOKEN", "geheim-ü")
  with pytest.raises(InputError, match="printable ASCII") as error:
    open_scorer(cfg)
  assert "geheim" not in str(error.value)


def test_open_scorer_of_local_ocr_reads():
  pytest.importorskip("rapidocr")
  from xomni_jax.data.world import open_world

  world = open_world("signs")
  item = Item("a", np.asarray(world[2]["image"]), "", world.sign(2).words)
  # The letters stand far apart, and the engine reads "E A R".
  spaced, plain = (
    open_scorer(RewardConfig("ocr", "local:ocr", spaces=spaces))([item])[0]
    for spaces in (True, False)
  )
  assert 0.5 < spaced.score < plain.score == 1.0
  assert spaced.model_rev != plain.model_rev
