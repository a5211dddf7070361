"""The next-token loss over two vocabularies, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from xomni_jax.training import losses

B, T, D, TEXT, IMAGE = 2, 13, 8, 11, 7


def case(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.standard_normal(shape)
  params = {"lm_head": draw(TEXT, D), "mm_head": draw(IMAGE, D)}
  tokens = rng.integers(0, TEXT + IMAGE, (B, T))
  weights = rng.random((B, T)) * (rng.random((B, T)) < 0.7)
  return params, draw(B, T, D), tokens, weights


def plain(params, hidden, tokens, weights):
  """(nll, correct) of text and of image targets, a target at a time."""
  sums = np.zeros((2, 2))
  for b in range(B):
    for t in range(1, T):  # the first token is nobody's target
      image = tokens[b, t] >= TEXT
      head = params["mm_head" if image else "lm_head"]
      logits = head @ hidden[b, t - 1]
      target = tokens[b, t] - TEXT * image
      logp = logits - np.log(np.exp(logits).sum())
      sums[int(image)] += weights[b, t] * np.array(
        [-logp[target], logits.argmax() == target]
      )
  return sums


def ours(params, hidden, tokens, weights, chunk):
  f32 = lambda x: jnp.asarray(x, jnp.float32)
  return losses.joint_loss(
    jax.tree.map(f32, params),
    f32(hidden),
    jnp.asarray(tokens, jnp.int32),
    f32(weights),
    TEXT,
    chunk,
  )


@pytest.mark.parametrize("chunk", [4, 5, 64])
def test_joint_loss_equals_float64(chunk):
  given = case()
  # f32 sums of a few dozen terms of order one.
  assert (
    helpers.max_difference(np.array(ours(*given, chunk)), plain(*given)) < 1e-5
  )


def test_gradients_do_not_depend_on_the_chunk():
  params, hidden, tokens, weights = case(1)

  def gradient(chunk):
    def loss(params, hidden):
      text, image = ours(params, hidden, tokens, weights, chunk)
      return text.nll + 2 * image.nll

    f32 = lambda x: jnp.asarray(x, jnp.float32)
    return jax.grad(loss, (0, 1))(jax.tree.map(f32, params), f32(hidden))

  for a, b in zip(
    jax.tree.leaves(gradient(3)), jax.tree.leaves(gradient(64)), strict=True
  ):
    assert helpers.max_difference(a, b) < 1e-5


def test_gradient_of_the_head_equals_float64_differences():
  params, hidden, tokens, weights = case(2)
  gradient = jax.grad(lambda p: ours(p, hidden, tokens, weights, 4).text.nll)(
    jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  )
  for at in [(0, 0), (5, 3), (10, 7)]:
    moved = []
    for step in (1e-5, -1e-5):
      head = params["lm_head"].copy()
      head[at] += step
      moved.append(
        plain(params | {"lm_head": head}, hidden, tokens, weights)[0, 0]
      )
    assert abs(gradient["lm_head"][at] - (moved[0] - moved[1]) / 2e-5) < 1e-4
  assert jnp.abs(gradient["mm_head"]).max() == 0


def test_head_gradient_of_bf16_chunks_is_summed_in_f32():
  # 64 equal chunks: a bf16 sum would stop growing at 2^8 times a term.
  length, chunk = 1024, 2
  hidden = jnp.ones((1, length, 1), jnp.bfloat16)
  head = jnp.zeros((2, 1), jnp.bfloat16)
  targets = jnp.zeros((1, length), jnp.int32)
  total = lambda head: (
    losses.token_loss(
      hidden, head.astype(jnp.float32), targets, jnp.ones((1, length)), chunk
    ).nll
  )
  gradient = jax.grad(total)(head.astype(jnp.float32))
  np.testing.assert_allclose(gradient[:, 0], [-512, 512], rtol=1e-3)


def test_a_target_is_scored_by_its_own_vocabulary_alone():
  params, hidden, tokens, weights = case(3)
  base = ours(params, hidden, tokens, weights, 64)
  other = params | {"mm_head": params["mm_head"] + 1.7}
  changed = ours(other, hidden, tokens, weights, 64)
  assert base.text.nll == changed.text.nll
  assert base.image.nll != changed.image.nll
