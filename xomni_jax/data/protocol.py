"""Text and ids: how images stand in text, and the model's tokenizer.

An image is the text `<SOM>h w<IMAGE><MM-Token-..>...<EOM>`, codes in row-major
order. `h`, the space and `w` are ordinary text tokens.
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from xomni_jax.data.boundary import (
  codes_grid,
  encodable,
  has_files,
  unreadable,
)
from xomni_jax.errors import InputError

SOM, EOM, IMAGE = "<SOM>", "<EOM>", "<IMAGE>"
PAD = "<|endoftext|>"


def image_prefix(h: int, w: int) -> str:
  """The text after which the codes of an image of h x w cells follow."""
  return f"{SOM}{h} {w}{IMAGE}"


def image_string(codes) -> str:
  """An image, given by its codes i32[h, w], as text.

  Raises:
    InputError: codes are no grid of non-negative integers.
  """
  codes = codes_grid(codes)
  tokens = "".join(mm_token(code) for code in codes.ravel().tolist())
  return image_prefix(*codes.shape) + tokens + EOM


def mm_token(code: int) -> str:
  """The token of an image code."""
  return f"<MM-Token-{code}>"


class ImageSpan(NamedTuple):
  """An image of a document: i32[h, w] and the diffusion decoder's prompt."""

  codes: np.ndarray
  prompt: str


class Document(NamedTuple):
  """Texts and images of a document, in order of appearance.

  A text follows each `<EOM>`: one that ends in an image has a last text "".
  """

  texts: list[str]
  images: list[ImageSpan]


def parse_document(text: str, pad_token: str, codebook_size: int) -> Document:
  """Generated text taken apart into its texts and images.

  Args:
    text: decoded ids, special tokens included.
    pad_token: removed wherever it stands.
    codebook_size: codes lie in [0, codebook_size).
  Returns:
    Document. An image's prompt is the text between the image before it, or
    the start, and its `<SOM>`, with the special tokens in it.
  Raises:
    InputError: an image without size or with fewer than h*w codes, or a code
      outside the codebook.
  """
  texts, images = [], []
  for part in _unpadded(text, pad_token).split(EOM):
    before, som, image = part.partition(SOM)
    texts.append(before)
    if som:
      name = f"image string {len(images)}"
      images.append(ImageSpan(_parse_codes(image, codebook_size, name), before))
  return Document(texts, images)


def _unpadded(text, pad_token):
  return text.replace(pad_token, "").replace("<SEP>", "")


def _parse_codes(image, codebook_size, name):
  """i32[h, w] from what stands between `<SOM>` and `<EOM>`."""
  # More than nine digits are neither a size nor a code.
  match = re.match(rf"([0-9]{{1,9}}) ([0-9]{{1,9}}){IMAGE}", image)
  h, w = map(int, match.groups()) if match else (0, 0)
  if not h * w or SOM in image or image.count(IMAGE) != 1:
    raise InputError(
      f"{name} begins {SOM + image[:24]!r}, expected "
      f"'{SOM}height width{IMAGE}' with sizes in tokens, then the codes"
    )
  # What follows the h*w-th code is ignored, as the reference does.
  found = re.findall(r"<MM-Token-([0-9]{1,9})>", image)[: h * w]
  if len(found) < h * w:
    raise InputError(
      f"{name} has {len(found)} codes, expected {h}x{w} = {h * w}; generate "
      "up to the last one"
    )
  codes = np.array(found, np.int32).reshape(h, w)
  if codes.max() >= codebook_size:
    raise InputError(
      f"{name} has code {codes.max()}, expected 0 to {codebook_size - 1}"
    )
  return codes


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """The autoregressive model's tokenizer; `load_tokenizer` makes one.

  Attributes:
    backend: transformers' Qwen2Tokenizer.
    vocab_size: ids below are text; `<MM-Token-i>` is vocab_size + i.
    image_vocab_size: number of codes.
    pad_id, som_id, eom_id, image_id: of `<|endoftext|>`, `<SOM>`, `<EOM>`,
      `<IMAGE>`.
  """

  backend: Any
  vocab_size: int
  image_vocab_size: int
  pad_id: int
  som_id: int
  eom_id: int
  image_id: int

  def encode(self, text: str) -> list[int]:
    """Ids of a text; special tokens written out in it become their ids."""
    return self.backend.encode(encodable(text), add_special_tokens=False)

  def decode(self, ids) -> str:
    """Text of ids, special tokens included, nothing cleaned up."""
    return self.backend.decode(
      np.asarray(ids, np.int64).tolist(),
      skip_special_tokens=False,
      clean_up_tokenization_spaces=False,
    )

  def text(self, ids) -> str:
    """`decode` without padding: an answer, or a prompt as the painter sees it.

    Unlike `parse` it does not look for images, so that no text can fail.
    """
    return _unpadded(self.decode(ids), PAD)

  def parse(self, ids) -> Document:
    """Texts and images of generated ids; raises as `parse_document` does."""
    return parse_document(self.decode(ids), PAD, self.image_vocab_size)

  def chat_prompt(self, *messages: str) -> str:
    """Messages in the chat template, up to where the next answer begins.

    Args:
      messages: of the user and the assistant in turn, the last the user's.
    Raises:
      InputError: the checkpoint came without a chat template.
    """
    if not self.backend.chat_template:
      raise InputError(
        f"{self.backend.name_or_path} has no chat template, expected "
        "'chat_template' in tokenizer_config.json or chat_template.jinja"
      )
    return self.backend.apply_chat_template(
      [
        {"role": ("user", "assistant")[i % 2], "content": message}
        for i, message in enumerate(messages)
      ],
      tokenize=False,
      add_generation_prompt=True,
    )


def load_tokenizer(
  folder: str | os.PathLike, vocab_size: int, image_vocab_size: int
) -> Tokenizer:
  """The tokenizer of a checkpoint, checked against the model's vocabulary.

  Args:
    folder: has tokenizer.json, or vocab.json, merges.txt and
      added_tokens.json; and tokenizer_config.json for the chat template.
    vocab_size: number of text ids.
    image_vocab_size: number of codes.
  Raises:
    InputError: missing or broken files, or tokens whose ids are not the
      model's; all of them at once.
  """
  if not has_files(folder, "tokenizer.json") and not has_files(
    folder, "vocab.json", "merges.txt"
  ):
    # transformers would make up an empty tokenizer.
    raise InputError(
      f"{folder} has no tokenizer, expected tokenizer.json, or vocab.json and "
      "merges.txt; complete the folder"
    )
  # Without torch installed transformers says on import that it would be nice.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  from transformers import Qwen2Tokenizer

  try:
    # The class and not AutoTokenizer, which first looks into config.json and
    # warns of a model type that it does not know. It runs no remote code.
    backend = Qwen2Tokenizer.from_pretrained(
      str(folder),
      local_files_only=True,
      # A value, for transformers 5 trips over the one in an older
      # special_tokens_map.json (a list of dicts). Only skip_special_tokens
      # would look at it.
      additional_special_tokens=[PAD],
    )
  except Exception as e:  # json's, KeyError, and what the Rust side raises
    advice = "intact tokenizer files; fetch them again"
    raise unreadable(f"tokenizer in {folder}", e, advice) from None

  find = backend.backend_tokenizer.token_to_id
  ids = {token: find(token) for token in (PAD, SOM, EOM, IMAGE)}
  problems = _id_problems(find, ids, vocab_size, image_vocab_size)
  if problems:
    raise InputError(
      f"tokenizer in {folder} does not fit vocab_size {vocab_size} and "
      f"image_vocab_size {image_vocab_size}: " + "; ".join(problems)
    )
  return Tokenizer(backend, vocab_size, image_vocab_size, *ids.values())


def _id_problems(find, ids, vocab_size, image_vocab_size):
  """What keeps a tokenizer from fitting the model, as a list of clauses."""
  problems = [f"{token} is missing" for token, i in ids.items() if i is None]
  first_special = vocab_size + image_vocab_size
  for token, i in ids.items():
    if i is not None and token == PAD and i >= vocab_size:
      problems.append(f"{token} has id {i}, expected below {vocab_size}")
    if i is not None and token != PAD and i < first_special:
      problems.append(f"{token} has id {i}, expected at least {first_special}")
  found = [find(mm_token(i)) for i in range(image_vocab_size)]
  wrong = [i for i, j in enumerate(found) if j != vocab_size + i]
  problems += [
    f"{mm_token(i)} has id {found[i]}, expected {vocab_size + i}"
    for i in sorted({*wrong[:1], *wrong[-1:]})
  ]
  if len(wrong) > 2:
    problems.append(f"and {len(wrong) - 2} image tokens between them")
  return problems


def left_pad(
  sequences: Sequence[Sequence[int]], pad_id: int, multiple_of: int = 1
) -> tuple[np.ndarray, np.ndarray]:
  """Sequences side by side, ending at the same column.

  Args:
    sequences: B non-empty id lists.
    pad_id: fills up on the left.
    multiple_of: T is rounded up to a multiple of it.
  Returns:
    tokens i32[B, T] and mask bool[B, T], False at padding.
  Raises:
    InputError: no sequences, or an empty one.
  """
  lengths = [len(ids) for ids in sequences]
  if not lengths or not min(lengths):
    where = f"sequence {lengths.index(0)} is empty" if lengths else "no ids"
    raise InputError(f"{where}, expected at least one id in each sequence")
  width = -(-max(lengths) // multiple_of) * multiple_of
  tokens = np.full((len(sequences), width), pad_id, np.int32)
  mask = np.arange(width) >= width - np.array(lengths)[:, None]
  for row, ids in zip(tokens, sequences, strict=True):
    row[width - len(ids) :] = ids
  return tokens, mask
