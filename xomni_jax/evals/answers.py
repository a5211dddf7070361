"""What a model answers about images of the drawn world, through their codes.

An answer is exact if the model, each time choosing the likeliest token, gives
just the truth and ends there. That is so if and only if each token of the truth
is the likeliest after those before it, which one pass over the truth shows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from xomni_jax.data import images, sequences
from xomni_jax.errors import InputError
from xomni_jax.evals import stats
from xomni_jax.evals.asked import true_records
from xomni_jax.inference.pipeline import Model

NAME = "answers"
CAPTION = "caption"
QUESTIONS = ("What does it say?", "What colour is it?")
_ROW = 32  # rows are padded to multiples, for the number of programs' sake
_LOGITS = 2**28  # that exist at once: 1 GiB


def check_asks(source: str) -> None:
  """InputError unless the records of a source have these questions."""
  (record,) = true_records(source, [0])
  there = {question for question, _ in record["qa"]}
  if missing := [q for q in QUESTIONS if q not in there]:
    raise InputError(
      f"{source} does not ask {' or '.join(missing)}; expected a level that "
      "does, such as world:signs:test"
    )


def measure(
  model: Model, source: str, count: int, batch: int, bar: tqdm
) -> dict[str, np.ndarray]:
  """{"caption" or question: f64[count], 1 where the answer is exact}.

  Args:
    model: that is asked.
    source: "world:LEVEL:SPLIT".
    count: of images.
    batch: images at once.
    bar: counts them.
  """
  found: dict[str, list[bool]] = {name: [] for name in (CAPTION, *QUESTIONS)}
  for first in range(0, count, batch):
    numbers = range(first, min(first + batch, count))
    records = true_records(source, numbers)
    codes = _encode(model, [r["image"] for r in records])
    records = [{**r, "codes": c} for r, c in zip(records, codes, strict=True)]
    for name, of in found.items():
      of += _exact(model, [_truth(model, r, name) for r in records])
    bar.update(len(numbers))
  return {name: np.array(of, np.float64) for name, of in found.items()}


def summary(
  identity: Mapping[str, Any],
  found: Mapping[str, np.ndarray],
  kinds: Sequence[str],
) -> dict[str, Any]:
  """The figures as JSON: {"exact": {question: {kind: Estimate}}}.

  Args:
    identity: what was measured.
    found: see `measure`.
    kinds: of the images' texts.
  """
  columns = {("exact", name): values for name, values in found.items()}
  return {"identity": dict(identity), **stats.by_kind(columns, kinds)}


def _encode(model: Model, pictures: Sequence[Image.Image]) -> np.ndarray:
  transform = model.config.transform
  pixels = [images.preprocess(picture, transform) for picture in pictures]
  return model.encode_pixels(np.stack(pixels))


def _truth(model, record, name) -> tuple[np.ndarray, np.ndarray]:
  """Tokens i32[n], and whether each is part of what is asked for."""
  rng = np.random.default_rng(0)  # there is nothing to choose
  tokenizer = model.tokenizer
  if name == CAPTION:
    tokens, _ = sequences.sample(record, "image_to_text", tokenizer, rng)
    image = int(np.flatnonzero(tokens == tokenizer.eom_id)[0])
    return tokens, np.arange(len(tokens)) > image
  qa = [[q, a] for q, a in record["qa"] if q == name]
  made = sequences.sample({**record, "qa": qa}, "chat", tokenizer, rng)
  return made.tokens, made.weights > 0


def _exact(model: Model, rows) -> list[bool]:
  length = -(-max(len(tokens) for tokens, _ in rows) // _ROW) * _ROW
  padded = np.zeros((len(rows), length), np.int32)
  there = np.zeros(padded.shape, bool)
  for b, (tokens, _) in enumerate(rows):
    padded[b, : len(tokens)] = tokens
    there[b, : len(tokens)] = True
  # With a full-size vocabulary a batch of these takes 20 GiB.
  vocabulary = model.config.ar.vocab_size + model.config.ar.mm_vocab_size
  at_once = max(1, _LOGITS // (length * vocabulary))
  likeliest = np.concatenate(
    [
      model.logits(
        padded[i : i + at_once], "text", there[i : i + at_once]
      ).argmax(-1)
      for i in range(0, len(rows), at_once)
    ]
  )
  return [
    bool(np.all((likeliest[b, : len(t) - 1] == t[1:])[asked[1:]]))
    for b, (t, asked) in enumerate(rows)
  ]
