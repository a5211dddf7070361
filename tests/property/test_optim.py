"""AdamW over phases: groups of their own, against optax and float64 sums."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train_configs import train_config
from xomni_jax import mesh as mesh_lib
from xomni_jax.errors import InputError
from xomni_jax.params import Row
from xomni_jax.train_config import OptimConfig, Phase
from xomni_jax.training import layout as layout_lib
from xomni_jax.training import optim
from xomni_jax.training import step as step_lib
from xomni_jax.training.stage import Part, Program

SHAPES = {
  "a/kernel": (3, 4),
  "a/bias": (4,),
  "b/kernel": (4, 2),
  "b/scale": (2,),
  "c/kernel": (5,),
  "d/kernel": (2, 2),
}
# a always trains, b from the second phase on, c in the second alone, d never.
PHASES = (
  Phase("one", 4, ("m/a/",)),
  Phase("two", 3, ("m/[abc]/",)),
  Phase("three", 3, ("m/",), freeze=("m/[cd]/",)),
)
CFG = OptimConfig(lr=1e-2, weight_decay=0.1, clip_norm=0.0)
# Float32 has 6e-8; powers of the betas and the roots lose some of it, and lr
# times a step of about 1 is the scale of all changes.
CLOSE = {"rtol": 2e-6, "atol": 2e-7}


def part():
  layout = lambda shape: " ".join("xyz"[: len(shape)])
  rows = [
    Row(path, path, f"{layout(shape)} -> {layout(shape)}")
    for path, shape in SHAPES.items()
  ]
  tree = {
    path: jax.ShapeDtypeStruct(shape, jnp.float32)
    for path, shape in SHAPES.items()
  }
  return Part(rows, layout_lib.nest(tree))


def make_layout(phases=PHASES):
  return layout_lib.make_layout(
    {"m": part()}, phases, mesh_lib.make_mesh(), "float32"
  )


def draw(seed, paths=None):
  rng = np.random.default_rng(seed)
  out = {
    f"m/{path}": rng.standard_normal(shape, np.float32)
    for path, shape in SHAPES.items()
  }
  return {k: v for k, v in out.items() if paths is None or k in paths}


def run(cfg, layout, phases=PHASES):
  """Parameters and states before each step and after the last, and rates."""
  params = draw(0, layout.trained)
  state = optim.init(cfg, layout, params)
  history, step = [(params, state)], 0
  rates = []
  for i, phase in enumerate(phases):
    for _ in range(phase.steps):
      rates.append(cfg.lr * (1 + step % 3))
      step += 1
      params, state, _ = optim.update(
        cfg, layout, i, draw(step, layout.active[i]), state, params, rates[-1]
      )
      history.append((params, state))
  return history, rates


def alone(cfg, paths, steps, rates):
  """optax.adamw on these paths alone, in these steps alone, from the start."""
  params = draw(0, paths)
  decays = {p: not p.endswith(("bias", "scale")) for p in paths}
  make = optax.inject_hyperparams(
    optax.adamw, static_args=("b1", "b2", "eps", "mask")
  )
  adamw = make(
    learning_rate=1.0,
    b1=cfg.b1,
    b2=cfg.b2,
    eps=cfg.eps,
    weight_decay=cfg.weight_decay,
    mask=decays,
  )
  state = adamw.init(params)
  for step in steps:
    state.hyperparams["learning_rate"] = jnp.float32(rates[step - 1])
    updates, state = adamw.update(draw(step, paths), state, params)
    params = optax.apply_updates(params, updates)
  return params


def test_muon_leaves_the_rest_to_adamw():
  layout = make_layout()
  cfg = dataclasses.replace(CFG, muon=("m/a/kernel",))
  history, rates = run(cfg, layout)
  assert set(history[0][1]) == {"0+1+2", "0+1+2/muon", "1+2", "1"}
  wanted = alone(CFG, ("m/a/bias",), range(1, 11), rates)
  np.testing.assert_allclose(
    history[-1][0]["m/a/bias"], wanted["m/a/bias"], **CLOSE
  )
  with pytest.raises(
    InputError, match=r"optim\.muon matches c/kernel, which has 1 "
  ):
    run(dataclasses.replace(CFG, muon=(".*kernel",)), layout)


def test_groups_are_parameters_that_train_in_the_same_phases():
  layout = make_layout()
  assert layout.groups() == {
    "0+1+2": ["m/a/bias", "m/a/kernel"],
    "1+2": ["m/b/kernel", "m/b/scale"],
    "1": ["m/c/kernel"],
  }
  assert layout.frozen == ["m/d/kernel"]


@pytest.mark.parametrize(
  ("paths", "steps"),
  [
    # Its moments go on over both boundaries.
    (("m/a/kernel", "m/a/bias"), range(1, 11)),
    # From zero where it is unfrozen, bias correction and all.
    (("m/b/kernel", "m/b/scale"), range(5, 11)),
    (("m/c/kernel",), range(5, 8)),
  ],
)
def test_each_group_is_as_adamw_alone_on_the_steps_it_trains(paths, steps):
  history, rates = run(CFG, make_layout())
  wanted = alone(CFG, paths, steps, rates)
  for path in paths:
    np.testing.assert_allclose(history[-1][0][path], wanted[path], **CLOSE)


def test_frozen_parameters_and_moments_stay_in_every_bit():
  history, _ = run(CFG, make_layout())
  first = draw(0)
  same = lambda a, b: all(
    np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )
  for step in range(5):  # phase one
    params, state = history[step]
    for path in ("m/b/kernel", "m/b/scale", "m/c/kernel"):
      assert same(params[path], first[path])
    assert not any(np.any(x) for x in jax.tree.leaves(state["1"]))
  for step in range(7, 11):  # c is frozen again
    assert same(history[step][0]["m/c/kernel"], history[7][0]["m/c/kernel"])
    assert same(history[step][1]["1"], history[7][1]["1"])
  assert not same(history[5][0]["m/c/kernel"], history[7][0]["m/c/kernel"])


def test_weight_decay_leaves_biases_and_scales_alone():
  layout = make_layout((Phase("all", 1, ("m/",)),))
  params = draw(0)
  zero = {path: np.zeros_like(x) for path, x in params.items()}
  after, _, norm = optim.update(
    CFG, layout, 0, zero, optim.init(CFG, layout, params), params, 0.5
  )
  assert norm == 0
  for path, x in params.items():
    kept = 1.0 if path.endswith(("bias", "scale")) else 1 - 0.5 * 0.1
    np.testing.assert_allclose(after[path], x * np.float32(kept), rtol=2e-7)


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e3])
def test_gradients_are_clipped_by_their_norm_over_all_groups(clip):
  layout, params = make_layout(), draw(0, make_layout().trained)
  # Beta 0: the moment is the clipped gradient itself.
  cfg = OptimConfig(lr=1.0, b1=0.0, clip_norm=clip)
  grads = draw(1, layout.trained)
  _, state, norm = optim.update(
    cfg, layout, 1, grads, optim.init(cfg, layout, params), params, 1e-3
  )
  exact = np.sqrt(
    sum((x.astype(np.float64) ** 2).sum() for x in grads.values())
  )
  np.testing.assert_allclose(norm, exact, rtol=1e-6)
  scale = min(1.0, clip / exact) if clip else 1.0
  for label, paths in layout.groups().items():
    for path in paths:
      np.testing.assert_allclose(
        state[label][0].mu[path], grads[path] * scale, rtol=1e-6
      )


def test_rates_rise_to_the_peak_and_fall_as_told():
  values = lambda **more: [
    optim.rate(Phase("p", 10, ("m/",), lr_scale=0.5, **more), 4.0, i)
    for i in range(11)
  ]
  # Peak 2; optax computes in float32.
  near = lambda *x: pytest.approx(x, rel=1e-6, abs=1e-6)
  warm = values(warmup_steps=4)
  assert warm == near(0.5, 1.0, 1.5, *[2.0] * 8)
  assert values() == near(*[2.0] * 11)
  assert values(decay="linear") == near(*np.linspace(2, 0, 11))
  line = values(decay="linear", warmup_steps=5, end_scale=0.1)
  assert line[4:] == near(2.0, *np.linspace(2, 0.2, 6))
  wave = values(decay="cosine", end_scale=0.2)
  exact = 0.4 + 1.6 * (1 + np.cos(np.pi * np.arange(11) / 10)) / 2
  assert wave == near(*exact)


def toy(accumulate=1, ema=0.0):
  """A linear model of 8 rows, some of them masked, as a stage would be."""
  width = 3

  def residuals(params, batch):
    flat = layout_lib.flatten(params)
    hidden = jnp.tanh(batch["x"] @ flat["m/a/kernel"] + flat["m/a/bias"])
    out = hidden @ flat["m/b/kernel"] * flat["m/b/scale"]
    return jnp.sum((out - batch["y"]) ** 2, -1) * batch["real"]

  def loss(params, batch, context):
    errors = residuals(params, batch)
    value = jnp.sum(errors) / jnp.maximum(context.totals["rows"], 1)
    return value, {"error": value, "error_max": jnp.max(errors)}

  program = Program(
    parts={"m": part()},
    init=lambda key: None,
    totals=lambda batch: {"rows": jnp.sum(batch["real"])},
    loss=loss,
    batch={},
    tokens=0,
    flops=0.0,
  )
  cfg = train_config(
    4,
    "m/[ab]/",
    optim=OptimConfig(
      lr=1e-2, weight_decay=0.1, accumulate=accumulate, ema=ema
    ),
  )
  rng = np.random.default_rng(5)
  batches = [
    {
      "x": rng.standard_normal((8, width), np.float32),
      "y": rng.standard_normal((8, 2), np.float32),
      "real": np.array([1, 1, 0, 1, 1, 0, 0, 0], np.float32),
    }
    for _ in range(4)
  ]
  return cfg, program, batches


def trained(cfg, program, batches):
  """States before each step and after the last, on the host."""
  mesh = mesh_lib.make_mesh()
  layout = layout_lib.make_layout(program.parts, cfg.phases, mesh, "float32")
  flat = draw(0)
  with jax.set_mesh(mesh):
    params = {path: jnp.asarray(flat[path]) for path in layout.trained}
    frozen = {path: jnp.asarray(flat[path]) for path in layout.frozen}
    state = step_lib.init_state(cfg, program, layout, params)
    step = step_lib.train_step(cfg, program, layout, 0)
    history, reports = [jax.device_get(state)], []
    for rows in batches:
      state, report = step(
        state,
        frozen,
        step_lib.place_batch(rows, mesh),
        jax.random.key(0),
        np.float32(cfg.optim.lr),
      )
      history.append(jax.device_get(state))
      reports.append(jax.device_get(report))
  return history, reports


def test_average_of_parameters_is_exponential():
  history, _ = trained(*toy(ema=0.75))
  exact = {k: v.astype(np.float64) for k, v in history[0]["params"].items()}
  for state in history[1:]:
    exact = {
      k: 0.75 * v + 0.25 * state["params"][k].astype(np.float64)
      for k, v in exact.items()
    }
    for path, x in exact.items():
      np.testing.assert_allclose(state["ema"][path], x, rtol=1e-6, atol=1e-7)
  assert trained(*toy())[0][-1]["ema"] == {}


def test_four_microbatches_are_as_one_batch():
  # One of the four has no row that counts, others one or two.
  once, one = trained(*toy())
  often, four = trained(*toy(accumulate=4))
  for a, b in zip(one, four, strict=True):
    for name in ("loss", "error", "error_max", "grad_norm"):
      np.testing.assert_allclose(a[name], b[name], rtol=1e-6)
  for path, x in once[-1]["params"].items():
    # Four steps of Adam, of 0.01 each.
    np.testing.assert_allclose(
      often[-1]["params"][path], x, rtol=1e-6, atol=1e-6
    )


def test_step_without_a_row_that_counts_moves_nothing():
  """Momentum and weight decay of the steps before would."""
  cfg, program, batches = toy(accumulate=2)
  nothing = {**batches[1], "real": np.zeros(8, np.float32)}
  history, reports = trained(cfg, program, [batches[0], nothing, batches[2]])
  assert int(history[2]["step"]) == 2 and reports[1]["grad_norm"] == 0
  for part in ("params", "optim"):
    for a, b in zip(
      *(jax.tree.leaves(state[part]) for state in history[1:3]), strict=True
    ):
      np.testing.assert_array_equal(a, b)
  assert any(
    (history[3]["params"][path] != x).any()
    for path, x in history[2]["params"].items()
  )
