"""Records as token sequences, with a weight for each prediction."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from xomni_jax.data import protocol
from xomni_jax.data.fields import Record, need
from xomni_jax.errors import InputError

TASKS = ("text", "text_to_image", "image_to_text", "generate", "chat")
TURN_END = "<|im_end|>"


class Sample(NamedTuple):
  """A record as the AR model reads it.

  Attributes:
    tokens: i32[n].
    weights: f32[n], 1 where the prediction of token t from t - 1 counts; the
      first is 0.
  """

  tokens: np.ndarray
  weights: np.ndarray


def sample(
  record: Record,
  task: str,
  tokenizer: protocol.Tokenizer,
  rng: np.random.Generator,
  prompt_dropout: float = 0.0,
) -> Sample:
  """A record as a sequence.

      text            document <|endoftext|>
      text_to_image   prompt <SOM>h w<IMAGE>codes<EOM> <|endoftext|>
      image_to_text   <SOM>h w<IMAGE>codes<EOM> caption <|endoftext|>
      generate        prompt <SOM>h w<IMAGE> | codes<EOM>
      chat            chat template of image, question | answer <|im_end|>

  What stands before | is not predicted. `generate` and `text_to_image` lose
  their prompt with probability `prompt_dropout`: guidance then has a branch
  that sees the image only. `chat` takes one of the questions.

  Raises:
    InputError: a field is missing or not what it should be.
  """
  if task == "text":
    return _joined([], _document(record, tokenizer))
  codes = need(record, "codes")
  prefix, image = _image_ids(codes, tokenizer)
  if task == "image_to_text":
    return _joined([], prefix + image + _document(record, tokenizer))
  if task in ("text_to_image", "generate"):
    dropped = rng.random() < prompt_dropout
    prompt = [] if dropped else _prompt_ids(record, tokenizer)
    if task == "generate":
      return _joined(prompt + prefix, image)
    return _joined([], prompt + prefix + image + [tokenizer.pad_id])
  if task != "chat":
    raise AssertionError(f"{task} is none of {TASKS}")
  pairs = need(record, "qa")
  if not pairs:
    raise InputError("field 'qa' is empty, expected a question and its answer")
  question, answer = pairs[rng.integers(len(pairs))]
  return _joined(*_turn_ids(prefix + image, question, answer, tokenizer))


def lengths(record: Record, tokenizer: protocol.Tokenizer) -> dict[str, int]:
  """{task: tokens} for each task that the record can be.

  The most it can be: with its prompt, and with the longest question.
  """
  out = {}
  text, qa = record.get("text"), record.get("qa")
  if text is not None:
    out["text"] = len(_document(record, tokenizer))
  if record.get("codes") is None:
    return out
  prefix, codes = _image_ids(record["codes"], tokenizer)
  image = prefix + codes
  if text is not None:
    out["image_to_text"] = len(image) + out["text"]
  if text is not None or record.get("prompt") is not None:
    out["generate"] = len(image) + len(_prompt_ids(record, tokenizer))
    out["text_to_image"] = out["generate"] + 1
  if qa:
    turns = [_turn_ids(image, q, a, tokenizer) for q, a in qa]
    out["chat"] = max(len(before) + len(after) for before, after in turns)
  return out


def _document(record, tokenizer):
  return [*tokenizer.encode(need(record, "text")), tokenizer.pad_id]


def _prompt_ids(record, tokenizer):
  prompt = record.get("prompt")
  return tokenizer.encode(need(record, "text") if prompt is None else prompt)


def _image_ids(codes, tokenizer) -> tuple[list[int], list[int]]:
  """Ids of an image string: `<SOM>h w<IMAGE>`, and what follows it."""
  if codes.max() >= tokenizer.image_vocab_size:
    raise InputError(
      f"code {codes.max()}, expected 0 to {tokenizer.image_vocab_size - 1}; "
      "tokenize the images with this model"
    )
  # Codes are written as ids: by way of text they would take the tokenizer a
  # thousand times as long.
  ids = (codes.ravel() + tokenizer.vocab_size).tolist()
  prefix = tokenizer.encode(protocol.image_prefix(*codes.shape))
  return prefix, [*ids, tokenizer.eom_id]


def _turn_ids(image, question, answer, tokenizer):
  """Ids of the chat up to the answer, and of the answer."""
  # A single token stands in for the image; its neighbours do not see, behind
  # a special token, which one it is.
  text = tokenizer.chat_prompt(f"{protocol.SOM}\n{question}")
  ids = tokenizer.encode(text)
  at = ids.index(tokenizer.som_id)
  end = tokenizer.encode(TURN_END)
  if len(end) != 1:
    raise InputError(
      f"the tokenizer has no token {TURN_END}, expected it beside its chat "
      "template"
    )
  return ids[:at] + image + ids[at + 1 :], tokenizer.encode(answer) + end


def _joined(before: Sequence[int], after: Sequence[int]) -> Sample:
  """Tokens of which those `after` are predicted."""
  tokens = np.array([*before, *after], np.int32)
  weights = np.zeros(len(tokens), np.float32)
  weights[max(1, len(before)) :] = 1
  return Sample(tokens, weights)
