"""Filters and draws: what is kept, how likely it is, how often it comes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import max_difference
from xomni_jax.errors import InputError
from xomni_jax.inference.sampling import Sampling, draw, filter_logits, guide

SETTINGS = [
  Sampling(temperature=0.6),
  Sampling(top_k=7),
  Sampling(top_k=500),  # more than there are
  Sampling(top_p=0.75),
  Sampling(min_p=0.2),
  Sampling(temperature=1.4, top_k=30, top_p=0.9, min_p=0.05),
  Sampling(temperature=0.3, top_k=2, top_p=0.5),
]


def kept(logits, **settings):
  """Which of one row of logits survive."""
  out = filter_logits(jnp.array(logits, jnp.float32), Sampling(**settings))
  return np.isfinite(out).tolist()


@pytest.mark.parametrize("s", SETTINGS, ids=str)
def test_filters_match_transformers_processors(s):
  torch = pytest.importorskip("torch")
  from transformers.generation import logits_process as theirs

  logits = 3 * np.random.default_rng(0).standard_normal((40, 97), np.float32)
  steps = [theirs.TemperatureLogitsWarper(s.temperature)]
  if s.top_k:
    steps.append(theirs.TopKLogitsWarper(s.top_k))
  if s.top_p < 1:
    steps.append(theirs.TopPLogitsWarper(s.top_p))
  if s.min_p:
    steps.append(theirs.MinPLogitsWarper(s.min_p))
  expected = torch.from_numpy(logits.copy())
  for step in steps:
    expected = step(None, expected)
  ours = np.asarray(filter_logits(logits, s))
  np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(expected))
  # One division; the rest only cuts.
  np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_top_k_keeps_all_tokens_tied_with_the_kth():
  assert kept([1.0, 3.0, 2.0, 2.0, 0.0], top_k=2) == [
    False, True, True, True, False,
  ]  # fmt: skip
  assert kept([1.0, 1.0, 1.0], top_k=1) == [True, True, True]


@pytest.mark.parametrize("top_p", [1e-9, 1e-30])
def test_tiny_top_p_keeps_one_token(top_p):
  assert kept([1.0, 3.0, 2.0], top_p=top_p) == [False, True, False]
  assert sum(kept([2.0, 2.0, 2.0], top_p=top_p)) == 1
  assert sum(kept(np.zeros(16384), top_p=top_p)) == 1


def test_top_p_keeps_tokens_until_their_sum_reaches_p():
  logits = np.log([0.5, 0.25, 0.125, 0.125])
  assert kept(logits, top_p=0.49) == [True, False, False, False]
  assert kept(logits, top_p=0.51) == [True, True, False, False]
  assert kept(logits, top_p=0.76) == [True, True, True, False]


def test_min_p_is_a_share_of_the_likeliest():
  logits = np.log([0.4, 0.21, 0.19, 0.2])
  assert kept(logits, min_p=0.51) == [True, True, False, False]
  assert kept(logits, min_p=0.499) == [True, True, False, True]
  assert kept(logits, min_p=0.999) == [True, False, False, False]


def test_top_k_comes_before_top_p():
  # Of the two that top_k leaves the first has 0.55 / 0.8 = 0.69.
  logits = np.log([0.55, 0.25, 0.2])
  assert kept(logits, top_k=2, top_p=0.6) == [True, False, False]
  assert kept(logits, top_p=0.6) == [True, True, False]


def test_temperature_comes_before_top_p():
  logits = np.log([0.5, 0.3, 0.2])
  assert kept(logits, top_p=0.6) == [True, True, False]
  assert kept(logits, top_p=0.6, temperature=0.3) == [True, False, False]


@pytest.mark.parametrize(
  "s",
  [
    Sampling(),
    Sampling(temperature=0.7, top_k=8, top_p=0.9, min_p=0.03),
    Sampling(cfg_scale=2.5, top_k=6),
  ],
  ids=str,
)
def test_draws_come_as_often_as_their_logprobs_say(s):
  n, V = 20_000, 12
  rng = np.random.default_rng(1)
  cond, uncond = 1.2 * rng.standard_normal((2, V), np.float32)
  scores = cond if s.cfg_scale == 1 else guide(cond, uncond, s.cfg_scale)
  probs = np.asarray(jax.nn.softmax(filter_logits(scores, s)))
  rows = [np.broadcast_to(cond, (n, V))]
  if s.cfg_scale != 1:
    rows.append(np.broadcast_to(uncond, (n, V)))
  keys = jax.random.split(jax.random.key(2), n)
  drawn = jax.jit(draw, static_argnums=2)(keys, np.concatenate(rows), s)
  token = np.asarray(drawn.token)
  count = np.bincount(token, minlength=V)
  support = probs > 0
  assert (count[~support] == 0).all()
  assert (support.sum() < V) == (s != Sampling())
  # Pearson's statistic; 31 is its 99.9th percentile at 11 degrees of freedom.
  wanted = n * probs[support]
  assert ((count[support] - wanted) ** 2 / wanted).sum() < 31
  assert max_difference(drawn.logprob, np.log(probs[token])) < 1e-5
  raw = np.asarray(jax.nn.log_softmax(cond))
  assert max_difference(drawn.raw_logprob, raw[token]) < 1e-5


def test_a_draw_depends_on_its_own_key_and_row_only():
  logits = np.random.default_rng(3).standard_normal((6, 50), np.float32)
  keys = jax.random.split(jax.random.key(4), 6)
  whole = draw(keys, logits, Sampling()).token
  part = draw(keys[2:4], logits[2:4], Sampling()).token
  np.testing.assert_array_equal(whole[2:4], part)
  assert len(set(whole.tolist())) > 1


def test_greedy_takes_the_guided_maximum_and_ignores_filters():
  cond, uncond = np.float32([[2.0, 1.9, 0.0], [2.0, 0.0, 0.0]])
  s = Sampling(temperature=9.0, top_k=1, greedy=True, cfg_scale=4.0)
  drawn = draw(
    jax.random.split(jax.random.key(0), 1), np.stack([cond, uncond]), s
  )
  assert drawn.token.tolist() == [1]  # not 0, which `cond` alone prefers
  guided = guide(cond, uncond, 4.0)
  expected = jax.nn.log_softmax(guided)[1]
  assert max_difference(drawn.logprob, [expected]) < 1e-6
  assert max_difference(drawn.raw_logprob, [jax.nn.log_softmax(cond)[1]]) < 1e-6


def test_guidance_of_one_is_the_conditional_distribution():
  cond, uncond = np.random.default_rng(5).standard_normal((2, 9), np.float32)
  expected = jax.nn.log_softmax(cond)
  assert max_difference(guide(cond, uncond, 1.0), expected) < 1e-6


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("temperature", 0.0),
    ("temperature", -1.0),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("top_k", -1),
    ("top_k", 2.5),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", float("nan")),
    ("min_p", -0.1),
    ("min_p", 1.0),
    ("cfg_scale", 0.9),
    ("cfg_scale", float("inf")),
    ("cfg_scale", float("nan")),
  ],
)
def test_sampling_refuses_a_setting_out_of_range(name, value):
  with pytest.raises(InputError) as caught:
    Sampling(**{name: value})
  message = str(caught.value)
  assert f"{name} is {value}, expected" in message
  assert "\n" not in message


def test_sampling_names_all_bad_settings_at_once():
  with pytest.raises(InputError, match=r"temperature.*top_k.*cfg_scale"):
    Sampling(temperature=-1, top_k=-2, cfg_scale=0)


def test_sampling_accepts_the_ends_of_its_ranges():
  Sampling(temperature=1e-3, top_k=0, top_p=1.0, min_p=0.0, cfg_scale=1.0)
  Sampling(top_k=10**6, top_p=1e-6, min_p=0.999, cfg_scale=50.0)
