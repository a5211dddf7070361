"""Tokenizers built from text: accepted by the loaders, and by independent
readers of the same files.
"""

import json
import re
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.helpers import GOLDEN
from xomni_jax.data import encoder_ids, protocol
from xomni_jax.data.build_encoder_tokenizers import build_clip, build_t5
from xomni_jax.data.build_tokenizers import (
  build_qwen,
  extend_qwen,
  world_lines,
)
from xomni_jax.data.world import open_world
from xomni_jax.errors import InputError

VOCAB, IMAGE, MM = 512, 64, 128
TEXTS = [
  'A red sign that says "OPEN 24", with a star above it.',
  "",
  " ",
  "  two  spaces ",
  "tab\tand\nline\r\n\nends ",
  "Größe 漢字 ☃ ﬁ ½ e\u0301",
  "don't you'LL 12345 ...?!",
  "<|endoftext|> and <|im_end|>",
]


@pytest.fixture(scope="module")
def lines():
  return list(world_lines(120))


@pytest.fixture(scope="module")
def folder(lines, tmp_path_factory):
  """One folder each of "qwen", "clip" and "t5"; read only."""
  out = tmp_path_factory.mktemp("tokenizers")
  build_qwen(lines, out / "qwen", VOCAB, IMAGE, MM)
  build_clip(lines, out / "clip", 640)
  build_t5(lines, out / "t5", 384)
  return out


@pytest.fixture(scope="module")
def qwen(folder):
  return protocol.load_tokenizer(folder / "qwen", VOCAB, IMAGE)


@pytest.fixture(scope="module")
def prompts():
  source = open_world("signs", "test")
  return [source[i]["prompt"] for i in range(200)]


def test_the_same_lines_give_the_same_bytes(lines, folder, tmp_path):
  build_qwen(iter(lines), tmp_path / "qwen", VOCAB, IMAGE, MM)
  build_clip(iter(lines), tmp_path / "clip", 640)
  build_t5(iter(lines), tmp_path / "t5", 384)
  names = sorted(
    p.relative_to(folder) for p in folder.rglob("*") if p.is_file()
  )
  assert len(names) == 14
  for name in names:
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_files_are_those_of_the_golden_folders(folder):
  for ours, theirs in (
    ("qwen", GOLDEN / "xomni"),
    ("clip", GOLDEN / "flux1/tokenizer"),
    ("t5", GOLDEN / "flux1/tokenizer_2"),
  ):
    found = {p.name for p in (folder / ours).iterdir()}
    wanted = {p.name for p in theirs.iterdir() if p.is_file()}
    wanted -= {"config.json", "generation_config.json"}
    assert found == {n for n in wanted if "safetensors" not in n}


def test_qwen_ids_are_where_the_model_has_them(qwen):
  assert qwen.encode("<MM-Token-0><MM-Token-63>") == [VOCAB, VOCAB + IMAGE - 1]
  specials = [qwen.som_id, qwen.eom_id, qwen.image_id]
  assert specials == [VOCAB + IMAGE + i for i in range(3)]
  # Every id is some token's.
  tokens = qwen.backend.convert_ids_to_tokens(list(range(VOCAB + IMAGE + 3)))
  assert len(set(tokens)) == VOCAB + IMAGE + 3 and None not in tokens


def test_qwen_decodes_what_it_encoded(qwen, prompts):
  for text in (*TEXTS, *prompts):
    composed = text.replace("e\u0301", "é")
    assert qwen.decode(qwen.encode(text)) == composed


def test_qwen_has_one_token_for_each_character_of_signs(qwen, prompts):
  for prompt in prompts:
    said = prompt.split('"')[1]
    for start in ('"', 'says "', ""):
      tokens = [qwen.decode([i]) for i in qwen.encode(f"{start}{said}")]
      assert tokens[-len(said) :] == list(said)


def test_qwen_writes_image_sizes_digit_by_digit(qwen):
  ids = qwen.encode(protocol.image_prefix(12, 6))
  assert [qwen.decode([i]) for i in ids] == (
    ["<SOM>", "1", "2", " ", "6", "<IMAGE>"]
  )


def test_qwen_never_joins_digits(tmp_path):
  build_qwen(["2024 year 2024"] * 9, tmp_path, 300, 4, 10)
  # By the file; transformers' class has a pattern of its own.
  tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  ids = tokenizer.encode("2024 year").ids
  assert [tokenizer.decode([i]) for i in ids] == [*"2024", " year"]


def test_qwen_has_qwens_chat_template(qwen):
  theirs = protocol.load_tokenizer(GOLDEN / "xomni", 448, 64)
  ours = qwen.chat_prompt("Which colour?")
  assert ours == theirs.chat_prompt("Which colour?")
  # Words of every chat are single tokens.
  assert len(qwen.encode(ours)) < 25


def test_qwen_forms_of_the_files_agree(folder, qwen, tmp_path, prompts):
  from transformers import Qwen2Tokenizer

  for name in ("vocab.json", "merges.txt", "added_tokens.json"):
    shutil.copyfile(folder / "qwen" / name, tmp_path / name)
  shutil.copyfile(
    folder / "qwen/tokenizer_config.json", tmp_path / "tokenizer_config.json"
  )
  slow = Qwen2Tokenizer.from_pretrained(str(tmp_path))
  fast = Tokenizer.from_file(str(folder / "qwen/tokenizer.json"))
  for text in (*TEXTS, *prompts, "<SOM>1 1<IMAGE><MM-Token-5><EOM>"):
    theirs = slow.encode(text, add_special_tokens=False)
    assert qwen.encode(text) == fast.encode(text).ids == theirs, text


def test_unused_text_ids_are_extra_tokens(tmp_path):
  build_qwen(["abab"], tmp_path, 300, 4, 10)
  tokenizer = protocol.load_tokenizer(tmp_path, 300, 4)
  assert tokenizer.encode("<MM-Token-0>") == [300]
  ids = json.loads((tmp_path / "added_tokens.json").read_text())
  assert ids["<|extra_0|>"] == ids["<|im_end|>"] + 1
  assert max(i for t, i in ids.items() if "extra" in t) == 299


def test_extended_tokenizer_keeps_its_ids_and_adds_the_images(
  folder, qwen, tmp_path, prompts
):
  plain = tmp_path / "plain"
  build_qwen(list(world_lines(120)), plain, VOCAB, 1, 4)
  whole = json.loads((plain / "tokenizer.json").read_text("utf-8"))
  # As Qwen2.5's own: no image tokens, and ids unused below vocab_size.
  whole["added_tokens"] = [
    t for t in whole["added_tokens"] if not t["content"].startswith("<|extra")
  ][:3]
  (plain / "tokenizer.json").write_text(json.dumps(whole), "utf-8")
  source = {p.name: p.read_bytes() for p in plain.iterdir()}
  out = tmp_path / "out"
  extend_qwen(plain, out, 700, 300)
  assert {p.name: p.read_bytes() for p in plain.iterdir()} == source
  extended = protocol.load_tokenizer(out, 700, 300)
  assert extended.encode("<MM-Token-299><SOM>") == [999, 1000]
  for text in prompts:
    assert extended.encode(text) == qwen.encode(text)
  assert extended.chat_prompt("x") == qwen.chat_prompt("x")
  with pytest.raises(InputError, match="has <SOM>, <EOM>, <IMAGE> already"):
    extend_qwen(out, tmp_path / "again", 700, 300)
  with pytest.raises(InputError, match=r"vocab_size is 300, expected at least"):
    extend_qwen(plain, tmp_path / "again", 300, 300)
  with pytest.raises(InputError, match=r"tokenizer\.json: not readable"):
    extend_qwen(tmp_path, tmp_path / "again", 700, 300)


def test_clip_ends_are_the_last_ids(folder):
  ids = encoder_ids.load_clip_tokenizer(folder / "clip")(["sign", ""])
  assert ids.shape == (2, 77) and ids.max() == 639
  assert list(ids[1, :2]) == [638, 639] and (ids[:, -1] == 639).all()


def test_clip_ends_are_the_last_ids_though_merges_run_out(lines, tmp_path):
  build_clip(lines, tmp_path, 2000)
  ids = encoder_ids.load_clip_tokenizer(tmp_path)(["sign"])[0]
  assert ids[0] == 1998 and ids[-1] == ids.max() == 1999 and ids[1] < 1000


def test_clip_ids_spell_the_text(folder, prompts):
  text_ids = encoder_ids.load_clip_tokenizer(folder / "clip")
  vocab = json.loads((folder / "clip/vocab.json").read_text("utf-8"))
  token = {i: t for t, i in vocab.items()}
  assert len(token) == len(vocab)
  texts = [*TEXTS[:5], *prompts]
  for text, row in zip(texts, text_ids(texts), strict=True):
    spelled = "".join(token[i] for i in row[1:] if i < 638)
    words = spelled.replace("</w>", " ").split()
    assert "".join(words) == "".join(text.lower().split())


def test_clip_merges_are_used(folder, prompts):
  rows = encoder_ids.load_clip_tokenizer(folder / "clip")(prompts)
  used = (rows < 638).sum() / sum(len("".join(p.split())) for p in prompts)
  assert used < 0.6, "tokens per character"


def test_t5_ids_equal_sentencepiece(folder, prompts):
  import sentencepiece

  model = sentencepiece.SentencePieceProcessor(
    model_file=str(folder / "t5/spiece.model")
  )
  assert [model.pad_id(), model.eos_id(), model.unk_id()] == [0, 1, 2]
  # Written-out special tokens are text to SentencePiece.
  texts = [*TEXTS[:-1], *prompts]
  rows = encoder_ids.load_t5_tokenizer(folder / "t5", 128)(texts)
  for text, row in zip(texts, rows, strict=True):
    theirs = [*model.encode(text), 1]
    padded = np.pad(theirs, (0, 128 - len(theirs)))
    np.testing.assert_array_equal(row, padded, err_msg=repr(text))
  assert (rows[len(TEXTS) :] != 2).all(), "a sign's text has unknown characters"


def test_t5_has_a_piece_for_each_word_that_is_often_said(folder):
  """SentencePiece alone takes parts of several words only."""
  whole = json.loads((folder / "t5/tokenizer.json").read_text("utf-8"))
  pieces = {piece for piece, _ in whole["model"]["vocab"]}
  assert {"\u2581sign", "\u2581that", "\u2581with", "\u2581above"} <= pieces


def test_t5_ids_stay_below_the_vocabulary(folder):
  whole = json.loads((folder / "t5/tokenizer.json").read_text("utf-8"))
  ids = [t["id"] for t in whole["added_tokens"]]
  assert max(ids) < 384 and len(ids) == 103
  assert ids[3] == len(whole["model"]["vocab"])


@pytest.mark.parametrize(
  ("build", "words"),
  [
    (lambda d: build_qwen(["a"], d, 258, 4, 10), "vocab_size is 258.*259"),
    (lambda d: build_qwen(["a"], d, 300, 8, 10), "mm_vocab_size is 10.*11"),
    (lambda d: build_clip(["a"], d, 513), "vocab_size is 513.*514"),
    (lambda d: build_t5(["a"], d, 103), "vocab_size is 103.*104"),
    (lambda d: build_t5(["abcdefgh"], d, 105), "no T5 tokenizer.*105"),
    (lambda d: build_t5([], d, 200), "no T5 tokenizer.*200"),
  ],
)
def test_vocabularies_without_room_are_refused(build, words, tmp_path):
  with pytest.raises(InputError, match=words) as e:
    build(tmp_path / "out")
  assert len(str(e.value).splitlines()) == 1
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("level", ["signs", "posters"])
def test_world_lines_join_no_characters_of_images(level):
  lines = list(world_lines(50, level))
  assert not [x for x in lines if re.search(r"[A-Z0-9]{2,}", x)]
  assert not [x for x in lines if re.search(r"[A-Z0-9] [A-Z0-9]", x)]
  source = open_world(level)
  shown = "".join(line for i in range(50) for line in source.sign(i).lines)
  assert set(shown) - {" "} <= set(lines)
