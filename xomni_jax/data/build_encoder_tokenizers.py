"""The text encoders' tokenizers, CLIP's and T5's, built from lines of text.

Files are those of FLUX.1-dev. The same lines give the same bytes.
"""

import base64
import collections
import io
import os
import pathlib
import tempfile
from collections.abc import Iterable
from typing import Any

from xomni_jax.data import tokenizer_files as files
from xomni_jax.data.encoder_ids import (
  CLIP_END,
  CLIP_START,
  clip_splitter,
  clip_words,
)
from xomni_jax.errors import InputError

_T5_SPECIALS = ("<pad>", "</s>", "<unk>")
_T5_EXTRA = 100  # <extra_id_99> .. <extra_id_0>, T5's
_LONGEST = 16  # characters of a piece, SentencePiece's


def build_clip(
  lines: Iterable[str], folder: str | os.PathLike, vocab_size: int
) -> None:
  """Writes a CLIP tokenizer into a folder.

  `<|endoftext|>` is the last id, vocab_size - 1, as the encoder's pooling
  wants it, and `<|startoftext|>` the one before.

  Raises:
    InputError: vocab_size leaves no room for bytes and special tokens.
  """
  room = vocab_size - 2 * files.BYTES - 2
  files.room(folder, "vocab_size", vocab_size, 2 * files.BYTES + 2)
  from tokenizers import Tokenizer, models, pre_tokenizers

  tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
  tokenizer.pre_tokenizer = clip_splitter()
  lines = (clip_words(line) for line in lines)
  whole = files.train_bpe(
    tokenizer, lines, vocab_size, end_of_word_suffix="</w>"
  )
  # Every byte also as the end of a word, though the lines end in few of them.
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  merges = whole["model"]["merges"][:room]
  tokens = [*alphabet, *(c + "</w>" for c in alphabet), *map("".join, merges)]
  vocab = {token: i for i, token in enumerate(tokens)}
  vocab |= {CLIP_START: vocab_size - 2, CLIP_END: vocab_size - 1}
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  files.write_json(folder / "vocab.json", vocab)
  files.write_merges(folder / "merges.txt", merges)
  flags = files.FLAGS | {"normalized": True}
  roles = {
    "bos_token": CLIP_START,
    "eos_token": CLIP_END,
    "pad_token": CLIP_END,
    "unk_token": CLIP_END,
  }
  files.write_json(folder / "special_tokens_map.json", roles)
  files.write_json(
    folder / "tokenizer_config.json",
    {
      "added_tokens_decoder": {
        str(vocab[name]): {"content": name, **flags}
        for name in (CLIP_START, CLIP_END)
      },
      **roles,
      "clean_up_tokenization_spaces": False,
      "errors": "replace",
      "model_max_length": 77,
      "tokenizer_class": "CLIPTokenizer",
    },
  )


def build_t5(
  lines: Iterable[str], folder: str | os.PathLike, vocab_size: int
) -> None:
  """Writes a T5 tokenizer into a folder: spiece.model and tokenizer.json.

  The last ids are T5's `<extra_id_99>` to `<extra_id_0>`, after at most
  vocab_size - 100 pieces.

  Raises:
    InputError: vocab_size leaves no room for the characters of the lines.
  """
  files.room(
    folder, "vocab_size", vocab_size, _T5_EXTRA + len(_T5_SPECIALS) + 1
  )
  import sentencepiece
  from sentencepiece import sentencepiece_model_pb2

  model, lines = io.BytesIO(), list(lines)
  try:
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as seeds:
      seeds.writelines(f"{piece}\t{n}\n" for piece, n in _seeds(lines))
      seeds.flush()
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        seed_sentencepieces_file=seeds.name,
        model_type="unigram",
        vocab_size=vocab_size - _T5_EXTRA,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
      )
  except RuntimeError as e:
    reason = str(e).strip().splitlines()[0]
    raise InputError(
      f"{folder}: no T5 tokenizer of vocab_size {vocab_size} from these lines "
      f"({reason}); give more lines, or a larger vocab_size"
    ) from None
  proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
  proto.trainer_spec.ClearField("seed_sentencepieces_file")  # a name by chance
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "spiece.model").write_bytes(proto.SerializeToString())
  whole = _t5_json(proto)
  extra = [token["content"] for token in whole["added_tokens"]]
  extra = extra[len(_T5_SPECIALS) :][::-1]
  files.write_json(folder / "tokenizer.json", whole)
  roles = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
  roles["additional_special_tokens"] = extra
  files.write_json(folder / "special_tokens_map.json", roles)
  files.write_json(
    folder / "tokenizer_config.json",
    {
      "added_tokens_decoder": files.by_id(whole["added_tokens"]),
      **roles,
      "clean_up_tokenization_spaces": False,
      "extra_ids": _T5_EXTRA,
      "legacy": True,
      "model_max_length": 512,
      "tokenizer_class": "T5Tokenizer",
    },
  )


def _seeds(lines: list[str]) -> list[tuple[str, int]]:
  """What pieces are chosen from, and how often each occurs in the lines.

  SentencePiece itself counts in how many words a piece occurs, once each. Of a
  few prompts' words most share no part with another, and would be cut into
  letters, however often they are said.
  """
  counts: collections.Counter[str] = collections.Counter()
  words = collections.Counter(word for line in lines for word in line.split())
  for word, count in words.items():
    whole = f"\u2581{word}"
    for start in range(len(whole)):
      for end in range(start + 1, min(len(whole), start + _LONGEST) + 1):
        counts[whole[start:end]] += count
  frequent = [(p, n) for p, n in counts.items() if n > 1 or len(p) == 1]
  return sorted(frequent, key=lambda seed: (-seed[1] * len(seed[0]), seed[0]))


def _t5_json(proto) -> dict[str, Any]:
  """The tokenizer.json that gives the ids of a SentencePiece ModelProto."""
  pieces = [[piece.piece, piece.score] for piece in proto.pieces]
  first = len(pieces)
  names = [f"<extra_id_{i}>" for i in reversed(range(_T5_EXTRA))]
  added = [*enumerate(_T5_SPECIALS), *enumerate(names, first)]
  table = base64.b64encode(proto.normalizer_spec.precompiled_charsmap)
  spaces = {
    "type": "Metaspace",
    "replacement": "▁",
    "prepend_scheme": "always",
    "split": True,
  }
  end = [
    {"Sequence": {"id": "A", "type_id": 0}},
    {"SpecialToken": {"id": "</s>", "type_id": 0}},
  ]
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
      {"id": i, "content": name, **files.FLAGS} for i, name in added
    ],
    "normalizer": {
      "type": "Sequence",
      "normalizers": [
        {"type": "Precompiled", "precompiled_charsmap": table.decode()},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
      ],
    },
    "pre_tokenizer": spaces,
    "post_processor": {
      "type": "TemplateProcessing",
      "single": end,
      "pair": [*end, {"Sequence": {"id": "B", "type_id": 0}}, end[1]],
      "special_tokens": {
        "</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}
      },
    },
    "decoder": spaces,
    "model": {
      "type": "Unigram",
      "unk_id": 2,
      "vocab": pieces,
      "byte_fallback": False,
    },
  }
