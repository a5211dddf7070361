"""Attention within packed samples: no path leads from one to another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from xomni_jax.config import Compute
from xomni_jax.models import ar
from xomni_jax.models.layers import attention, join_runs, split_runs
from xomni_jax.models.splash import splash

# f32 at highest precision; sums of a hundred terms of order one.
TOLERANCE = 1e-5
B, T, N, K, H = 2, 200, 4, 2, 16


def arrays():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape)
  cuts = [0, 37, 90, 91, 160, T]
  segments = np.zeros((B, T), np.int32)
  for i in range(4):  # the last stretch is padding
    segments[:, cuts[i] : cuts[i + 1]] = i + 1
  segments[1] = np.roll(segments[1], 3)
  segments[1, :3] = 7
  return (
    draw(B, T, N, H),
    draw(B, K, T, H),
    draw(B, K, T, H),
    segments,
  )


def plain(q, k, v, segments):
  """The same in float64, a query at a time."""
  out = np.zeros_like(q)
  for b in range(B):
    for n in range(N):
      for t in range(T):
        keys = (np.arange(T) <= t) & (segments[b] == segments[b, t])
        scores = k[b, n // (N // K)] @ q[b, t, n] * H**-0.5
        weights = np.where(keys, np.exp(scores - scores[keys].max()), 0)
        out[b, t, n] = weights @ v[b, n // (N // K)] / weights.sum()
  return out


def ways(segments):
  """{name: function of q, k, v} of every implementation."""
  common = dict(scale=H**-0.5, causal_from=0, segments=(segments, segments))
  return {
    "whole": lambda *x: attention(*x, chunk=T, **common),
    "chunked": lambda *x: attention(*x, chunk=48, **common),
    "splash": lambda *x: splash(*x, segments, causal=True, interpret=True),
  }


@pytest.mark.parametrize("way", ["whole", "chunked", "splash"])
def test_attention_within_segments_equals_float64(way):
  q, k, v, segments = arrays()
  q32, k32, v32 = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
  ours = jax.jit(ways(jnp.asarray(segments))[way])(q32, k32, v32)
  assert helpers.max_difference(ours, plain(q, k, v, segments)) < TOLERANCE


@pytest.mark.parametrize("way", ["chunked", "splash"])
def test_gradients_of_attention_equal_those_of_the_plain_one(way):
  q, k, v, segments = arrays()
  args = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
  all_ways = ways(jnp.asarray(segments))
  gradient = lambda f: jax.jit(
    jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), argnums=(0, 1, 2))
  )(*args)
  for ours, theirs in zip(
    gradient(all_ways[way]), gradient(all_ways["whole"]), strict=True
  ):
    assert helpers.max_difference(ours, theirs) < TOLERANCE


def test_runs_of_positions_are_put_together_again():
  x = jnp.arange(2 * 11 * 3).reshape(2, 11, 3)
  runs = split_runs(x, 1, 4)
  assert runs.shape == (3, 2, 4, 3)
  np.testing.assert_array_equal(join_runs(runs, 1, 11), x)


def packed_tokens():
  """Three samples of text and image tokens, and one row with all of them."""
  cfg, rng = helpers.SMALL_AR, np.random.default_rng(1)
  samples = [rng.integers(0, cfg.vocab_size + 20, n) for n in (9, 14, 5)]
  row = np.concatenate([*samples, np.zeros(4, int)])
  segments = np.repeat([1, 2, 3, 0], [9, 14, 5, 4])
  positions = np.concatenate([np.arange(n) for n in (9, 14, 5)] + [np.zeros(4)])
  return samples, *(
    jnp.asarray(x[None], jnp.int32) for x in (row, segments, positions)
  )


@pytest.mark.parametrize("kernel", ["chunked", "splash_interpret"])
def test_packed_samples_equal_samples_alone(kernel):
  samples, row, segments, positions = packed_tokens()
  params = helpers.small_ar_params()
  model = ar.XOmniAR(helpers.SMALL_AR, Compute(query_chunk=8, attention=kernel))
  packed, _ = model.apply(
    {"params": params}, row, positions, segments > 0, segments_BT=segments
  )
  first = 0
  for tokens in samples:
    valid = jnp.ones((1, len(tokens)), bool)
    alone, _ = ar.XOmniAR(helpers.SMALL_AR).apply(
      {"params": params},
      jnp.asarray(tokens[None], jnp.int32),
      ar.positions_of(valid),
      valid,
    )
    part = packed[:, first : first + len(tokens)]
    assert helpers.max_difference(part, alone) < 1e-4
    first += len(tokens)


def test_a_sample_has_no_gradient_in_another():
  _, row, segments, positions = packed_tokens()
  cfg = helpers.SMALL_AR
  params = helpers.small_ar_params()
  # A token that occurs in the first sample only.
  own = next(
    int(t) for t in row[0, :9] if t < cfg.vocab_size and t not in row[0, 9:]
  )

  def of_others(table):
    hidden, _ = ar.XOmniAR(cfg).apply(
      {"params": params | {"lm_embed_tokens": table}},
      row,
      positions,
      segments > 0,
      segments_BT=segments,
    )
    return jnp.sum(jnp.where(segments[..., None] > 1, jnp.sin(hidden), 0))

  gradient = jax.grad(of_others)(params["lm_embed_tokens"])
  assert jnp.abs(gradient).max() > 0
  assert jnp.abs(gradient[own]).max() == 0


@pytest.mark.parametrize("remat", ["full", "dots"])
@pytest.mark.parametrize("scan", [True, False])
def test_gradients_do_not_depend_on_rematerialisation(remat, scan):
  _, row, segments, positions = packed_tokens()
  params = helpers.small_ar_params()

  def gradient(compute):
    def loss(params):
      hidden, _ = ar.XOmniAR(helpers.SMALL_AR, compute).apply(
        {"params": params}, row, positions, segments > 0, segments_BT=segments
      )
      return jnp.sum(jnp.sin(hidden))

    return jax.jit(jax.grad(loss))(params)

  plain_ = Compute(query_chunk=8)
  other = dataclasses.replace(plain_, remat=remat, scan_layers=scan)
  for ours, theirs in zip(
    jax.tree.leaves(gradient(other)),
    jax.tree.leaves(gradient(plain_)),
    strict=True,
  ):
    # Gradients of order one to a hundred.
    assert helpers.max_difference(ours, theirs) < 1e-4
