"""The text and image loops: where they stop, and how they draw."""

import numpy as np
import pytest

from tests.helpers import SMALL_AR, max_difference, small_ar_params
from xomni_jax.config import Compute
from xomni_jax.data import protocol
from xomni_jax.inference import sampling
from xomni_jax.inference.sampling import Sampling

UNROLLED = Compute(scan_layers=False)


def prefilled(rows, steps, copies, seed=0):
  """State of `rows` of ids in the small transformer."""
  tokens, valid = protocol.left_pad(rows, pad_id=0, multiple_of=8)
  return sampling.prefill(
    small_ar_params(),
    tokens,
    valid,
    sampling.sequence_keys(seed, sum(copies)),
    cfg=SMALL_AR,
    compute=UNROLLED,
    steps=steps,
    copies=copies,
  )


def text_run(ends, steps=8):
  """Tokens [2, steps] and steps made, greedy, of two prompts."""
  state = prefilled([[3, 5, 7], [1, 2, 3, 4, 5, 6]], steps, (1, 1))
  _, tokens, made = sampling.text_steps(
    small_ar_params(),
    state,
    cfg=SMALL_AR,
    compute=UNROLLED,
    sampling=Sampling(greedy=True),
    steps=steps,
    ends=ends,
  )
  return np.asarray(tokens), int(made)


def test_text_loop_ends_each_sequence_at_its_own_end_token():
  free, made = text_run(())
  assert made == 8
  row, other = free.tolist()
  at = next(i for i in range(2, 8) if row[i] not in row[:i] + other)
  end = row[at]
  tokens, made = text_run((end,))
  assert made == 8  # the other sequence runs on
  assert tokens[0].tolist() == row[: at + 1] + [end] * (7 - at)
  assert tokens[1].tolist() == other


def test_text_loop_stops_once_every_sequence_has_ended():
  free, _ = text_run(())
  ends = tuple(sorted({int(row[1]) for row in free}))
  tokens, made = text_run(ends)
  expected = [
    next(i for i, t in enumerate(row) if t in ends) for row in free.tolist()
  ]
  assert made == max(expected) + 1 <= 2
  for mine, row, at in zip(tokens, free, expected, strict=True):
    assert mine[: at + 1].tolist() == row[: at + 1].tolist()


def test_text_loop_goes_on_where_it_stopped():
  run = lambda state, steps: sampling.text_steps(
    small_ar_params(),
    state,
    cfg=SMALL_AR,
    compute=UNROLLED,
    sampling=Sampling(temperature=1.5),
    steps=steps,
    ends=(),
  )
  start = lambda: prefilled([[3, 5, 7], [1, 2, 3, 4, 5, 6]], 8, (1, 1))
  _, whole, _ = run(start(), 8)
  state, first, _ = run(start(), 4)
  _, second, _ = run(state, 4)
  np.testing.assert_array_equal(np.hstack([first, second]), whole)


def test_steps_and_sequences_draw_independently():
  params = small_ar_params() | {"mm_head": np.zeros((20, 32), np.float32)}
  N, steps, V = 16, 64, SMALL_AR.image_vocab_size
  _, drawn = sampling.image_steps(
    params,
    prefilled([[3, 5, 7]], steps, (N,)),
    cfg=SMALL_AR,
    compute=UNROLLED,
    sampling=Sampling(),
    steps=steps,
  )
  codes = np.asarray(drawn.token)
  assert max_difference(drawn.logprob, np.full((N, steps), -np.log(V))) < 1e-5
  # Pairs of neighbours along either axis are uniform over V * V cells; 331 is
  # the 99.9th percentile of Pearson's statistic at 255 degrees of freedom.
  for pairs in (codes[:, 1:] * V + codes[:, :-1], codes[1:] * V + codes[:-1]):
    count = np.bincount(pairs.ravel(), minlength=V * V)
    wanted = pairs.size / V**2
    assert ((count - wanted) ** 2 / wanted).sum() < 331


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_sequence_is_drawn_alike_beside_longer_prompts(guidance):
  """Padding, which others of the batch make longer, has no part in its keys."""
  row, other, nothing, steps = [3, 5, 7], [*range(1, 14)], [2], 12

  def drawn(*rows):
    keys = sampling.sequence_keys(0, len(rows))
    if guidance != 1:
      rows += (nothing,) * len(rows)
    state = prefilled(rows, steps, (1,) * len(rows))
    _, drawn = sampling.image_steps(
      small_ar_params(),
      state._replace(keys=keys, done=state.done[: len(keys)]),
      cfg=SMALL_AR,
      compute=UNROLLED,
      sampling=Sampling(temperature=2.0, cfg_scale=guidance),
      steps=steps,
    )
    return np.asarray(drawn.token)

  np.testing.assert_array_equal(drawn(row, other)[:1], drawn(row))
