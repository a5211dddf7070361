"""Care of the codebook: k-means against numpy in float64, use, revival."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import max_difference
from xomni_jax.training import codebook


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def clusters(count, each, spread, size=5, seed=0):
  """Unit vectors around `count` directions, in random order."""
  rng = np.random.default_rng(seed)
  centres = unit(rng.standard_normal((count, size)))
  points = np.repeat(centres, each, axis=0)
  points = unit(points + spread * rng.standard_normal(points.shape))
  return centres, rng.permutation(points).astype(np.float32)


def lloyd(vectors, start, iterations):
  """Spherical k-means in float64; unused centres take the farthest vectors."""
  x = vectors.astype(np.float64)
  centres = x[start]
  for _ in range(iterations):
    cosine = x @ unit(centres).T
    nearest = cosine.argmax(1)
    far = iter(np.argsort(cosine.max(1), kind="stable"))
    centres = np.stack(
      [
        unit(x[nearest == k].sum(0)) if (nearest == k).any() else x[next(far)]
        for k in range(len(centres))
      ]
    )
  return centres


@pytest.mark.parametrize("chunk", (4096, 7))
def test_kmeans_matches_float64(chunk):
  _, vectors = clusters(6, 20, 0.4)
  key = jax.random.key(3)
  start = jax.random.choice(key, len(vectors), (9,), replace=False)
  found = codebook.kmeans(jnp.asarray(vectors), 9, 5, key, chunk)
  # Sums of 20 unit vectors in float32; the same assignment gives 1e-6.
  assert max_difference(found, lloyd(vectors, np.asarray(start), 5)) < 1e-5


def test_kmeans_reseeds_unused_centres():
  """Of twins as a start, one centre each moves to a far vector."""
  twins = np.tile(unit(np.ones((1, 4))), (30, 1))
  rest = unit(np.random.default_rng(0).standard_normal((6, 4)))
  vectors = np.concatenate([twins, rest]).astype(np.float32)
  make = jax.jit(codebook.kmeans, static_argnums=(1, 2))
  found = make(jnp.asarray(vectors), 7, 8, jax.random.key(0))
  _, cosine = codebook.assign(jnp.asarray(vectors), found)
  assert float(cosine.min()) > 1 - 1e-5  # each of the 7 has a centre


def test_kmeans_refuses_too_few_vectors():
  with pytest.raises(ValueError, match="3 vectors for 4 centres"):
    codebook.kmeans(jnp.ones((3, 2)), 4, 1, jax.random.key(0))


def test_count_weighs_rows():
  codes = jnp.array([[0, 1, 1], [2, 2, 2], [1, 3, 3]])
  counts = codebook.count(codes, jnp.array([1.0, 0.0, 1.0]), 5)
  assert counts.tolist() == [1, 3, 0, 2, 0]


@pytest.mark.parametrize(
  ("counts", "used", "perplexity"),
  (
    ([5, 5, 5, 5], 4, 4),
    ([7, 0, 0, 0], 1, 1),
    ([0, 0, 0, 0], 0, 0),
    # exp of 0.5 ln 2 + 0.5 ln 4
    ([2, 1, 1, 0], 3, np.exp(1.5 * np.log(2))),
  ),
)
def test_use_of_codes(counts, used, perplexity):
  counts = jnp.array(counts, jnp.float32)
  assert float(codebook.codes_used(counts)) == used
  assert abs(float(codebook.perplexity(counts)) - perplexity) < 1e-5


def revival(usage, vectors, key=0):
  codes = jnp.asarray(unit(np.eye(4, 6) + 0.01).astype(np.float32)) * 1.3
  out = jax.jit(codebook.revive, static_argnums=4)(
    codes, jnp.array(usage), vectors, jax.random.key(key), 0.1
  )
  return codes, *out


def test_revive_moves_dead_codes_to_far_vectors():
  near = unit(np.tile(np.eye(4, 6), (50, 1)) + 0.01)
  far = np.eye(6)[4:]
  vectors = jnp.asarray(np.concatenate([near, far]).astype(np.float32))
  old, new, usage, moved = revival([10.0, 0.2, 8.0, 0.0], vectors)
  assert float(moved) == 2
  assert (new[jnp.array([0, 2])] == old[jnp.array([0, 2])]).all()
  # Distance 2 against 1e-3: 100 near vectors weigh less than the two far ones.
  taken = {int(jnp.argmax(new[i])) for i in (1, 3)}
  assert taken == {4, 5}
  mean = (10 + 0.2 + 8) / 4
  assert np.allclose(usage, [10, mean, 8, mean])


def test_revive_with_fewer_vectors_than_dead_codes():
  vectors = jnp.asarray(np.eye(6)[5:].astype(np.float32))
  old, new, usage, moved = revival([0.0, 0.0, 9.0, 0.0], vectors)
  assert float(moved) == 1
  assert (new[0] == vectors[0]).all() and (new[1:] == old[1:]).all()
  assert usage[1] == 0 and usage[3] == 0


def test_revive_leaves_a_codebook_in_use():
  vectors = jnp.asarray(np.eye(6, dtype=np.float32))
  old, new, usage, moved = revival([1.0, 2.0, 0.5, 1.0], vectors)
  assert float(moved) == 0 and (old == new).all()
  assert usage.tolist() == [1, 2, 0.5, 1]
