"""What the recipe runs, without running it."""

import json

from xomni_jax import recipe


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
  _write(tmp_path / "grpo", [*grpo, {"step": 3, step: 4.0}])
  job = recipe._control(tmp_path, 3)
  assert "--config.phases.2_all.steps=26" in job.argv  # 13 s of 0.5 s each
  assert "--config.seed=1003" in job.argv
  assert job.argv.count("--workdir=runs/control") == 1
  starts = [a for a in job.argv if "init.model" in a]
  assert starts == ["--config.init.model=runs/sft/model"]
  assert not any(a == "--workdir=runs/sft" for a in job.argv)
