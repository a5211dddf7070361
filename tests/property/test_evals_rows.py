"""Rows of a measurement: kept, resumed, refused, scored; the loop around them.

Drawing and reading are stand-ins here: an image is its key's numbers.
"""

import contextlib
import errno
import json
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from xomni_jax.errors import InputError, RunError
from xomni_jax.evals import asked, measure, rows
from xomni_jax.evals.asked import Asked
from xomni_jax.evals.measure import Setting
from xomni_jax.evals.rows import Key, Rows
from xomni_jax.inference.sampling import Sampling

IDENTITY = {"measures": "best-of-n", "seed": 0, "folders": {"sft": "a"}}
SETTINGS = (
  Setting("sft T=1", "sft", "", 4, Sampling()),
  Setting("rl T=1", "rl", "", 1, Sampling()),
)
TWO_SIZES = [
  Asked(
    f"prompt {i}", (f"WORD {i}",), "en", ((32, 48), (48, 32))[i % 3 == 0], ""
  )
  for i in range(10)
]


class _Drawer:
  """Images that tell model, prompt and sample."""

  def __init__(self, log, stop_after=None):
    self.log, self.left = log, stop_after

  def __call__(self, model):
    self.model = model
    return self

  def draw(self, some, numbers, samples, how):
    if self.left is not None:
      if not self.left:
        raise KeyboardInterrupt
      self.left -= 1
    self.log.append((self.model, tuple(numbers)))
    assert len({a.size for a in some}) == 1
    made = np.zeros((len(some) * samples, *some[0].size, 3), np.uint8)
    for i, image in enumerate(made):
      image[0, 0] = self.model == "rl", numbers[i // samples], i % samples
    return made


class _Readers:
  """Read what the drawer wrote; every `fails`-th image can't be read."""

  def __init__(self, fails=0):
    self.fails, self.count = fails, 0

  def ask(self, items):
    return items

  def hear(self, items):
    found = []
    for item in items:
      self.count += 1
      bad = self.fails and self.count % self.fails == 0
      text = " ".join(map(str, item.image[0, 0]))
      fine = {"text": text, "score": 0.5}
      found.append({"rapidocr": {"error": "no"} if bad else fine})
    return found


def _run(folder, *, stop_after=None, fails=0, prompts=TWO_SIZES):
  log, found = [], Rows(folder / "x.rows.jsonl", IDENTITY)
  drawer, readers = _Drawer(log, stop_after), _Readers(fails)
  try:
    measure.run(
      SETTINGS,
      prompts,
      found,
      readers,
      drawer,
      images=8,
      folder=folder / "sheets",
    )
  except KeyboardInterrupt:
    pass
  finally:
    found.close()
  return log


def _lines(folder):
  return (folder / "x.rows.jsonl").read_text().splitlines()


@pytest.mark.parametrize("stop_after", [0, 1, 3, 4, 5, 6])
def test_measurement_that_was_killed_goes_on_to_the_same_rows(
  tmp_path, stop_after, monkeypatch
):
  monkeypatch.setattr(measure, "SHOWN", 2)
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  _run(whole)
  first = _run(parts, stop_after=stop_after)
  # A kill while a line is written leaves half of it.
  path = parts / "x.rows.jsonl"
  path.write_bytes(path.read_bytes()[:-9])
  second = _run(parts)
  assert sorted(_lines(whole)) == sorted(_lines(parts))
  assert len(_lines(parts)) == 1 + 10 * 4 + 10
  assert len(first) == stop_after
  # Two batches waited to be read, and half of a line is none.
  if stop_after > 4:
    assert len(second) == 7 - (stop_after - 3)
  for name in ("sft-t-1.png", "rl-t-1.png"):
    sheets = [Image.open(f / "sheets" / name) for f in (whole, parts)]
    assert sheets[0].tobytes() == sheets[1].tobytes()


def test_rows_are_of_the_images_that_were_drawn(tmp_path):
  log = _run(tmp_path)
  _, found = rows.read_rows(tmp_path / "x.rows.jsonl")
  for key, readings in found.items():
    rl = int(key.setting == "rl T=1")
    text = f"{rl} {key.prompt} {key.sample}"
    assert readings["rapidocr"]["text"] == text
  # Sizes apart, two prompts of 4 or eight of 1 at once, the last filled up.
  assert log[:2] == [("sft", (0, 3)), ("sft", (6, 9))]
  assert log[5:] == [
    ("rl", (0, 3, 6, 9, 9, 9, 9, 9)),
    ("rl", (1, 2, 4, 5, 7, 8, 8, 8)),
  ]


def test_nothing_is_drawn_when_all_is_there(tmp_path):
  _run(tmp_path)
  assert _run(tmp_path, stop_after=0) == []


def test_sheet_that_is_gone_is_made_again_and_no_row_twice(tmp_path):
  _run(tmp_path)
  before = _lines(tmp_path)
  (tmp_path / "sheets" / "rl-t-1.png").unlink()
  assert {model for model, _ in _run(tmp_path)} == {"rl"}
  assert _lines(tmp_path) == before
  assert (tmp_path / "sheets" / "rl-t-1.png").exists()


def test_engine_that_fails_too_often_stops_the_measurement(tmp_path):
  prompts = [TWO_SIZES[1]] * 100
  with pytest.raises(RunError, match=r"rapidocr fails on .* at most 1%"):
    _run(tmp_path / "often", fails=20, prompts=prompts)
  _run(tmp_path / "seldom", fails=150, prompts=prompts)
  # With the engine mended the same command goes on: little is lost for good.
  _run(tmp_path / "often", prompts=prompts)
  lines = _lines(tmp_path / "often")
  assert sum("error" in line for line in lines) <= 2


def test_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
  file = Rows(tmp_path / "rows.jsonl", IDENTITY)
  row = (Key("sft T=1", 0, 0), {"rapidocr": {"text": "A", "score": 1.0}})
  with monkeypatch.context() as patch:
    full = OSError(errno.ENOSPC, "No space left on device")
    patch.setattr(file._journal, "add", mock.Mock(side_effect=full))
    with pytest.raises(RunError, match="No space left on device") as error:
      file.add([row])
  assert "\n" not in str(error.value)
  file.add([row])
  file.close()
  assert rows.read_rows(tmp_path / "rows.jsonl")[1] == dict([row])


def test_rows_of_another_measurement_are_refused(tmp_path):
  path = tmp_path / "rows.jsonl"
  Rows(path, IDENTITY).close()
  moved = IDENTITY | {"folders": {"sft": "elsewhere"}}
  Rows(path, moved).close()  # the same weights in another place
  for change in ({"seed": 1}, {"steps": 4}):
    with pytest.raises(InputError, match="another measurement") as error:
      Rows(path, IDENTITY | change)
    assert "\n" not in str(error.value)
    assert next(iter(change)) in str(error.value)
    assert "new --out" in str(error.value)
  assert len(path.read_text().splitlines()) == 1


def test_rows_of_the_same_models_are_taken_over(tmp_path):
  path = tmp_path / "rows.jsonl"
  mine = IDENTITY | {"models": {"sft": "a1", "rl": "b2"}}
  theirs = IDENTITY | {"models": {"sft": "a1", "rl": "c3", "control": "d4"}}
  found = {Key("sft T=1", 0, 0): {"rapidocr": {"text": "A", "score": 1.0}}}
  with contextlib.closing(Rows(path, theirs)) as file:
    file.add(found.items())
  there = rows.reusable(path, mine)
  assert there.rows == found
  # An image has a key of its own, however many are drawn.
  more = mine | {"n": [1], "samples": 2, "batch": 3}
  assert rows.reusable(path, more) == there
  assert there.models == {"", "sft"}  # of no model: true drawings
  assert there.drawings == (0,)  # the oldest say nothing of it


def test_rows_of_other_prompts_are_not_taken_over(tmp_path):
  path = tmp_path / "rows.jsonl"
  with pytest.raises(InputError, match=r"--reuse: .* has no rows\.jsonl"):
    rows.reusable(path, IDENTITY | {"models": {}})
  Rows(path, IDENTITY | {"models": {}}).close()
  with pytest.raises(InputError, match="seed is 0, here it is 1"):
    rows.reusable(path, IDENTITY | {"models": {}, "seed": 1})


@pytest.mark.parametrize("text", ['{"step": 1}\n', "[1]\n", "no JSON\n"])
def test_file_that_holds_no_rows_is_one_line(tmp_path, text):
  path = tmp_path / "rows.jsonl"
  path.write_text(text)
  with pytest.raises(InputError) as error:
    Rows(path, IDENTITY)
  assert "\n" not in str(error.value)


def test_scores_are_made_from_the_texts(tmp_path):
  some = [
    Asked("p", ("OPEN", "24"), "en", (96, 96), ""),
    Asked("p", ("Exit",), "en", (96, 96), ""),
  ]
  read = lambda text: {"rapidocr": {"text": text, "score": 0.0}}
  found = {
    Key("s", 0, 0): read("o p e n\n2 4!"),
    Key("s", 0, 1): read("OPEN 2A"),
    Key("s", 1, 0): read(""),
    Key("s", 1, 1): {"rapidocr": {"error": "broken"}},
  }
  table = rows.score_table(found, "s", 2, some, "rapidocr")
  np.testing.assert_allclose(table["exact"], [[1, 0], [0, np.nan]])
  np.testing.assert_allclose(table["characters"], [[1, 5 / 6], [0, np.nan]])
  # Half of the recall, half of the edits: both 5 of 6.
  np.testing.assert_allclose(table["reward"], [[1, 5 / 6], [0, np.nan]])
  assert np.isnan(rows.score_table(found, "s", 2, some, "none")["exact"]).all()
  with pytest.raises(InputError, match="no row of 's', prompt 0, sample 2"):
    rows.score_table(found, "s", 3, some, "rapidocr")


def test_prompts_are_kept_beside_the_rows(tmp_path):
  path = tmp_path / "prompts.jsonl"
  some = asked.open_asked("world:signs:test", 20)
  rows.write_prompts(path, some)
  assert rows.read_prompts(path) == some
  assert {a.kind for a in some} == {"one word", "two words", "with digits"}
  assert {a.size for a in some} == {(96, 96)}
  assert asked.prompts_hash(some) != asked.prompts_hash(some[:-1])


def test_prompts_of_a_file_need_targets_and_sizes(tmp_path):
  path = tmp_path / "prompts.jsonl"
  line = {"prompt": "a", "targets": ["A", "B"], "size": [208, 128]}
  path.write_text(json.dumps(line) + "\n")
  (one,) = asked.open_asked(str(path), 1)
  assert (one.targets, one.size, one.kind) == (("A", "B"), (208, 128), "")
  with pytest.raises(InputError, match="count is 2"):
    asked.open_asked(str(path), 2)
  wrong = [{k: v for k, v in line.items() if k != n} for n in line]
  wrong = [w for w in wrong if "prompt" in w] + [line | {"targets": ["!?"]}]
  for one in wrong:
    path.write_text(json.dumps(one))
    with pytest.raises(
      InputError, match="lack a size in px, or targets"
    ) as error:
      asked.open_asked(str(path), 1)
    assert "\n" not in str(error.value)
