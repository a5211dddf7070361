"""Checks of what callers pass to the public API; each raises InputError."""

import operator
from collections.abc import Sequence

import numpy as np

from xomni_jax.config import ARConfig
from xomni_jax.data import boundary
from xomni_jax.errors import InputError


def grid_of(size: Sequence[int], px: int) -> tuple[int, int]:
  """(h, w) in codes of (height, width) in px, `px` a code."""
  try:
    size = [operator.index(s) for s in size]
  except TypeError:
    raise InputError(
      f"size is {size!r}, expected (height, width) in px, two whole numbers"
    ) from None
  if len(size) != 2 or any(s < px or s % px for s in size):
    tries = " x ".join(str(max(px, round(s / px) * px)) for s in size)
    raise InputError(
      f"size is {' x '.join(map(str, size))} px, expected height and width as "
      f"multiples of the {px} px of a token; try {tries}"
    )
  return size[0] // px, size[1] // px


def prompts_list(prompts: str | Sequence[str]) -> list[str]:
  """One or more texts, none of them blank."""
  if not isinstance(prompts, Sequence):
    raise InputError(f"prompts is {prompts!r}, expected a text or several")
  prompts = [prompts] if isinstance(prompts, str) else list(prompts)
  for prompt in prompts:
    text(prompt=prompt)
  empty = [i + 1 for i, p in enumerate(prompts) if not p.strip()]
  if empty or not prompts:
    raise InputError(
      f"prompt {empty[0] if empty else 1} of {max(1, len(prompts))} is empty; "
      "say what to draw"
    )
  return prompts


def question(asked: str) -> None:
  """A user's message, which says something."""
  text(question=asked)
  if not asked.strip():
    raise InputError("question is empty; say what to answer")


def text(**values: str) -> None:
  """Texts, be they empty."""
  for name, value in values.items():
    if not isinstance(value, str):
      raise InputError(f"{name} is {value!r}, expected a text")


def at_least_one(**values: int | None) -> None:
  """Whole numbers from 1; None passes."""
  bad = [
    f"{name} is {value!r}"
    for name, value in values.items()
    if value is not None and (not _is_whole(value) or value < 1)
  ]
  if bad:
    raise InputError(f"{', '.join(bad)}; expected a whole number from 1")


def seed_number(seed: int) -> None:
  """A seed of the random streams."""
  if not _is_whole(seed) or not 0 <= seed < 2**32:
    raise InputError(f"seed is {seed!r}, expected a whole number in 0..2^32-1")


def _is_whole(value):
  return isinstance(value, int | np.integer) and not isinstance(value, bool)


def fits_positions(tokens: int, cfg: ARConfig) -> None:
  """Whether so many tokens fit into the model's positions."""
  if tokens > cfg.max_position_embeddings:
    raise InputError(
      f"{tokens} tokens with the prompt, the model has "
      f"{cfg.max_position_embeddings} positions; shorten the prompt or ask for "
      "less"
    )


def tokens_and_mask(
  tokens, mask, cfg: ARConfig
) -> tuple[np.ndarray, np.ndarray]:
  """i32[B, T] joint ids, and bool[B, T] (None: all True)."""
  expected = "i32[B, T], shorter rows padded on the left and a mask"
  tokens = boundary.array("tokens", tokens, expected)
  total = cfg.vocab_size + cfg.mm_vocab_size
  if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
    raise InputError(
      f"tokens are {tokens.dtype}{list(tokens.shape)}, expected i32[B, T]"
    )
  if tokens.min() < 0 or tokens.max() >= total:
    raise InputError(
      f"tokens lie in {tokens.min()}..{tokens.max()}, expected 0..{total - 1}"
    )
  if mask is None:
    mask = np.ones(tokens.shape, bool)
  mask = boundary.array("mask", mask, "bool[B, T]", bool)
  if mask.shape != tokens.shape:
    raise InputError(
      f"mask is {list(mask.shape)}, expected {list(tokens.shape)} as tokens"
    )
  return tokens.astype(np.int32), mask
