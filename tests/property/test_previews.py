"""Records that previews show: as in training, bad ones are passed over."""

import json
import types

import pytest
from PIL import Image

from tests.helpers import GOLDEN
from xomni_jax.data import protocol, records
from xomni_jax.train_config import SourceConfig
from xomni_jax.training import configure
from xomni_jax.training.stages import ar, grids

GOOD = {"text": "a sign", "prompt": "draw it", "qa": [["What?", "A sign."]]}


def test_first_good_images_of_those_that_are_used_are_shown(tmp_path):
  for i in range(9):
    Image.new("RGB", (i + 1, 4)).save(tmp_path / f"{i}.png")
  (tmp_path / "3.png").write_bytes(b"no image")
  width = lambda record, _: records.image_of(record).width
  show = lambda **used: grids.shown_of(
    SourceConfig(str(tmp_path), "image", **used), 3, width
  )
  assert show() == [1, 2, 3]
  assert show(first=2) == [3, 5, 6]
  assert show(first=2, count=2) == [3]
  assert show(first=7) == [8, 9]


def test_no_more_than_some_bad_records_are_tried(tmp_path, monkeypatch):
  for i in range(9):
    (tmp_path / f"{i}.png").write_bytes(b"no image")
  monkeypatch.setattr(grids, "_TRIES", 3)
  tried = []

  def make(record, i):
    tried.append(i)
    return records.image_of(record)

  assert not grids.shown_of(SourceConfig(str(tmp_path), "image"), 2, make)
  assert tried == [0, 1, 2, 3, 4, 5]


@pytest.fixture
def preview(tmp_path):
  """Of eight records; the first and the last are not used."""
  codes = lambda h, w: [[i % 64 for i in range(w)]] * h
  lines = [
    {**GOOD, "key": "0", "codes": codes(5, 5)},
    {**GOOD, "key": "no codes"},
    {"key": "no text", "codes": codes(2, 2)},
    {**GOOD, "key": "of another tokenizer", "codes": [[64]]},
    {**GOOD, "key": "too long", "codes": codes(20, 20)},
    {**GOOD, "key": "5", "codes": codes(2, 3)},
    {**GOOD, "key": "6", "codes": codes(3, 2)},
    {**GOOD, "key": "7", "codes": codes(4, 4)},
  ]
  path = tmp_path / "records.jsonl"
  path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  config = configure.read("configs/pretrain.py:tiny")
  used = {"path": str(path), "weight": 1.0, "first": 1, "count": 6}
  config.data.sources = config.eval_data.sources = (
    {**used, "task": "generate"},
    {**used, "task": "chat"},
  )
  made = ar._Preview(configure.parse(config, "test")[0], None)
  tokenizer = protocol.load_tokenizer(GOLDEN / "xomni", 448, 64)
  made._model = types.SimpleNamespace(tokenizer=tokenizer)
  return made


def test_good_records_are_drawn(preview):
  assert preview._some_prompts() == {(2, 3): ["draw it"], (3, 2): ["draw it"]}


def test_good_records_are_read(preview):
  shown = [(codes.shape, *said) for codes, _, *said in preview._some_to_read()]
  assert shown == [(s, "What?\n", "A sign.") for s in ((2, 3), (3, 2))] * 2
