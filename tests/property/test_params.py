"""The parameter table: both ways, its errors, and the released layout."""

import re
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.model import get_config
from tests.helpers import max_difference, params_from_torch, random_state
from xomni_jax import config_files, params
from xomni_jax.errors import InputError
from xomni_jax.models import ar, flux, siglip, text_encoders, vae, vq
from xomni_jax.params import Row

LAYOUT = Path(__file__).parents[1] / "golden" / "real_layout.txt"

ROWS = [
  Row("same", "a.weight", "norm -> norm"),
  Row("turned", "b.weight", "mlp embed -> embed mlp"),
  Row("split", "c.weight", "(heads head_dim) embed -> embed heads head_dim"),
  Row("merged", "d.weight", "embed (heads head_dim) -> heads head_dim embed"),
  Row("bias", "c.bias", "(heads head_dim) -> heads head_dim"),
  Row("conv", "e.weight", "cout cin kh kw -> kh kw cin cout"),
  Row("one/by/one", "f.weight", "cout cin 1 1 -> cin cout"),
  Row("lead", "g", "1 cell embed -> cell embed"),
  Row("qkv", "h.weight", "(three heads head_dim) e -> e three heads head_dim"),
  Row("stack/kernel", "blocks.{i}.w", "mlp embed -> embed mlp", first=3),
]


def random_tree(rng):
  """Parameters for ROWS, every axis of a random size."""
  flat = {
    row.path: rng.standard_normal(rng.integers(1, 6, len(row.axes)), np.float32)
    for row in ROWS
  }
  return params.unflatten(flat)


def assert_trees_equal(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("seed", range(20))
def test_from_torch_inverts_to_torch(seed):
  tree = random_tree(np.random.default_rng(seed))
  state = dict(params.to_torch(ROWS, tree))
  shapes = {key: array.shape for key, array in state.items()}
  assert shapes == params.torch_shapes(ROWS, tree)
  assert_trees_equal(params_from_torch(ROWS, tree, state), tree)


@pytest.mark.parametrize("seed", range(20))
def test_to_torch_inverts_from_torch(seed):
  tree = random_tree(np.random.default_rng(seed))
  state = random_state(ROWS, tree, seed)
  back = dict(params.to_torch(ROWS, params_from_torch(ROWS, tree, state)))
  assert back.keys() == state.keys()
  for key, array in state.items():
    np.testing.assert_array_equal(back[key], array)


def test_layouts_mean_what_pytorch_does_with_them():
  """Against matrix products written out, not against the table itself."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal(5, np.float32)  # embed
  weight = rng.standard_normal((2 * 3, 5), np.float32)  # heads * head_dim
  y = (weight @ x).reshape(2, 3)  # head by head, as PyTorch views it
  ours = ROWS[2].from_torch(weight, (5, 2, 3))
  assert max_difference(np.einsum("e,ehd->hd", x, ours), y) < 1e-5
  weight = rng.standard_normal((5, 2 * 3), np.float32)
  ours = ROWS[3].from_torch(weight, (2, 3, 5))
  expected = weight @ y.reshape(-1)
  assert max_difference(np.einsum("hd,hde->e", y, ours), expected) < 1e-4


def test_stack_starts_at_its_first_index():
  tree = {"stack": {"kernel": np.zeros((2, 3, 4))}}
  assert params.torch_shapes(ROWS[-1:], tree) == {
    "blocks.3.w": (4, 3),
    "blocks.4.w": (4, 3),
  }


def test_check_lists_everything_wrong_in_one_line():
  tree = random_tree(np.random.default_rng(0))
  found = params.torch_shapes(ROWS, tree)
  for key in ("b.weight", "blocks.4.w", "g"):
    found.pop(key, None)
  missing = params.torch_shapes(ROWS, tree).keys() - found.keys()
  found |= {"zzz": (1,), "blocks.99.w": (4, 3), "a.weight": (77,)}
  found["e.weight"] = (*found["e.weight"], 1)
  with pytest.raises(InputError) as caught:
    params.check(ROWS, tree, found, "some/file")
  message = str(caught.value)
  assert message.startswith("some/file: ")
  assert "\n" not in message
  assert f"{len(missing)} missing: {', '.join(sorted(missing))}" in message
  assert "2 unused: blocks.99.w, zzz" in message
  (size,) = tree["same"].shape
  assert f"2 misshapen: a.weight [77] instead of [{size}]" in message
  assert f"e.weight {list(found['e.weight'])} instead of" in message


def test_check_passes_what_fits():
  tree = random_tree(np.random.default_rng(0))
  params.check(ROWS, tree, params.torch_shapes(ROWS, tree), "file")


def test_check_ignores_whole_keys_only():
  tree = {"same": np.zeros(2)}
  found = {"a.weight": (2,), "norm.weight": (9,)}
  params.check(ROWS[:1], tree, found, "file", ignore=r"norm\..*")
  with pytest.raises(InputError, match=r"1 unused: my\.norm\.weight"):
    more = {**found, "my.norm.weight": (1,)}
    params.check(ROWS[:1], tree, more, "file", ignore=r"norm\..*")
  with pytest.raises(InputError, match=r"1 unused: norm\.weight"):
    params.check(ROWS[:1], tree, found, "file")
  with pytest.raises(InputError, match=r"1 missing: a\.weight"):
    # Being ignored does not make a wanted tensor optional.
    params.check(ROWS[:1], tree, {}, "file", ignore=".*")


@pytest.mark.parametrize(
  ("key", "ignored"),
  [
    ("norm.weight", True),
    ("norm.bias", True),
    ("attn_pool.latent", True),
    ("fc_norm.weight", True),
    ("head.weight", True),
    ("blocks.0.norm1.extra", False),
    ("blocks.0.norm.weight", False),
    ("blocks.0.head.weight", False),
    ("pos_embed_2", False),
    ("normal", False),
  ],
)
def test_vit_ignores_norm_pooling_and_head_only(key, ignored):
  assert bool(re.fullmatch(siglip.IGNORED, key)) == ignored


@pytest.mark.parametrize(
  ("table", "problem"),
  [
    ([*ROWS, ROWS[0]], "two rows for same"),
    ([*ROWS, Row("odd", "odd", "a -> a")], "no parameter odd"),
    (ROWS[1:], "no row for same"),
    ([Row("same", "a", "a b -> a b"), *ROWS[1:]], r"same: axes \('a', 'b'\)"),
  ],
)
def test_table_that_does_not_fit_its_parameters_is_refused(table, problem):
  tree = random_tree(np.random.default_rng(0))
  with pytest.raises(ValueError, match=problem):
    params.matched(table, tree)


def test_torch_shape_of_every_layout():
  sizes = {"turned": (3, 4), "split": (3, 4, 5), "conv": (2, 3, 4, 5)}
  sizes |= {"one/by/one": (3, 4), "lead": (6, 7), "qkv": (2, 3, 4, 5)}
  expected = {"turned": (4, 3), "split": (20, 3), "conv": (5, 4, 2, 3)}
  expected |= {"one/by/one": (4, 3, 1, 1), "lead": (1, 6, 7), "qkv": (60, 2)}
  for row in ROWS:
    if row.path in sizes:
      assert row.torch_shape(sizes[row.path]) == expected[row.path], row


# The full-size model


def full_size():
  """{section of the layout file: (table, abstract parameters)}."""
  sizes = config_files.architecture(get_config("7b"), "configs/model.py:7b")
  return {
    "AR": (ar.rows(sizes.ar), ar.abstract(sizes.ar)),
    "vit": (siglip.rows(sizes.siglip), siglip.abstract(sizes.siglip)),
    "projector": (vq.rows(sizes.vq), vq.abstract(sizes.vq)),
    "flux": (flux.rows(sizes.flux), flux.abstract(sizes.flux)),
    "vae": (vae.rows(sizes.vae), vae.abstract(sizes.vae)),
    "clip": (
      text_encoders.clip_rows(sizes.clip),
      text_encoders.clip_abstract(sizes.clip),
    ),
    "t5": (
      text_encoders.t5_rows(sizes.t5),
      text_encoders.t5_abstract(sizes.t5),
    ),
  }


def layout(section):
  """Rows (regular expression, shape, how many) and the parameter total."""
  text = LAYOUT.read_text().split(f"## {section}\n")[1].split("\n##")[0]
  *lines, last = text.strip().splitlines()
  rows = []
  for line in lines:
    match = re.fullmatch(r"\s*(\S+)\s+\[([\d, ]+)\](?:\s+x(\d+))?", line)
    key, shape, count = match.groups()
    pattern = re.escape(key).replace(re.escape("{i}"), r"(\d+)")
    shape = tuple(int(n) for n in shape.split(","))
    rows.append((pattern, shape, int(count or 1)))
  total = int(last.split("parameters:")[1].replace(",", ""))
  return rows, total


SECTIONS = ("AR", "vit", "projector", "flux", "vae", "clip", "t5")


def test_layout_file_has_the_sections_that_are_compared():
  assert re.findall(r"^## (\w+)", LAYOUT.read_text(), re.M) == list(SECTIONS)


def test_full_size_names_and_shapes_are_the_released_ones():
  """Every tensor, how many of each, and the totals; nothing is allocated."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  live = sum(x.nbytes for x in jax.live_arrays())
  for section, (table, tree) in full_size().items():
    leaves = jax.tree.leaves(tree)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
    for row, leaf in params.matched(table, tree):
      assert len(row.axes) == leaf.ndim == len(set(row.axes)), (section, row)
    rows, total = layout(section)
    indices = [set() for _ in rows]
    for key, shape in params.torch_shapes(table, tree).items():
      fits = [
        (n, match.groups())
        for n, (pattern, wanted, _) in enumerate(rows)
        if wanted == shape and (match := re.fullmatch(pattern, key))
      ]
      assert len(fits) == 1, (section, key, shape, fits)
      ((n, index),) = fits
      indices[n].add(index)
    for (pattern, _, count), found in zip(rows, indices, strict=True):
      assert len(found) == count, (section, pattern, found)
      if count > 3:  # a stack of one kind of block: all of its indices
        assert found == {(str(i),) for i in range(count)}, pattern
    assert sum(int(np.prod(x.shape)) for x in leaves) == total, section
  assert sum(x.nbytes for x in jax.live_arrays()) == live
  # Linux counts KiB. The parameters are 107 GB in float32.
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
  assert grown < 2**20, f"{grown} KiB"


def test_tiny_config_has_the_shapes_of_the_golden_checkpoint():
  from tests.helpers import GOLDEN
  from xomni_jax.inference import checkpoint

  opened = checkpoint.open_checkpoint(GOLDEN / "xomni")
  decoder = checkpoint.open_decoder(opened, GOLDEN / "flux1")
  sizes = config_files.architecture(get_config("tiny"), "configs/model.py:tiny")
  assert sizes.ar == opened.config.ar
  assert sizes.siglip == opened.siglip
  assert sizes.vq == opened.config.vq
  assert sizes.flux == decoder.flux
  assert sizes.vae == decoder.vae
  assert sizes.clip == decoder.clip
  assert sizes.t5 == decoder.t5


# Shardings


def test_shardings_follow_the_table_and_replicate_what_does_not_divide():
  mesh = jax.sharding.AbstractMesh(
    (1, 2, 4, 1), ("data", "fsdp", "tensor", "context")
  )
  table = [
    Row("q", "q", "(heads head_dim) embed -> embed heads head_dim"),
    Row("k", "k", "(kv_heads head_dim) embed -> embed kv_heads head_dim"),
  ]
  tree = {"q": np.zeros((6, 8, 4)), "k": np.zeros((5, 2, 4))}
  placed = params.shardings(table, tree, mesh)
  P = jax.sharding.PartitionSpec
  assert placed["q"].spec == P(("fsdp",), ("tensor",), None)
  assert placed["k"].spec == P(None, None, None)
  assert params.replicated(table, tree, mesh) == [
    "k (embed 5 over 2)",
    "k (kv_heads 2 over 4)",
  ]


def test_flatten_and_unflatten_are_inverse():
  tree = random_tree(np.random.default_rng(1))
  flat = params.flatten(tree)
  assert set(flat) == {row.path for row in ROWS}
  assert_trees_equal(params.unflatten(flat), tree)


def test_table_works_on_device_arrays_and_bfloat16():
  tree = jax.tree.map(
    lambda x: jnp.asarray(x, jnp.bfloat16),
    random_tree(np.random.default_rng(2)),
  )
  state = dict(params.to_torch(ROWS, tree))
  assert {array.dtype for array in state.values()} == {jnp.dtype(jnp.bfloat16)}
  assert_trees_equal(params_from_torch(ROWS, tree, state), tree)


def test_abstract_tree_is_traced_once_and_may_be_changed():
  traced = []

  @params.abstract_tree
  def abstract(cfg):
    """Of a config."""
    traced.append(cfg)
    return {"layer": {"kernel": jnp.zeros((cfg, 2), jnp.bfloat16)}}

  first = abstract(3)
  assert first["layer"]["kernel"] == jax.ShapeDtypeStruct((3, 2), jnp.bfloat16)
  first["layer"].clear()
  assert abstract(3)["layer"]["kernel"].shape == (3, 2)
  assert abstract(4)["layer"]["kernel"].shape == (4, 2)
  assert traced == [3, 4] and abstract.__doc__ == "Of a config."
