"""Text in batches: T5 ids and Unicode normalisation, by one of two libraries.

"tensorflow_text" runs SentencePiece and ICU inside TensorFlow, "tokenizers"
the Rust library of that name and Python's own tables. They give the same.
TensorFlow takes some 20 s to import, so it is imported where it is first used.
"""

import dataclasses
import functools
import os
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from xomni_jax.data import encoder_ids
from xomni_jax.data.boundary import encodable, unreadable


@dataclasses.dataclass(frozen=True)
class T5Ids:
  """T5's tokenizer, texts -> i32[B, length]; may be sent to other processes.

  Attributes:
    folder: has spiece.model ("tensorflow_text") or tokenizer.json.
    length: of every row, the closing </s> included; longer texts are cut.
    backend: "tensorflow_text" or "tokenizers".
  """

  folder: str | os.PathLike
  length: int = 512
  backend: str = "tokenizers"

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """i32[B, length], padded with 0; raises InputError for a broken folder."""
    return _loaded(str(self.folder), self.length, self.backend)(texts)


@functools.cache
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


def _load_tensorflow_text(folder, length):
  path = Path(folder, "spiece.model")
  advice = "the intact spiece.model of a FLUX.1-dev folder; fetch it again"
  try:
    model = path.read_bytes()
  except OSError as e:
    raise unreadable(f"T5 tokenizer {path}", e, advice) from None
  tf, text = _tensorflow_text()
  try:
    tokenizer = text.SentencepieceTokenizer(model, add_eos=False)
    tokenizer.vocab_size()
  except Exception as e:  # TensorFlow's own classes
    raise unreadable(f"T5 tokenizer {path}", e, advice) from None

  def text_ids(texts):
    out = np.zeros((len(texts), length), np.int32)
    if not len(texts):
      return out
    ragged = tokenizer.tokenize(tf.constant([encodable(t) for t in texts]))
    for row, ids in zip(out, ragged.to_list(), strict=True):
      ids = [*ids[: length - 1], 1]
      row[: len(ids)] = ids
    return out

  return text_ids


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
