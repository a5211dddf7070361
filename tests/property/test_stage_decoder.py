"""The decoder's stage: times, noise, dropping, rows, gradients, export."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from tests import stage_checks
from tests.helpers import GOLDEN, max_difference
from xomni_jax.config import TransformConfig
from xomni_jax.data import encoder_ids, images
from xomni_jax.data.text_ops import T5Ids
from xomni_jax.errors import InputError
from xomni_jax.inference import checkpoint, flow, flux1
from xomni_jax.mesh import make_mesh
from xomni_jax.params import flatten
from xomni_jax.training import configure
from xomni_jax.training.stage import Context
from xomni_jax.training.stages import decoder as stage_lib
from xomni_jax.training.stages import decoder_program as lib
from xomni_jax.training.stages.grids import Grids
from xomni_jax.training.stages.painting_rows import PaintingRows

GRID = (2, 3)
BATCH = 4
SETTINGS = [
  f"global_batch={BATCH}",
  f"options.grids=({GRID},)",
  "options.text_len=12",
  "options.preview_steps=2",
  "options.token_dropout=0.5",
  f"init.flux={GOLDEN / 'flux1'}",
]


def parsed(size, *settings):
  config = configure.read(f"configs/decoder.py:{size}")
  configure.override(config, settings)
  return configure.parse(config, "test")


@functools.cache
def opened():
  return checkpoint.open_checkpoint(GOLDEN / "xomni")


@functools.cache
def golden_stage(*settings):
  cfg, arch = parsed("tiny", *SETTINGS, *settings)
  return stage_lib.stage(cfg, arch, opened())


@functools.cache
def small():
  """Program, its jitted loss, and parameters at the golden sizes."""
  made = golden_stage().program

  @functools.partial(jax.jit, static_argnames="train")
  def loss(params, batch, totals, key, train=True):
    return made.loss(params, batch, Context(key, 0, totals, train))

  params = jax.jit(made.init)(jax.random.key(0))
  # It begins at zero, which would hide what features do.
  kernel = params["flux"]["siglip_embed"]["kernel"]
  params["flux"]["siglip_embed"]["kernel"] = 0.3 * jax.random.normal(
    jax.random.key(1), kernel.shape
  )
  return made, loss, params


def some_batch(seed=0, real=(1, 1, 1, 1), grid=GRID):
  rng = np.random.default_rng(seed)
  h, w = (16 * n for n in grid)
  return {
    "pixels": rng.integers(0, 256, (BATCH, h, w, 3), dtype=np.uint8),
    "clip_ids": rng.integers(0, 500, (BATCH, 77), dtype=np.int32),
    "t5_ids": rng.integers(0, 180, (BATCH, 12), dtype=np.int32),
    "seen": np.ones(BATCH, np.float32),
    "id": np.array([7, 3, 100, 4], np.int32),
    "real": np.array(real, np.float32),
  }


def value_of(batch, seed=1, params=None, **how):
  made, loss, own = small()
  key = jax.random.key(seed)
  return loss(params or own, batch, made.totals(batch), key, **how)


# Noise levels


def cdf(times, shift):
  """P(sigma <= s), by the unshifted level that becomes s."""
  base = stats.norm.cdf if times == "logit_normal" else None

  def below(s):
    u = s / (shift * (1 - s) + s)  # the inverse of the shift
    return base(np.log(u) - np.log1p(-u)) if base else u

  return below


@pytest.mark.parametrize("times", ["logit_normal", "uniform"])
@pytest.mark.parametrize("shift", [1.0, 1.6, 3.2])
def test_decoder_sigmas_follow_their_distribution(times, shift):
  keys = jax.random.split(jax.random.key(0), 20_000)
  draw = jax.jit(jax.vmap(lambda k: lib.draw_sigma(k, times, shift)))
  sigma = np.asarray(draw(keys), np.float64)
  assert sigma.min() > 0 and sigma.max() <= 1
  # Kolmogorov-Smirnov: above 1.63 / sqrt(20,000) in one of 100 seeds.
  distance = stats.kstest(sigma, cdf(times, shift)).statistic
  assert distance < 0.0115
  shares = np.histogram(sigma, bins=4, range=(0, 1))[0] / len(sigma)
  expected = lib.shares_of_sigma(times, shift)
  assert abs(expected.sum() - 1) < 1e-6
  assert abs(shares - expected).max() < 0.012  # three deviations


def test_decoder_shifts_times_as_sampling_does():
  """A uniform level goes where `flow.sigmas` takes it."""
  scheduler = lib.FLUX_SCHEDULER
  levels = flow.sigmas(scheduler, 4096, 10)[:-1]
  shift = flow.shift(scheduler, 4096)
  assert shift == pytest.approx(math.exp(1.15))
  u = np.linspace(1, 0.1, 10)
  assert abs(shift / (shift + 1 / u - 1) - levels).max() < 1e-6


def test_decoder_velocity_leads_from_noise_to_the_image():
  x0, noise = np.random.default_rng(0).standard_normal((2, 3, 5, 4))
  sigma = np.array([0.2, 0.9, 1.0])
  at = lib.noisy(jnp.asarray(x0), jnp.asarray(sigma), jnp.asarray(noise))
  assert max_difference(at.latents[2], noise[2]) < 1e-6
  # `flow.euler_step` adds (next level - level) v; the next level is 0.
  back = at.latents + (0 - at.sigma)[:, None, None] * at.velocity
  assert max_difference(back, x0) < 1e-6


def test_decoder_dropped_tokens_keep_the_expectation():
  features = jnp.ones((50, 4))
  drop = jax.vmap(lambda k: lib.drop_tokens(k, features, 0.3))
  out = np.asarray(drop(jax.random.split(jax.random.key(0), 400)))
  kept = out[..., 0] != 0
  assert abs(kept.mean() - 0.7) < 0.01  # 20,000 tokens: three deviations
  assert abs(out.mean() - 1) < 0.014
  assert ((out == 0).all(-1) | (abs(out - 1 / 0.7) < 1e-6).all(-1)).all()


# The loss


def test_decoder_loss_adds_up_over_devices():
  batch = some_batch(real=(1, 0, 1, 1))
  stage_checks.adds_up_over_devices(*small(), batch)


def test_decoder_loss_leaves_masked_rows_out():
  one, other = some_batch(real=(1, 0, 1, 1)), some_batch(real=(1, 0, 1, 1))
  other["pixels"][1] = 255 - other["pixels"][1]
  other["t5_ids"][1] += 1
  assert value_of(one)[0] == value_of(other)[0]


def test_decoder_rows_draw_by_record_and_not_by_place():
  stage_checks.rows_draw_by_record_and_not_by_place(
    value_of, some_batch(), least=1e-3
  )


def test_decoder_held_out_loss_is_always_at_the_same_noise():
  """That it drops nothing is seen in tests/parity/test_stage_losses.py."""
  batch = some_batch()
  first, second = (value_of(batch, seed, train=False)[0] for seed in (1, 2))
  assert first == second
  assert value_of(batch, 1)[0] != value_of(batch, 2)[0]


def test_decoder_loss_by_noise_level_makes_the_loss():
  value, metrics = value_of(some_batch())
  shift = flow.shift(lib.FLUX_SCHEDULER, math.prod(GRID))
  shares = lib.shares_of_sigma("logit_normal", shift)
  parts = [
    metrics[f"decoder/loss_at_{x}"] for x in ("0", "0.25", "0.5", "0.75")
  ]
  assert abs(np.dot(parts, shares) - value) < 1e-5


def test_decoder_rows_without_features_do_not_see_their_codes():
  batch = some_batch()
  _, _, params = small()
  book = params["vq"]["codebook"]
  changed = {**params, "vq": {**params["vq"], "codebook": -2 * book}}
  assert abs(value_of(batch)[0] - value_of(batch, params=changed)[0]) > 1e-4
  blind = {**batch, "seen": np.zeros(BATCH, np.float32)}
  assert value_of(blind)[0] == value_of(blind, params=changed)[0]


def test_decoder_gradient_reaches_exactly_what_trains():
  made, _, params = small()
  batch = some_batch()
  context = Context(jax.random.key(1), 0, made.totals(batch))
  grads = jax.jit(jax.grad(lambda p: made.loss(p, batch, context)[0]))(params)
  largest = {k: float(abs(g).max()) for k, g in flatten(grads).items()}
  frozen = ("vq/", "siglip/", "vae/")
  assert not any(largest[k] for k in largest if k.startswith(frozen))
  still = {
    k for k, x in largest.items() if not k.startswith(frozen) and x < 1e-9
  }
  # The last double block's text goes on through the single blocks, and CLIP's
  # key bias moves no softmax; rows of unused ids are within their tables.
  assert still <= {"clip/blocks/k_proj/bias"}


def test_decoder_takes_batches_of_every_grid():
  made = golden_stage("options.grids=((2, 3), (4, 2))").program
  assert made.batch["pixels"].shape == (BATCH, 64, 32, 3)
  assert made.tokens == BATCH * 8
  _, loss, params = small()
  for grid in ((2, 3), (4, 2)):
    batch = some_batch(grid=grid)
    totals = {"rows": jnp.float32(BATCH)}
    value, _ = loss(params, batch, totals, jax.random.key(0))
    assert np.isfinite(value)


# Rows


def rows(dropout=0.0, grids=(GRID,)):
  folder = GOLDEN / "flux1"
  return PaintingRows(
    encoder_ids.load_clip_tokenizer(folder / "tokenizer"),
    T5Ids(folder / "tokenizer_2", 12),
    Grids(grids, 16),
    dropout,
  )


def record(width=48, height=32, **fields):
  noise = np.random.default_rng(0).integers(0, 256, (height, width, 3))
  image = Image.fromarray(noise.astype(np.uint8))
  return {"image": image, "text": "a red sign", **fields}


def test_decoder_rows_drop_prompt_and_features_together():
  made = rows(dropout=0.4)
  empty = made.t5_ids([""])[0]
  found = [
    made.prepare(record(), np.random.default_rng(i), None) for i in range(1000)
  ]
  prompt = np.array([(row["t5_ids"] != empty).any() for row in found])
  clip = np.array(
    [(r["clip_ids"] != made.clip_ids([""])[0]).any() for r in found]
  )
  seen = np.array([row["seen"] for row in found])
  assert (clip == prompt).all()
  assert set(seen) == {0.0, 1.0}
  assert not (prompt & (seen == 0)).any()  # features go with a prompt only
  # Three deviations of 1000 and of about 400 draws.
  assert abs((~prompt).mean() - 0.4) < 0.047
  assert abs((seen[~prompt] == 0).mean() - 0.5) < 0.075


def test_decoder_rows_take_caption_and_prompt_alike():
  made = rows()
  both = record(prompt="draw it")
  texts = {tuple(made.t5_ids([both[k]])[0]) for k in ("text", "prompt")}
  found = {
    tuple(made.prepare(both, np.random.default_rng(i), None)["t5_ids"])
    for i in range(20)
  }
  assert found == texts and len(texts) == 2


def test_decoder_rows_resize_as_the_tokenizer_does():
  transform = TransformConfig(32, 48, 16, 1, 3.0, False)
  for size in ((48, 32), (150, 100), (33, 22)):
    one = record(*size)
    expected = images.pixels_u8(one["image"], transform)
    row = rows().prepare(one, np.random.default_rng(0), GRID)
    assert (row["pixels"] == expected).all()


def test_decoder_rows_go_to_the_nearest_shape():
  made = rows(grids=((4, 4), (3, 5), (5, 3)))
  of = made.grids.bucket_of
  sides = ((100, 100), (900, 500), (500, 900), (120, 100))
  assert [of(*s) for s in sides] == [(4, 4), (3, 5), (5, 3), (4, 4)]
  blank = made.blank((5, 3))
  row = made.prepare(record(), np.random.default_rng(0), (5, 3))
  assert {k: x.shape for k, x in row.items()} == {
    k: x.shape for k, x in blank.items()
  }
  assert blank["seen"] == 0


def test_decoder_rows_refuse_records_without_text():
  with pytest.raises(InputError, match="neither 'text' nor 'prompt'"):
    rows().prepare({**record(), "text": ""}, np.random.default_rng(0), None)


# The stage


def test_decoder_stage_previews_and_exports(tmp_path):
  stage = golden_stage()
  arrays = stage.batches(0)[0].arrays
  shapes = {k: (x.shape, x.dtype) for k, x in arrays.items()}
  wanted = {k: (x.shape, x.dtype) for k, x in stage.program.batch.items()}
  assert shapes == wanted
  mesh = make_mesh(devices=jax.devices()[:1])
  params = stage.load(mesh, dict.fromkeys(lib.PARTS, "float32"))
  assert params.keys() == set(lib.PARTS)
  changed = jax.tree.map(lambda x: x * 1.25, params)

  shown = stage.preview(params, 0)
  assert [p.image.size for p in shown] == [(2 * 48, 32)] * 4
  painted = lambda p: np.asarray(p.image)[:, 48:]
  assert (painted(shown[0]) == painted(stage.preview(params, 9)[0])).all()
  assert (painted(shown[0]) != painted(stage.preview(changed, 0)[0])).any()

  stage.export(changed, tmp_path / "model")
  again = checkpoint.open_checkpoint(tmp_path / "model")
  text = tmp_path / stage_lib.FLUX1
  assert encoder_ids.t5_length(text / "tokenizer_2") == 12
  cfg, arch = parsed("tiny", *SETTINGS, f"init.flux={text}")
  loaded = stage_lib.stage(cfg, arch, again).load(
    mesh, dict.fromkeys(lib.PARTS, "float32")
  )
  for part in lib.PARTS:
    trained = part in ("flux", "clip", "t5")
    expected = (changed if trained else params)[part]
    same = jax.tree.map(
      lambda a, b: max_difference(a, b) == 0, loaded[part], expected
    )
    assert jax.tree.all(same), part


def test_decoder_export_without_text_encoders_writes_one_folder(tmp_path):
  config = configure.read("configs/decoder.py:tiny")
  configure.override(config, SETTINGS)
  config.phases["1_all"].train = ("flux/siglip_embed/",)
  config.options.text_len = 512  # as the folder says
  cfg, arch = configure.parse(config, "test")
  stage = stage_lib.stage(cfg, arch, opened())
  mesh = make_mesh(devices=jax.devices()[:1])
  params = stage.load(mesh, dict.fromkeys(lib.PARTS, "float32"))
  stage.export(params, tmp_path / "model")
  assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_decoder_refuses_an_autoencoder_of_another_size():
  cfg, arch = parsed("tiny", *SETTINGS)
  wrong = dataclasses.replace(
    opened(), siglip=dataclasses.replace(opened().siglip, patch=8)
  )
  with pytest.raises(InputError, match="8 px to the ViT and 16 px"):
    stage_lib.stage(cfg, arch, wrong)


@pytest.mark.parametrize("size", ["7b", "tiny"])
def test_decoder_program_builds_from_its_config(size):
  cfg, arch = parsed(size)
  made = lib.program(cfg, arch)
  params = jax.eval_shape(made.init, jax.random.key(0))
  context = Context(jax.random.key(0), 0, {"rows": 1.0})
  value, metrics = jax.eval_shape(
    lambda p, b: made.loss(p, b, context), params, made.batch
  )
  assert value.shape == () and all(m.shape == () for m in metrics.values())
  longest = max(h * w for h, w in cfg.options.grids)
  assert made.tokens == cfg.global_batch * longest
  trained = lib.trained_parts(cfg, made.parts)
  assert trained == ({"flux"} if size == "7b" else {"flux", "clip", "t5"})


def test_flux1_length_of_prompts_is_that_of_its_file(tmp_path):
  assert encoder_ids.t5_length(GOLDEN / "flux1" / "tokenizer_2") == 512
  assert encoder_ids.t5_length(tmp_path) == 512
  file = tmp_path / "tokenizer_config.json"
  for text, expected in (
    ('{"model_max_length": 48}', 48),
    ('{"model_max_length": 1e30}', 512),
    ("{}", 512),
  ):
    file.write_text(text)
    assert encoder_ids.t5_length(tmp_path) == expected
  file.write_text("[")
  with pytest.raises(InputError, match="T5 tokenizer"):
    encoder_ids.t5_length(tmp_path)
  assert flux1.open_flux1(GOLDEN / "flux1").scheduler == lib.FLUX_SCHEDULER
