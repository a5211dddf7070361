"""Chinese signs of the drawn world."""

import collections
import hashlib
import re
import sys
import zlib

import numpy as np
import pytest

from xomni_jax.data import world, world_paint, world_signs_zh
from xomni_jax.data.prompts import open_prompts
from xomni_jax.data.world import COLOURS, open_world
from xomni_jax.errors import InputError

COUNT = 400
NAMES = {
  "红色": "red",
  "绿色": "green",
  "蓝色": "blue",
  "黑色": "black",
  "白色": "white",
  "黄色": "yellow",
}


@pytest.fixture(scope="module")
def records():
  """{split: its first records}."""
  pytest.importorskip("pylopdf_fonts_zh_cn")
  return {
    split: [open_world("signs-zh", split)[i] for i in range(COUNT)]
    for split in world.SPLITS
  }


def every_word():
  return {w for s in ("train", "held-out") for w in world_signs_zh.words(s)}


def of_split(split):
  """Listed words of a split, by the rule."""
  rest = {"validation": 0, "test": 8}[split]
  return {w for w in every_word() if zlib.crc32(w.encode()) % 16 == rest}


def said(record):
  return re.search("“(.*?)”", record["text"])[1]


def answers(record):
  return dict(record["qa"])


def test_lists_of_words_are_those_of_their_splits():
  words = every_word()
  assert len(words) >= 250
  assert all(re.fullmatch("[\u4e00-\u9fff]{2,4}", word) for word in words)
  assert len(of_split("validation")) >= 15 and len(of_split("test")) >= 15
  for split in ("validation", "test"):
    assert of_split(split) & set(world_signs_zh.words(split))
  both = [set(world_signs_zh.words(s)) for s in ("validation", "test")]
  assert not both[0] & both[1]


def test_no_held_out_word_stands_within_a_training_text(records):
  for split, rs in records.items():
    found = {
      other: [any(w in said(r) for w in of_split(other)) for r in rs]
      for other in ("validation", "test")
    }
    if split == "train":
      assert not any(found["validation"]) and not any(found["test"])
    elif split == "held-out":
      assert np.logical_or(found["validation"], found["test"]).all()
    else:
      assert all(found.pop(split))
      assert not any(next(iter(found.values())))


def test_a_row_with_a_held_out_word_in_it_is_drawn_again():
  (word,) = {"光临"} & of_split("test")
  rows = iter(f"路{word}" + "出口路")
  assert world_signs_zh._draw_row(lambda _: next(rows), 3) == "出口路"


def test_training_shows_most_characters_of_held_out_words(records):
  shown = {c for r in records["train"] for c in said(r)}
  wanted = {c for w in of_split("test") | of_split("validation") for c in w}
  assert len(wanted & shown) > 0.6 * len(wanted)


def test_a_characters_ink_stays_in_its_cell(records):
  seen = collections.defaultdict(set)
  for record in records["train"]:
    board = COLOURS[NAMES[answers(record)["牌子是什么颜色？"]]]
    colour = NAMES[answers(record)["文字是什么颜色？"]]
    pixels = np.asarray(record["image"])
    inked = (pixels != board).any(-1).reshape(6, 16, 6, 16).any((1, 3))
    assert (pixels == COLOURS[colour]).all(-1).any()
    lines = said(record).split(" ")
    assert [box[0] for box in record["boxes"]] == lines
    for line, x0, y0, x1, y1 in record["boxes"]:
      assert (x0, y0 % 32, y1 - y0, x1) == (0, 0, 16, 16 * len(line))
      assert inked[y0 // 16, : len(line)].all()
      if y0 > 32:
        assert not inked[y0 // 16, len(line) :].any()
        assert not inked[y0 // 16 + 1].any()
      for k, c in enumerate(line):
        patch = pixels[y0:y1, 16 * k : 16 * k + 16]
        seen[c, colour, board].add(patch.tobytes())
    shape = answers(record)["牌子上有什么形状？"]
    assert (shape == "没有") == ("有一个" not in record["text"])
    above, beside = inked[:2, 2:4].all(0).any(), inked[2:4, 4:].all(0).any()
    assert above == (f"上方有一个{shape}" in record["text"])
    assert beside == (f"旁边有一个{shape}" in record["text"])
    assert (shape in record["prompt"]) == (shape != "没有")
  assert all(len(patches) == 1 for patches in seen.values())


def test_every_character_has_a_glyph_of_its_own():
  pytest.importorskip("pylopdf_fonts_zh_cn")
  characters = {c for word in every_word() for c in word}
  glyphs = [world_paint.glyph_ink(c) for c in characters]
  assert len({glyph.tobytes() for glyph in glyphs}) == len(characters)
  # None is the box that stands for a missing one, nor reaches below.
  missing = world_paint.glyph_ink("\ue000").tobytes()
  assert missing not in {glyph.tobytes() for glyph in glyphs}
  assert not any(glyph[16:].any() for glyph in glyphs)


def test_questions_and_prompts_have_the_text(records):
  starts = set()
  for record in records["train"]:
    text, found = said(record), answers(record)
    assert len(found) == len(record["qa"])
    assert found["牌子上写着什么？"] == text
    characters = [a for q, a in record["qa"] if q.endswith("个字是什么？")]
    assert "".join(characters) == text.replace(" ", "")
    assert found["牌子上有几个字？"] == str(len(characters))
    assert f"“{text}”" in record["prompt"]
    starts.add(record["prompt"][0])
  assert {"一", "画", "请", "“"} <= starts


def test_prompts_are_chinese_with_targets_by_line():
  source = open_world("signs-zh", "test")
  prompts = open_prompts("world:signs-zh:test")
  for i in range(20):
    assert prompts[i].lang == source.lang == "zh" and prompts[i].size is None
    assert prompts[i].targets == source.sign(i).lines
    assert prompts[i].text == source.prompt(i)
  assert open_prompts("world:signs")[0].lang == "en"
  assert world.kind(source.sign(0)) in ("one word", "two words", "with digits")


def test_chinese_texts_are_the_same_on_every_machine():
  source = open_world("signs-zh")
  lines = "\n".join(
    f"{source.sign(i).text}|{source.prompt(i)}" for i in range(200)
  )
  digest = hashlib.sha256(lines.encode()).hexdigest()
  assert digest[:16] == "fa671670b3993089"


def test_a_missing_font_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "pylopdf_fonts_zh_cn", None)
  world_paint._chinese_font.cache_clear()
  with pytest.raises(InputError, match="pip install pylopdf-fonts-zh-cn"):
    world_paint.glyph_ink.__wrapped__("出")


def test_rapidocr_reads_chinese_signs(records):
  pytest.importorskip("rapidocr")
  from xomni_jax.rewards import ocr
  from xomni_jax.rewards.wire import Item

  source = open_world("signs-zh", "test")
  items = [
    Item(str(i), np.asarray(r["image"]), "", source.sign(i).lines, "zh")
    for i, r in enumerate(records["test"][:12])
  ]
  scores = ocr.make_scorer(ocr.open_engine("rapidocr"))(items)
  assert np.mean([s.score for s in scores]) >= 0.95
