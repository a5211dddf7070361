"""The autoencoder's stage: its loss, rows, scale and export."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests import stage_checks
from tests.helpers import GOLDEN, max_difference
from xomni_jax.config import Compute
from xomni_jax.errors import InputError
from xomni_jax.inference import flux1
from xomni_jax.models import vae
from xomni_jax.params import flatten
from xomni_jax.training import configure, pixels
from xomni_jax.training.stage import Context, row_keys
from xomni_jax.training.stages import vae as stage_lib
from xomni_jax.training.stages import vae_program
from xomni_jax.training.stages.painting_rows import CropRows

SETTINGS = ["global_batch=4", "options.crops=(16,)", "options.kl=0.01"]


def parsed(size, *settings):
  config = configure.read(f"configs/vae.py:{size}")
  configure.override(config, settings)
  return configure.parse(config, "test")


@functools.cache
def small():
  """Program, its jitted loss, and parameters."""
  cfg, arch = parsed("tiny", *SETTINGS)
  sizes = dataclasses.replace(
    arch.vae, block_out_channels=(8, 8), norm_num_groups=2
  )
  arch = dataclasses.replace(arch, vae=sizes)
  made = stage_lib.program(cfg, arch)

  @functools.partial(jax.jit, static_argnames="train")
  def loss(params, batch, totals, key, train=True):
    return made.loss(params, batch, Context(key, 0, totals, train))

  params = made.init(jax.random.key(0))
  return cfg, arch, made, loss, params


def some_batch(seed=0, real=(1, 1, 1, 1)):
  rng = np.random.default_rng(seed)
  return {
    "pixels": rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8),
    "id": np.array([7, 3, 100, 4], np.int32),
    "real": np.array(real, np.float32),
  }


def value_of(batch, seed=1, **how):
  _, _, made, loss, params = small()
  return loss(params, batch, made.totals(batch), jax.random.key(seed), **how)


def test_vae_terms_equal_a_plain_computation():
  rng = np.random.default_rng(0)
  image, target = rng.standard_normal((2, 3, 5, 4, 3))
  mean, logvar = rng.standard_normal((2, 3, 2, 2, 6))
  args = (x.astype(np.float32) for x in (image, target, mean, logvar))
  ours = vae_program.row_terms(*map(jnp.asarray, args))
  for i in range(3):
    error = image[i] - target[i]
    down = [
      abs(error[y + 1, x] - error[y, x]) for y in range(4) for x in range(4)
    ]
    right = [
      abs(error[y, x + 1] - error[y, x]) for y in range(5) for x in range(3)
    ]
    variance = np.exp(logvar[i])
    expected = {
      "l1": abs(error).mean(),
      "l2": (error**2).mean(),
      "edges": (np.mean(down) + np.mean(right)) / 2,
      "kl": -0.5 * (1 + logvar[i] - mean[i] ** 2 - variance).mean(),
    }
    for name, x in expected.items():
      # Sums of 60 values of order one in float32.
      assert abs(float(ours[name][i]) - x) < 1e-5, name


def test_vae_kl_is_zero_for_a_unit_gaussian():
  unit = jnp.zeros((2, 3, 3, 4))
  terms = vae_program.row_terms(unit, unit, unit, unit)
  assert not any(x.any() for x in terms.values())


def test_vae_loss_weighs_its_terms():
  cfg, *_ = small()
  value, metrics = value_of(some_batch())
  opts = cfg.options
  assert (opts.l1, opts.l2, opts.edges, opts.kl) == (1.0, 2.0, 1.0, 0.01)
  expected = (
    metrics["vae/l1"]
    + 2 * metrics["vae/l2"]
    + metrics["vae/edges"]
    + 0.01 * metrics["vae/kl"]
  )
  assert abs(value - expected) < 1e-6 * abs(expected)


def test_vae_loss_adds_up_over_devices():
  _, _, made, loss, params = small()
  batch = some_batch(real=(1, 0, 1, 1))
  stage_checks.adds_up_over_devices(made, loss, params, batch)


def test_vae_loss_leaves_masked_rows_out():
  masked, other = some_batch(real=(1, 0, 1, 1)), some_batch(real=(1, 0, 1, 1))
  other["pixels"][1] = 255 - other["pixels"][1]
  assert value_of(masked)[0] == value_of(other)[0]
  twice = some_batch()
  for name in ("pixels", "id"):  # row 0 in place of the masked one
    twice[name][1] = twice[name][0]
  rows = value_of(twice)[0] * 4 - value_of(masked)[0] * 3
  alone = value_of(some_batch(real=(1, 0, 0, 0)))[0]
  assert abs(rows - alone) < 1e-4  # of a difference of sums of order 10


def test_vae_rows_draw_by_record_and_not_by_place():
  stage_checks.rows_draw_by_record_and_not_by_place(
    value_of, some_batch(), least=1e-4
  )


def test_vae_held_out_loss_does_not_depend_on_the_key():
  batch = some_batch()
  again = [value_of(batch, seed, train=False)[0] for seed in (1, 2)]
  assert again[0] == again[1]
  trained = [value_of(batch, seed)[0] for seed in (1, 2)]
  assert trained[0] != trained[1]


def test_vae_latents_are_drawn_with_the_encoders_deviation():
  mean = jnp.full((1, 100, 100, 2), 3.0)
  logvar = jnp.full(mean.shape, 2 * np.log(0.5))
  keys = row_keys(jax.random.key(0), jnp.arange(1))
  drawn = vae_program.sample(mean, logvar, keys)
  # Of 20,000 values: deviations of mean and deviation are 0.0035 and 0.0025.
  assert abs(drawn.mean() - 3) < 0.015 and abs(drawn.std() - 0.5) < 0.011


def test_vae_gradient_reaches_every_parameter():
  _, _, made, _, params = small()
  batch = some_batch()
  context = Context(jax.random.key(1), 0, made.totals(batch))
  grads = jax.jit(jax.grad(lambda p: made.loss(p, batch, context)[0]))(params)
  # A bias on all keys moves no softmax.
  still = [k for k, g in flatten(grads).items() if abs(g).max() < 1e-7]
  assert sorted(still) == [
    "vae/decoder/mid_block/attentions_0/to_k/bias",
    "vae/encoder/mid_block/attentions_0/to_k/bias",
  ]


def test_vae_psnr_is_that_of_eight_bit_pixels():
  batch = some_batch()
  _, metrics = value_of(batch)
  _, _, made, *_ = small()
  error = 127.5**2 * float(metrics["vae/l2"])  # of levels 0 to 255
  expected = 10 * np.log10(255**2 / error)
  assert abs(made.summarise(metrics)["vae/psnr_db"] - expected) < 1e-3


def test_vae_scale_makes_latents_standard():
  cfg, arch, _, _, params = small()
  batches = [some_batch(seed)["pixels"] for seed in range(16)]
  scale, shift = stage_lib.fit_scale(
    params["vae"], batches, arch.vae, cfg.compute
  )
  scaled = dataclasses.replace(
    arch.vae, scaling_factor=scale, shift_factor=shift
  )
  keys = row_keys(jax.random.key(0), jnp.arange(4))
  drawn = [
    vae.to_model_space(
      vae_program.sample(
        *vae.encode(params["vae"], pixels.to_float(x), arch.vae, Compute()),
        keys,
      ),
      scaled,
    )
    for x in batches
  ]
  # The noise drawn is 0.7 % of the variance, of 65,536 values.
  assert abs(np.mean(drawn)) < 0.01 and abs(np.std(drawn) - 1) < 0.01


def test_vae_crops_lie_within_the_image():
  rows = CropRows(24)
  picture = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
  record = {"image": Image.fromarray(picture)}
  views = np.lib.stride_tricks.sliding_window_view(picture, (24, 24, 3))
  seen = set()
  for seed in range(40):
    crop = rows.prepare(record, np.random.default_rng(seed), None)["pixels"]
    found = np.argwhere((views[:, :, 0] == crop).all(axis=(-3, -2, -1)))
    assert len(found) == 1
    seen.add(tuple(found[0]))
  assert len(seen) > 20


def test_vae_crops_can_lie_on_a_grid():
  rows = CropRows(16, align=8)
  # Pixels say where they are.
  y, x = np.mgrid[:40, :33].astype(np.uint8)
  record = {"image": Image.fromarray(np.stack([y, x, y], axis=-1))}
  crops = (
    rows.prepare(record, np.random.default_rng(seed), None)["pixels"]
    for seed in range(60)
  )
  corners = {tuple(crop[0, 0, :2].tolist()) for crop in crops}
  assert corners == {(y, x) for y in (0, 8, 16, 24) for x in (0, 8, 16)}


@pytest.mark.parametrize("crops", ["(16, 16, 16)", "(12,)"])
def test_vae_crops_that_do_not_fit_are_refused(crops):
  cfg, arch = parsed(
    "tiny", f"init.flux={GOLDEN / 'flux1'}", f"options.crops={crops}"
  )
  with pytest.raises(
    InputError, match=r"options.crops is .* expected one side"
  ):
    stage_lib.stage(cfg, arch)


def test_vae_phases_have_crops_of_their_own():
  cfg, arch = parsed(
    "tiny",
    f"init.flux={GOLDEN / 'flux1'}",
    "options.crops=(16, 32)",
    "global_batch=2",
  )
  stage = stage_lib.stage(cfg, arch)
  sides = [stage.batches(i)[0].arrays["pixels"].shape[1] for i in (0, 1)]
  assert sides == [16, 32]
  assert stage.held_out[0].arrays["pixels"].shape[1] == 32


@pytest.mark.parametrize("size", [(10, 10), (9, 33), (100, 7), (24, 23)])
def test_vae_crops_of_small_images_are_enlarged(size):
  record = {"image": Image.new("RGB", size, (10, 200, 30))}
  row = CropRows(24).prepare(record, np.random.default_rng(0), None)
  assert row["pixels"].shape == CropRows(24).blank(None)["pixels"].shape
  assert (row["pixels"] == (10, 200, 30)).all()


def test_vae_stage_exports_a_flux1_folder(tmp_path):
  cfg, arch = parsed(
    "tiny",
    f"init.flux={GOLDEN / 'flux1'}",
    "options.crops=(16,)",
    "global_batch=4",
  )
  stage = stage_lib.stage(cfg, arch)
  rows = stage.batches(0)[0]
  shapes = {k: (x.shape, x.dtype) for k, x in rows.arrays.items()}
  wanted = {k: (x.shape, x.dtype) for k, x in stage.program.batch.items()}
  assert shapes == wanted
  mesh = jax.make_mesh((1,), ("data",))
  assert stage.load(mesh, {}) == {}  # a run that goes on asks for nothing
  params = stage.load(mesh, {"vae": "float32"})
  changed = jax.tree.map(lambda x: x + 0.01, params)
  stage.export(changed, tmp_path / "model")
  before = flux1.open_flux1(GOLDEN / "flux1")
  after = flux1.open_flux1(tmp_path / "model")
  sizes = dataclasses.replace(
    after.vae,
    scaling_factor=before.vae.scaling_factor,
    shift_factor=before.vae.shift_factor,
  )
  assert sizes == before.vae and after.vae != before.vae
  cfg = dataclasses.replace(
    cfg, init=dataclasses.replace(cfg.init, flux=str(tmp_path / "model"))
  )
  again = stage_lib.stage(cfg, arch).load(mesh, {"vae": "float32"})
  assert jax.tree.all(
    jax.tree.map(lambda a, b: max_difference(a, b) == 0, again, changed)
  )
  shown = stage.preview(params, 0)
  assert [p.image.size for p in shown] == [(192, 96)] * 4
  left = np.asarray(shown[0].image)[:, :96]
  again = stage.preview(changed, 5)
  assert (np.asarray(again[0].image)[:, :96] == left).all()
  assert again[0].caption.startswith("signs/validation/0")


@pytest.mark.parametrize(
  ("size", "shape"),
  [
    ((96, 96), (96, 96)),
    ((101, 30), (24, 96)),
    ((2480, 3508), (512, 512)),
    ((2000, 20), (16, 512)),
    ((5, 40), (40, 8)),
  ],
)
def test_vae_previews_are_whole_cells_and_not_too_many(size, shape):
  made = stage_lib._middle(Image.new("RGB", size), 8)
  assert made.shape == (*shape, 3)


def test_vae_previews_show_the_middle_as_it_is():
  x = np.broadcast_to(np.arange(1000) % 256, (600, 1000))
  y = np.broadcast_to(np.arange(600)[:, None] % 256, x.shape)
  picture = np.stack([y, x, x], axis=-1).astype(np.uint8)
  made = stage_lib._middle(Image.fromarray(picture), 8)
  assert (made == picture[44:556, 244:756]).all()


@pytest.mark.parametrize("size", ["7b", "tiny"])
def test_vae_program_builds_from_its_config(size):
  cfg, arch = parsed(size)
  made = stage_lib.program(cfg, arch)
  params = jax.eval_shape(made.init, jax.random.key(0))
  context = Context(jax.random.key(0), 0, {"rows": 1.0})
  value, metrics = jax.eval_shape(
    lambda p, b: made.loss(p, b, context), params, made.batch
  )
  assert value.shape == () and all(m.shape == () for m in metrics.values())
  assert made.tokens == cfg.global_batch * (cfg.options.crops[0] // 8) ** 2
