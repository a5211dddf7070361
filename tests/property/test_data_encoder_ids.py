"""CLIP and T5 ids: conventions, and other implementations as witnesses."""

import json
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from xomni_jax.data import encoder_ids
from xomni_jax.errors import InputError

FLUX1 = Path(__file__).parents[1] / "golden" / "tiny-a" / "flux1"
CLIP, T5 = FLUX1 / "tokenizer", FLUX1 / "tokenizer_2"
TEXTS = [
  "",
  'A poster with the title "Hello World", 3 icons.',
  "It's  a\tDOG's\n\n life; they'll say: 'We've won!' 2024",
  "naïve CAFÉ, Ünïcode — “quotes” … 50% off (c) #1",
  "smile 😀🤣 family 👩‍👩‍👧 flag 🇨🇭",
  "before<|endoftext|>after",
]
CHINESE = ["一只猫坐在窗边 Describe the image", "a「猫」b 狗dog，さくら"]


def refused(match, function, *args):
  """Asserts a one-line InputError with these words."""
  with pytest.raises(InputError, match=match) as error:
    function(*args)
  assert "\n" not in str(error.value)


def copied(source, target, *names):
  target.mkdir()
  for name in names:
    shutil.copyfile(source / name, target / name)
  return target


@pytest.fixture(scope="module")
def clip():
  return encoder_ids.load_clip_tokenizer(CLIP)


@pytest.fixture(scope="module")
def basic():
  """The tokenizer in front of the slow CLIPTokenizer of transformers 4."""
  legacy = pytest.importorskip(
    "transformers.models.bert.tokenization_bert_legacy"
  )
  return legacy.BasicTokenizer(strip_accents=False, do_split_on_punc=False)


def fast_clip(texts):
  """Ids of transformers' CLIPTokenizer, which is the fast algorithm."""
  from transformers import CLIPTokenizer

  tokenizer = CLIPTokenizer.from_pretrained(str(CLIP))
  rows = tokenizer(texts, padding="max_length", max_length=77, truncation=True)
  return np.array(rows["input_ids"])


def test_clip_equals_transformers_where_no_chinese_is(clip):
  # Its fast algorithm keeps the joiners (Cf) of emoji, the slow one does not.
  texts = [text for text in TEXTS if "\u200d" not in text]
  np.testing.assert_array_equal(clip(texts), fast_clip(texts))


def test_clip_equals_transformers_behind_basic_tokenizer(clip, basic):
  texts = TEXTS[:-1] + CHINESE
  words = [" ".join(basic.tokenize(text)) for text in texts]
  np.testing.assert_array_equal(clip(texts), fast_clip(words))


def test_clip_ends_a_word_after_every_ideograph(clip):
  (together,), (apart,) = clip(["猫坐"]), clip(["猫 坐"])
  np.testing.assert_array_equal(together, apart)
  assert (
    fast_clip(["猫坐"]) != fast_clip(["猫 坐"])
  ).any()  # the trap is there


@pytest.mark.skipif(
  sys.version_info >= (3, 13), reason="one check over all of Unicode is enough"
)
def test_clip_words_equal_basic_tokenizer_on_all_of_unicode(basic):
  points = [c for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]
  # Unassigned and private ones are all alike: a sample of each.
  kinds = {"Cn": 997, "Co": 997, "Lo": 7}
  for c in points:
    if c % kinds.get(unicodedata.category(chr(c)), 1) == 0:
      text = f"A{chr(c)}Σ"
      assert encoder_ids.clip_words(text) == " ".join(basic.tokenize(text))


def test_clip_words_treat_the_ends_of_ideograph_blocks_alike(basic):
  ends = [
    0x3400, 0x4DBF, 0x4E00, 0x9FFF, 0xF900, 0xFAFF, 0x20000, 0x2A6DF,
    0x2A700, 0x2B73F, 0x2B740, 0x2B81F, 0x2B820, 0x2CEAF, 0x2F800, 0x2FA1F,
  ]  # fmt: skip
  for end in ends:
    for c in (end - 1, end, end + 1):
      text = f"a{chr(c)}b"
      assert encoder_ids.clip_words(text) == " ".join(basic.tokenize(text))


def test_clip_pads_with_end_of_text_and_cuts_long_texts(clip):
  empty, long = clip(["", "cat " * 200])
  assert empty[0] == 582 and (empty[1:] == 583).all() and len(empty) == 77
  assert long[0] == 582 and long[76] == 583 and (long[:76] != 583).all()
  short = encoder_ids.load_clip_tokenizer(CLIP, 5)
  np.testing.assert_array_equal(short(["cat " * 9])[0, :4], long[:4])
  assert short(["cat " * 9])[0, 4] == 583
  assert clip([]).shape == (0, 77)


def test_clip_reads_a_folder_that_transformers_5_saved(clip, tmp_path):
  from transformers import CLIPTokenizer

  CLIPTokenizer.from_pretrained(str(CLIP)).save_pretrained(str(tmp_path))
  for name in ("vocab.json", "merges.txt"):
    (tmp_path / name).unlink(missing_ok=True)
  saved = encoder_ids.load_clip_tokenizer(tmp_path)
  texts = TEXTS + CHINESE
  np.testing.assert_array_equal(saved(texts), clip(texts))


def test_clip_refuses_missing_and_broken_files(tmp_path):
  load = encoder_ids.load_clip_tokenizer
  refused("no files, expected vocab.json", load, tmp_path)
  refused("no files, expected vocab.json", load, tmp_path / "missing")
  folder = copied(CLIP, tmp_path / "cut", "vocab.json", "merges.txt")
  (folder / "vocab.json").write_bytes((CLIP / "vocab.json").read_bytes()[:999])
  refused("can't be read", load, folder)
  vocab = json.loads((CLIP / "vocab.json").read_text("utf-8"))
  del vocab["<|startoftext|>"]
  (folder / "vocab.json").write_text(json.dumps(vocab))
  refused("can't be read .*startoftext", load, folder)
  shutil.copyfile(CLIP / "vocab.json", folder / "vocab.json")
  (folder / "merges.txt").write_text("#version: 0.2\nxyz abc\n")
  refused("can't be read", load, folder)


def with_space_mark(folder):
  """A T5 folder whose file puts the space mark first, as FLUX.1-dev's does."""
  content = json.loads((T5 / "tokenizer.json").read_text("utf-8"))
  content["pre_tokenizer"]["prepend_scheme"] = "always"
  (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
  return folder


def test_t5_equals_sentencepiece_where_the_file_begins_with_a_space(tmp_path):
  sentencepiece = pytest.importorskip("sentencepiece")
  model = sentencepiece.SentencePieceProcessor(
    model_file=str(T5 / "spiece.model")
  )
  ids = encoder_ids.load_t5_tokenizer(with_space_mark(tmp_path))
  texts = [text for text in TEXTS + CHINESE if text]
  for text, row in zip(texts, ids(texts), strict=True):
    expected = [*model.encode(text), 1]
    assert row.tolist() == expected + [0] * (512 - len(expected)), text


def test_t5_equals_transformers_where_the_file_begins_with_a_space(tmp_path):
  from transformers import T5Tokenizer

  tokenizer = T5Tokenizer.from_pretrained(str(T5))
  texts = [*TEXTS[:4], *CHINESE, "fill <extra_id_0> in"]
  rows = tokenizer(texts, padding="max_length", max_length=512, truncation=True)
  ids = encoder_ids.load_t5_tokenizer(with_space_mark(tmp_path))
  np.testing.assert_array_equal(ids(texts), rows["input_ids"])


def test_t5_pads_with_0_and_cuts_long_texts():
  ids = encoder_ids.load_t5_tokenizer(T5)
  empty, long = ids(["", "cat " * 900])
  assert empty[0] == 1 and (empty[1:] == 0).all() and len(empty) == 512
  assert long[511] == 1 and (long[:511] > 1).all()
  short = encoder_ids.load_t5_tokenizer(T5, 6)(["cat " * 9])
  np.testing.assert_array_equal(short[0, :5], long[:5])
  assert short[0, 5] == 1


def test_t5_refuses_missing_and_broken_files(tmp_path):
  load = encoder_ids.load_t5_tokenizer
  refused("no files, expected tokenizer.json", load, tmp_path)
  folder = copied(T5, tmp_path / "cut", "spiece.model")
  refused("no files, expected tokenizer.json", load, folder)
  (folder / "tokenizer.json").write_text("{")
  refused("can't be read", load, folder)
  shutil.copyfile(
    FLUX1.parent / "xomni" / "tokenizer.json", folder / "tokenizer.json"
  )
  refused("<pad> has id None, expected 0", load, folder)


def test_text_that_is_not_unicode_is_refused(clip):
  refused(r"'\\udcff' at character 2", clip, ["ab\udcff"])
  t5 = encoder_ids.load_t5_tokenizer(T5)
  refused("expected Unicode", t5, ["ab\udcff"])
