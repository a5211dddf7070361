"""Text in batches: T5 ids and Unicode normalisation, by one of two libraries.

"tensorflow_text" runs SentencePiece and ICU inside TensorFlow, "tokenizers"
the Rust library of that name and Python's own tables. They give the same.
TensorFlow takes some 20 s to import, so it is imported where it is first used.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xomni_jax.data import encoder_ids


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
    raise NotImplementedError


def nfc(texts: Sequence[str], backend: str = "tokenizers") -> list[str]:
  """The texts in Unicode's composed form (NFC)."""
  raise NotImplementedError
