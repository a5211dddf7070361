"""Rollouts and updates of the policy, on the golden checkpoint.

Rewards are functions of the codes: what is painted is their numbers.
"""

import concurrent.futures
import dataclasses
import json
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from tests.helpers import GOLDEN
from xomni_jax import mesh as mesh_lib
from xomni_jax.data import protocol
from xomni_jax.data.prompts import Prompt
from xomni_jax.errors import InputError, RunError
from xomni_jax.inference import painter, sheets
from xomni_jax.mesh import make_mesh
from xomni_jax.reward_config import RewardConfig
from xomni_jax.rewards import wire
from xomni_jax.training import (
  build,
  configure,
  loop,
  rewarding,
  rollout,
  start,
  step,
)
from xomni_jax.training.layout import flatten, make_layout

WANTED = 7  # a code


def settings(**changes):
  """The tiny config on the golden checkpoint: 32 images of 2 x 3 codes."""
  config = configure.read("configs/grpo.py:tiny")
  sizes = configure.read("configs/model.py:tiny").to_dict()
  config.architecture = {k: sizes[k] for k in config.architecture}
  configure.override(
    config,
    [
      "global_batch=32",
      f"init.model={GOLDEN / 'xomni'}",
      f"init.flux={GOLDEN / 'flux1'}",
      "options.sizes=((32, 48),)",
      "options.prompt_len=80",
      "report.eval_every=0",
      "report.preview_every=0",
      "checkpoint.every=1000",
      "checkpoint.export=False",
      "phases.1_all.warmup_steps=0",
      "phases.1_all.decay=constant",
      *(f"{k.replace('__', '.')}={v}" for k, v in changes.items()),
    ],
  )
  return config


def share_of(code):
  """A scorer: the share of a code in an image of codes."""

  def scorer(items):
    return [
      wire.Score(i.id, True, float((i.image[..., 0] == code).mean()))
      for i in items
    ]

  return scorer


@pytest.fixture
def codes_as_images(monkeypatch):
  """Paints code c as the pixel (c, c, c)."""

  def paint_rows(parts, codes, *args, grid, **kwargs):
    pixels = codes.astype(np.uint8).reshape(-1, *grid, 1)
    return jnp.repeat(pixels, 3, axis=-1)

  monkeypatch.setattr(painter, "paint_rows", paint_rows)


def train(config, workdir, monkeypatch, scorer):
  """Metrics of each step of a run in this process."""
  monkeypatch.setattr(rewarding, "open_scorer", lambda *args: scorer)
  cfg, arch = configure.parse(config, "test")
  stage = build.stage(cfg, arch, config, workdir)
  status = loop.train(cfg, stage, workdir, settings=config.to_dict())
  assert status == 0
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


FILTERS = {
  "plain": {},
  "temperature": {"temperature": 0.6},
  "top_k": {"top_k": 5},
  "top_p": {"top_p": 0.7},
  "min_p": {"min_p": 0.2},
  "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
}


@pytest.mark.parametrize(
  ("name", "dtype"),
  [*((name, "float32") for name in FILTERS), ("all", "bfloat16")],
)
def test_training_scores_what_the_sampler_drew(name, dtype, tmp_path):
  config = settings(
    compute__dtype=dtype,
    **{f"options__{k}": v for k, v in FILTERS[name].items()},
  )
  cfg, arch = configure.parse(config, "test")
  program = build.program(cfg, arch, config)
  mesh = make_mesh(devices=jax.devices()[:1])
  layout = make_layout(program.parts, cfg.phases, mesh, cfg.frozen_dtype)
  stage = build.stage(cfg, arch, config, tmp_path)
  params = stage.load(mesh, {"ar": "float32", "ref": "float32"})
  run = stage.collect.__self__
  with jax.set_mesh(mesh):
    roller = run._rolled(params)
    prompts = run._prompts[0]
    # Prompts of several lengths: padded on the left by as many.
    lengths = {len(roller.tokenizer.encode(p.text)) for p in prompts}
    assert len(lengths) > 1
    drawn = roller.draw(run._policy(params), prompts, 0)
    measure = step.rows_step(cfg, layout, program.measure)
    rows = run._measured(
      lambda rows: measure(flatten(params), step.place_whole(rows, mesh)),
      drawn,
    )
  assert (drawn.support is None) == (name in ("plain", "temperature"))
  gap = np.abs(rows["logp_old"] - rows["logp_sampler"])
  # Another order of operations; the mean is metric sampler_gap.
  most, mean = {"float32": (1e-4, 1e-5), "bfloat16": (0.5, 0.05)}[dtype]
  assert gap.max() < most and gap.mean() < mean


def test_padding_of_prompts_changes_no_code(tmp_path):
  config = settings()
  cfg, arch = configure.parse(config, "test")
  stage = build.stage(cfg, arch, config, tmp_path)
  mesh = make_mesh(devices=jax.devices()[:1])
  params = stage.load(mesh, {"ar": "float32"})
  run = stage.collect.__self__
  found = []
  with jax.set_mesh(mesh):
    roller = run._rolled(params)
    for length in (80, 120):
      options = dataclasses.replace(cfg.options, prompt_len=length)
      padded = dataclasses.replace(roller, options=options)
      # Draws depend on the slot of the cache, likeliest codes do not.
      found.append(
        padded.draw(params["ar"], run._prompts[0], 0, greedy=True, copies=1)
      )
  assert all(drawn.fits.all() for drawn in found)
  assert (found[0].codes == found[1].codes).all()
  gap = np.abs(found[0].logp_sampler - found[1].logp_sampler)
  assert gap.max() < 1e-4


SOME_FILTERS = [
  pytest.param(name, marks=() if name in ("plain", "all") else pytest.mark.slow)
  for name in FILTERS
]


@pytest.mark.parametrize("filters", SOME_FILTERS)
def test_ratio_is_one_at_the_first_update(
  tmp_path, monkeypatch, codes_as_images, filters
):
  config = settings(
    phases__1_all__steps=4,
    options__epochs=2,
    optim__lr=3e-3,
    **{f"options__{k}": v for k, v in FILTERS[filters].items()},
  )
  found = train(config, tmp_path, monkeypatch, share_of(WANTED))
  off = [metrics["grpo/ratio_off_max"] for metrics in found]
  # A rollout is gone through twice: only the first time nothing has moved.
  assert off[0] < 1e-6 and off[2] < 1e-6, off
  assert off[1] > 1e-3 and off[3] > 1e-3, off


def test_ratio_is_one_for_every_filter_padding_and_split_of_rows(
  tmp_path, monkeypatch, codes_as_images
):
  """One compiled update: filters are bits of its rows.

  Rows are measured by 8 and trained by 16 at once, and the longest prompt of
  the four has no padding at all.
  """
  texts = ["a sign", "a cat on a mat", "a dog", "a sign that says OPEN"]
  file = tmp_path / "prompts.jsonl"
  file.write_text("".join(f'{{"prompt": "{text}"}}\n' for text in texts))
  config = settings(
    options__temperature=0.6,
    options__top_k=5,
    options__score_rows=8,
    optim__accumulate=2,
  )
  config.data.sources = ({"path": str(file), "task": "prompt"},)
  sizes = config.architecture.ar
  spell = protocol.load_tokenizer(
    GOLDEN / "xomni", sizes.vocab_size, sizes.image_vocab_size
  ).encode
  longest = max(len(spell(text)) for text in texts)
  config.options.prompt_len = longest + len(spell(protocol.image_prefix(2, 3)))
  monkeypatch.setattr(rewarding, "open_scorer", lambda *_: share_of(WANTED))
  cfg, arch = configure.parse(config, "test")
  stage = build.stage(cfg, arch, config, tmp_path)
  mesh = make_mesh(devices=jax.devices()[:1])
  layout = make_layout(stage.program.parts, cfg.phases, mesh, cfg.frozen_dtype)
  run = stage.collect.__self__
  every = np.full((32, 6, arch.ar.image_vocab_size // 8), 255, np.uint8)
  filters = ("temperature", "top_k", "top_p", "min_p")
  with jax.set_mesh(mesh):
    params = stage.load(mesh, {"ar": "float32", "ref": "float32"})
    flat = flatten(params)
    measure = step.rows_step(cfg, layout, stage.program.measure)
    update = step.train_step(cfg, stage.program, layout, 0)

    def measured(rows):
      rows = {"support": every[: len(rows["codes"])], **rows}
      return measure(flat, step.place_whole(rows, mesh))

    roller = run._rolled(params)
    for number, name in enumerate(filters):
      drawn_by = {"top_k": 0, "temperature": 0.6, **FILTERS[name]}
      how = dataclasses.replace(cfg.options, **drawn_by)
      run._roller = dataclasses.replace(roller, options=how)
      rows, _, _ = stage.collect(measured, params, {}, number)
      padding = (~rows["valid"][:, : cfg.options.prompt_len]).sum(axis=1)
      assert padding.min() == 0 and len(set(padding)) > 2
      kept = np.unpackbits(rows.get("support", every), axis=-1).sum(-1)
      assert (kept.min() < 64) == (name != "temperature")
      own = {path: jnp.copy(flat[path]) for path in layout.trained}
      _, metrics = update(
        step.init_state(cfg, stage.program, layout, own),
        {path: flat[path] for path in layout.frozen},
        step.place_whole({"support": every, **rows}, mesh),
        jax.random.key(0),
        np.float32(1e-3),
      )
      assert metrics["tokens"] == 32 * 6
      assert metrics["ratio_off_max"] < 1e-6, name
      assert metrics["sampler_gap_max"] < 1e-4, name
  stage.close()


@pytest.mark.slow
@pytest.mark.parametrize("filters", FILTERS)
def test_log_probs_stay_finite_after_many_updates(
  tmp_path, monkeypatch, codes_as_images, filters
):
  """Until most of what was drawn is outside what a filter would keep now."""
  config = settings(
    phases__1_all__steps=60,
    options__epochs=4,
    options__beta=0.1,
    optim__lr=1e-2,
    **{f"options__{k}": v for k, v in FILTERS[filters].items()},
  )
  found = train(config, tmp_path, monkeypatch, share_of(WANTED))
  for metrics in found:
    assert all(np.isfinite(v) for v in metrics.values()), metrics
    assert metrics["grpo/kl"] >= -1e-7
  assert max(m["grpo/ratio_off"] for m in found) > 0.1


def test_reward_rises_and_a_large_beta_holds_it(
  tmp_path, monkeypatch, codes_as_images
):
  """64 codes: the share of one begins near 1/64."""
  rise = {}
  for name, beta in (("free", 0.0), ("held", 100.0)):
    config = settings(
      phases__1_all__steps=40,
      optim__lr=2e-3,
      options__beta=beta,
      options__normalise=False,
      options__temperature=1.0,
    )
    found = train(config, tmp_path / name, monkeypatch, share_of(WANTED))
    rise[name] = [metrics["reward/ocr"] for metrics in found]
  assert rise["free"][0] == rise["held"][0] < 0.1
  assert np.mean(rise["free"][-5:]) > 0.9
  assert np.mean(rise["held"][-5:]) < 0.1


def test_failed_scores_are_masked_and_never_zero(
  tmp_path, monkeypatch, codes_as_images
):
  def scorer(items):
    good = share_of(WANTED)(items)
    # Every fourth fails.
    return [
      wire.failed(s.id, "timeout", "too late") if i % 4 == 0 else s
      for i, s in enumerate(good)
    ]

  config = settings(phases__1_all__steps=2, report__preview_every=2)
  config.options.combine = {"max_failure_rate": 0.5}
  found = train(config, tmp_path, monkeypatch, scorer)
  for metrics in found:
    assert metrics["reward/ocr_failed"] == metrics["reward/masked"] == 0.25
  for name in ("samples", "curves"):
    assert (tmp_path / "pictures" / f"{name}-0000002.png").exists()


def test_fused_path_gives_the_numbers_of_the_host_path(
  tmp_path, monkeypatch, codes_as_images
):
  found, asked = {}, {}
  for path in ("host", "fused"):
    ids = asked[path] = []

    def scorer(items, ids=ids):
      ids.extend(int(item.id) for item in items)
      return [
        wire.failed(s.id, "http", "no") if int(s.id) % 5 == 0 else s
        for s in share_of(WANTED)(items)
      ]

    config = settings(
      phases__1_all__steps=2,
      options__reward_path=path,
      options__paint_rows=16,
    )
    config.options.combine = {"max_failure_rate": 0.5}
    steps = train(config, tmp_path / path, monkeypatch, scorer)
    found[path] = [
      {k: v for k, v in m.items() if not k.startswith("time/")} for m in steps
    ]
  assert found["fused"] == found["host"]
  # Each image once, whatever runs they are painted in.
  assert (
    sorted(asked["fused"])
    == sorted(asked["host"])
    == sorted([*range(32), *range(32)])
  )


@pytest.mark.parametrize(
  ("path", "fault"),
  [
    ("host", "raises"),
    ("fused", "raises"),
    pytest.param("host", "short", marks=pytest.mark.slow),
    pytest.param("fused", "short", marks=pytest.mark.slow),
  ],
)
def test_scorer_that_breaks_its_promise_has_failed(
  tmp_path, monkeypatch, codes_as_images, path, fault
):
  """On both paths, of the part of a rollout that it was asked for."""

  def scorer(items):
    if items[0].id == "0":
      if fault == "raises":
        raise RuntimeError("broken")
      return share_of(WANTED)(items)[1:]
    return share_of(WANTED)(items)

  config = settings(
    phases__1_all__steps=1,
    options__reward_path=path,
    options__paint_rows=16,
    report__preview_every=1,
  )
  config.options.combine = {"max_failure_rate": 0.6}
  (metrics,) = train(config, tmp_path, monkeypatch, scorer)
  assert metrics["reward/ocr_failed"] == 0.5
  assert (tmp_path / "pictures" / "samples-0000001.png").exists()


def rewarder(tmp_path, *rewards, **combine):
  cfg = configure.parse(settings(), "test")[0].options
  return rewarding.Rewarder(
    rewards or cfg.rewards,
    dataclasses.replace(cfg.combine, **combine),
    8,
    tmp_path,
  )


def test_fused_path_asks_for_all_rewards_of_all_devices_at_once(
  tmp_path, monkeypatch
):
  together = threading.Barrier(2 * 3)  # devices x rewards

  def scorer(items):
    together.wait(60)
    return share_of(WANTED)(items)

  monkeypatch.setattr(rewarding, "open_scorer", lambda *args: scorer)
  rewards = [RewardConfig(name, "http://nowhere/x") for name in "abc"]
  asking = rewarder(tmp_path, *rewards)
  fused = asking.fused(0, [Prompt("p", "a sign")] * 8, None)
  images = np.zeros((4, 2, 2, 3), np.uint8)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    tables = list(
      pool.map(fused._ask, [images] * 2, [[0, 1, 2, 3], [4, 5, 6, 7]])
    )
  assert np.stack(tables).shape == (2, 4, 3, 4)
  assert (np.stack(tables)[..., 0] == 1).all()
  assert all(sorted(found) == [*range(8)] for found in fused.scores.values())


def test_what_a_server_says_besides_its_score_breaks_nothing(
  tmp_path, monkeypatch
):
  """Two engines' distance is read from a reply that may hold any JSON."""
  said = ["far", None, [1], True, 0.25, {"x": 1}, "nan", 1e999]

  def scorer(items):
    return [
      wire.Score(i.id, True, 0.5, {"apart": x})
      for i, x in zip(items, said, strict=True)
    ]

  monkeypatch.setattr(rewarding, "open_scorer", lambda *args: scorer)
  asking = rewarder(tmp_path, max_failure_rate=1.0)
  image = np.zeros((2, 2, 3), np.uint8)
  asked = asking.ask(
    0, [Prompt("p", "a sign")] * 8, dict.fromkeys(range(8), image)
  )
  heard = asking.hear(asked)
  assert heard.combined.metrics["reward/ocr_apart"] == 0.25
  # JSON has no infinity: that reply was none.
  assert np.isfinite(heard.combined.rewards).sum() == 7


def test_failures_before_a_kill_count_after_it(tmp_path, monkeypatch):
  """A window of four steps; two of them lie before the run is resumed."""
  monkeypatch.setattr(
    rewarding,
    "open_scorer",
    lambda *args: (
      lambda items: [wire.failed(i.id, "http", "no") for i in items]
    ),
  )
  cfg = configure.parse(settings(), "test")[0].options
  limit = dataclasses.replace(cfg.combine, window=4, max_failure_rate=0.9)
  image = np.zeros((2, 2, 3), np.uint8)
  prompts = [Prompt("p", "a sign")] * 8

  def hear(rewarder, step):
    rewarder.hear(rewarder.ask(step, prompts, dict.fromkeys(range(8), image)))

  make = lambda: rewarding.Rewarder(cfg.rewards, limit, 8, tmp_path)
  first = make()
  for number in range(3):
    hear(first, number)
  first.close()
  again = make()
  hear(again, 2)  # its third step is not counted twice
  with pytest.raises(RunError, match="32 of 32 scores"):
    hear(again, 3)


@pytest.mark.parametrize(
  "path", ["host", pytest.param("fused", marks=pytest.mark.slow)]
)
def test_prompt_that_does_not_fit_is_named_and_counts_nowhere(
  tmp_path, monkeypatch, codes_as_images, capsys, path
):
  """Its images would have the best scores of all.

  And a held-out batch of which all scores fail takes nothing from the mean.
  """
  file = tmp_path / "prompts.jsonl"
  texts = ["a sign", "long " * 200, "a cat", "a dog"]
  file.write_text("".join(f'{{"prompt": "{text}"}}\n' for text in texts))
  asked = []

  def scorer(items):
    last = len(asked) >= 2 * 24  # after a rollout and a held-out batch
    asked.extend(item.prompt for item in items)
    if last:
      return [wire.failed(i.id, "timeout", "too late") for i in items]
    return [
      wire.Score(i.id, True, 1.0 if i.prompt.startswith("long") else 0.25)
      for i in items
    ]

  config = settings(
    phases__1_all__steps=1,
    data__shuffle=False,
    report__eval_every=1,
    report__eval_batches=2,
    report__preview_every=1,
    options__reward_path=path,
    options__paint_rows=16,
  )
  config.data.sources = ({"path": str(file), "task": "prompt"},)
  config.eval_data.sources = config.data.sources
  found = train(config, tmp_path / "run", monkeypatch, scorer)
  metrics = {k: v for line in found for k, v in line.items()}
  said = capsys.readouterr().err
  assert said.count("prompt prompts.jsonl:2 has more than 80 tokens") == 3
  # The rest of the rollout counts: entropy is a mean over what does.
  assert np.isfinite(metrics["grpo/entropy"]) and metrics["grpo/entropy"] > 0
  assert metrics["grpo/tokens"] == 24 * 6
  for where in ("reward", "held_out"):
    assert metrics[f"{where}/ocr"] == metrics[f"{where}/total"] == 0.25
    assert metrics[f"{where}/ocr_absent"] == 0.25
  assert metrics["reward/ocr_failed"] == 0
  assert metrics["reward/masked"] == 0.25
  assert metrics["held_out/ocr_failed"] == 0.5
  assert metrics["held_out/masked"] == 0.625
  assert sorted(asked) == sorted(["a sign", "a cat", "a dog"] * 24)


@pytest.mark.parametrize("same", [True, False])
def test_images_of_a_prompt_share_their_noise_or_not(tmp_path, same):
  config = settings(
    options__same_noise=same, options__paint_rows=16, options__paint_steps=1
  )
  cfg, arch = configure.parse(config, "test")
  stage = build.stage(cfg, arch, config, tmp_path)
  mesh = make_mesh(devices=jax.devices()[:1])
  run = stage.collect.__self__
  with jax.set_mesh(mesh):
    roller = run._rolled(stage.load(mesh, {"ar": "float32"}))
    codes = np.zeros((16, 6), np.int32)  # two prompts, the same codes
    images, _ = roller.paint(codes, ["a sign"] * 16, 0, (2, 3))
  equal = [(images[i] == images[0]).all() for i in range(16)]
  assert equal == [i == 0 or (same and i < 8) for i in range(16)]


def test_own_rows_are_each_given_once():
  mesh = make_mesh(devices=jax.devices()[:1])
  x = jax.device_put(
    np.arange(6).reshape(6, 1),
    jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
  )
  assert [(i, int(v[0])) for i, v in rollout.own_rows(x)] == [
    (i, i) for i in range(6)
  ]


def test_rollout_has_to_be_whole_groups(tmp_path):
  config = settings(global_batch=20)
  cfg, arch = configure.parse(config, "test")
  with pytest.raises(InputError, match="no multiple of group_size 8"):
    build.stage(cfg, arch, config, tmp_path)
  config = settings(options__sample_rows=12)
  cfg, arch = configure.parse(config, "test")
  with pytest.raises(InputError, match="sample_rows is 12, expected a part"):
    build.stage(cfg, arch, config, tmp_path)


@pytest.mark.parametrize(
  ("options", "said"),
  [
    (
      {"reward_path": "fused", "paint_rows": 12},
      "paint_rows is 12, expected a multiple of the 8 devices .* try 16",
    ),
    ({"score_rows": 4}, "score_rows is 4, expected a multiple of the 8 batch"),
    # Rows are split over `data`, rewards are asked for by all devices.
    (
      {
        "rollout_mesh": "(('data', 2), ('tensor', 4))",
        "reward_path": "fused",
        "paint_rows": 4,
      },
      "paint_rows is 4, expected a multiple of the 8 devices",
    ),
    ({"reward_path": "fused", "paint_rows": 24, "score_rows": 8}, None),
    ({"paint_rows": 12}, None),
  ],
)
def test_rows_have_to_go_into_devices(tmp_path, monkeypatch, options, said):
  monkeypatch.setattr(jax, "device_count", lambda: 8)
  config = settings(**{f"options__{k}": v for k, v in options.items()})
  cfg, arch = configure.parse(config, "test")
  if said is None:
    build.stage(cfg, arch, config, tmp_path).close()
    return
  with pytest.raises(InputError, match=said) as error:
    build.stage(cfg, arch, config, tmp_path)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("most", [1, 40, 100])
def test_array_in_pieces_is_the_array(most):
  x = jnp.arange(2 * 7 * 5, dtype=jnp.uint8).reshape(2, 7, 5)
  sizes = []

  def gather(x):
    sizes.append(x.nbytes)
    return np.asarray(x)

  assert (mesh_lib._in_pieces(x, gather, most) == np.asarray(x)).all()
  assert max(sizes) <= max(most, 10) and (most < 70) == (len(sizes) > 1)


def test_chinese_prompts_are_spelled_under_images():
  pytest.importorskip("pylopdf_fonts_zh_cn")
  paint = lambda text: np.asarray(
    sheets.grid([sheets.Picture(Image.new("RGB", (240, 8)), text)])
  )
  # Letters that a font lacks all look alike.
  assert (paint("出口 ab") != paint("入口 ab")).any()
  assert (paint("出口 ab") == paint("出口 ab")).all()


def test_frozen_parameters_have_to_be_those_of_the_beginning(tmp_path, capsys):
  rng = np.random.default_rng(0)
  first = {
    "ref/a": jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32),
    "ref/b": jnp.asarray(rng.normal(size=(7,)), jnp.bfloat16),
    "vae/a": jnp.asarray(rng.normal(size=(2, 2)), jnp.float32),
    "vae/table": jnp.asarray(rng.integers(0, 255, (3,)), jnp.uint8),
  }
  check = lambda frozen, resumed=True, allow=False: start.check_frozen(
    tmp_path, frozen, resumed, allow
  )
  check(first)  # a run of before there were sums
  check({k: x[::-1] for k, x in first.items()}, resumed=False)
  check(first, resumed=False)
  check({k: x + 0 for k, x in reversed(first.items())})
  a, b = first["ref/a"], first["ref/b"]
  others = [
    {"ref/a": a.at[1, 2, 3].set(jnp.nextafter(a[1, 2, 3], jnp.inf))},
    {"ref/a": a.at[0].set(a[1]).at[1].set(a[0])},
    {"ref/a": a.swapaxes(0, 2)},
    {"ref/b": b.at[0].set(b[1]).at[1].set(b[0])},
    {"ref/b": -b},
  ]
  for other in others:
    with pytest.raises(InputError, match=r"parameters \(ref\) are others") as e:
      check(first | other)
    assert "\n" not in str(e.value)
  with pytest.raises(InputError, match=r"\(vae\) are others"):
    check(first | {"vae/table": first["vae/table"].at[1].add(1)})
  check(first)
  check(first | others[0], allow=True)
  assert "(ref) are others" in capsys.readouterr().out
  check(first | others[0])
  (tmp_path / "frozen.json").write_text("{")
  with pytest.raises(InputError, match="unreadable"):
    check(first)


@pytest.mark.slow
def test_resumed_run_has_the_reference_that_it_began_with(
  tmp_path, monkeypatch, codes_as_images
):
  monkeypatch.setattr(rewarding, "open_scorer", lambda *args: share_of(WANTED))
  model, workdir = tmp_path / "model", tmp_path / "run"
  shutil.copytree(GOLDEN / "xomni", model)

  def run(steps):
    config = settings(phases__1_all__steps=steps, global_batch=8)
    config.init.model = str(model)
    cfg, arch = configure.parse(config, "test")
    stage = build.stage(cfg, arch, config, workdir)
    config.phases["1_all"].steps = 1  # as it was said before
    return loop.train(cfg, stage, workdir, settings=config.to_dict())

  assert run(1) == 0
  shutil.rmtree(model)
  shutil.copytree(GOLDEN / "xomni", model)  # the same, with other times
  assert run(2) == 0
  file = min(model.glob("model*.safetensors"))
  tensors = safetensors.numpy.load_file(file)
  name = min(tensors)
  tensors[name] = np.negative(tensors[name])
  safetensors.numpy.save_file(tensors, file)
  with pytest.raises(InputError, match=r"parameters \(ref\) are others"):
    run(3)


@pytest.fixture
def draws(monkeypatch):
  """Numbers of the rollouts that are drawn."""
  numbers, draw = [], rollout.Roller.draw

  def spy(self, policy, prompts, number, **how):
    numbers.append(number)
    return draw(self, policy, prompts, number, **how)

  monkeypatch.setattr(rollout.Roller, "draw", spy)
  return numbers


@pytest.mark.parametrize(
  ("change", "drawn"),
  [
    pytest.param("nothing", [2], marks=pytest.mark.slow),
    # At its end a run has no next rollout, and keeps the one before.
    ("longer", [2, 3]),
    pytest.param("prompts", [1, 2], marks=pytest.mark.slow),
    pytest.param("temperature", [1, 2], marks=pytest.mark.slow),
  ],
)
def test_rollout_that_waits_is_used_only_if_it_is_the_one(
  tmp_path, monkeypatch, codes_as_images, draws, change, drawn
):
  file, workdir = tmp_path / "prompts.jsonl", tmp_path / "run"
  write = lambda text: file.write_text(
    "".join(f'{{"prompt": "{text} {i}"}}\n' for i in range(8))
  )
  monkeypatch.setattr(rewarding, "open_scorer", lambda *args: share_of(WANTED))
  stop_at = {"longer": 0}.get(change, 1)
  monkeypatch.setattr(
    loop.Preemption, "should_stop", lambda self, step: step == stop_at
  )

  def run(steps, **more):
    config = settings(
      phases__1_all__steps=steps,
      global_batch=8,
      options__group_size=4,
      options__overlap=1,
      checkpoint__every=1,
      **more,
    )
    config.data.sources = ({"path": str(file), "task": "prompt"},)
    cfg, arch = configure.parse(config, "test")
    stage = build.stage(cfg, arch, config, workdir)
    return loop.train(
      cfg,
      stage,
      workdir,
      settings=config.to_dict(),
      allow_config_change=change in ("longer", "temperature"),
    )

  write("a sign")
  assert run(2 if change == "longer" else 3) == (143 if stop_at else 0)
  draws.clear()
  stop_at = 0
  if change == "prompts":
    write("another sign")
  more = {"options__temperature": 0.5} if change == "temperature" else {}
  assert run(4 if change == "longer" else 3, **more) == 0
  assert draws == drawn


def test_scores_of_a_rollout_come_in_while_the_next_one_is_drawn(
  tmp_path, monkeypatch, codes_as_images
):
  """Each waits for the other to begin: one after the other, both give up."""
  scoring, drawing, met = threading.Event(), threading.Event(), []
  draw = rollout.Roller.draw

  def spy(self, policy, prompts, number, **how):
    if number == 1:
      drawing.set()
      met.append(scoring.wait(60))
    return draw(self, policy, prompts, number, **how)

  def scorer(items):
    if not scoring.is_set():  # of the first rollout
      scoring.set()
      met.append(drawing.wait(60))
    return share_of(WANTED)(items)

  monkeypatch.setattr(rollout.Roller, "draw", spy)
  config = settings(
    phases__1_all__steps=2,
    global_batch=8,
    options__group_size=4,
    options__overlap=1,
  )
  train(config, tmp_path, monkeypatch, scorer)
  assert met == [True, True]


def test_rollouts_of_two_sizes_are_trained_as_each_alone(
  tmp_path, monkeypatch, codes_as_images
):
  """The smaller one is padded: its tokens, support, log-probs and mask."""
  small, large = (32, 32), (32, 48)
  file = tmp_path / "prompts.jsonl"
  lines = [
    json.dumps({"prompt": f"a sign {i}", "size": size}) + "\n"
    for size in (small, large)
    for i in range(2)
  ]
  file.write_text("".join(lines))
  shapes = []

  def scorer(items):
    shapes.append({item.image.shape[:2] for item in items})
    # Codes are bytes of the image.
    return [
      wire.Score(i.id, True, float(i.image[..., 0].mean()) / 64) for i in items
    ]

  def run(sizes, steps):
    config = settings(
      phases__1_all__steps=steps,
      global_batch=8,
      options__group_size=4,
      options__min_p=0.2,
      options__beta=0.1,
      options__sizes=sizes,
      data__shuffle=False,
      data__window=4,
      optim__lr=1e-2,
    )
    config.data.sources = ({"path": str(file), "task": "prompt"},)
    workdir = tmp_path / str(len(sizes))
    return train(config, workdir, monkeypatch, scorer)

  both = run((small, large), 4)
  assert shapes == [{(2, 2)}, {(2, 3)}, {(2, 2)}, {(2, 3)}]
  (alone,) = run((small,), 1)
  for key, value in alone.items():
    if not key.startswith("time/"):
      assert abs(both[0][key] - value) <= 1e-5 * max(1, abs(value)), key
  for metrics in both:
    assert metrics["grpo/grad_norm"] > 0
    assert metrics["grpo/ratio_off"] < 1e-6
    assert metrics["grpo/sampler_gap"] < 1e-5
