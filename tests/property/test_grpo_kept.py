"""What a GRPO run keeps: its reference, and a rollout that waits.

A resumed run has the reference that it began with, and uses a rollout that
waits only if it is the one it would draw.
"""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tests import grpo_small
from tests.grpo_small import WANTED, settings, share_of
from tests.helpers import GOLDEN
from xomni_jax.errors import InputError
from xomni_jax.training import (
  build,
  configure,
  loop,
  rewarding,
  rollout,
  start,
)
from xomni_jax.training.stages import grpo_rows

codes_as_images = grpo_small.codes_as_images  # a fixture


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
  with pytest.raises(InputError, match=r"parameters \(ar, ref\) are others"):
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


def test_rollout_is_another_where_what_its_rows_depend_on_changed():
  def rewards(**changes):
    ocr = {"name": "ocr", "source": "local:ocr", "spaces": False}
    return repr(({**ocr, **changes},))

  def mark(number=0, prompts=("p",), **changes):
    config = settings(**{f"options__{k}": v for k, v in changes.items()})
    cfg, _ = configure.parse(config, "test")
    return grpo_rows.mark(cfg, number, prompts)

  others = [
    mark(1),
    mark(prompts=("q",)),
    *(
      mark(**{name: value})
      for name, value in (
        ("temperature", 0.5),
        ("min_p", 0.1),
        ("group_size", 4),
        ("paint_steps", 2),
        ("normalise", False),
        ("line_advantages", 0),
        ("rewards", rewards(weight=2.0)),
        ("rewards", rewards(spaces=True)),
        ("rewards", rewards(source="local:ocr:tesseract")),
        ("rewards", rewards(source="http://a:1")),
      )
    ),
  ]
  assert len({mark(), *others}) == 1 + len(others)
  # How the loss is made of it, in what parts, and where servers are.
  for name, value in (
    *(("beta", 0.5), ("clip_low", 0.1), ("loss_chunk", 8), ("paint_rows", 16)),
    ("rewards", rewards(threads=2)),
  ):
    assert mark(**{name: value}) == mark()
  assert mark(rewards=rewards(source="http://a:1")) == mark(
    rewards=rewards(source="http://b:1", spaces=True)
  )
