"""Scores of a rollout: who is asked, when, and what a failed one counts.

Both paths, host and fused, ask for the same and give the same numbers.
"""

import concurrent.futures
import dataclasses
import io
import threading

import numpy as np
import pytest
from PIL import Image

from tests import grpo_small
from tests.grpo_small import WANTED, settings, share_of, train
from xomni_jax.data.prompts import Prompt
from xomni_jax.errors import InputError, RunError
from xomni_jax.reward_config import RewardConfig
from xomni_jax.rewards import wire
from xomni_jax.training import configure, rewarding, rollout
from xomni_jax.training.stages import grpo_pictures

codes_as_images = grpo_small.codes_as_images  # a fixture


def test_failed_scores_are_masked_and_never_zero(
  tmp_path, monkeypatch, codes_as_images
):
  def scorer(items):
    good = share_of(WANTED)(items)
    # Every fourth fails.
    return [
      wire.failed(s.id, "timeout", "too late") if i % 4 == 0 else s
      for i, s in enumerate(good)
    ]

  config = settings(phases__1_all__steps=2, report__preview_every=2)
  config.options.combine = {"max_failure_rate": 0.5}
  found = train(config, tmp_path, monkeypatch, scorer)
  for metrics in found:
    assert metrics["reward/ocr_failed"] == metrics["reward/masked"] == 0.25
    assert metrics["grpo/tokens"] == 0.75 * 32 * 6  # 6 codes an image
  for name in ("samples", "curves"):
    assert (tmp_path / "pictures" / f"{name}-0000002.png").exists()


def test_fused_path_gives_the_numbers_of_the_host_path(
  tmp_path, monkeypatch, codes_as_images
):
  found, asked = {}, {}
  for path in ("host", "fused"):
    ids = asked[path] = []

    def scorer(items, ids=ids):
      ids.extend(int(item.id) for item in items)
      return [
        wire.failed(s.id, "http", "no")
        if int(s.id) % 5 == 0
        else s._replace(raw={"lines": [[1 - s.score, 0.0, 0.5]]})
        for s in share_of(WANTED)(items)
      ]

    config = settings(
      phases__1_all__steps=2,
      options__reward_path=path,
      options__paint_rows=16,
      options__line_advantages=2,
    )
    config.options.combine = {"max_failure_rate": 0.5}
    steps = train(config, tmp_path / path, monkeypatch, scorer)
    found[path] = [
      {k: v for k, v in m.items() if not k.startswith("time/")} for m in steps
    ]
  assert found["fused"] == found["host"]
  assert all(m["reward/lines_found"] == 1 for m in found["host"])
  # Each image once, whatever runs they are painted in.
  assert (
    sorted(asked["fused"])
    == sorted(asked["host"])
    == sorted([*range(32), *range(32)])
  )


@pytest.mark.parametrize(
  ("path", "fault"),
  [
    ("host", "raises"),
    ("fused", "raises"),
    pytest.param("host", "short", marks=pytest.mark.slow),
    pytest.param("fused", "short", marks=pytest.mark.slow),
  ],
)
def test_scorer_that_breaks_its_promise_has_failed(
  tmp_path, monkeypatch, codes_as_images, path, fault
):
  """On both paths, of the part of a rollout that it was asked for."""

  def scorer(items):
    if items[0].id == "0":
      if fault == "raises":
        raise RuntimeError("broken")
      return share_of(WANTED)(items)[1:]
    return share_of(WANTED)(items)

  config = settings(
    phases__1_all__steps=1,
    options__reward_path=path,
    options__paint_rows=16,
    report__preview_every=1,
  )
  config.options.combine = {"max_failure_rate": 0.6}
  (metrics,) = train(config, tmp_path, monkeypatch, scorer)
  assert metrics["reward/ocr_failed"] == 0.5
  assert (tmp_path / "pictures" / "samples-0000001.png").exists()


def rewarder(tmp_path, *rewards, **combine):
  cfg = configure.parse(settings(), "test")[0].options
  return rewarding.Rewarder(
    rewards or cfg.rewards,
    dataclasses.replace(cfg.combine, **combine),
    8,
    tmp_path,
  )


def test_fused_path_asks_for_all_rewards_of_all_devices_at_once(
  tmp_path, monkeypatch
):
  together = threading.Barrier(2 * 3)  # devices x rewards

  def scorer(items):
    together.wait(60)
    return share_of(WANTED)(items)

  monkeypatch.setattr(rewarding, "open_scorer", lambda *args: scorer)
  rewards = [RewardConfig(name, "http://nowhere/x") for name in "abc"]
  asking = rewarder(tmp_path, *rewards)
  fused = asking.fused(0, [Prompt("p", "a sign")] * 8, None)
  images = np.zeros((4, 2, 2, 3), np.uint8)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    tables = list(
      pool.map(fused._ask, [images] * 2, [[0, 1, 2, 3], [4, 5, 6, 7]])
    )
  assert np.stack(tables).shape == (2, 4, 3, 4)
  assert (np.stack(tables)[..., 0] == 1).all()
  assert all(sorted(found) == [*range(8)] for found in fused.scores.values())
  # What is shown with its scores is what was asked for here.
  assert sorted(fused.images) == [*range(8)]


def test_what_a_server_says_besides_its_score_breaks_nothing(
  tmp_path, monkeypatch
):
  """Two engines' distance is read from a reply that may hold any JSON."""
  said = ["far", None, [1], True, 0.25, {"x": 1}, "nan", 1e999]

  def scorer(items):
    return [
      wire.Score(i.id, True, 0.5, {"apart": x})
      for i, x in zip(items, said, strict=True)
    ]

  monkeypatch.setattr(rewarding, "open_scorer", lambda *args: scorer)
  asking = rewarder(tmp_path, max_failure_rate=1.0)
  image = np.zeros((2, 2, 3), np.uint8)
  asked = asking.ask(
    0, [Prompt("p", "a sign")] * 8, dict.fromkeys(range(8), image)
  )
  heard = asking.hear(asked)
  assert heard.combined.metrics["reward/ocr_apart"] == 0.25
  # JSON has no infinity: that reply was none.
  assert np.isfinite(heard.combined.rewards).sum() == 7


def test_steps_that_were_watched_are_read_or_refused(tmp_path):
  first = rewarder(tmp_path)
  first.close()
  for line in ("5", "{}", '{"step": 0}', '{"step": 0, "failures": [1]}'):
    first._watched.write_text(line + "\n")
    with pytest.raises(InputError, match="line 1 is not about a step") as e:
      rewarder(tmp_path)._history_before(3)
    assert "\n" not in str(e.value)


def test_why_scores_failed_is_told_once_each(tmp_path, monkeypatch):
  """As a warning, and where the run stops; whatever JSON says why."""
  why = {
    0: wire.Score("0", False, None, {"error": "no\x1b[1m\nGPU" * 99}, "engine"),
    1: wire.Score("1", False, None, ["far"], "odd"),
    2: wire.Score("2", False, None, {"raw": {"error": "late"}}, "timeout"),
  }
  scorer = lambda items: [
    why.get(int(i.id), wire.Score(i.id, True, 0.5, {})) for i in items
  ]
  monkeypatch.setattr(rewarding, "open_scorer", lambda *args: scorer)
  asking = rewarder(tmp_path, max_failure_rate=0.4, window=1)
  images = dict.fromkeys(range(8), np.zeros((2, 2, 3), np.uint8))
  hear = lambda step: asking.hear(
    asking.ask(step, [Prompt("p", "a sign")] * 8, images)
  )
  first, other, last = hear(0).warnings
  assert first.startswith("a score failed, ocr: engine: no [1m GPUno [1m ")
  assert len(first) < 230
  assert other == 'a score failed, ocr: other: ["far"]'
  assert last == "a score failed, ocr: timeout: late"
  assert hear(1).warnings == []
  why |= {i: wire.failed(str(i), "client", "no route") for i in (3, 4)}
  with pytest.raises(RunError, match=r"one says: no route\)"):
    hear(2)


def test_run_that_an_outage_stopped_goes_on_once_it_is_over(
  tmp_path, monkeypatch
):
  failing = set()

  def scorer(items):
    return [
      wire.failed(i.id, "http", "no")
      if int(i.id) in failing
      else wire.Score(i.id, True, 0.5, {})
      for i in items
    ]

  monkeypatch.setattr(rewarding, "open_scorer", lambda *args: scorer)
  image = np.zeros((2, 2, 3), np.uint8)
  images = dict.fromkeys(range(8), image)

  def hear(asking, step):
    asking.hear(asking.ask(step, [Prompt("p", "a sign")] * 8, images))

  open_again = lambda: rewarder(tmp_path, window=20, max_failure_rate=0.2)
  first, step = open_again(), 0
  hear(first, step)
  failing |= set(range(8))
  with pytest.raises(RunError, match="start the run again"):
    for step in range(1, 20):
      hear(first, step)
  first.close()
  # Still down: it stops at once, and does not go through steps for nothing.
  for _ in range(2):
    again = open_again()
    with pytest.raises(RunError):
      hear(again, step)
    again.close()
  # What failed before is over; as ever some may fail.
  last = open_again()
  failing.intersection_update({0})
  end = step + 10
  for later in range(step, end):
    hear(last, later)
  last.close()
  # One that is killed then knows what it would have known.
  read, stopped = open_again()._history_before(end)
  assert read == last._history
  assert not stopped
  assert read.failures == [[8, 1]] * 10


def test_caption_of_any_text_goes_into_a_file():
  """JSON can spell halves of characters, which one host must not fail on."""
  image = np.zeros((8, 8, 3), np.uint8)
  score = wire.Score("0", True, 0.5, {"text": "\ud800A"})
  (picture,) = grpo_pictures.pictures(
    {0: image}, {"ocr": {0: score}}, [Prompt("p", "a sign")], 1
  )
  file = Image.open(io.BytesIO(grpo_pictures._png(picture)))
  assert file.text["caption"].endswith("ocr: 0.50 ?A")


def test_rollout_without_any_score_changes_nothing(
  tmp_path, monkeypatch, codes_as_images
):
  """Its groups are dropped, and all its tokens with them."""
  fails = lambda items: [wire.failed(i.id, "http", "no") for i in items]
  config = settings(phases__1_all__steps=1)
  config.options.combine = {"max_failure_rate": 1.0}
  (metrics,) = train(config, tmp_path, monkeypatch, fails)
  assert metrics["grpo/tokens"] == metrics["grpo/grad_norm"] == 0


def test_failures_before_a_kill_count_after_it(tmp_path, monkeypatch):
  """A window of four steps; two of them lie before the run is resumed."""
  monkeypatch.setattr(
    rewarding,
    "open_scorer",
    lambda *args: (
      lambda items: [wire.failed(i.id, "http", "no") for i in items]
    ),
  )
  cfg = configure.parse(settings(), "test")[0].options
  limit = dataclasses.replace(cfg.combine, window=4, max_failure_rate=0.9)
  image = np.zeros((2, 2, 3), np.uint8)
  prompts = [Prompt("p", "a sign")] * 8

  def hear(rewarder, step):
    rewarder.hear(rewarder.ask(step, prompts, dict.fromkeys(range(8), image)))

  make = lambda: rewarding.Rewarder(cfg.rewards, limit, 8, tmp_path)
  first = make()
  for number in range(3):
    hear(first, number)
  first.close()
  again = make()
  hear(again, 2)  # its third step is not counted twice
  with pytest.raises(RunError, match="32 of 32 scores"):
    hear(again, 3)


def test_scores_of_a_rollout_come_in_while_the_next_one_is_drawn(
  tmp_path, monkeypatch, codes_as_images
):
  """Each waits for the other to begin: one after the other, both give up."""
  scoring, drawing, met = threading.Event(), threading.Event(), []
  draw = rollout.Roller.draw

  def spy(self, policy, prompts, number, **how):
    if number == 1:
      drawing.set()
      met.append(scoring.wait(60))
    return draw(self, policy, prompts, number, **how)

  def scorer(items):
    if not scoring.is_set():  # of the first rollout
      scoring.set()
      met.append(drawing.wait(60))
    return share_of(WANTED)(items)

  monkeypatch.setattr(rollout.Roller, "draw", spy)
  config = settings(
    phases__1_all__steps=2,
    global_batch=8,
    options__group_size=4,
    options__overlap=1,
  )
  train(config, tmp_path, monkeypatch, scorer)
  assert met == [True, True]


def test_processes_record_replies_in_files_of_their_own(monkeypatch):
  reward = RewardConfig("ocr", "local:ocr", record="runs/replies.jsonl")
  assert rewarding._recorded(reward) == reward
  monkeypatch.setattr(rewarding.jax, "process_count", lambda: 2)
  monkeypatch.setattr(rewarding.jax, "process_index", lambda: 1)
  assert rewarding._recorded(reward).record == "runs/replies-1.jsonl"
