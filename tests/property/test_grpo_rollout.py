"""Rollouts: which prompts, rows and sizes one is made of."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests import grpo_small
from tests.grpo_small import WANTED, settings, share_of, train
from xomni_jax import mesh as mesh_lib
from xomni_jax.errors import InputError
from xomni_jax.inference import sheets
from xomni_jax.mesh import make_mesh
from xomni_jax.rewards import wire
from xomni_jax.training import (
  build,
  configure,
  policy,
  rollout,
)

codes_as_images = grpo_small.codes_as_images  # a fixture


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


@pytest.mark.parametrize(
  ("steps", "logged"), [(9, [3, 4, 7, 8, 9]), (10, [3, 4, 7, 8, 9, 10])]
)
def test_rewards_are_logged_whatever_log_every_is(
  tmp_path, monkeypatch, codes_as_images, steps, logged
):
  """They come with the first update of a rollout."""
  config = settings(
    options__epochs=2, report__log_every=4, phases__1_all__steps=steps
  )
  found = train(config, tmp_path, monkeypatch, share_of(WANTED))
  assert [m["step"] for m in found] == logged
  told = [m["step"] for m in found if "reward/ocr" in m]
  assert told == [3, 7, 9]


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


def _builds(config, workdir, refused):
  """A stage is built of the config, or refused on one line; None: built."""
  cfg, arch = configure.parse(config, "test")
  if refused is None:
    build.stage(cfg, arch, config, workdir).close()
    return
  with pytest.raises(InputError, match=refused) as error:
    build.stage(cfg, arch, config, workdir)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"global_batch": 20}, "no multiple of group_size 8"),
    ({"options__sample_rows": 12}, "sample_rows is 12, expected a part"),
  ],
)
def test_rollout_has_to_be_whole_groups(tmp_path, changes, said):
  _builds(settings(**changes), tmp_path, said)


@pytest.mark.parametrize(
  ("train", "said"),
  [
    (".", "trains ref/"),
    ("(ar|ref)/mm_head", "trains ref/mm_head"),
    ("ar/", None),
  ],
)
def test_reference_policy_is_never_trained(tmp_path, train, said):
  config = settings()
  config.phases["1_all"].train = (train,)
  _builds(config, tmp_path, said)


def test_phase_with_data_of_its_own_is_refused(tmp_path):
  config = settings()
  config.phases["1_all"].data = config.data
  _builds(config, tmp_path, "'1_all' has data of its own")


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
    ({"rollout_mesh": "(('model', 2),)"}, "axes model, expected some of "),
    ({"reward_path": "fused", "paint_rows": 24, "score_rows": 8}, None),
    ({"paint_rows": 12}, None),
  ],
)
def test_rows_have_to_go_into_devices(tmp_path, monkeypatch, options, said):
  monkeypatch.setattr(jax, "device_count", lambda: 8)
  config = settings(**{f"options__{k}": v for k, v in options.items()})
  _builds(config, tmp_path, said)


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


def test_rollouts_of_two_sizes_are_trained_as_each_alone(
  tmp_path, monkeypatch, codes_as_images
):
  """The smaller one is kept padded, and computed without its padding."""
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

  widths = []
  token_scores = policy.token_scores

  def spy(params, hidden, codes, *more, **how):
    widths.append(codes.shape[1])
    return token_scores(params, hidden, codes, *more, **how)

  monkeypatch.setattr(policy, "token_scores", spy)
  both = run((small, large), 4)
  assert set(widths) == {4, 6}
  assert shapes == [{(2, 2)}, {(2, 3)}, {(2, 2)}, {(2, 3)}]
  (alone,) = run((small,), 1)
  for key, value in alone.items():
    if not key.startswith("time/"):
      assert abs(both[0][key] - value) <= 1e-5 * max(1, abs(value)), key
  for metrics in both:
    assert metrics["grpo/grad_norm"] > 0
    assert metrics["grpo/ratio_off"] < 1e-6
    assert metrics["grpo/sampler_gap"] < 1e-5
