"""Ids for the two text encoders of the diffusion decoder, CLIP and T5.

Both are built on the `tokenizers` library from the files that FLUX.1-dev
ships, without the transformers classes: version 5 of these gives other ids
than the reference, for reasons noted at each function.
"""

import json
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from xomni_jax.data.boundary import encodable, has_files, unreadable
from xomni_jax.errors import InputError

TextIds = Callable[[Sequence[str]], np.ndarray]

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
_T5_LENGTH = 512  # of FLUX.1-dev's prompts
_ADVICE = "the intact files of a FLUX.1-dev folder; fetch them again"


def load_clip_tokenizer(folder: str | os.PathLike, length: int = 77) -> TextIds:
  """CLIP's tokenizer, as texts -> i32[B, length].

  Args:
    folder: has vocab.json and merges.txt, or else a tokenizer.json.
    length: of every row, start and end of text included; longer texts are cut.
      77 is max_position_embeddings of the CLIP in FLUX.1-dev.
  Returns:
    A function; its rows are padded with the end-of-text id.
  Raises:
    InputError: missing or broken files.
  """
  # CLIPTokenizer named two algorithms up to transformers 4. FLUX.1-dev asks
  # for the slow one, which makes every Chinese character a word (ending in
  # </w>); version 5 kept only the fast one, to which a run of them is one
  # word. Hence BPE's files are read here, and what surrounds it spelled out.
  from tokenizers import AddedToken, Tokenizer, models, processors

  start, end = CLIP_START, CLIP_END
  name = f"CLIP tokenizer in {folder}"
  if not has_files(folder, "vocab.json", "merges.txt") and not has_files(
    folder, "tokenizer.json"
  ):
    raise InputError(
      f"{name}: no files, expected vocab.json and merges.txt, or "
      "tokenizer.json; give a complete FLUX.1-dev folder"
    )
  try:
    vocab, merges = _read_bpe(Path(folder))
    tokenizer = Tokenizer(
      models.BPE(vocab, merges, unk_token=end, end_of_word_suffix="</w>")
    )
    ends = [(start, vocab[start]), (end, vocab[end])]
  except Exception as e:  # json's, KeyError, and what the Rust side raises
    raise unreadable(name, e, _ADVICE) from None
  tokenizer.add_special_tokens(
    [AddedToken(t, normalized=True) for t, _ in ends]
  )
  tokenizer.pre_tokenizer = clip_splitter()
  tokenizer.post_processor = processors.TemplateProcessing(
    single=[start, "$A", end], special_tokens=ends
  )
  return _fixed_length(tokenizer, length, vocab[end], end, clip_words)


def clip_splitter():
  """CLIP's pre-tokeniser: words, single digits and runs of punctuation."""
  from tokenizers import Regex, pre_tokenizers

  words = (
    rf"{re.escape(CLIP_START)}|{re.escape(CLIP_END)}|'s|'t|'re|'ve|'m|'ll|'d"
    r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
  )
  return pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )


def _read_bpe(folder):
  """(vocabulary, merges): from the slow tokenizer's files if there are any."""
  if has_files(folder, "vocab.json", "merges.txt"):
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    lines = (folder / "merges.txt").read_text("utf-8").strip().split("\n")
    # Only the header goes: "#" begins merges as well.
    merges = lines[lines[0].startswith("#version") :]
  else:
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    vocab, merges = model["vocab"], model["merges"]
  pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
  return vocab, [tuple(pair) for pair in pairs]


def clip_words(text):
  """Cleaned, NFC, lower-case words; every CJK ideograph is a word of its own.

  Source: BasicTokenizer of transformers 4 (strip_accents=False,
  do_split_on_punc=False), which the slow CLIPTokenizer uses where ftfy is not
  installed, as the reference does.
  """
  # BertNormalizer of `tokenizers` is nearly this, but for unassigned code
  # points, a block of rare ideographs, and the final sigma.
  out = []
  for c in text:
    kind = unicodedata.category(c)
    if c in "\t\n\r" or kind == "Zs":
      out.append(" ")
    elif c != "\ufffd" and kind[0] != "C":
      out.append(f" {c} " if _is_ideograph(ord(c)) else c)
  words = unicodedata.normalize("NFC", "".join(out)).split()
  return " ".join(word.lower() for word in words)


def _is_ideograph(c):
  return (
    0x3400 <= c <= 0x4DBF
    or 0x4E00 <= c <= 0x9FFF
    or 0xF900 <= c <= 0xFAFF
    or 0x20000 <= c <= 0x2A6DF
    or 0x2A700 <= c <= 0x2CEAF
    or 0x2F800 <= c <= 0x2FA1F
  )


def load_t5_tokenizer(
  folder: str | os.PathLike, length: int | None = None
) -> TextIds:
  """T5's tokenizer, as texts -> i32[B, length].

  Args:
    folder: has tokenizer.json.
    length: of every row, the closing </s> included; longer texts are cut.
      None: `t5_length` of the folder.
  Returns:
    A function; its rows are padded with 0.
  Raises:
    InputError: a missing or broken file.
  """
  if length is None:
    length = t5_length(folder)
  # T5Tokenizer of transformers 5 takes only the vocabulary and the character
  # map from tokenizer.json. Its own pre-tokeniser begins every text with the
  # space mark whatever the file says; here the file is followed.
  from tokenizers import Tokenizer

  name = f"T5 tokenizer in {folder}"
  if not has_files(folder, "tokenizer.json"):
    raise InputError(
      f"{name}: no files, expected tokenizer.json; give a complete FLUX.1-dev "
      "folder"
    )
  try:
    tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
  except Exception as e:  # the Rust side raises no narrower class
    raise unreadable(name, e, _ADVICE) from None
  if tokenizer.token_to_id("<pad>") != 0:
    raise InputError(
      f"{name}: <pad> has id {tokenizer.token_to_id('<pad>')}, expected 0; is "
      "this the folder tokenizer_2?"
    )
  return _fixed_length(tokenizer, length, 0, "<pad>", str)


def t5_length(folder: str | os.PathLike) -> int:
  """T5 ids of a prompt: `model_max_length` of tokenizer_config.json.

  That is 512 in FLUX.1-dev, and where the file does not say. The encoder and
  FLUX see padding, so that a model takes the length it was trained with.

  Raises:
    InputError: the file is broken.
  """
  path = Path(folder, "tokenizer_config.json")
  if not path.exists():
    return _T5_LENGTH
  try:
    length = json.loads(path.read_text("utf-8")).get("model_max_length")
  except Exception as e:  # json's, or of a file that is no mapping
    raise unreadable(f"T5 tokenizer in {folder}", e, _ADVICE) from None
  # Absent, or transformers' 1e30 for "no limit".
  whole = type(length) is int and 0 < length <= _T5_LENGTH
  return length if whole else _T5_LENGTH


def _fixed_length(tokenizer, length, pad_id, pad_token, prepare) -> TextIds:
  """A `tokenizers.Tokenizer` as texts -> i32[B, length]."""
  tokenizer.enable_truncation(length)
  tokenizer.enable_padding(length=length, pad_id=pad_id, pad_token=pad_token)

  def text_ids(texts):
    # One by one: encode_batch starts threads, and warns at a later fork.
    rows = [tokenizer.encode(prepare(encodable(t))).ids for t in texts]
    return np.array(rows, np.int32).reshape(-1, length)

  return text_ids
