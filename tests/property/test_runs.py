"""Checkpoints of runs: exact, complete or passed over, never silently lost."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xomni_jax.checkpoints import manifest, run_config, runs
from xomni_jax.errors import InputError
from xomni_jax.train_config import CheckpointConfig

ROOT = pathlib.Path(__file__).parents[2]


def state(seed=0, size=64):
  """A state with every kind of container and of array that a run has."""
  bits = jax.random.bits(jax.random.key(seed), (size, 8), jnp.uint32)
  params = {
    # All bit patterns: NaNs with payloads, subnormals, infinities, -0.
    "ar": {"lm": {"kernel": jax.lax.bitcast_convert_type(bits, jnp.float32)}},
    "vae": jax.lax.bitcast_convert_type(bits.astype("uint16"), jnp.bfloat16),
  }
  moments = optax.adamw(1e-3).init({"w": jnp.ones((3, size)) * seed})
  return {
    "params": params,
    "optimizer": moments,
    "extra": (bits, [jnp.int32(-seed), {}], None),
  }


def abstract(tree):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )


def assert_same_bits(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved(folder, steps, **settings):
  """A folder with checkpoints of these steps; the seed is the step."""
  saver = runs.Runs(folder, CheckpointConfig(**settings))
  for step in steps:
    saver.save(step, state(step))
  saver.close()
  return runs.Runs(folder, CheckpointConfig(**settings))


def data_file(folder):
  """The file that holds most of a checkpoint."""
  files = [p for p in folder.rglob("*") if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def test_restored_state_equals_saved_one_in_every_bit(tmp_path):
  run = saved(tmp_path, [7])
  step, restored = run.restore(abstract(state(7)))
  assert step == 7
  assert_same_bits(restored, state(7))


def test_nothing_saved_restores_nothing(tmp_path):
  assert saved(tmp_path, []).restore(abstract(state())) is None


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
  run = runs.Runs(tmp_path, CheckpointConfig())
  overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  big = lambda: jax.random.normal(jax.random.key(1), (1 << 20,))
  x = big()
  run.save(1, {"x": x})
  for _ in range(5):
    x = overwrite(x)
  jax.block_until_ready(x)
  run.wait()
  assert_same_bits(run.restore(abstract({"x": x}))[1], {"x": big()})


def test_last_and_every_mth_checkpoint_stay(tmp_path):
  run = saved(tmp_path, range(1, 8), keep_last=2, keep_every=3)
  assert run.steps() == [3, 6, 7]
  assert {p.name for p in tmp_path.iterdir()} == {"3", "6", "7"}


@pytest.mark.parametrize(
  ("harm", "says"),
  [
    (flip, "has other bytes"),
    (lambda path: os.truncate(path, 100), "has another size"),
    (lambda path: path.unlink(), "is missing"),
  ],
)
def test_altered_checkpoint_is_passed_over_and_named(
  tmp_path, capsys, harm, says
):
  run = saved(tmp_path, [1, 2])
  path = data_file(tmp_path / "2")
  harm(path)
  step, restored = run.restore(abstract(state()))
  assert step == 1
  assert_same_bits(restored, state(1))
  line = f"checkpoint of step 2 passed over: {path} {says}\n"
  assert capsys.readouterr().out == line


def test_any_file_altered_or_missing_never_gives_other_values(tmp_path):
  saved(tmp_path / "good", [1, 2])
  names = [
    p.relative_to(tmp_path / "good/2")
    for p in (tmp_path / "good/2").rglob("*")
    if p.is_file()
  ]
  assert len(names) > 5
  for harm in (flip, pathlib.Path.unlink):
    for name in names:
      folder = shutil.copytree(tmp_path / "good", tmp_path / "bad")
      harm(folder / "2" / name)
      run = runs.Runs(folder, CheckpointConfig())
      step, restored = run.restore(abstract(state()))
      assert_same_bits(restored, state(step))
      shutil.rmtree(folder)


def test_checkpoint_without_manifest_is_passed_over(tmp_path, capsys):
  run = saved(tmp_path, [1, 2])
  (tmp_path / "2" / manifest.FILE).unlink()
  assert run.steps() == [1]
  assert run.restore(abstract(state()))[0] == 1
  assert "step 2 passed over: manifest.json is missing" in (
    capsys.readouterr().out
  )


def test_no_intact_checkpoint_is_an_error(tmp_path):
  run = saved(tmp_path, [1, 2])
  flip(data_file(tmp_path / "1"))
  (tmp_path / "2" / manifest.FILE).write_text("{}")
  with pytest.raises(InputError, match=r"intact \(steps 1, 2\)"):
    run.restore(abstract(state()))


def test_bad_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
  run = saved(tmp_path, [1, 2])
  flip(data_file(tmp_path / "2"))
  assert run.restore(abstract(state()))[0] == 1
  run.save(2, state(20))
  run.close()
  assert_same_bits(run.restore(abstract(state()))[1], state(20))


def test_bad_checkpoints_do_not_count_among_those_kept(tmp_path):
  run = saved(tmp_path, [1, 9], keep_last=2)
  flip(data_file(tmp_path / "9"))
  assert run.restore(abstract(state()))[0] == 1
  run.save(5, state(5))
  run.close()
  assert run.steps() == [1, 5]


def test_restored_step_is_not_written_again(tmp_path):
  run = saved(tmp_path, [3])
  run.restore(abstract(state()))
  before = (tmp_path / "3" / manifest.FILE).stat().st_mtime_ns
  run.save(3, state(0))
  run.close()
  assert (tmp_path / "3" / manifest.FILE).stat().st_mtime_ns == before
  assert_same_bits(run.restore(abstract(state()))[1], state(3))


def test_checkpoints_of_another_run_are_not_overwritten(tmp_path):
  run = saved(tmp_path, [3])
  with pytest.raises(InputError, match="has a checkpoint of step 3"):
    run.save(2, state())


def test_other_arrays_than_the_run_has_are_listed(tmp_path):
  run = saved(tmp_path, [1])
  other = abstract(state())
  del other["params"]["vae"]
  other["params"]["new"] = jax.ShapeDtypeStruct((2,), jnp.float32)
  other["extra"] = (
    jax.ShapeDtypeStruct((64, 8), jnp.int32),
    *other["extra"][1:],
  )
  with pytest.raises(InputError) as error:
    run.restore(other)
  text = str(error.value)
  assert "1 missing: params/new; 1 unused: params/vae;" in text
  assert "extra/0 uint32[64, 8] instead of int32[64, 8]" in text
  assert "\n" not in text


def child(code, *arguments):
  """Runs Python that has Runs and `state` at hand."""
  start = "import os, signal, sys, time; from tests.property.test_runs import *"
  return subprocess.run(
    [sys.executable, "-c", f"{start}\n{code}", *map(str, arguments)],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=120,
  )


@pytest.mark.parametrize("delay", [0, 0.05])
def test_kill_during_a_save_leaves_the_checkpoint_before(tmp_path, delay):
  killed = child(
    "run = runs.Runs(sys.argv[1], CheckpointConfig())\n"
    "run.save(1, state(1)); run.wait(); run.save(2, state(2, 1 << 20))\n"
    "time.sleep(float(sys.argv[2])); os.kill(os.getpid(), signal.SIGKILL)",
    tmp_path,
    delay,
  )
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  left = [p for p in tmp_path.iterdir() if not p.name.isdigit()]
  assert left  # the kill came in the middle
  run = runs.Runs(tmp_path, CheckpointConfig())
  step, restored = run.restore(abstract(state()))
  assert step == 1
  assert_same_bits(restored, state(1))
  run.save(2, state(2))
  run.close()
  assert {p.name for p in tmp_path.iterdir()} == {"1", "2"}


def test_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path):
  # No file may grow above this limit; as on a full disk, a write fails.
  result = child(
    "import resource\n"
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    "run = runs.Runs(sys.argv[1], CheckpointConfig())\n"
    "run.save(1, state(1)); run.wait()\n"
    "limit = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))\n"
    "for _ in range(2):\n"
    "  run.save(2, state(2, 1 << 16))\n"
    "  try: run.save(3, state(3))\n"
    "  except InputError as e: print(e)\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, limit)\n"
    "run.save(4, state(4)); run.close(); print(run.steps())",
    tmp_path,
  )
  assert result.returncode == 0, result.stderr
  line = (
    f"checkpoint of step 2 could not be written to {tmp_path}: File too large; "
    "make room there, earlier checkpoints are intact"
  )
  assert result.stdout.splitlines() == [line, line, "[1, 4]"]
  assert "ERROR" not in result.stderr  # Orbax's pages of tracebacks
  assert {p.name for p in tmp_path.iterdir()} == {"1", "4"}


@pytest.mark.parametrize(("place", "said"), [("orbax", False), ("mine", True)])
def test_errors_of_other_tasks_that_orbax_leaves_are_not_logged(
  tmp_path, place, said
):
  result = child(
    "import asyncio\n"
    "runs.Runs(sys.argv[1], CheckpointConfig()).close()\n"
    "code = 'async def fails(): raise OSError(27)'\n"
    "there = {}\n"
    "exec(compile(code, f'/lib/{sys.argv[2]}/io.py', 'exec'), there)\n"
    "async def main():\n"
    "  asyncio.ensure_future(there['fails']())\n"
    "  await asyncio.sleep(0.01)\n"
    "asyncio.run(main())",
    tmp_path,
    place,
  )
  assert result.returncode == 0, result.stderr
  assert ("Task exception was never retrieved" in result.stderr) == said


def test_full_file_system_is_one_line(tmp_path):
  mounted = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path],
    capture_output=True,
    check=False,
  )
  if mounted.returncode:
    pytest.skip("needs to mount a file system")
  try:
    run = runs.Runs(tmp_path / "run", CheckpointConfig())
    run.save(1, state(1))
    run.save(2, state(2, 1 << 16))
    with pytest.raises(InputError, match=r"step 2 .* No space left on device"):
      run.wait()
    assert run.restore(abstract(state()))[0] == 1
    run.close()
  finally:
    subprocess.run(["umount", tmp_path], check=True)


def test_changed_config_is_shown_and_refused_unless_allowed(tmp_path):
  old = {"steps": 3, "optim": {"lr": 1e-3, "betas": (0.9, 0.95)}, "mesh": []}
  new = {"steps": 3, "optim": {"lr": 3e-4, "betas": (0.9,)}, "seed": "ß"}
  assert run_config.check_config(tmp_path, old, allow=False) == []
  assert run_config.check_config(tmp_path, old, allow=False) == []
  changes = [
    "optim.lr: 0.001 -> 0.0003",
    "optim.betas.1: 0.95 -> (absent)",
    "mesh: [] -> (absent)",
    'seed: (absent) -> "ß"',
  ]
  with pytest.raises(InputError) as error:
    run_config.check_config(tmp_path, new, allow=False)
  assert "; ".join(changes) in str(error.value)
  assert "allow the change (--allow-config-change)" in str(error.value)
  assert run_config.check_config(tmp_path, new, allow=True) == changes
  assert run_config.check_config(tmp_path, new, allow=False) == []


def test_unreadable_config_is_an_error(tmp_path):
  run_config.save_config(tmp_path, {"steps": 3})
  flip(tmp_path / run_config.FILE)
  (tmp_path / run_config.FILE).write_text('{"steps"')
  with pytest.raises(InputError, match=r"config.json is unreadable"):
    run_config.check_config(tmp_path, {"steps": 3}, allow=True)
