"""Whose codes have earned a reward: lines told apart, from OCR to advantages."""

from unittest import mock

import numpy as np
import pytest

from xomni_jax.data.world import open_world
from xomni_jax.reward_config import RewardConfig
from xomni_jax.rewards import combine, ocr, ocr_engines, text_lines, wire
from xomni_jax.stage_options import GRPOOptions
from xomni_jax.training import credit, policy, rewarding
from xomni_jax.training.stages import grpo

NAN = np.nan


OCR = RewardConfig("ocr", "local:ocr")


def _options(lines, rewards=(OCR,)):
  return GRPOOptions(((32, 32),), rewards, group_size=4, line_advantages=lines)


def _column(values, lines=None):
  values = np.array(values, np.float64)
  return combine.Column(values, np.zeros(len(values), bool), NAN, {}, lines)


def _spans(count):
  return [(i / 10, (i + 1) / 10) for i in range(count)]


@pytest.mark.parametrize(
  ("read", "expected"),
  [
    (["open", "at", "noon"], [1, 1, 1]),
    (["open", "noon"], [1, 0, 1]),
    (["x", "open", "at", "zzz", "noon"], [1, 1, 1]),
    (["o pen", "a t", "no on"], [1, 1, 1]),
    (["noon"], [0, 0, 1]),
    ([], [0, 0, 0]),
    (["opem", "at", "noom"], [0.75, 1, 0.75]),
  ],
)
def test_each_target_has_the_score_of_the_line_it_was_read_as(read, expected):
  found = text_lines.line_scores(
    ["open", "at", "noon"], read, _spans(len(read)), spaces=False
  )
  assert [line[0] for line in found] == expected
  for line, score in zip(found, expected, strict=True):
    assert (line[1] is None) == (score == 0)
  if read[:1] == ["x"]:
    assert [line[1] for line in found] == [0.1, 0.2, 0.4]


def test_lines_are_paired_as_they_are_scored():
  """Letters that stand apart are no other line for that."""
  targets, read = ["a b c d", "ox"], ["o x y z"]
  found = text_lines.line_scores(targets, read, _spans(1), spaces=False)
  assert found[0] == [0.0, None, None]
  assert found[1][1:] == [0.0, 0.1]


def test_target_without_letters_has_no_score():
  found = text_lines.line_scores(["", "open"], ["open"], _spans(1))
  assert found == [[None, None, None], [1.0, 0.0, 0.1]]


@pytest.mark.parametrize("name", ["rapidocr", "tesseract"])
def test_ocr_tells_which_line_of_a_poster_is_wrong(name):
  try:
    engine = ocr.open_engine(name)
  except Exception as e:  # an engine that this machine lacks
    pytest.skip(str(e))
  world = open_world("posters", "train")
  image = np.asarray(world[3]["image"])
  lines = list(world.sign(3).lines)
  lines[2] = "KIWI"
  score = ocr.make_scorer(engine, spaces=False)
  found = score([wire.Item("a", image, "", tuple(lines))])[0].raw["lines"]
  told = np.array(found, np.float64)
  good = [k for k in range(len(lines)) if k != 2]
  assert (told[good, 0] == 1).all()
  assert told[2, 0] < 0.5
  # A line stands in row 1 + 2 k of 13.
  rows = credit.rows_of_lines(told[None, :, 1:], 13)[0]
  assert {int(rows[1 + 2 * k]) for k in good} == set(good)
  assert set(rows[::2]) == {-1}


def test_lines_that_a_server_tells_of_are_numbers_or_nothing():
  told = [
    [[0.5, 0.1, 0.2], [0, None, None], [1, 0.8, 0.9]],
    [[0.5, 0.1]],
    "no lines",
    [[{}, 1, 2]],
    [[10**400, 0, 1]],
    None,
  ]
  scores = {
    i: wire.Score(str(i), True, 0.5, {"lines": lines})
    for i, lines in enumerate(told)
  }
  lines = rewarding._column(rewarding._table(scores, 6, 2)).lines
  assert lines.shape == (6, 2, 3)
  np.testing.assert_allclose(lines[0], [[0.5, 0.1, 0.2], [0, np.nan, np.nan]])
  assert np.isnan(lines[1:]).all()


@pytest.mark.parametrize(("how", "join"), [("mean", np.mean), ("min", min)])
def test_engines_tell_of_lines_together(how, join):
  """One that tells of none has read every line as well as the whole."""
  told = {
    "a": [[0.5, 0.1, 0.2], [0.0, None, None], [None, None, None]],
    "b": [[1.0, 0.3, 0.4], [0.8, 0.5, 0.6], [None, None, None]],
    "c": None,
  }
  scorers = {
    name: lambda items, lines=lines: [
      wire.Score(item.id, True, 0.6, {"lines": lines} if lines else {})
      for item in items
    ]
    for name, lines in told.items()
  }
  score = ocr.combine_engines(scorers, how)
  (found,) = score([wire.Item("x", np.zeros((8, 8, 3), np.uint8), "")])
  assert wire.checked(found) == found  # JSON, as it goes to the ledger
  assert found.raw["lines"] == [
    [pytest.approx(join([0.5, 1.0, 0.6])), *np.float32([0.1, 0.2])],
    [pytest.approx(join([0.0, 0.8, 0.6])), *np.float32([0.5, 0.6])],
    [pytest.approx(0.6), None, None],
  ]
  (alone,) = ocr.combine_engines({"c": scorers["c"]}, how)(
    [wire.Item("x", np.zeros((8, 8, 3), np.uint8), "")]
  )
  assert "lines" not in alone.raw


def test_image_that_nothing_was_read_in_has_lines_that_nobody_read():
  """They count as not found, in the metric too."""
  readings = {
    "full": ocr_engines.Reading("OPEN\n24", 1.0, ((0.0, 0.2), (0.5, 0.7))),
    "blank": ocr_engines.Reading(""),
  }
  engine = ocr_engines.Engine(
    lambda items: [readings[item.id] for item in items], "e"
  )
  image = np.zeros((8, 8, 3), np.uint8)
  items = [wire.Item(name, image, "", ("OPEN", "24")) for name in readings]
  full, blank = ocr.make_scorer(engine)(items)
  assert full.raw["lines"] == [[1.0, 0.0, 0.2], [1.0, 0.5, 0.7]]
  assert blank.raw["lines"] == [[0.0, None, None]] * 2


def test_run_gives_codes_their_lines_advantage():
  """A grid that is not square, so that rows are not taken for columns."""
  rewards = (OCR,)
  opts = _options(1, rewards)
  values = np.array([0.2, 0.4, 0.6, 0.8])
  lines = np.full((4, 1, 3), [0.0, 0.0, 0.5])
  lines[:, 0, 0] = values[::-1]
  columns = {"ocr": _column(values, lines)}
  heard = mock.Mock(columns=columns)
  heard.combined = combine.combine(columns, rewards, 4, 0.5)
  run = mock.Mock(_cfg=mock.Mock(options=opts))
  # Longer rows, as for another size.
  rows = {"codes": np.zeros((4, 10), int), "mask": np.ones((4, 10))}
  made, _ = grpo._Run._with_advantages(run, rows, heard, (2, 3))
  upper, lower = made["advantage"][:, :3], made["advantage"][:, 3:6]
  whole = policy.group_advantages(values, 4, normalise=True)
  np.testing.assert_allclose(upper, np.repeat(whole[::-1, None], 3, 1))
  np.testing.assert_allclose(lower, np.repeat(whole[:, None], 3, 1))
  assert not made["advantage"][:, 6:].any()


def test_row_belongs_to_the_line_with_most_of_it():
  spans = np.array([[[0.0, 0.26], [0.24, 0.5], [0.55, 0.58], [NAN, NAN]]])
  # Of 4 rows: the third line is small, and lies in the third row whole.
  assert credit.rows_of_lines(spans, 4).tolist() == [[0, 1, 2, -1]]
  # Half of a line is enough, and so is half of a row.
  half = np.array([[[0.2, 0.3], [0.62, 0.9]]])
  assert credit.rows_of_lines(half, 4).tolist() == [[0, 0, 1, 1]]


def test_codes_of_a_line_learn_from_their_line():
  """Against a loop over lines; the second reward tells nothing of them."""
  rng = np.random.default_rng(0)
  rewards = (
    # It tells of lines as well, but nothing is learned from it.
    RewardConfig("shadow", "http://x:2", weight=0.0),
    RewardConfig("look", "http://x:1"),
    RewardConfig("ocr", "local:ocr", weight=2.0),
  )
  opts = _options(2, rewards)
  lines = np.full((8, 2, 3), NAN)
  lines[..., 0] = rng.random((8, 2))
  lines[:, 0, 1:] = 0.25, 0.5
  lines[:, 1, 1:] = 0.75, 1.0
  lines[2, 1, 1:] = NAN  # not found there
  lines[2, 1, 0] = 0.0
  lines[4:, 1] = NAN  # the second prompt has one line
  lines[5] = NAN
  ocr_values, look = rng.random(8), rng.random(8)
  ocr_values[5] = NAN  # failed
  columns = {"look": _column(look), "ocr": _column(ocr_values, lines)}
  columns["shadow"] = _column(look, 1 - lines)
  whole = combine.combine(columns, rewards, 4, 0.5).rewards
  found, metrics = credit.advantages(whole, columns, opts, (4, 3))
  assert found.shape == (8, 12)
  assert metrics == {"reward/lines_found": pytest.approx(10 / 11)}
  group = lambda x: policy.group_advantages(x, 4, normalise=True)
  expected = np.repeat(group(look + 2 * ocr_values)[:, None], 4, 1)
  first = np.where(np.isnan(ocr_values), NAN, lines[:, 0, 0])
  expected[:, 1] = group(look + 2 * first)
  second = np.where(np.arange(8) < 4, lines[:, 1, 0], ocr_values)
  expected[:4, 3] = np.where(
    np.arange(4) == 2, expected[:4, 3], group(look + 2 * second)[:4]
  )
  np.testing.assert_allclose(
    found.reshape(8, 4, 3), np.repeat(expected[..., None], 3, 2), atol=1e-6
  )
  assert not found[5].any()


def test_without_lines_all_codes_learn_alike():
  values = np.arange(4) / 4
  told = np.full((4, 1, 3), [0.5, 0.0, 1.0])
  whole = policy.group_advantages(values, 4, normalise=True)
  for lines, column in (
    (0, _column(values, told)),  # not asked for
    (1, _column(values, np.full((4, 1, 3), NAN))),  # not told
  ):
    found, metrics = credit.advantages(
      values, {"ocr": column}, _options(lines), (2, 2)
    )
    np.testing.assert_array_equal(found, np.repeat(whole[:, None], 4, 1))
    assert metrics == {}
