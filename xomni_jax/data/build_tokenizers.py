"""The AR model's tokenizer: built from lines of text, or out of Qwen2.5's.

Files are those of the released one. The same lines give the same bytes.
"""

import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator

from xomni_jax.data import tokenizer_files as files
from xomni_jax.data.protocol import EOM, IMAGE, PAD, SOM, mm_token
from xomni_jax.data.world import open_world
from xomni_jax.errors import InputError

_TEXT_SPECIALS = (PAD, "<|im_start|>", "<|im_end|>")
_IMAGE_SPECIALS = (SOM, EOM, IMAGE)
# Qwen2's. Digits stand alone, and with them the sizes of images.
_QWEN_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In an answer that repeats what an image says.
_SAID = re.compile("[A-Z]|[0-9]{2}|[0-9] ")
_SYSTEM = "You are a helpful assistant."
_CHAT_TEMPLATE = (
  "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
  + _SYSTEM
  + "<|im_end|>\\n' }}{% endif %}{% for message in messages %}"
  "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
  "+ '<|im_end|>' + '\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def world_lines(count: int, level: str = "signs") -> Iterator[str]:
  """Text of the drawn world's first `count` training records, for tokenizers.

  What an image says is taken out of them, its characters come on lines of their
  own: so none of them is ever joined to another, nor to a space, and each is
  one token wherever it stands. A small model learns to read in minutes then,
  and not at all where it has to find out which letters are in which token.
  """
  source = open_world(level)
  for i in range(count):
    record = source[i]
    for line in (record["prompt"], record["text"]):
      # A digit, for digits stand alone as well.
      yield re.sub('"[^"]+"', '"0"', line)
    for question, answer in record["qa"]:
      yield question
      if not _SAID.search(answer):
        yield answer
    yield from "".join(source.sign(i).lines).replace(" ", "")
    # What every chat has.
    yield from ("system", _SYSTEM, "user", "assistant")


def build_qwen(
  lines: Iterable[str],
  folder: str | os.PathLike,
  vocab_size: int,
  image_vocab_size: int,
  mm_vocab_size: int,
) -> None:
  """Writes a Qwen2-style tokenizer with image tokens into a folder.

  Args:
    lines: what merges are learned from.
    folder: made if need be; files of these names in it are replaced.
    vocab_size: number of text ids; what merges leave unused becomes
      `<|extra_i|>`, so that `<MM-Token-0>` has this id.
    image_vocab_size: number of codes.
    mm_vocab_size: ids of codes and of `<SOM>`, `<EOM>`, `<IMAGE>`.
  Raises:
    InputError: the numbers leave no room for bytes or special tokens.
  """
  least = files.BYTES + len(_TEXT_SPECIALS)
  files.room(folder, "vocab_size", vocab_size, least)
  least = image_vocab_size + len(_IMAGE_SPECIALS)
  files.room(folder, "mm_vocab_size", mm_vocab_size, least)
  from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
  )

  tokenizer = Tokenizer(models.BPE())
  tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
  tokenizer.decoder = decoders.ByteLevel()
  whole = files.train_bpe(tokenizer, lines, vocab_size - len(_TEXT_SPECIALS))
  vocab = whole["model"]["vocab"]
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  merges = whole["model"]["merges"]
  files.write_json(folder / "vocab.json", vocab)
  files.write_merges(folder / "merges.txt", merges)
  names = [*_TEXT_SPECIALS]
  names += _extra(vocab_size - len(vocab) - len(names))
  names += _image_tokens(image_vocab_size)
  added = [
    {"id": len(vocab) + i, "content": name, **files.FLAGS}
    for i, name in enumerate(names)
  ]
  config = {
    "add_prefix_space": False,
    "additional_special_tokens": list(_TEXT_SPECIALS),
    "bos_token": None,
    "chat_template": _CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "errors": "replace",
    "model_max_length": 32768,
    "pad_token": PAD,
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
  }
  files.write_added(folder, whole, config, added)
  files.write_json(
    folder / "special_tokens_map.json",
    {
      "additional_special_tokens": list(_TEXT_SPECIALS),
      "eos_token": "<|im_end|>",
      "pad_token": PAD,
    },
  )


def extend_qwen(
  source: str | os.PathLike,
  out: str | os.PathLike,
  vocab_size: int,
  image_vocab_size: int,
) -> None:
  """Writes a copy of a Qwen2.5 tokenizer that knows image tokens besides.

  Args:
    source: has tokenizer.json; the other files of a tokenizer are copied.
    out: made if need be; another folder.
    vocab_size: of the model's text; ids between the tokenizer's last one and
      this, which belong to no token, become `<|extra_i|>`.
    image_vocab_size: number of codes.
  Raises:
    InputError: no readable tokenizer, one that reaches beyond `vocab_size`, or
      one that has image tokens.
  """
  source, out = pathlib.Path(source), pathlib.Path(out)
  whole = files.read_json(source / "tokenizer.json")
  try:
    ids = dict(whole["model"]["vocab"])
    added = list(whole["added_tokens"])
    ids |= {token["content"]: token["id"] for token in added}
    first = max(ids.values()) + 1
  except (KeyError, TypeError, ValueError) as e:
    raise InputError(
      f"{source}/tokenizer.json: no byte-pair tokenizer ({type(e).__name__}: "
      f"{e}); expected Qwen2.5's"
    ) from None
  known = [name for name in _IMAGE_SPECIALS if name in ids]
  if known:
    raise InputError(
      f"{source}: the tokenizer has {', '.join(known)} already; use it as it is"
    )
  files.room(source, "vocab_size", vocab_size, first)
  names = _extra(vocab_size - first) + _image_tokens(image_vocab_size)
  added += [
    {"id": first + i, "content": name, **files.FLAGS}
    for i, name in enumerate(names)
  ]
  out.mkdir(parents=True, exist_ok=True)
  for name in (
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template.jinja",
  ):
    if (source / name).is_file():
      shutil.copyfile(source / name, out / name)
  config = source / "tokenizer_config.json"
  files.write_added(
    out, whole, files.read_json(config) if config.exists() else {}, added
  )


def _extra(count):
  return [f"<|extra_{i}|>" for i in range(count)]


def _image_tokens(count):
  return [*map(mm_token, range(count)), *_IMAGE_SPECIALS]
