"""The GRPO loss against plain float64, and what must not change it."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xomni_jax.config_files import load_architecture
from xomni_jax.errors import InputError
from xomni_jax.reward_config import RewardConfig
from xomni_jax.stage_options import GRPOOptions
from xomni_jax.training import policy

B, L, D = 6, 5, 16
ARCH = load_architecture("configs/model.py:tiny")
V = ARCH.ar.image_vocab_size


def options(**changes):
  given = {"sizes": ((32, 32),), "rewards": (RewardConfig("x", "local:ocr"),)}
  return GRPOOptions(**given | changes)


def some_scores(seed, spread=0.3):
  """Scores and rows whose ratios lie on both sides of the clip."""
  rng = np.random.default_rng(seed)
  logp = -rng.exponential(1.0, (B, L))
  near = lambda: (logp + rng.normal(0, spread, (B, L))).astype(np.float32)
  mask = np.ones((B, L), np.float32)
  mask[1, 3:] = 0  # a smaller image
  mask[4] = 0  # without a reward
  scores = policy.TokenScores(
    logp.astype(np.float32), near(), rng.random((B, L), np.float32)
  )
  batch = {
    "logp_old": near(),
    "logp_ref": near(),
    "logp_sampler": near(),
    "advantage": rng.normal(0, 1, (B, L)).astype(np.float32),
    "mask": mask,
  }
  return scores, batch


def plain_loss(scores, batch, opts):
  """The loss and its gradient by `scores.logp` and `logp_model`, float64."""
  total, by_logp, by_model = 0.0, np.zeros((B, L)), np.zeros((B, L))
  mask = batch["mask"].astype(np.float64)
  for b in range(B):
    for t in range(L):
      if not mask[b, t]:
        continue
      if opts.aggregate == "token":
        share = 1 / mask.sum()
      else:
        share = 1 / mask[b].sum() / (mask.sum(1) > 0).sum()
      a = float(batch["advantage"][b, t])
      ratio = np.exp(
        np.float64(scores.logp[b, t]) - np.float64(batch["logp_old"][b, t])
      )
      kept = min(max(ratio, 1 - opts.clip_low), 1 + opts.clip_high)
      slope = ratio * a if ratio * a <= kept * a else 0.0
      weight = 1.0
      if opts.importance_cap:
        gap = np.float64(batch["logp_old"][b, t]) - np.float64(
          batch["logp_sampler"][b, t]
        )
        weight = min(np.exp(gap), opts.importance_cap)
      d = np.float64(batch["logp_ref"][b, t]) - np.float64(
        scores.logp_model[b, t]
      )
      kl = np.exp(d) - d - 1
      total += share * (-weight * min(ratio * a, kept * a) + opts.beta * kl)
      by_logp[b, t] = -share * weight * slope
      by_model[b, t] = share * opts.beta * (1 - np.exp(d))
  return total, by_logp, by_model


def our_loss(scores, batch, opts):
  totals = policy.policy_totals(batch)
  return policy.policy_loss(scores, batch, totals, opts)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"aggregate": "sequence"},
    {"beta": 0.5, "clip_low": 0.1, "clip_high": 0.3},
    {"importance_cap": 1.1},
  ],
  ids=lambda c: ",".join(c) or "defaults",
)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_are_those_of_float64(seed, changes):
  opts = options(**changes)
  scores, batch = some_scores(seed)
  (value, _), slopes = jax.value_and_grad(
    lambda s: our_loss(s, batch, opts), has_aux=True
  )(scores)
  total, by_logp, by_model = plain_loss(scores, batch, opts)
  # Float32 sums of about 25 terms of size 1.
  assert abs(value - total) < 2e-6
  assert np.abs(slopes.logp - by_logp).max() < 1e-6
  assert np.abs(slopes.logp_model - by_model).max() < 1e-6
  assert not slopes.entropy.any()


def test_contributions_of_parts_add_up_to_the_whole():
  opts = options(aggregate="sequence")
  scores, batch = some_scores(0)
  totals = policy.policy_totals(batch)
  whole, metrics = policy.policy_loss(scores, batch, totals, opts)
  parts = [
    policy.policy_loss(
      *jax.tree.map(lambda x, p=p: x[p], (scores, batch)), totals, opts
    )
    for p in (slice(0, 2), slice(2, 6))
  ]
  assert np.isclose(sum(p[0] for p in parts), whole, atol=1e-6)
  for name, value in metrics.items():
    join = max if name.endswith("_max") else sum
    assert np.isclose(join(p[1][name] for p in parts), value, atol=1e-6), name


def test_masked_row_changes_nothing_but_its_absence():
  opts = options()
  scores, batch = some_scores(1)
  keep = np.array([0, 1, 2, 3, 5])  # row 4 is masked
  value, metrics = our_loss(scores, batch, opts)
  without = our_loss(*jax.tree.map(lambda x: x[keep], (scores, batch)), opts)
  assert np.isclose(value, without[0], atol=1e-6)
  other = {**batch, "advantage": batch["advantage"].copy()}
  other["advantage"][4] = 1e9
  assert our_loss(scores, other, opts)[0] == value
  for name, x in metrics.items():
    assert np.isclose(x, without[1][name], atol=1e-6), name


@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_masked_token_has_no_slope_whatever_it_is(aggregate):
  """exp(120) is infinite in float32, and 0 times its slope NaN."""
  opts = options(aggregate=aggregate, importance_cap=2.0, beta=0.1)
  scores, batch = some_scores(1)
  slopes = jax.grad(lambda s, b: our_loss(s, b, opts)[0])
  expected = slopes(scores, batch)
  gone = batch["mask"] == 0
  for value in (-120.0, 120.0, -np.inf):
    far = lambda x, value=value: np.where(gone, np.float32(value), x)
    for changed in (
      (scores._replace(logp=far(scores.logp)), batch),
      (scores._replace(logp_model=far(scores.logp_model)), batch),
      *(
        (scores, {**batch, name: far(batch[name])})
        for name in ("logp_old", "logp_ref", "logp_sampler")
      ),
    ):
      for a, b in zip(slopes(*changed), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_k3_of_each_token_is_that_of_float64_and_never_negative():
  """Each token is a batch of its own, so that none hides behind a mean."""
  rng = np.random.default_rng(2)
  model = -rng.exponential(3.0, 20_000).astype(np.float32)
  # Differences of all sizes, from less than a rounding of the log-prob.
  away = 10 ** rng.uniform(-8, 0.7, model.shape) * rng.choice([-1, 1], 20_000)
  ref = np.concatenate([model + away.astype(np.float32), model])
  model = np.concatenate([model, model])

  @jax.vmap
  def kl(model, ref):
    one = jnp.ones((1, 1))
    batch = dict.fromkeys(("logp_old", "logp_sampler"), 0 * one)
    batch |= {"logp_ref": ref * one, "mask": one, "advantage": one}
    scores = policy.TokenScores(0 * one, model * one, 0 * one)
    return our_loss(scores, batch, options())[1]["kl"]

  found = np.asarray(kl(model, ref))
  apart = ref.astype(np.float64) - model
  exact = np.expm1(apart) - apart
  assert found.min() >= -1e-7
  np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-7)
  assert not found[20_000:].any()  # two equal models


def test_metrics_say_what_the_clip_stops_and_what_is_furthest_off():
  opts = options(clip_low=0.2, clip_high=0.3)
  ratio = np.array([[2.0, 0.5, 1.0, 1.25], [2.0, 0.5, 1.0, 5.0]], np.float32)
  mask = np.ones((2, 4), np.float32)
  mask[1, 3] = 0
  old = np.zeros((2, 4), np.float32)
  scores = policy.TokenScores(np.log(ratio), old, old)
  for of_rows, stopped in (
    ((1.0, 1.0), {(0, 0), (1, 0)}),
    ((-1.0, 1.0), {(0, 1), (1, 0)}),
    ((0.0, -1.0), {(1, 1)}),
    ((0.0, 0.0), set()),
  ):
    advantage = np.broadcast_to(np.float32(of_rows)[:, None], (2, 4))
    batch = {
      "logp_old": old,
      "logp_ref": old,
      "mask": mask,
      "logp_sampler": np.where(mask > 0, [0.1, -0.3, 0, 0.2], 9.0),
      "advantage": advantage,
    }
    (_, metrics), slopes = jax.value_and_grad(
      lambda s, b: our_loss(s, b, opts), has_aux=True
    )(scores, batch)
    # Those that have an advantage, and whose slope is gone nevertheless.
    has_one = (mask > 0) & (advantage != 0)
    flat = has_one & (np.asarray(slopes.logp) == 0)
    assert {(int(b), int(t)) for b, t in np.argwhere(flat)} == stopped
    assert metrics["clip_fraction"] == pytest.approx(len(stopped) / 7)
  assert metrics["tokens"] == 7
  assert metrics["ratio_off_max"] == pytest.approx(1.0, abs=1e-6)
  assert metrics["sampler_gap_max"] == pytest.approx(0.3, abs=1e-6)


@pytest.mark.parametrize("normalise", [True, False])
def test_advantages_do_not_see_shifts_of_rewards(normalise):
  rng = np.random.default_rng(0)
  rewards = rng.random(24)
  rewards[[3, 17]] = np.nan
  found = policy.group_advantages(rewards, 8, normalise=normalise)
  for shift in (-5.0, 1000.0):
    moved = policy.group_advantages(rewards + shift, 8, normalise=normalise)
    assert np.abs(moved - found).max() < 1e-5
  assert found[3] == found[17] == 0
  groups = found.reshape(3, 8)
  # Each group's mean, of those that have a reward, is 0.
  assert np.abs(groups.sum(axis=1)).max() < 1e-5
  if normalise:
    own = rewards[8:16]
    expected = (own - own.mean()) / (own.std() + 1e-4)
    assert np.abs(groups[1] - expected).max() < 1e-6


def test_advantages_are_zero_where_nothing_varies():
  rewards = np.array([0.3] * 4 + [np.nan] * 3 + [0.9])
  assert not policy.group_advantages(rewards, 4, normalise=True).any()
  with pytest.raises(ValueError, match="not groups of 3"):
    policy.group_advantages(rewards, 3, normalise=True)


@functools.cache
def some_hidden():
  rng = np.random.default_rng(3)
  width = ARCH.ar.hidden_size
  head = rng.normal(0, 1, (ARCH.ar.mm_vocab_size, width)).astype(np.float32)
  hidden = rng.normal(0, 0.5, (B, L, width)).astype(np.float32)
  codes = rng.integers(0, V, (B, L)).astype(np.int32)
  return {"mm_head": head}, hidden, codes


def some_support(codes):
  """bool[B, L, V] with about a tenth of the codes, and those drawn."""
  kept = np.random.default_rng(4).random((B, L, V)) < 0.1
  np.put_along_axis(kept, codes[..., None], True, axis=-1)
  return kept


@pytest.mark.parametrize("chunk", [2, L])
@pytest.mark.parametrize("filtered", [True, False])
def test_token_scores_and_gradients_are_those_of_float64(filtered, chunk):
  params, hidden, codes = some_hidden()
  kept = some_support(codes) if filtered else np.ones((B, L, V), bool)
  bits = np.packbits(kept, axis=-1) if filtered else None
  scores, back = jax.vjp(
    lambda params, hidden: policy.token_scores(
      params, hidden, codes, bits, ARCH.ar, temperature=0.7, chunk=chunk
    ),
    params,
    hidden,
  )
  head = params["mm_head"][:V].astype(np.float64)
  logits = hidden.astype(np.float64) @ head.T / 0.7

  def log_softmax(x):
    top = x.max(axis=-1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(axis=-1, keepdims=True))

  of_code = lambda x: np.take_along_axis(x, codes[..., None], -1)[..., 0]
  model = log_softmax(logits)
  with np.errstate(invalid="ignore"):
    within = log_softmax(np.where(kept, logits, -np.inf))
    entropy = -np.where(kept, np.exp(within) * within, 0).sum(axis=-1)
  # Logits are of size 10 in float32.
  assert np.abs(scores.logp - of_code(within)).max() < 2e-5
  assert np.abs(scores.logp_model - of_code(model)).max() < 2e-5
  assert np.abs(scores.entropy - entropy).max() < 2e-5

  # By hand: of a log-prob by logits it is "drawn" - p, of the entropy it is
  # -p (log p + entropy).
  weight = np.random.default_rng(5).normal(0, 1, (3, B, L)).astype(np.float32)
  by_params, by_hidden = back(policy.TokenScores(*weight))
  p, drawn = np.exp(within), np.eye(V)[codes]
  inner = np.where(kept, within, 0) + entropy[..., None]
  by_logits = weight[0, ..., None] * (drawn - p)
  by_logits += weight[1, ..., None] * (drawn - np.exp(model))
  by_logits = (by_logits - weight[2, ..., None] * p * inner) / 0.7
  np.testing.assert_allclose(by_hidden, by_logits @ head, atol=1e-4)
  expected = np.zeros(params["mm_head"].shape)
  expected[:V] = np.einsum("blv,bld->vd", by_logits, hidden)
  np.testing.assert_allclose(by_params["mm_head"], expected, atol=1e-4)


def test_head_gradient_of_bf16_chunks_is_summed_in_f32():
  """512 chunks that each add 1: in bf16 the sum would stop at 256."""
  length = 1024
  hidden = jnp.ones((1, length, 1), jnp.bfloat16)
  codes = jnp.zeros((1, length), jnp.int32)
  cfg = types.SimpleNamespace(image_vocab_size=2)
  total = lambda head: policy.token_scores(
    {"mm_head": head}, hidden, codes, None, cfg, temperature=1.0, chunk=2
  ).logp.sum()
  gradient = jax.grad(total)(jnp.zeros((2, 1), jnp.bfloat16))
  assert gradient[:, 0].tolist() == [512, -512]


def test_gradients_of_filtered_scores_are_finite_in_chunks():
  """A run's padding keeps no code at all."""
  params, hidden, codes = some_hidden()
  bits = np.packbits(some_support(codes), axis=-1)

  def total(params, hidden, chunk):
    scores = policy.token_scores(
      params, hidden, codes, bits, ARCH.ar, temperature=1.0, chunk=chunk
    )
    return sum(jnp.sum(x) for x in scores)

  slopes = [
    jax.grad(total, argnums=(0, 1))(params, hidden, chunk) for chunk in (2, L)
  ]
  for a, b in zip(*map(jax.tree.leaves, slopes), strict=True):
    assert np.isfinite(a).all()
    assert np.abs(a - b).max() < 1e-4  # sums in another order


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"group_size": 1}, "group_size is 1"),
    ({"cfg_scale": 2.0}, "only 1 can be scored"),
    ({"overlap": 2}, "overlap is 2"),
    ({"clip_low": 1.5}, "clip_low 1.5"),
    ({"aggregate": "mean"}, "aggregate is 'mean'"),
    ({"sizes": ((0, 48),)}, "sizes is "),
    ({"sizes": ((32,),)}, "sizes is "),
    ({"sizes": ()}, "sizes is "),
    ({"rollout_mesh": (("data", 0),)}, "rollout_mesh: data is 0"),
    ({"top_k": -1}, "top_k is -1"),
    ({"top_p": 1.5}, "top_p is 1.5"),
    ({"min_p": 1.0}, "min_p is 1.0"),
    ({"paint_cfg_scale": -1.0}, "paint_cfg_scale is -1.0"),
  ],
)
def test_bad_options_are_refused_on_one_line(changes, says):
  with pytest.raises(InputError, match=says) as e:
    options(**changes)
  assert "\n" not in str(e.value)
