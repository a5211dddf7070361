"""Muon's steps against float64, and where its matrices lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xomni_jax import mesh as mesh_lib
from xomni_jax.params import Row
from xomni_jax.train_config import OptimConfig, Phase
from xomni_jax.training import layout as layout_lib
from xomni_jax.training import muon, optim
from xomni_jax.training.stage import Part


def orthogonal(x):
  """Five steps of Newton and Schulz with Muon's coefficients, in float64."""
  x = np.asarray(x, np.float64)
  x = x / (np.linalg.norm(x) + 1e-8)
  for _ in range(5):
    y = x @ x.T
    x = 3.4445 * x + (-4.775 * y + 2.0315 * y @ y) @ x
  return x


@pytest.mark.parametrize(
  ("key", "shape", "pattern", "matrix"),
  [
    ("one/kernel", (4, 6), "out in -> in out", (4, 6)),
    # Each layer is a matrix; heads are not.
    (
      "{i}/kernel",
      (3, 4, 2, 5),
      "(heads head_dim) embed -> embed heads head_dim",
      (4, 10),
    ),
    (
      "{i}/kernel",
      (3, 2, 5, 4),
      "embed (heads head_dim) -> heads head_dim embed",
      (10, 4),
    ),
    # A convolution: what an output is made of is a side.
    ("one/kernel", (3, 2, 4, 5), "out in kh kw -> kh kw in out", (24, 5)),
  ],
)
def test_muon_moves_matrices_by_orthogonal_steps(key, shape, pattern, matrix):
  tree = layout_lib.nest({"kernel": jnp.zeros(shape)})
  part = Part([Row("kernel", key, pattern)], tree)
  phases = (Phase("one", 3, ("m/",)),)
  layout = layout_lib.make_layout(
    {"m": part}, phases, mesh_lib.make_mesh(), "float32"
  )
  cfg = OptimConfig(
    lr=1e-2, weight_decay=0.1, clip_norm=0.0, muon=(".*/kernel",)
  )
  path = "m/kernel"
  rng = np.random.default_rng(0)
  value = rng.standard_normal(shape).astype(np.float32)
  params, wanted = {path: jnp.asarray(value)}, value.astype(np.float64)
  state, momentum = optim.init(cfg, layout, params), np.zeros(shape)
  for n in range(1, 4):
    grad = rng.standard_normal(shape).astype(np.float32)
    params, state, _ = optim.update(
      cfg, layout, 0, {path: jnp.asarray(grad)}, state, params, 1e-2
    )
    momentum = 0.95 * momentum + 0.05 * grad
    # Nesterov's, both corrected for their start at zero.
    ahead = 0.95 * momentum / (1 - 0.95 ** (n + 1)) + 0.05 * grad / (
      1 - 0.95**n
    )
    step = np.stack([orthogonal(m) for m in ahead.reshape(-1, *matrix)])
    step *= 0.2 * max(matrix) ** 0.5
    wanted = wanted - 1e-2 * (step.reshape(shape) + 0.1 * wanted)
  np.testing.assert_allclose(params[path], wanted, rtol=1e-5, atol=1e-5)
  assert list(state) == ["0/muon"]


# {name: (key, shape, layout)} of matrices; those of a convolution are
# 12 x 8, and all but one of the others 6 x 8, lying or standing.
MATRICES = {
  "layers": ("{i}/kernel", (3, 6, 8), "out in -> in out"),
  "standing": ("k", (8, 6), "out in -> in out"),
  "heads": ("k", (8, 2, 3), "(heads d) embed -> embed heads d"),
  "other": ("k", (6, 9), "out in -> in out"),
  "convolution": ("k", (2, 2, 3, 8), "out in kh kw -> kh kw in out"),
}


def muon_layout(mesh):
  rows = [Row(name, *row[::2]) for name, row in MATRICES.items()]
  tree = {name: jnp.zeros(shape) for name, (_, shape, _) in MATRICES.items()}
  part = Part(rows, layout_lib.nest(tree))
  return layout_lib.make_layout(
    {"m": part}, (Phase("one", 3, ("m/",)),), mesh, "float32"
  )


def test_muon_finds_the_steps_of_all_matrices_that_are_alike_at_once():
  layout = muon_layout(mesh_lib.make_mesh())
  rng = np.random.default_rng(0)
  momentum = {
    path: rng.standard_normal(shape).astype(np.float32)
    for path, shape in layout.shapes.items()
  }
  shapes = {"m/layers": (6, 8), "m/heads": (8, 6), "m/convolution": (12, 8)}
  steps = muon.orthogonal(momentum, layout)
  for path, x in momentum.items():
    sides = shapes.get(path, x.shape)
    wanted = [orthogonal(m) for m in x.reshape(-1, *sides)]
    wanted = np.reshape(wanted, x.shape) * 0.2 * max(sides) ** 0.5
    np.testing.assert_allclose(steps[path], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("sizes", "parts"),
  [
    # Five of 6 x 8 are six with one of zeros, and each device has three.
    ({"data": 2}, {(3, 6, 8), (1, 6, 9), (1, 8, 12)}),
    ({"data": 2, "slice": 2}, {(2, 6, 8), (1, 6, 9), (1, 8, 12)}),
    # No two devices hold the same. What is split stays so, and is not alike
    # what is not.
    ({"fsdp": 2}, {(4, 6, 8), (1, 6, 4), (1, 6, 9), (1, 8, 12)}),
    ({"data": 2, "tensor": 2}, {(2, 6, 8), (1, 3, 8), (1, 6, 9), (1, 8, 12)}),
  ],
)
def test_devices_with_the_same_momentum_share_out_the_matrices(sizes, parts):
  mesh = jax.sharding.AbstractMesh(
    tuple(sizes.get(axis, 1) for axis in mesh_lib.AXES), mesh_lib.AXES
  )
  layout = muon_layout(mesh)
  momentum = {
    path: jax.ShapeDtypeStruct(shape, jnp.float32)
    for path, shape in layout.shapes.items()
  }
  made = jax.make_jaxpr(lambda x: muon.orthogonal(x, layout))(momentum)
  constraints = [
    e.params["sharding"].shard_shape(e.outvars[0].aval.shape)
    for e in made.eqns
    if e.primitive.name == "sharding_constraint"
  ]
  # Three of each group: together, shared out, and together again.
  assert set(constraints[1::3]) == parts
  assert len(constraints) == 3 * len(parts)


@pytest.mark.parametrize("shape", [(16, 144), (32, 64)])
@pytest.mark.parametrize("least", [0, -3, -6])
def test_long_matrices_go_by_their_gram_matrix(shape, least):
  """Orthogonal to 30 %, as Muon's are, it is the same to 0.1 %."""
  rng = np.random.default_rng(0)
  left, right = (
    np.linalg.qr(rng.standard_normal((n, shape[0])))[0] for n in shape
  )
  x = (left * np.logspace(0, least, shape[0])) @ right.T
  wanted = orthogonal(x)
  lengths = []
  for steps in (muon.newton_schulz, muon.by_iterates, muon.by_gram):
    found = steps(jnp.asarray(x[None], jnp.float32))[0]
    lengths.append(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
  assert lengths[0] == lengths[2] < 1e-3
  assert lengths[1] < 1e-4
