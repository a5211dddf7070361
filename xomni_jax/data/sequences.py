"""Records as token sequences, with a weight for each prediction."""

from typing import NamedTuple

import numpy as np

from xomni_jax.data import protocol, records
from xomni_jax.errors import InputError


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
  record: records.Record,
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
  their prompt with probability `prompt_dropout`; `chat` takes one question.

  Raises:
    InputError: a field is missing or not what it should be.
  """
  raise NotImplementedError


def lengths(
  record: records.Record, tokenizer: protocol.Tokenizer
) -> dict[str, int]:
  """{task: tokens} for each task that the record can be; the most it can be."""
  raise NotImplementedError
