"""Care of a codebook: its start by k-means, its use, and dead codes revived.

Shape letters: N vectors, K codes, E their size.
"""

import jax
import jax.numpy as jnp

from xomni_jax.models.vq import normalise


def kmeans(
  vectors_NE: jax.Array,
  size: int,
  iterations: int,
  key: jax.Array,
  chunk: int = 4096,
) -> jax.Array:
  """Centres of spherical k-means, f32[K, E] of unit length; jittable.

  It starts from K of the vectors. A centre that no vector is nearest to moves
  to one of the vectors that are farthest from their centres, in each
  iteration; with fewer distinct vectors than centres some remain unused.

  Args:
    vectors_NE: f32 of unit length, at least `size` of them.
    size: K.
    iterations: of assignment and averaging.
    key: draws the start.
    chunk: vectors whose cosines to all centres exist at once.
  Raises:
    ValueError: fewer vectors than centres.
  """
  count = vectors_NE.shape[0]
  if count < size:
    raise ValueError(f"{count} vectors for {size} centres; give more vectors")
  start = jax.random.choice(key, count, (size,), replace=False)

  def step(_, centres_KE):
    nearest_N, cosine_N = assign(vectors_NE, centres_KE, chunk)
    total_KE = jax.ops.segment_sum(vectors_NE, nearest_N, size)
    used_K = jnp.bincount(nearest_N, length=size) > 0
    _, far_K = jax.lax.top_k(-cosine_N, size)
    # The i-th unused centre takes the i-th farthest vector.
    turn_K = jnp.cumsum(~used_K) - 1
    other_KE = vectors_NE[far_K[turn_K]]
    return jnp.where(used_K[:, None], normalise(total_KE), other_KE)

  return jax.lax.fori_loop(0, iterations, step, vectors_NE[start])


def assign(
  vectors_NE: jax.Array, codebook_KE: jax.Array, chunk: int = 4096
) -> tuple[jax.Array, jax.Array]:
  """The nearest code of each vector, i32[N], and its cosine, f32[N].

  Args:
    vectors_NE: f32 of unit length.
    codebook_KE: of any length.
    chunk: vectors whose cosines exist at once.
  """
  unit_KE = normalise(codebook_KE)

  def one(vector_E):
    cosine_K = jnp.dot(unit_KE, vector_E, precision=jax.lax.Precision.HIGHEST)
    code = jnp.argmax(cosine_K).astype(jnp.int32)
    return code, cosine_K[code]

  return jax.lax.map(one, vectors_NE, batch_size=chunk)


def count(codes: jax.Array, weights_B: jax.Array, size: int) -> jax.Array:
  """f32[K], how often each code occurs in i32[B, ...], rows weighted."""
  weights = jnp.broadcast_to(
    weights_B.reshape(-1, *(1,) * (codes.ndim - 1)), codes.shape
  )
  return jax.ops.segment_sum(weights.ravel(), codes.ravel(), size)


def codes_used(counts_K: jax.Array) -> jax.Array:
  """f32[], how many codes occur."""
  return jnp.sum(counts_K > 0).astype(jnp.float32)


def perplexity(counts_K: jax.Array) -> jax.Array:
  """f32[], exp of the entropy of the codes' shares: K if all are alike.

  0 where nothing was counted.
  """
  total = jnp.sum(counts_K)
  share_K = counts_K / jnp.maximum(total, 1e-9)
  log_K = jnp.log(jnp.where(share_K > 0, share_K, 1))
  return jnp.where(total > 0, jnp.exp(-jnp.sum(share_K * log_K)), 0)


def revive(
  codebook_KE: jax.Array,
  usage_K: jax.Array,
  vectors_NE: jax.Array,
  key: jax.Array,
  dead_below: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Moves dead codes to vectors that the codebook renders badly; jittable.

  Which vectors is drawn, each with a probability in proportion to its squared
  distance from its nearest code, none twice, as k-means++ chooses centres.

  Args:
    codebook_KE: raw.
    usage_K: f32, averaged counts, of any scale.
    vectors_NE: f32 of unit length, a sample of what is quantised.
    key: draws the vectors.
    dead_below: a code is dead below this share of the mean use.
  Returns:
    the codebook; the usage, in which the moved codes have the mean use; and
    f32[], how many were moved: at most N.
  """
  size, count = codebook_KE.shape[0], vectors_NE.shape[0]
  mean = jnp.mean(usage_K)
  dead_K = usage_K < dead_below * mean
  _, cosine_N = assign(vectors_NE, codebook_KE)
  # Top-k of log-weights with Gumbel noise is a draw without replacement.
  weight_N = jnp.maximum(2 - 2 * cosine_N, 1e-9)
  noise_N = jax.random.gumbel(key, (count,))
  _, drawn = jax.lax.top_k(jnp.log(weight_N) + noise_N, min(size, count))
  turn_K = jnp.cumsum(dead_K) - 1
  moved_K = dead_K & (turn_K < drawn.size)
  other_KE = vectors_NE[drawn[jnp.clip(turn_K, 0, drawn.size - 1)]]
  codebook_KE = jnp.where(
    moved_K[:, None], other_KE.astype(codebook_KE.dtype), codebook_KE
  )
  usage_K = jnp.where(moved_K, mean, usage_K)
  return codebook_KE, usage_K, jnp.sum(moved_K).astype(jnp.float32)
