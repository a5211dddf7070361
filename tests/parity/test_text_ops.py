"""Text by TensorFlow Text against `tokenizers`' ids and plain Python.

Exact. TensorFlow's import takes most of the time of this file; all that needs
it is here, so that it happens once.
"""

import random
import sys
import unicodedata

import numpy as np
import pytest

from tests.helpers import GOLDEN
from xomni_jax.data import text_ops
from xomni_jax.errors import InputError
from xomni_jax.reward_config import RewardConfig
from xomni_jax.rewards import ocr, ocr_engines, text_scores, wire
from xomni_jax.rewards import open as open_lib

FOLDER = GOLDEN / "flux1" / "tokenizer_2"
TEXTS = [
  "", " ", "   ", "a", " a", "a ", "  a", "a  b", "\n", "a\nb\tc", "\r\n a",
  "一只猫坐在窗边 Describe the image", "a「猫」b 狗dog，さくら",
  "😀🤣 👩‍👩‍👧 🇨🇭", "naïve CAFÉ", "cafe\u0301", "e\u0301\u200dx", "ﬁ ①", "ｆｕｌｌ Ⅷ",
  "か\u3099", "\u1100\u1161", "a\u00a0b\u3000c\u2028d", "a\u200bb\u00adc\ufeff",
  "a\x00b\x01c\x7f\x85", "a \u2581 b\u2581", "\ufffd",
  "<pad>", "a</s>b", "<unk>", "x <extra_id_0> y<extra_id_99>", "<extra_id_",
  "the " * 200,
]  # fmt: skip


@pytest.fixture(scope="module")
def backends():
  pytest.importorskip("tensorflow_text")
  return [
    text_ops.T5Ids(FOLDER, 64, backend)
    for backend in ("tokenizers", "tensorflow_text")
  ]


def assert_same(backends, texts):
  ours, theirs = (ids(texts) for ids in backends)
  assert ours.dtype == theirs.dtype == np.int32
  wrong = [
    t for t, a, b in zip(texts, ours, theirs, strict=True) if (a != b).any()
  ]
  assert not wrong, wrong[:5]


def test_t5_ids_of_golden_prompts_by_tensorflow_text(
  backends, golden, golden_json
):
  ids = text_ops.T5Ids(FOLDER, backend="tensorflow_text")
  got = ids(golden_json["flux_prompts"])
  np.testing.assert_array_equal(got, golden["text/t5_ids"])


def test_t5_ids_of_odd_texts_are_the_same(backends):
  assert_same(backends, TEXTS)
  assert backends[1]([]).shape == (0, 64)


def test_t5_ids_of_random_texts_are_the_same(backends):
  rng = random.Random(0)
  parts = [
    " ", "  ", "\t", "a", "the ", "一", "é", "e\u0301", "😀", "\u200d", "ﬁ", "\u3000",
    "</s>", "<", "\u00a0", "\u0301", "ｆ",
  ]  # fmt: skip
  texts = [
    "".join(rng.choice(parts) for _ in range(rng.randint(0, 30)))
    for _ in range(1000)
  ]
  assert_same(backends, texts)


def characters():
  for c in range(1, 0x32000):
    if unicodedata.category(chr(c)) not in ("Cs", "Co", "Cn"):
      yield chr(c)


@pytest.mark.slow
def test_t5_ids_of_all_characters_are_the_same(backends):
  texts = [f"a{c}b {c}c" for c in characters()]
  for first in range(0, len(texts), 5000):
    assert_same(backends, texts[first : first + 5000])


def test_nfc_is_the_same(backends):
  texts = [*TEXTS, *(f"{c}\u0301" for c in characters())][::1]
  ours = text_ops.nfc(texts)
  assert ours == text_ops.nfc(texts, "tensorflow_text")
  assert ours == [unicodedata.normalize("NFC", t) for t in texts]
  assert ours != texts
  assert text_ops.nfc([], "tensorflow_text") == []


LANGS = ("en", "zh", "de", "ja")


@pytest.fixture(scope="module")
def normalize_all():
  pytest.importorskip("tensorflow_text")
  from xomni_jax.rewards.text_batches import open_normalizer

  return open_normalizer()


def assert_normalised(normalize_all, texts, langs):
  ours = normalize_all(texts, langs)
  theirs = [text_scores.normalize(*x) for x in zip(texts, langs, strict=True)]
  wrong = [
    x for x in zip(texts, langs, ours, theirs, strict=True) if x[2] != x[3]
  ]
  assert not wrong, wrong[:5]


@pytest.mark.parametrize("lang", LANGS[:3])
def test_texts_of_all_characters_are_normalised_alike(normalize_all, lang):
  texts = [f"A{c} {c}b{c}" for c in characters()]
  assert_normalised(normalize_all, texts, [lang] * len(texts))


def test_random_texts_are_normalised_alike(normalize_all):
  rng = random.Random(0)
  parts = [
    *" \t\r\n\x0b\x1c\x1f\x85\u00a0\u1680\u2003\u2028\u202f\u205f\u3000",
    *"aB9.,!", *"一龥龦春，。", *"ＡｂＣ１！", *"éÉçÇñÑßẞİıſΣςǰŉﬁ①Ⅷ㍿",
    *"\u0301\u0327\u0323\u3099\ufe0f\u034f\u0345", *"\u200b\u200d\u00ad\ufeff",
    *"\u1100\u1161\u11a8가", *"かﾞｶабвΑא\u05b0ก\u0e33", "😀", "👩‍👩‍👧", "🇨🇭", "\x00", "𝐀",
    "OPEN", "新品上市",
  ]  # fmt: skip
  texts = [
    "".join(rng.choice(parts) for _ in range(rng.randint(0, 40)))
    for _ in range(5000)
  ]
  langs = [rng.choice(LANGS) for _ in texts]  # mixed in one batch
  assert_normalised(normalize_all, texts, langs)
  assert normalize_all([], []) == []


@pytest.mark.parametrize(
  "odd", ["\U0001e030", "\U0001ccd6", "\ud800", "\u0cf3"]
)
def test_texts_beyond_pythons_unicode_are_normalised_alike(normalize_all, odd):
  """Newer libraries know more characters; surrogates have no bytes."""
  texts = [f"a{odd}b", "ＯＰＥＮ"]
  for lang in LANGS:
    assert_normalised(normalize_all, texts, [lang] * 2)


def test_ocr_scores_do_not_depend_on_the_backend(normalize_all, monkeypatch):
  """The real way in: from a reward's config, with an engine that just says."""
  read = {
    "a": "ｏｐｅｎ  late!",
    "b": "新 品",
    "c": "Straße",
    "d": "",
    "e": "x",
  }
  engine = ocr_engines.Engine(
    lambda items: [ocr_engines.Reading(read[item.id]) for item in items], "fake"
  )
  monkeypatch.setattr(ocr, "open_engine", lambda *args: engine)
  image = np.zeros((4, 4, 3), np.uint8)
  items = [
    wire.Item("a", image, "", ("OPEN", "LATE")),
    wire.Item("b", image, "", ("新品上市",), "zh"),
    wire.Item("c", image, "", ("STRASSE",), "de"),
    wire.Item("d", image, "", ("OPEN",)),
    wire.Item("e", image, "", ("!?",)),  # nothing to compare with
  ]
  for spaces in (True, False):
    cfg = RewardConfig("ocr", "local:ocr", spaces=spaces)
    ours, theirs = (
      open_lib.open_scorer(cfg, backend)(items)
      for backend in ("tensorflow_text", "tokenizers")
    )
    assert ours == theirs
    assert [s.score for s in ours] == [1.0, 0.5, 1.0, 0.0, None]
    for item, score in zip(items[:4], ours, strict=False):
      said = text_scores.text_reward(
        read[item.id], item.targets, item.lang, spaces
      )
      assert (
        score.score == said.score and score.raw["distance"] == said.distance
      )


def test_tensorflow_is_not_imported_for_the_other_backend():
  import subprocess

  code = (
    "import sys; from xomni_jax.data import text_ops; "
    f"text_ops.T5Ids({str(FOLDER)!r}, 8)(['a']); text_ops.nfc(['a']); "
    "assert 'tensorflow' not in sys.modules"
  )
  subprocess.run(
    [sys.executable, "-c", code], check=True, cwd=GOLDEN.parents[2]
  )


def test_broken_t5_folders_are_refused(backends, tmp_path):
  ids = text_ops.T5Ids(tmp_path, 8, "tensorflow_text")
  with pytest.raises(InputError, match=r"can't be read .*spiece\.model"):
    ids(["a"])
  (tmp_path / "spiece.model").write_bytes(b"nothing")
  (tmp_path / "tokenizer.json").write_bytes(
    (FOLDER / "tokenizer.json").read_bytes()
  )
  with pytest.raises(InputError, match="can't be read") as error:
    ids(["a"])
  assert "\n" not in str(error.value)
  with pytest.raises(InputError, match="expected Unicode"):
    backends[1](["a\udcff"])
