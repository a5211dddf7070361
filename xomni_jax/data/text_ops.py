"""Text in batches: T5 ids and Unicode normalisation, by one of two libraries.

"tensorflow_text" runs SentencePiece and ICU inside TensorFlow, "tokenizers"
the Rust library of that name and Python's own tables. They give the same.
TensorFlow takes some 20 s to import, so it is imported where it is first used.
"""

import dataclasses
import json
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from xomni_jax.data import encoder_ids
from xomni_jax.data.boundary import encodable, unreadable

_FILE = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class T5Ids:
  """T5's tokenizer, texts -> i32[B, length]; may be sent to other processes.

  Attributes:
    folder: has tokenizer.json, and spiece.model for "tensorflow_text".
    length: of every row, the closing </s> included; longer texts are cut.
    backend: "tensorflow_text" or "tokenizers".
  """

  folder: str | os.PathLike
  length: int = 512
  backend: str = "tokenizers"

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """i32[B, length], padded with 0; raises InputError for a broken folder."""
    return _loaded(str(self.folder), self.length, self.backend)(texts)


@cache
def _loaded(folder, length, backend) -> Callable[[Sequence[str]], np.ndarray]:
  if backend == "tokenizers":
    return encoder_ids.load_t5_tokenizer(folder, length)
  return _load_tensorflow_text(folder, length)


def _tensorflow_text():
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  import tensorflow as tf
  import tensorflow_text

  # Text is work for the host: the accelerator's memory belongs to JAX.
  tf.config.set_visible_devices([], "GPU")
  return tf, tensorflow_text


# Of a SentencePiece ModelProto: a normalizer_spec with an empty character map
# and without dummy prefix or removal of spaces. Behind a model's bytes it
# overrides these fields of the model's own.
_NO_NORMALISATION = bytes.fromhex("1a06120018002000")


def _load_tensorflow_text(folder, length):
  """T5 ids by TensorFlow Text, the same as tokenizer.json gives.

  SentencePiece alone would give others, for what FLUX.1-dev's tokenizer.json
  adds to or changes in spiece.model: special tokens written out in a text are
  ids; a text does not begin with a space mark unless the file says so; spaces
  are stripped on the right only; and the character map is applied to grapheme
  clusters of up to 5 bytes or else to single characters, so that an accent
  before a joiner is not composed. So this part follows the file, and
  SentencePiece finds the pieces.
  """
  name, advice = f"T5 tokenizer in {folder}", "the intact files of a FLUX.1-dev"
  advice += " folder (spiece.model and tokenizer.json); fetch them again"
  try:
    model = Path(folder, "spiece.model").read_bytes() + _NO_NORMALISATION
    sections = _sections(json.loads(Path(folder, _FILE).read_text("utf-8")))
    rules = Tokenizer.from_file(str(Path(folder, _FILE)))
    tf, text = _tensorflow_text()
    pieces_of = text.SentencepieceTokenizer(model).tokenize
    pieces_of([""])
  except Exception as e:  # the Rust side's and TensorFlow's own classes
    raise unreadable(name, e, advice) from None
  words_of = partial(_words, rules)

  def text_ids(texts):
    parts = [
      [id_ if id_ is not None else words_of(part) for part, id_ in sections(t)]
      for t in map(encodable, texts)
    ]
    words = sorted(
      {w for row in parts for p in row if isinstance(p, list) for w in p}
    )
    found = pieces_of(tf.constant(words)).to_list() if words else []
    ids = dict(zip(words, found, strict=True))
    out = np.zeros((len(parts), length), np.int32)
    for row, content in zip(out, parts, strict=True):
      flat = []
      for p in content:
        flat += [i for w in p for i in ids[w]] if isinstance(p, list) else [p]
      flat = [*flat[: length - 1], rules.token_to_id("</s>")]
      row[: len(flat)] = flat
    return out

  return text_ids


def _words(rules, part):
  """A text normalised and split into words, as the file's rules say."""
  part = rules.normalizer.normalize_str(part)
  return [w for w, _ in rules.pre_tokenizer.pre_tokenize_str(part)]


def _sections(file):
  """text -> [(part, id or None)]: the file's special tokens stand apart."""
  ids = {token["content"]: token["id"] for token in file["added_tokens"]}
  longest_first = sorted(ids, key=len, reverse=True)
  split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split
  return lambda text: [(part, ids.get(part)) for part in split(text) if part]


def nfc(texts: Sequence[str], backend: str = "tokenizers") -> list[str]:
  """The texts in Unicode's composed form (NFC)."""
  texts = [encodable(text) for text in texts]
  if backend == "tokenizers":
    return [unicodedata.normalize("NFC", text) for text in texts]
  if not texts:
    return []
  tf, text = _tensorflow_text()
  done = text.normalize_utf8(tf.constant(texts), "NFC")
  return [t.decode() for t in done.numpy().tolist()]
