"""Rows of the tokenizer stage: an image, and questions with their answers.

As many questions as fit stand behind the image, in random order. Each reads the
image and itself, as if it were alone: so one pass of the ViT teaches many
answers, and none of them gives another away.
"""

import dataclasses

import numpy as np

from xomni_jax.data import protocol, records
from xomni_jax.errors import InputError
from xomni_jax.training.stages.grids import Grid, Grids

# What a caption answers.
CAPTION = "Describe the image."


@dataclasses.dataclass(frozen=True)
class QuestionRows:
  """What `data.pipeline.images` needs to make rows; grids are the buckets.

  Attributes:
    tokenizer: of the text.
    vocab_size: of the language model, ids it knows.
    grids: aspect buckets.
    length: tokens of text.
  """

  tokenizer: protocol.Tokenizer
  vocab_size: int
  grids: Grids
  length: int

  def prepare(
    self, record: records.Record, rng: np.random.Generator, grid: Grid | None
  ) -> dict[str, np.ndarray]:
    """One row.

    Returns:
      pixels u8[H, W, 3], the whole image at the grid's size;
      tokens i32[T]; padding is the pad id;
      weights f32[T], of predicting token t from t - 1: 1 in answers;
      segments i32[T], 1, 2, ... by question, 0 at padding;
      positions i32[T], from 0 in each question.
    Raises:
      InputError: no image, no text to learn from, or none that fits.
    """
    pairs = [[CAPTION, record["text"]]] if record.get("text") else []
    pairs += record.get("qa") or []
    if not pairs:
      raise InputError("has neither 'text' nor 'qa', expected one of them")
    row = self._text(pairs[i] for i in rng.permutation(len(pairs)))
    if not row["weights"].any():
      raise InputError(
        f"no question fits {self.length} tokens; raise options.text_len"
      )
    image = records.image_of(record)
    return {"pixels": self.grids.pixels(image, grid), **row}

  def blank(self, grid: Grid | None) -> dict[str, np.ndarray]:
    """A row without anything to learn."""
    return {"pixels": self.grids.blank(grid), **self._text(())}

  def question(self, text: str) -> list[int]:
    """Ids of a question, up to where its answer begins."""
    return self._ids(text + "\n")

  def _ids(self, text):
    ids = self.tokenizer.encode(text)
    if ids and max(ids) >= self.vocab_size:
      raise InputError(
        f"text {text[:40]!r} has id {max(ids)}, expected below the language "
        f"model's vocab_size {self.vocab_size}; take image tokens out of it"
      )
    return ids

  def _text(self, pairs):
    """tokens, weights, segments and positions of the pairs that fit."""
    tokens = np.full(self.length, self.tokenizer.pad_id, np.int32)
    segments, positions = np.zeros((2, self.length), np.int32)
    weights = np.zeros(self.length, np.float32)
    start, count = 0, 0
    for question, answer in pairs:
      ids = self.question(question)
      asked = len(ids)
      ids = [*ids, *self._ids(answer), self.tokenizer.pad_id]
      end = start + len(ids)
      if end > self.length:
        continue
      count += 1
      tokens[start:end] = ids
      segments[start:end] = count
      positions[start:end] = np.arange(len(ids))
      weights[start + asked : end] = 1
      start = end
    return {
      "tokens": tokens,
      "weights": weights,
      "segments": segments,
      "positions": positions,
    }
