"""The AR transformer agrees with itself: cached and whole, scanned and unrolled,
chunked and dense; and padding and vision blocks keep to their places.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import SMALL_AR, max_difference, small_ar_params
from xomni_jax.config import Compute
from xomni_jax.models import ar, layers

# The same sums in another order (padding, cache length); values reach 5.
TOLERANCE = 2e-5

COMPUTES = {
  "unrolled": Compute(scan_layers=False),
  "scanned": Compute(scan_layers=True),
}


def mixed_tokens(batch=3, length=14):
  """Random text and image ids, and a mask with two rows padded on the left."""
  rng = np.random.default_rng(0)
  total = SMALL_AR.vocab_size + SMALL_AR.image_vocab_size
  tokens = rng.integers(0, total, (batch, length)).astype(np.int32)
  valid = np.arange(length) >= np.array([0, 4, 1])[:batch, None]
  return tokens, valid


@functools.partial(jax.jit, static_argnames="compute")
def full_pass(params, tokens, valid, compute=COMPUTES["unrolled"]):
  hidden, _ = ar.XOmniAR(SMALL_AR, compute).apply(
    {"params": params}, tokens, ar.positions_of(valid), valid
  )
  return hidden


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES)
def test_cached_passes_equal_the_full_pass(compute):
  tokens, valid = mixed_tokens()
  positions = ar.positions_of(valid)
  B, T = tokens.shape
  runs = [5, 2, *[1] * (T - 7)]  # as a prompt in two runs, then token by token

  @jax.jit
  def cached(params):
    cache = ar.init_cache(SMALL_AR, compute, B, T + 3)  # 3 slots stay empty
    slots = jnp.pad(valid, ((0, 0), (0, 3)))

    def run(first, size, cache):
      part = lambda x: jax.lax.dynamic_slice_in_dim(x, first, size, axis=1)
      return ar.XOmniAR(SMALL_AR, compute).apply(
        {"params": params},
        part(jnp.asarray(tokens)),
        part(positions),
        slots,
        first,
        cache,
      )

    a, cache = run(0, runs[0], cache)
    b, cache = run(runs[0], runs[1], cache)

    def one(cache, slot):
      hidden, cache = run(slot, 1, cache)
      return cache, hidden[:, 0]

    _, rest = jax.lax.scan(one, cache, jnp.arange(runs[0] + runs[1], T))
    return jnp.concatenate([a, b, jnp.moveaxis(rest, 0, 1)], axis=1)

  ours = np.asarray(cached(small_ar_params()))
  full = np.asarray(full_pass(small_ar_params(), tokens, valid))
  assert max_difference(ours[valid], full[valid]) < TOLERANCE


def test_scanned_equals_unrolled():
  tokens, valid = mixed_tokens()
  scanned, unrolled = (
    np.asarray(full_pass(small_ar_params(), tokens, valid, compute))
    for compute in COMPUTES.values()
  )
  assert max_difference(scanned[valid], unrolled[valid]) < TOLERANCE


def test_padding_does_not_reach_real_positions():
  tokens, valid = mixed_tokens()
  other = np.where(valid, tokens, SMALL_AR.vocab_size + 3).astype(np.int32)
  a, b = (
    np.asarray(full_pass(small_ar_params(), t, valid)) for t in (tokens, other)
  )
  assert (tokens != other).any()
  np.testing.assert_array_equal(a[valid], b[valid])


def test_vision_block_leaves_text_unchanged_but_reads_it():
  params = jax.tree.map(lambda x: x[0], small_ar_params()["vision_in"])
  block = ar.Block(SMALL_AR, COMPUTES["unrolled"], vision_only=True)
  rng = np.random.default_rng(1)
  x = rng.standard_normal((1, 9, SMALL_AR.hidden_size), np.float32)
  image = np.array([[0, 0, 1, 1, 0, 1, 0, 0, 1]], bool)
  valid = np.ones((1, 9), bool)
  rope = layers.rope_angles(ar.positions_of(valid), SMALL_AR.head_dim, 1e4)
  run = jax.jit(
    lambda x: block.apply({"params": params}, x, rope, image, valid)[0]
  )
  before = np.asarray(run(x))
  np.testing.assert_array_equal(before[~image], x[~image])
  changed = np.abs(before - x).max(axis=-1)
  assert (changed[image] > 0.1).all()
  x[0, 1] += 1  # a text position, seen by the image positions behind it
  moved = np.abs(np.asarray(run(x)) - before).max(axis=-1)
  assert (moved[image] > 1e-3).all()
  assert moved[0, 0] == moved[0, 4] == 0


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 10])
def test_chunked_attention_equals_dense(chunk):
  rng = np.random.default_rng(2)
  make = lambda *shape: rng.standard_normal(shape, np.float32)
  B, T, S, N, K, H = 2, 10, 13, 6, 2, 4
  valid = np.arange(S) >= np.array([[0], [3]])
  args = (make(B, T, N, H), make(B, K, S, H), make(B, K, S, H))
  for settings in (
    {},
    {"valid_BS": valid},
    {"valid_BS": valid, "causal_from": 3},
  ):
    run = lambda c, s=settings: layers.attention(*args, scale=0.5, chunk=c, **s)
    assert max_difference(run(chunk), run(T)) < 1e-6, settings


def test_grouped_heads_read_the_key_value_head_of_their_group():
  rng = np.random.default_rng(3)
  q, k, v = (
    rng.standard_normal(s, np.float32)
    for s in ((1, 5, 6, 4), (1, 2, 5, 4), (1, 2, 5, 4))
  )
  run = lambda q, k, v: layers.attention(
    q, k, v, scale=0.5, chunk=8, causal_from=0
  )
  whole = run(q, k, v)
  for head in range(6):
    group = head // 3
    alone = run(
      q[:, :, head : head + 1],
      k[:, group : group + 1],
      v[:, group : group + 1],
    )
    assert max_difference(whole[:, :, head : head + 1], alone) < 1e-6


def test_padding_rows_stay_finite():
  tokens, valid = mixed_tokens()
  assert np.isfinite(full_pass(small_ar_params(), tokens, valid)).all()
