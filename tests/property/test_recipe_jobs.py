"""What the recipe runs, without running it."""

import json

import pytest

from xomni_jax import recipe
from xomni_jax.errors import InputError


def _write(run, rows):
  run.mkdir(parents=True)
  lines = [json.dumps(row) for row in rows]
  (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_control_trains_for_as_long_as_reinforcement_learning(tmp_path):
  step = "time/step_seconds"
  # The first has compilation in it, which the median leaves out.
  sft = [(20, 2.5), (40, 0.5), (60, 0.5)]
  _write(tmp_path / "sft", [{"step": s, step: t} for s, t in sft])
  grpo = [{"step": 1, step: 5.0}, {"step": 2, "held_out/reward": 0.9}]
  _write(tmp_path / "rl", [*grpo, {"step": 3, step: 4.0}])
  job = recipe._control(tmp_path, tmp_path / "rl", 3)
  assert "--config.phases.2_all.steps=26" in job.argv  # 13 s of 0.5 s each
  assert "--config.seed=1003" in job.argv
  assert job.argv.count("--workdir=runs/control") == 1
  starts = [a for a in job.argv if "init.model" in a]
  assert starts == [f"--config.init.model={tmp_path}/sft/model"]
  assert not any(a == "--workdir=runs/sft" for a in job.argv)


def test_base_leaves_reinforcement_learning_alone(tmp_path):
  (job,) = recipe.jobs(quick=False, seed=2, base=tmp_path)
  assert job.name == "grpo"
  assert "--workdir=runs/grpo" in job.argv
  assert f"--config.init.model={tmp_path}/sft/model" in job.argv
  assert f"--config.init.flux={tmp_path}/decoder/flux1" in job.argv
  assert "--config.seed=2" in job.argv


def test_base_without_a_model_is_refused(tmp_path):
  base = tmp_path / "runs"
  (base / "sft" / "model").mkdir(parents=True)
  (base / "codes").mkdir()
  out = tmp_path / "out"
  with pytest.raises(InputError, match="has no decoder/flux1"):
    recipe.main(["--base", str(base), "--out", str(out)])
  assert not out.exists()
