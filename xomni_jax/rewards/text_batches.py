"""`text_scores.normalize` for many texts at once, by TensorFlow Text.

For a host that has TensorFlow loaded anyway; a server of rewards never has.
"""

import os
import unicodedata
from collections.abc import Callable, Sequence

from xomni_jax.errors import InputError
from xomni_jax.rewards import text_scores

# White space as Python's `str.isspace` sees it; RE2's \s is that of ASCII.
_SPACE = (
  "\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
)
_SPACES = f"[{_SPACE}]+"
_DROPPED = f"[^{text_scores.KEPT}{_SPACE}]"
_NO_LETTERS = rf"[^\p{{L}}\p{{M}}\p{{N}}{_SPACE}]"


def open_normalizer() -> Callable[[Sequence[str], Sequence[str]], list[str]]:
  """`text_scores.normalize_all`, the same texts, by TensorFlow Text.

  On 2 CPU cores it takes 0.4 of plain Python's time for Chinese, and as long
  for English; importing TensorFlow takes some 20 s.

  Raises:
    InputError: TensorFlow Text is not installed.
  """
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  try:
    import tensorflow as tf
    import tensorflow_text
  except ImportError as e:
    raise InputError(
      f"text_backend tensorflow_text can't be loaded ({e}); install "
      "tensorflow-text, or choose tokenizers"
    ) from None
  # Text is work for the host: the accelerator's memory belongs to JAX.
  tf.config.set_visible_devices([], "GPU")
  replace = tf.strings.regex_replace

  def of_one_kind(texts, lang):
    x = tensorflow_text.normalize_utf8(tf.constant(texts), "NFKC")
    x = replace(x, _DROPPED if lang in ("en", "zh") else _NO_LETTERS, "")
    if lang == "zh":
      return _strings(replace(x, _SPACES, ""))
    x = tf.strings.strip(replace(x, _SPACES, " "))
    if lang == "en":
      return _strings(tf.strings.lower(x, encoding="utf-8"))
    # TensorFlow Text folds case together with a normalisation of its own.
    return [text.casefold() for text in _strings(x)]

  def normalize_all(texts, langs):
    if not _known(texts):
      return text_scores.normalize_all(texts, langs)
    kinds = [lang if lang in ("en", "zh") else "" for lang in langs]
    found = [""] * len(texts)
    for kind in set(kinds):
      some = [i for i, k in enumerate(kinds) if k == kind]
      done = of_one_kind([texts[i] for i in some], kind)
      for i, text in zip(some, done, strict=True):
        found[i] = text
    return found

  return normalize_all


def _strings(x):
  return [text.decode() for text in x.numpy().tolist()]


def _known(texts):
  """Whether Python's Unicode has all characters: if not, tables may differ.

  Lone surrogates, which have no bytes, are not known either.
  """
  kinds = map(unicodedata.category, set().union(*texts))
  return not any(kind in ("Cn", "Cs") for kind in kinds)
