"""GRPO trains on what it drew: the sampler's scores and the update's agree.

The ratio of the two is one until an update, log-probs stay finite after many,
and the reward rises unless a large beta holds the policy.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import grpo_small
from tests.grpo_small import WANTED, settings, share_of, train
from tests.helpers import GOLDEN
from xomni_jax.data import protocol
from xomni_jax.mesh import make_mesh
from xomni_jax.training import build, configure, rewarding, step
from xomni_jax.training.layout import flatten, make_layout

codes_as_images = grpo_small.codes_as_images  # a fixture
FILTERS = {
  "plain": {},
  "temperature": {"temperature": 0.6},
  "top_k": {"top_k": 5},
  "top_p": {"top_p": 0.7},
  "min_p": {"min_p": 0.2},
  "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
}
SOME = [
  pytest.param(name, marks=() if name in ("plain", "all") else pytest.mark.slow)
  for name in FILTERS
]


@pytest.mark.parametrize(
  ("name", "dtype"),
  [
    *(pytest.param(*name.values, "float32", marks=name.marks) for name in SOME),
    ("all", "bfloat16"),
  ],
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


@pytest.mark.parametrize("filters", SOME)
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
      phases__1_all__steps=20,
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
