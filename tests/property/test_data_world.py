"""The drawn world: what a sign says is what is drawn, and splits keep apart."""

import collections
import hashlib
import itertools
import pickle
import re
import zlib

import numpy as np
import pytest

from xomni_jax.data import world, world_signs
from xomni_jax.data.world import COLOURS, open_world
from xomni_jax.data.world_words import Picks, draw_code
from xomni_jax.errors import InputError

COUNT = 1500


@pytest.fixture(scope="module")
def records():
  """{split: its first records}."""
  return {
    split: [open_world("signs", split)[i] for i in range(COUNT)]
    for split in world.SPLITS
  }


def split_of(word):
  """Written out again from the rule."""
  letters = [c for c in word if c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
  remainder = zlib.crc32(word.encode("ascii")) % 16
  if len(letters) < 2:
    return "train"
  return {0: "validation", 8: "test"}.get(remainder, "train")


def said(record):
  return record["text"].split('"')[1]


def test_splits_share_no_held_out_word(records):
  found = {
    split: {split_of(w) for r in rs for w in said(r).split()}
    for split, rs in records.items()
  }
  assert found["train"] == {"train"}
  assert found["validation"] == {"train", "validation"}
  assert found["test"] == {"train", "test"}
  for split in ("validation", "test", "held-out"):
    wanted = {"validation", "test"} if split == "held-out" else {split}
    for record in records[split]:
      assert wanted & {split_of(w) for w in said(record).split()}, record["key"]


def test_both_held_out_splits_have_words_enough():
  counts = collections.Counter(map(split_of, world.words()))
  assert min(counts.values()) >= 40, counts


def test_words_are_upper_case_unique_and_fit_a_line():
  words = world.words()
  assert len(words) == len(set(words)) >= 600
  for word in words:
    assert word.isascii() and word.isalpha() and word.isupper()
    assert 2 <= len(word) <= world_signs.CELLS


def test_texts_fit_the_cells(records):
  for record in itertools.chain(*records.values()):
    text = said(record)
    assert len(text) <= 8 and 1 <= len(text.split()) <= 2
    assert max(map(len, text.split())) <= 6
    assert len(record["boxes"]) == len(text.split())
    for (word, x0, y0, x1, y1), line in zip(
      record["boxes"], text.split(), strict=True
    ):
      assert word == line and (x0, y1 - y0, x1) == (0, 16, 16 * len(word))


def test_every_character_stands_in_every_cell_of_the_first_line(records):
  seen = collections.Counter(
    (column, c)
    for record in records["train"]
    for column, c in enumerate(said(record).split()[0])
  )
  missing = [
    (column, c)
    for column in range(5)
    for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    if not seen[column, c]
  ]
  # 36 x 5 places; rare ones may be absent from so few signs.
  assert len(missing) <= 5, missing


def cell(record, row, column):
  pixels = np.asarray(record["image"])
  return pixels[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]


def test_a_cell_depends_on_its_character_and_colours_alone(records):
  patches = collections.defaultdict(set)
  for record in records["train"]:
    colour, board = colours_of(record)
    for (word, _, y0, *_), line in zip(
      record["boxes"], said(record).split(), strict=True
    ):
      assert word == line
      for column, c in enumerate(word):
        patch = cell(record, y0 // 16, column).tobytes()
        patches[c, colour, board].add(patch)
  assert all(len(found) == 1 for found in patches.values())
  # And different characters look different.
  for pair in {key[1:] for key in patches}:
    drawn = [p for key, (p,) in patches.items() if key[1:] == pair]
    assert len(set(drawn)) == len(drawn) > 20


def answers(record):
  return dict(record["qa"])


def colours_of(record):
  found = answers(record)
  return found["Which colour is the text?"], found["Which colour is the board?"]


def test_answers_and_captions_tell_the_colours_of_the_pixels(records):
  for record in records["train"][:300]:
    pixels = np.asarray(record["image"]).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    colour, board = colours_of(record)
    assert tuple(colours[np.argmax(counts)]) == COLOURS[board]
    assert (pixels == COLOURS[colour]).all(axis=1).any()
    assert f"A {board} sign" in record["text"]
    assert f"in {colour}" in record["text"]


def test_questions_on_columns_spell_the_text(records):
  for record in records["train"]:
    found = answers(record)
    columns = [a for q, a in record["qa"] if q.startswith("Which character")]
    assert "".join(columns) == said(record).replace(" ", "")
    assert found["What does the sign say?"] == said(record)
    assert found["How many characters does the text have?"] == str(len(columns))
    assert len(found) == len(record["qa"]), "a question occurs twice"
    spelled = found["Spell the text."].split(" / ")
    assert ["".join(s.split()) for s in spelled] == said(record).split()


def blank_cells(record):
  """bool[6, 6]: cells that hold nothing but the board."""
  board = COLOURS[colours_of(record)[1]]
  pixels = np.asarray(record["image"]).reshape(6, 16, 6, 16, 3)
  return (pixels == board).all(axis=(1, 3, 4))


def test_shapes_are_drawn_where_they_are_said(records):
  kinds = collections.Counter()
  for record in records["train"]:
    shape = answers(record)["Which shape is on the sign?"]
    blank = blank_cells(record)
    above = not blank[:2, 2:4].all()
    beside = f"{shape} beside it" in record["text"]
    assert above == (f"{shape} above it" in record["text"])
    assert (shape == "none") == (not above and not beside)
    if beside:
      assert not blank[2:4, 4:].all(axis=0).any()
    assert (shape in record["prompt"]) == (shape != "none")
    kinds[shape] += 1
  assert min(kinds.values()) > COUNT / 10 and len(kinds) == 5


def test_prompts_ask_for_the_text_in_varied_words(records):
  prompts = [r["prompt"].split('"') for r in records["train"]]
  source = open_world("signs")
  asked = [source.sign(i).text for i in range(COUNT)]
  assert [p[1] for p in prompts] == asked
  starts = {p[0].split()[0] for p in prompts if p[0]}
  assert starts == {"A", "Draw", "Please"}


def test_no_character_of_a_code_tells_its_neighbour():
  """Else nothing asks a tokenizer to tell S from 5."""
  alike, pairs = 0, set()
  codes = [draw_code(Picks(i, "code"), 6) for i in range(COUNT)]
  for code in codes:
    for a, b in itertools.pairwise(code):
      alike += a.isdigit() == b.isdigit()
      pairs.add((a.isdigit(), b))
  assert abs(alike / (5 * len(codes)) - 0.5) < 0.03
  assert len(pairs) == 2 * 36
  assert {split_of(code) for code in codes} == {"train"}


@pytest.mark.parametrize("level", ["signs", "posters"])
def test_training_images_are_misspelt_now_and_then(level):
  source = open_world(level)
  count = wrong = 0
  for i in range(COUNT):
    wanted, record = source.sign(i), source[i]
    painted = [line for line, *_ in record["boxes"]]
    for line, there in zip(wanted.lines, painted, strict=True):
      count += 1
      assert len(line) == len(there) and line in record["prompt"]
      changed = [(a, b) for a, b in zip(line, there, strict=True) if a != b]
      wrong += bool(changed)
      assert len(changed) < 2
      assert all(a.isdigit() == b.isdigit() for a, b in changed)
    # Captions and answers are true, and no held-out word comes of a slip.
    quoted = re.findall('"([^"]*)"', record["text"])
    assert " ".join(quoted) == " ".join(painted)
    asked = dict(record["qa"])
    if len(painted) > 1 and level == "posters":
      assert asked["What does line 2 say?"] == painted[1]
    words = " ".join(painted).split()
    assert {split_of(word) for word in words} == {"train"}
  assert 0.045 < wrong / count < 0.075


@pytest.mark.parametrize("level", ["signs", "posters"])
@pytest.mark.parametrize("split", ["validation", "test", "held-out"])
def test_held_out_images_are_as_asked_for(level, split):
  source = open_world(level, split)
  for i in range(200):
    painted = tuple(line for line, *_ in source[i]["boxes"])
    assert painted == source.sign(i).lines


def test_records_are_a_function_of_level_split_and_index():
  source = open_world("signs")
  again = pickle.loads(pickle.dumps(source))
  for i in (0, 7, 2**31 - 2):
    ours, theirs = source[i], again[i]
    assert ours.pop("image").tobytes() == theirs.pop("image").tobytes()
    assert ours == theirs and ours["key"] == source.name(i)
    assert (ours["width"], ours["height"]) == source.size(i) == (96, 96)
  assert source[0]["text"] != open_world("signs", "test")[0]["text"]
  assert len(source) == 2**31 - 1


def test_texts_are_the_same_on_every_machine():
  """Digest of 200 records' words; the raw Philox stream is fixed by numpy."""
  source = open_world("signs")
  lines = "\n".join(
    f"{r['text']}|{r['prompt']}" for r in map(source.__getitem__, range(200))
  )
  digest = hashlib.sha256(lines.encode()).hexdigest()
  assert digest[:16] == "9aa8e430a7c64310"


def test_training_texts_hardly_repeat(records):
  texts = [said(r) for r in records["train"]]
  assert len(set(texts)) > 0.7 * COUNT


@pytest.mark.parametrize("i", [-1, 2**31 - 1])
def test_indices_outside_the_world_raise(i):
  source = open_world("signs")
  for call in (source.__getitem__, source.size, source.sign):
    with pytest.raises(IndexError, match=str(i)):
      call(i)


def test_unknown_levels_and_splits_are_refused():
  with pytest.raises(
    InputError, match=r"no level 'maps'.*signs, posters, signs-zh"
  ):
    open_world("maps")
  with pytest.raises(InputError, match=r"no split 'valid'.*validation"):
    open_world("signs", "valid")
