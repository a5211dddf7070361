"""Replies of rewards that are kept: journal, ledger, replay."""

import errno
import os
import threading

import numpy as np
import pytest

from tests.reward_items import items as _items
from xomni_jax.errors import InputError
from xomni_jax.rewards import journal, wire
from xomni_jax.rewards.ledger import Key, Ledger, score_once
from xomni_jax.rewards.replay import open_replay, record
from xomni_jax.rewards.wire import Score


class _Scorer:
  """Counts what it is asked; fails on ids in `bad`."""

  def __init__(self, bad=()):
    self.bad, self.asked = bad, []

  def __call__(self, items):
    self.asked += [item.id for item in items]
    return [
      wire.failed(i.id, "timeout", "late")
      if i.id in self.bad
      else Score(
        i.id, True, np.float32(i.image.mean() / 255), {"t": "ä"}, None, "m"
      )
      for i in items
    ]


def _keys(step, count):
  return [Key(step, f"prompt{n // 2}", n % 2) for n in range(count)]


def test_ledger_is_not_asked_twice_after_it_was_opened_again(tmp_path):
  items, scorer = _items(4), _Scorer()
  first, found = score_once(Ledger(tmp_path), "ocr", scorer, _keys(1, 4), items)
  assert found == 0
  # Other ids, the same images: what was said, under the new ids.
  again = [item._replace(id=f"new{item.id}") for item in items]
  second, found = score_once(
    Ledger(tmp_path), "ocr", scorer, _keys(1, 4), again
  )
  assert found == 4
  assert [s._replace(id=s.id[3:]) for s in second] == first
  assert len(scorer.asked) == 4


def test_ledger_asks_again_for_another_image_step_sample_or_reward(tmp_path):
  items, scorer, ledger = _items(2), _Scorer(), Ledger(tmp_path)
  score_once(ledger, "ocr", scorer, _keys(1, 2), items)
  changed = items[0].image.copy()
  changed[0, 0, 0] ^= 1
  other = [items[0]._replace(image=changed), items[1]]
  assert score_once(ledger, "ocr", scorer, _keys(1, 2), other)[1] == 1
  assert score_once(ledger, "ocr", scorer, _keys(2, 2), items)[1] == 0
  assert score_once(ledger, "hps", scorer, _keys(1, 2), items)[1] == 0
  assert score_once(ledger, "ocr", scorer, _keys(1, 2)[::-1], items)[1] == 0


def test_other_question_about_the_same_image_is_asked_anew(tmp_path):
  (item,), scorer, ledger = _items(1), _Scorer(), Ledger(tmp_path)
  score_once(ledger, "ocr", scorer, _keys(1, 1), [item], about="a")
  for change in ({"targets": ("OTHER",)}, {"prompt": "other"}, {"lang": "zh"}):
    other = item._replace(**change)
    found = score_once(ledger, "ocr", scorer, _keys(1, 1), [other], about="a")
    assert found[1] == 0
  assert (
    score_once(ledger, "ocr", scorer, _keys(1, 1), [item], about="b")[1] == 0
  )
  found = score_once(
    Ledger(tmp_path), "ocr", None, _keys(1, 1), [item], about="a"
  )
  assert found[1] == 1


def test_ledger_keeps_no_failure(tmp_path):
  items, keys = _items(3), _keys(1, 3)
  down, ledger = _Scorer(bad=("i1",)), Ledger(tmp_path)
  scores, _ = score_once(ledger, "ocr", down, keys, items)
  assert [s.ok for s in scores] == [True, False, True]
  back = _Scorer()
  scores, found = score_once(Ledger(tmp_path), "ocr", back, keys, items)
  assert (found, back.asked) == (2, ["i1"])
  assert all(s.ok for s in scores)


@pytest.mark.parametrize("lost", [1, 20, 10**6])
def test_ledger_drops_a_torn_last_line(tmp_path, lost):
  items, scorer = _items(3), _Scorer()
  score_once(Ledger(tmp_path), "ocr", scorer, _keys(1, 3), items)
  path = tmp_path / "scores-0.jsonl"
  whole = path.read_bytes()
  last = len(whole.splitlines(keepends=True)[-1])
  os.truncate(path, len(whole) - min(lost, last - 1))
  found = score_once(Ledger(tmp_path), "ocr", scorer, _keys(1, 3), items)[1]
  assert found == (3 if lost == 1 else 2)  # a line that only lacks its end
  assert path.read_bytes() == whole
  assert len(Ledger(tmp_path)) == 3


@pytest.mark.parametrize("text", ["a picture", "a,b\n1,2\n3", "[1]x\n[2"])
def test_file_that_is_no_journal_loses_nothing(tmp_path, text):
  path = tmp_path / "mine.txt"
  path.write_text(text)
  with pytest.raises(InputError, match="line 1 is no JSON"):
    journal.Journal(path)
  assert path.read_text() == text


def test_journal_that_is_written_alone_has_one_writer(tmp_path):
  path = tmp_path / "rows.jsonl"
  first = journal.Journal(path, alone=True)
  first.add([[1]])
  with pytest.raises(InputError, match="written to by another process"):
    journal.Journal(path, alone=True)
  first.close()
  journal.Journal(path, alone=True).close()
  assert journal.read_journal(path) == [[1]]


def test_ledger_that_is_broken_inside_is_one_line(tmp_path):
  path = tmp_path / "scores-0.jsonl"
  for bad in ("oops\n", "[1, 2]\n"):
    path.write_text(bad)
    with pytest.raises(InputError, match="line 1") as error:
      Ledger(tmp_path)
    assert "\n" not in str(error.value)


def test_score_that_a_disk_has_spoilt_is_asked_for_again(tmp_path):
  items, keys = _items(2), _keys(1, 2)
  score_once(Ledger(tmp_path), "ocr", _Scorer(), keys, items)
  path = tmp_path / "scores-0.jsonl"
  first, second = path.read_text().splitlines()
  path.write_text(first.replace('"ok": true', '"ok": 7') + f"\n{second}\n")
  again = _Scorer()
  scores, found = score_once(Ledger(tmp_path), "ocr", again, keys, items)
  assert (found, again.asked) == (1, ["i0"])
  assert all(s.ok for s in scores)


def test_ledger_has_what_was_said_before_a_kill(tmp_path):
  items, keys = _items(6), _keys(1, 6)

  def killed(part):
    if part[0].id == "i4":
      raise KeyboardInterrupt
    return _Scorer()(part)

  with pytest.raises(KeyboardInterrupt):
    score_once(Ledger(tmp_path), "ocr", killed, keys, items, size=2)
  back = _Scorer()
  scores, found = score_once(Ledger(tmp_path), "ocr", back, keys, items, 2)
  assert found == 4 and back.asked == ["i4", "i5"]
  assert [s.id for s in scores] == [i.id for i in items]


def test_ledger_asks_for_all_parts_at_once(tmp_path):
  items, keys = _items(7), _keys(1, 7)
  together = threading.Barrier(4)

  def scorer(part):
    together.wait(30)  # until the others are here too
    return _Scorer()(part)

  scores, _ = score_once(
    Ledger(tmp_path), "ocr", scorer, keys, items, size=2, together=True
  )
  assert scores == _Scorer()(items)
  assert len(Ledger(tmp_path)) == 7


def test_full_disk_costs_no_score_and_tears_no_line(
  tmp_path, monkeypatch, capfd
):
  write, items, ledger = os.write, _items(2), Ledger(tmp_path)
  score_once(ledger, "ocr", _Scorer(), _keys(0, 2), items)

  def full(file, data):
    if len(data) < 20:
      raise OSError(errno.ENOSPC, "No space left on device")
    return write(file, data[:-15])

  monkeypatch.setattr(journal.os, "write", full)
  for step in (1, 2):
    scores, _ = score_once(ledger, "ocr", _Scorer(), _keys(step, 2), items)
    assert all(s.ok for s in scores)
  assert score_once(ledger, "ocr", None, _keys(1, 2), items)[1] == 2
  monkeypatch.undo()
  score_once(ledger, "ocr", _Scorer(), _keys(3, 2), items)
  (line,) = capfd.readouterr().err.splitlines()
  assert "scores-0.jsonl can't be written (No space left on device)" in line
  assert len(Ledger(tmp_path)) == 4  # of steps 0 and 3


def test_ledger_of_one_process_finds_what_others_wrote(tmp_path):
  items = _items(2)
  for process in (0, 1):
    score_once(
      Ledger(tmp_path, process),
      "ocr",
      _Scorer(),
      _keys(1, 2)[process:][:1],
      items[process:][:1],
    )
  assert score_once(Ledger(tmp_path), "ocr", None, _keys(1, 2), items)[1] == 2


def test_replay_repeats_what_was_recorded(tmp_path):
  path, items = tmp_path / "replies" / "ocr.jsonl", _items(4)
  live = record(_Scorer(bad=("i2",)), path, "ocr")
  said = live(items)
  replayed = open_replay(path, "ocr")(items[::-1])[::-1]
  assert replayed == said
  assert not replayed[2].ok
  unknown = [
    items[0]._replace(prompt="other"),
    items[0]._replace(targets=("A b",)),
    _items(1, seed=9)[0],
  ]
  kinds = [s.error_kind for s in open_replay(path, "ocr")(unknown)]
  assert kinds == ["not_recorded"] * 3


def test_replay_of_another_reward_or_no_file_is_one_line(tmp_path):
  record(_Scorer(), tmp_path / "a", "ocr")(_items(1))
  for path, reward, says in (
    (tmp_path / "a", "hps", "ocr"),
    (tmp_path / "b", "ocr", "No such file"),
  ):
    with pytest.raises(InputError, match=says) as error:
      open_replay(path, reward)
    assert "\n" not in str(error.value)
