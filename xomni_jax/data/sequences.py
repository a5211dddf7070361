"""Records as token sequences, with a weight for each prediction."""

import functools
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
  turns: int = 1,
  room: int = 0,
) -> Sample:
  """A record as a sequence.

      text            document <|endoftext|>
      text_to_image   prompt <SOM>h w<IMAGE>codes<EOM> <|endoftext|>
      image_to_text   <SOM>h w<IMAGE>codes<EOM> caption <|endoftext|>
      generate        prompt <SOM>h w<IMAGE> | codes<EOM>
      chat            chat template of image, question | answer <|im_end|> ...

  What stands before | is not predicted. `generate` and `text_to_image` lose
  their prompt with probability `prompt_dropout`: guidance then has a branch
  that sees the image only. `chat` asks up to `turns` of the questions, in
  random order, and predicts each answer; from the second on, only those that
  fit into `room` tokens, if that is not 0.

  Raises:
    InputError: a field is missing or not what it should be.
  """
  if task == "text":
    return _joined(([], _document(record, tokenizer)))
  codes = need(record, "codes")
  prefix, image = _image_ids(codes, tokenizer)
  if task == "image_to_text":
    return _joined(([], prefix + image + _document(record, tokenizer)))
  if task in ("text_to_image", "generate"):
    dropped = rng.random() < prompt_dropout
    prompt = [] if dropped else _prompt_ids(record, tokenizer)
    if task == "generate":
      return _joined((prompt + prefix, image))
    return _joined(([], prompt + prefix + image + [tokenizer.pad_id]))
  if task != "chat":
    raise AssertionError(f"{task} is none of {TASKS}")
  pairs = need(record, "qa")
  if not pairs:
    raise InputError("field 'qa' is empty, expected a question and its answer")
  asked = rng.permutation(len(pairs))[:turns]
  return _chat(prefix + image, [pairs[i] for i in asked], tokenizer, room)


def lengths(record: Record, tokenizer: protocol.Tokenizer) -> dict[str, int]:
  """{task: tokens} for each task that the record can be.

  The most it can be: with its prompt, and with the longest question. A chat of
  several turns is longer; see `sample`.
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
    chats = (_chat(image, [pair], tokenizer) for pair in qa)
    out["chat"] = max(len(chat.tokens) for chat in chats)
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


def _chat(image, pairs, tokenizer, room=0) -> Sample:
  """A conversation on an image, of [question, answer] pairs."""
  end = _turn_end(tokenizer)
  messages, said, parts, length = [], "", [], 0
  for question, answer in pairs:
    if not parts:
      messages.append(_asked_of_image(question))
      text, ids = _opening(question, tokenizer)
      at = ids.index(tokenizer.som_id)
      before = [*ids[:at], *image, *ids[at + 1 :]]
    else:
      messages.append(question)
      text = tokenizer.chat_prompt(*messages)
      if not text.startswith(said):
        raise InputError(
          "the tokenizer's chat template writes earlier turns anew, expected "
          "that it adds to them; ask for one turn (data.turns)"
        )
      before = tokenizer.encode(text[len(said) :])
    after = tokenizer.encode(answer) + end
    length += len(before) + len(after)
    if parts and room and length > room:
      break
    parts.append((before, after))
    messages.append(answer)
    said = text + answer + TURN_END
  return _joined(*parts)


# The same is asked of thousands of images, and templates are slow: they took
# three quarters of the time in which images become codes.
@functools.lru_cache(4096)
def _opening(question, tokenizer) -> tuple[str, list[int]]:
  """A first question in the chat template, and its ids."""
  text = tokenizer.chat_prompt(_asked_of_image(question))
  return text, tokenizer.encode(text)


def _asked_of_image(question):
  # A single token stands in for the image; its neighbours do not see, behind a
  # special token, which one it is.
  return f"{protocol.SOM}\n{question}"


@functools.lru_cache(8)
def _turn_end(tokenizer) -> list[int]:
  end = tokenizer.encode(TURN_END)
  if len(end) != 1:
    raise InputError(
      f"the tokenizer has no token {TURN_END}, expected it beside its chat "
      "template"
    )
  return end


def _joined(*parts: tuple[Sequence[int], Sequence[int]]) -> Sample:
  """Of each part the first tokens are given and the second predicted."""
  tokens = [t for part in parts for ids in part for t in ids]
  lengths = [len(ids) for part in parts for ids in part]
  weights = np.repeat(np.float32([0, 1] * len(parts)), lengths)
  weights[:1] = 0
  return Sample(np.array(tokens, np.int32), weights)
