"""Stage `tokenizer` on the golden checkpoint's sizes and the drawn world."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import train_runs
from tests.helpers import GOLDEN, max_difference
from xomni_jax.config import LMConfig
from xomni_jax.data import pipeline, protocol, world
from xomni_jax.errors import InputError
from xomni_jax.inference import checkpoint, qwen
from xomni_jax.mesh import make_mesh
from xomni_jax.models import vq
from xomni_jax.training import configure, loop
from xomni_jax.training.stage import Context
from xomni_jax.training.stages import tokenizer
from xomni_jax.training.stages import tokenizer_program as lib
from xomni_jax.training.stages.grids import Grids
from xomni_jax.training.stages.questions import CAPTION, QuestionRows

# Sums of about 1000 terms of order 1 in float32, added in another order.
SUMS = 2e-5
LM = LMConfig(448, 64, 96, 1, 4, 2, 1e4, 1e-6, 512, True)
WIDE = LMConfig(448, 128, 96, 1, 4, 2, 1e4, 1e-6, 512, True)
BATCH = 4


@functools.cache
def opened():
  return checkpoint.open_checkpoint(GOLDEN / "xomni")


@functools.cache
def sizes():
  return types.SimpleNamespace(
    ar=opened().config.ar, siglip=opened().siglip, vq=opened().config.vq
  )


def config(**options):
  settings = configure.read("configs/tokenizer.py:tiny")
  del settings.phases["1_signs"]
  phase = settings.phases["2_all"]
  phase.steps, phase.warmup_steps = 5, 0
  settings.global_batch = BATCH
  settings.data.sources = settings.data.sources[:1]  # signs
  settings.eval_data.sources = settings.eval_data.sources[:1]
  settings.checkpoint.every = 5
  settings.report.eval_every, settings.report.eval_batches = 5, 1
  settings.report.preview_every, settings.report.log_every = 5, 1
  for name, value in {
    "grids": ((6, 6),),
    "quantise_from": 2,
    "kmeans_batches": 2,
    "revive_every": 2,
    "text_len": 160,
    **options,
  }.items():
    settings.options[name] = value
  return configure.parse(settings, "test")[0]


@functools.cache
def rows(length=160, grids=((6, 6),)):
  tok = protocol.load_tokenizer(GOLDEN / "xomni", 448, 64)
  return QuestionRows(tok, LM.vocab_size, Grids(grids, 16), length)


@functools.cache
def batch():
  data = config().data
  made = pipeline.images(
    data,
    seed=0,
    global_batch=BATCH,
    prepare=rows().prepare,
    blank=rows().blank,
  )
  return made[0].arrays


@functools.cache
def params():
  cfg = config()
  return jax.jit(lambda key: lib.init(cfg, sizes(), LM, key))(jax.random.key(0))


@functools.cache
def program(**options):
  return lib.program(config(**options), sizes(), LM)


@functools.cache
def run(step=10, train=False, **options):
  """(params, batch) -> contribution, metrics; totals are the batch's own."""
  made = program(**options)

  @jax.jit
  def loss(params, batch, totals):
    totals = made.totals(batch) if totals is None else totals
    context = Context(jax.random.key(1), jnp.int32(step), totals, train)
    return made.loss(params, batch, context)

  return lambda params, batch, totals=None: loss(params, batch, totals)


@functools.cache
def whole():
  return run()(params(), batch())


def test_program_shapes_are_those_of_init_and_batches():
  made = program()
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(made.batch) == shapes(batch())
  tree = {name: part.tree for name, part in made.parts.items()}
  assert shapes(tree) == shapes(params())


def test_full_size_builds():
  settings = configure.read("configs/tokenizer.py:7b")
  cfg, arch = configure.parse(settings, "test")
  reader = configure.section(settings, "lm", "LMConfig", "test")
  made = lib.program(cfg, arch, reader)
  drawn = jax.eval_shape(made.init, jax.random.key(0))
  shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
  tree = {name: part.tree for name, part in made.parts.items()}
  assert shapes(drawn) == shapes(tree)
  assert set(tree) == {"siglip", "vq", "lm"}


@pytest.mark.slow
def test_full_size_loss_builds():
  settings = configure.read("configs/tokenizer.py:7b")
  cfg, arch = configure.parse(settings, "test")
  reader = configure.section(settings, "lm", "LMConfig", "test")
  made = lib.program(cfg, arch, reader)

  def loss(params, batch):
    context = Context(jax.random.key(0), jnp.int32(9), made.totals(batch))
    return made.loss(params, batch, context)

  tree = {name: part.tree for name, part in made.parts.items()}
  value, metrics = jax.eval_shape(loss, tree, made.batch)
  assert value.shape == () and metrics["counts"].shape == (16384,)


def test_other_width_is_refused():
  with pytest.raises(InputError, match="hidden_size 128 differ"):
    lib.program(config(), sizes(), WIDE)


def test_loss_is_a_sum_over_rows():
  """What two devices add up to is what one computes."""
  totals = program().totals(batch())
  parts = [
    run()(params(), {k: v[i : i + 2] for k, v in batch().items()}, totals)
    for i in (0, 2)
  ]
  summed = jax.tree.map(jnp.add, *parts)
  for a, b in zip(
    jax.tree.leaves(summed), jax.tree.leaves(whole()), strict=True
  ):
    assert max_difference(a, b) <= SUMS


def test_masked_row_contributes_nothing():
  masked = {**batch(), "real": np.array([1, 1, 0, 1], np.float32)}
  other = {**masked, "pixels": batch()["pixels"].copy()}
  other["pixels"][2] = 255 - other["pixels"][2]
  other["tokens"] = batch()["tokens"].copy()
  other["tokens"][2] = 7
  first, second = (run()(params(), x) for x in (masked, other))
  assert jax.tree.all(
    jax.tree.map(lambda a, b: bool((a == b).all()), first, second)
  )
  assert max_difference(first[0], whole()[0]) > 1e-4


def test_answers_depend_on_the_image():
  swapped = {**batch(), "pixels": batch()["pixels"][::-1].copy()}
  name = "tokenizer/answer_loss"
  other = run()(params(), swapped)[1][name]
  assert max_difference(other, whole()[1][name]) > 1e-5


def test_question_reads_its_image_and_itself_only():
  """In a row of many it gives what it gives alone."""
  cfg, row = config(), {k: v[:1] for k, v in batch().items()}
  embeddings = np.random.default_rng(0).standard_normal((1, 6, 6, 64))
  read = jax.jit(
    lambda row: lib.read(params(), embeddings.astype(np.float32), row, cfg, LM)
  )
  together = np.asarray(read(row))[0]
  segments = row["segments"][0]
  assert segments.max() >= 3
  for segment in (1, int(segments.max())):
    own = segments == segment
    alone = {
      name: np.zeros_like(row[name])
      for name in ("tokens", "segments", "positions")
    }
    for name, x in alone.items():
      x[0, : own.sum()] = row[name][0][own]
    got = np.asarray(read(alone))[0, : own.sum()]
    assert max_difference(got, together[own]) <= SUMS


def gradients(step, **options):
  made = program(**options)

  def loss(params, batch):
    context = Context(
      jax.random.key(1), jnp.int32(step), made.totals(batch), True
    )
    return made.loss(params, batch, context)

  return jax.jit(jax.grad(loss, has_aux=True))(params(), batch())


def test_codebook_waits_for_its_start():
  grads, metrics = gradients(1)
  assert float(jnp.abs(grads["vq"]["codebook"]).max()) == 0
  assert float(metrics["vq/error"]) == 0
  # The projection learns meanwhile.
  assert float(jnp.abs(grads["vq"]["quant_conv"]["kernel"]).max()) > 0


def test_everything_trains_through_the_codes():
  grads, metrics = gradients(2, skip=0.0, pixels=0.0, entropy=0.0)
  assert float(metrics["vq/error"]) > 0
  for name in ("siglip", "vq", "lm"):
    dead = [
      jax.tree_util.keystr(path)
      for path, g in jax.tree_util.tree_leaves_with_path(grads[name])
      # A key's bias moves all of a query's scores alike.
      if float(jnp.abs(g).max()) == 0 and "k_proj" not in str(path)
    ]
    assert not dead, (name, dead)


def test_skipped_samples_flow_past_the_quantiser():
  """With all of them skipped, answers do not see the codebook."""
  moved = jax.tree.map(lambda x: x, params())
  moved["vq"] = {**moved["vq"], "codebook": moved["vq"]["codebook"] + 1}
  for skip, same in ((1.0, True), (0.0, False)):
    answers = [
      run(train=True, skip=skip)(p, batch())[1]["tokenizer/answer_loss"]
      for p in (params(), moved)
    ]
    assert (float(answers[0]) == float(answers[1])) == same
  # On held-out images nothing is skipped.
  answers = [
    run(skip=1.0)(p, batch())[1]["tokenizer/answer_loss"]
    for p in (params(), moved)
  ]
  assert float(answers[0]) != float(answers[1])


def test_metrics_count_codes():
  metrics = program().summarise(whole()[1])
  assert "counts" not in metrics
  encode = vq.VQ(sizes().vq).apply
  vit = lib.features(params(), batch()["pixels"], config(), sizes())
  codes = encode({"params": params()["vq"]}, vit, method="encode")
  used, counts = np.unique(np.asarray(codes), return_counts=True)
  share = counts / counts.sum()
  assert float(metrics["vq/codes_used"]) == len(used)
  expected = np.exp(-(share * np.log(share)).sum())
  assert abs(float(metrics["vq/perplexity"]) - expected) < 1e-3


def test_pixel_error_compares_patches_in_place():
  """A readout that knows a patch's pixels has no error."""
  image = np.random.default_rng(0).integers(0, 256, (1, 4, 6, 3), np.uint8)
  patches = image.reshape(1, 2, 2, 3, 2, 3).transpose(0, 1, 3, 2, 4, 5)
  known = patches.reshape(1, 2, 3, 12) / 127.5 - 1
  readout = {"kernel": np.eye(12), "bias": np.zeros(12)}
  error = lib.pixel_error(readout, known.astype(np.float32), image)
  assert max_difference(error, np.zeros(1)) < 1e-10
  turned = lib.pixel_error(readout, known[:, ::-1].astype(np.float32), image)
  assert float(turned[0]) > 0.1


def record(i=0):
  return world.open_world("signs")[i]


def test_rows_weigh_answers_and_their_end():
  row = rows().prepare(record(), np.random.default_rng(0), None)
  tok = rows().tokenizer
  seen = {}
  for segment in range(1, row["segments"].max() + 1):
    own = row["segments"] == segment
    ids, weights = row["tokens"][own], row["weights"][own]
    assert (row["positions"][own] == np.arange(own.sum())).all()
    question = tok.decode(ids[weights == 0])
    answer = tok.decode(ids[weights == 1])
    assert question.endswith("\n") and answer.endswith(protocol.PAD)
    seen[question[:-1]] = answer.removesuffix(protocol.PAD)
  expected = dict(record()["qa"]) | {CAPTION: record()["text"]}
  assert seen.items() <= expected.items() and len(seen) >= 2
  assert not row["weights"][row["segments"] == 0].any()
  assert (row["pixels"] == np.asarray(record()["image"])).all()


def test_rows_differ_by_generator_only():
  make = lambda seed: rows().prepare(
    record(), np.random.default_rng(seed), None
  )
  assert (make(3)["tokens"] == make(3)["tokens"]).all()
  assert (make(3)["tokens"] != make(4)["tokens"]).any()


@pytest.mark.parametrize(
  ("change", "says"),
  (
    ({"text": None, "qa": None}, "neither 'text' nor 'qa'"),
    ({"text": "word " * 99, "qa": []}, "raise options.text_len"),
    ({"text": "<MM-Token-3>", "qa": []}, "below the language model's"),
  ),
)
def test_bad_records_are_refused_in_one_line(change, says):
  with pytest.raises(InputError, match=says) as error:
    rows().prepare({**record(), **change}, np.random.default_rng(0), None)
  assert "\n" not in str(error.value)


def test_kmeans_of_too_few_features_is_refused():
  cfg = dataclasses.replace(config(kmeans_batches=1), global_batch=1)
  with pytest.raises(InputError, match="kmeans_batches 1 of 1 images hold 36"):
    tokenizer._care(cfg, sizes())


def stage():
  return tokenizer.stage(config(), sizes(), opened(), LM)


def test_care_starts_and_revives_the_codebook():
  made, cfg = stage(), config()
  assert sorted(made.prepare) == [2, 4]
  mesh = make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    here = jax.device_put(params(), jax.NamedSharding(mesh, jax.P()))
    data = made.batches(0)
    before = run()(here, batch())[1]
    new, extra = made.prepare[2](here, made.program.extra(), data)
    after = run()(new, batch())[1]
    # Codes lie among the features: nearer, and most of them are met.
    assert float(after["vq/error"]) < 0.2 * float(before["vq/error"])
    assert jnp.allclose(jnp.linalg.norm(new["vq"]["codebook"], axis=1), 1, 1e-5)
    used = jnp.zeros(64).at[:60].set(5.0)
    again, extra = made.prepare[4](new, {"usage": used}, data)
    changed = (again["vq"]["codebook"] != new["vq"]["codebook"]).any(axis=1)
    assert changed.tolist() == [False] * 60 + [True] * 4
    assert float(extra["usage"][-1]) == pytest.approx(60 * 5 / 64)
  assert cfg.options.dead_below > 0


def test_usage_is_averaged():
  counts = jnp.arange(64.0)
  _, extra = program().update(
    {}, {"usage": jnp.ones(64)}, {"counts": counts}, None
  )
  assert max_difference(extra["usage"], 1 + 0.02 * (counts - 1)) < 1e-6


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """Folder of a whole run, whose weights are averaged too."""
  folder, cfg = tmp_path_factory.mktemp("run"), config()
  cfg = dataclasses.replace(
    cfg, optim=dataclasses.replace(cfg.optim, ema=0.999)
  )
  assert loop.train(cfg, stage(), folder, settings={"stage": "tokenizer"}) == 0
  return folder


def test_stage_runs_through_the_loop(trained):
  """k-means, revival, held-out rows, pictures, and an exported model."""
  lines = (trained / "metrics.jsonl").read_text().splitlines()
  seen = {k: v for line in lines for k, v in json.loads(line).items()}
  for name in (
    *("tokenizer/loss", "tokenizer/answer_accuracy", "vq/codes_used"),
    *("vq/perplexity", "held_out/answer_accuracy"),
  ):
    assert np.isfinite(seen[name]), name
  assert list(trained.rglob("*.png"))
  folder = trained / "model"
  exported = checkpoint.open_checkpoint(folder)
  assert exported.config.vq == sizes().vq
  read = qwen.open_qwen(folder / "lm")
  assert dataclasses.replace(read.config) == LM


def test_average_of_a_codebook_that_is_set_anew_begins_anew(trained):
  """k-means at step 2: what the codes were before is in no average."""
  made = train_runs.state(trained, config().steps)
  codes, average = made["params/vq/codebook"], made["ema/vq/codebook"]
  assert 0 < np.abs(average - codes).max() < 0.05
