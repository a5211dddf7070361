"""Scores of texts, against official scorers' values and a plain table."""

import itertools
import json
import random
import subprocess
import sys
import time

import pytest

from tests import helpers
from xomni_jax.rewards import text_scores
from xomni_jax.rewards.text_scores import text_reward


def _pairs(bench):
  """Cases of one image; made by running the official scorer."""
  file = helpers.GOLDEN.parent / "vectors" / f"{bench}.json"
  cases = json.loads(file.read_text("utf-8"))["cases"]
  return [c for c in cases if c["kind"] == "text_pair"]


def _plain_distance(a, b):
  row = list(range(len(b) + 1))
  for i, x in enumerate(a, 1):
    diagonal, row[0] = row[0], i
    for j, y in enumerate(b, 1):
      diagonal, row[j] = (
        row[j],
        min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y)),
      )
  return row[-1]


@pytest.mark.parametrize("case", _pairs("longtext"), ids=lambda c: c["id"])
def test_longtext_form_is_the_benchmarks(case):
  mode, expected = case["input"]["mode"], case["expected"]
  truth = text_scores.longtext_form(" ".join(case["input"]["text"]), mode)
  read = text_scores.longtext_form(expected["ocr_cleaned"], mode)
  assert truth == expected["gt_preprocessed"]
  assert read == expected["ocr_preprocessed"]
  if mode == "zh" and truth:
    recall = text_scores.forms_reward(read, truth).recall
    assert recall == pytest.approx(expected["text_accuracy"], abs=1e-9)


@pytest.mark.parametrize("case", _pairs("oneig_text"), ids=lambda c: c["id"])
def test_edit_distance_is_oneigs(case):
  expected = case["expected"]
  pair = expected["gt_preprocessed"], expected["ocr_preprocessed"]
  assert text_scores.edit_distance(*pair) == expected["edit_distance"]


def test_edit_distance_equals_a_plain_table():
  rng = random.Random(0)
  for _ in range(300):
    a, b = ("".join(rng.choices("abc ", k=rng.randrange(80))) for _ in "ab")
    assert text_scores.edit_distance(a, b) == _plain_distance(a, b)


def test_edit_distance_of_a_thousand_characters_is_quick():
  rng = random.Random(1)
  a, b = ("".join(rng.choices("abcdefgh", k=1000)) for _ in "ab")
  start = time.process_time()
  text_scores.edit_distance(a, b)
  # Some 2 ms; a table in Python takes 300 ms.
  assert time.process_time() - start < 0.1


def test_reward_follows_its_formula():
  # "opne": all four letters, two edits of four.
  score = text_reward("OPNE", ("OPEN",), "en")
  assert (score.recall, score.distance) == (1.0, 2)
  assert score.score == pytest.approx(0.5 * 1 + 0.5 * (1 - 2 / 4))
  # Half of it read: recall 1/2, two edits.
  assert text_reward("OP", ("OPEN",), "en").score == pytest.approx(0.5)
  # Lines of the target are one text; so are lines that were read.
  assert text_reward("SALE\n20", ("SALE", "20"), "en").score == 1.0


def test_reward_of_nothing_read_is_0_and_without_target_absent():
  assert text_reward("", ("OPEN",), "en").score == 0.0
  for targets in ((), ("",), (" ", "!?")):
    assert text_reward("OPEN", targets, "en") is None


def test_reward_normalises_by_language():
  assert text_reward("open", ("OPEN",), "en").score == 1.0
  assert text_reward("ＯＰＥＮ", ("OPEN",), "en").score == 1.0
  assert text_reward("新 品，上市", ("新品上市",), "zh").score == 1.0
  assert text_reward("sale", ("SALE",), "zh").score == 0.0
  # Letters that the benchmarks' filter drops count in other languages.
  assert text_reward("Straße señor", ("STRASSE", "SEÑOR"), "de").score == 1.0
  assert text_reward("seor", ("señor",), "es").score < 1.0


def test_reward_may_ignore_white_space():
  spread = "O P E N\nL A T E"
  assert text_reward(spread, ("OPEN LATE",), "en").score < 0.8
  assert text_reward(spread, ("OPEN LATE",), "en", spaces=False).score == 1.0


def test_reward_falls_with_every_extra_character():
  target = "OPEN LATE"
  scores = [
    text_reward(target + "QWXZVKJ"[:n], (target,), "en").score for n in range(8)
  ]
  assert scores[0] == 1.0
  assert all(a > b for a, b in itertools.pairwise(scores))


@pytest.mark.parametrize(
  "hack",
  [
    "A BLUE SIGN THAT SAYS OPEN LATE IN WHITE ON A BOARD WITH A STAR",
    "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG 0123456789",
    "OPEN LATE OPEN LATE",
    "OPEN LATE " * 40,
    "O" * 500,
    "OPEN LATE" + "LALALALALALALALALALALALALALA",
    "SCORE 1.0 CORRECT TEXT OPEN LATE GIVE FULL MARKS PLEASE",
  ],
)
def test_reward_of_a_hack_is_below_that_of_half_the_text(hack):
  honest = text_reward("OPEN", ("OPEN LATE",), "en").score
  assert text_reward(hack, ("OPEN LATE",), "en").score < honest


def test_loop_is_found_and_rhythm_of_a_target_allowed():
  looped = text_reward("HA" * 20, ("HAT",), "en")
  assert (looped.looped, looped.score) == (True, 0.0)
  assert text_reward("春天" * 8, ("春天来了",), "zh").looped
  laughing = ("HA HA HA HA HA",)
  assert text_reward(laughing[0], laughing, "en").score == 1.0
  assert not text_reward("LONDON BRIDGE IS DOWN", ("DOWN",), "en").looped
  # A fence that is read as some letters spoils a little, not all.
  assert (
    text_reward("OPEN LATE TODAY lll", ("OPEN LATE TODAY",), "en").score > 0.7
  )


def test_reward_modules_load_neither_jax_nor_torch():
  modules = [
    "client",
    "combine",
    "ledger",
    "ocr",
    "open",
    "text_batches",
    "wire",
  ]
  lines = [f"import xomni_jax.rewards.{name}" for name in modules]
  heavy = "{'jax', 'torch', 'cv2', 'tensorflow', 'tensorflow_text'}"
  lines += ["import sys", f"print({heavy} & set(sys.modules))"]
  run = subprocess.run(
    [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True
  )
  assert run.stdout == "set()\n", run.stderr
