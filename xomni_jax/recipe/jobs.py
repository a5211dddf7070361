"""What the recipe runs: its stages in order, each with its settings."""

import json
import pathlib
import statistics
from typing import NamedTuple

from xomni_jax.inference import shipped

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
# Of images that become codes, of each level: {split: (whole, quick)}.
_CODES = {
  "signs": {"train": (20_000, 2_000), "validation": (1_000, 100)},
  "posters": {"train": (10_000, 300), "validation": (500, 50)},
}
_SHARD = 1024
# Where a stage starts: {setting: what another stage left}.
STARTS = {
  "vae": {},
  "tokenizer": {},
  "decoder": {"model": "tokenizer/model", "flux": "vae/model"},
  "pretrain": {"model": "decoder/model"},
  "sft": {"model": "pretrain/model"},
  "grpo": {"model": "sft/model", "flux": "decoder/flux1"},
}
# {stage: settings} that make it a try of half a minute: losses fall, no more.
# Signs alone: programs are compiled for one size.
_SIGNS = "{}.sources=({{'path': 'world:signs:{}', 'task': '{}'}},)"
_QUICK_DATA = (
  _SIGNS.format("data", "train", "image"),
  _SIGNS.format("eval_data", "validation", "image"),
)
_QUICK = {
  "vae": (
    *_QUICK_DATA,
    "phases.1_crops.steps=130",
    "phases.2_whole.steps=10",
    "phases.2_whole.warmup_steps=0",
  ),
  "tokenizer": (
    *_QUICK_DATA,
    "phases.1_signs.steps=140",
    "phases.2_all.steps=20",
    "phases.2_all.warmup_steps=5",
    "options.quantise_from=90",
    "options.revive_until=130",
  ),
  "decoder": (*_QUICK_DATA, "phases.1_all.steps=80"),
  "pretrain": (
    "phases.1_vision.steps=20",
    "phases.2_read.steps=10",
    "phases.2_read.warmup_steps=5",
    "phases.3_draw.steps=60",
    "phases.4_posters.steps=10",
    "phases.5_all.steps=20",
    "phases.6_anneal.steps=10",
  ),
  "sft": (
    "phases.1_answer.steps=10",
    "phases.1_answer.warmup_steps=0",
    "phases.2_all.steps=20",
  ),
  "grpo": (
    _SIGNS.format("data", "train", "prompt"),
    _SIGNS.format("eval_data", "validation", "prompt"),
    "options.sizes=((96, 96),)",
    "options.prompt_len=32",
    "phases.1_all.steps=2",
    "phases.1_all.warmup_steps=0",
  ),
}
_RL = ("grpo",)  # what --base leaves to be trained
SHIPPED = shipped.NAMES[1]  # the --base that comes with the package
_TIMED = 200  # steps of fine-tuning that tell how long one takes
_ALIKE = 20  # steps that have about the same mix of sizes
_CONTROL_SEED = 1000  # added: other records, in another order, than before


class Wanted(NamedTuple):
  """Which recipe: what a folder of runs is of.

  Attributes:
    quick: minutes, to see that all of it runs.
    seed: of every stage.
    base: runs/ whose models before reinforcement learning are taken; SHIPPED:
      those of the package; None: they are made here.
    rl_steps: of reinforcement learning; None: as its config says.
  """

  quick: bool = False
  seed: int = 0
  base: pathlib.Path | str | None = None
  rl_steps: int | None = None


class Job(NamedTuple):
  """A process of the recipe.

  Attributes:
    name: of it.
    argv: arguments of `xomni`.
    leaves: what is under runs/ when it is done.
  """

  name: str
  argv: tuple[str, ...]
  leaves: str


def in_order(wanted: Wanted, with_control: bool = False) -> list[Job]:
  """What is run, in order, up to the model after reinforcement learning.

  Args:
    with_control: what the control needs besides is made too.
  """
  if wanted.base:
    found = [_stage(stage, wanted) for stage in _RL]
    if with_control and wanted.base == SHIPPED:
      found += _codes(wanted, SHIPPED)
    if with_control:
      found.append(_timing(wanted))
    return found
  found = []
  for stage in STARTS:
    if stage == "pretrain":
      found += _codes(wanted, "runs/tokenizer/model")
    found.append(_stage(stage, wanted))
  return found


def _codes(wanted: Wanted, model: str) -> list[Job]:
  """Images of the drawn world as codes of a model."""
  return [
    _codes_of(level, split, counts[wanted.quick], model)
    for level, splits in _CODES.items()
    for split, counts in splits.items()
  ]


def _codes_of(level, split, count, model):
  out = f"codes/{level}/{split}"
  shards = -(-count // _SHARD)
  return Job(
    f"codes of {level}, {split}",
    ("tokenize-dataset", "--model", model,
     "--source", f"world:{level}:{split}", "--count", str(count),
     "--shard-size", str(_SHARD), "--out", f"runs/{out}"),
    # Shards are made in order, each whole or not at all.
    f"{out}/codes-{shards - 1:05d}-of-{shards:05d}.array_record",
  )  # fmt: skip


def _timing(wanted: Wanted) -> Job:
  """A little fine-tuning: how long a step takes here is not known of a base
  that was made elsewhere."""
  job = _stage("sft", wanted._replace(quick=False))
  model = left_by(wanted, pathlib.Path("runs"), "sft/model")
  return _tuning(job, "timing", model, _TIMED)


def control(wanted: Wanted, runs: pathlib.Path) -> Job:
  """Fine-tuning that goes on for as long as reinforcement learning took.

  The time of both is that of their steps, of GRPO's with drawing, painting and
  rewards in it. The rate falls over the whole of it, as in the stage `sft`.

  Args:
    wanted: the recipe; both start from the same model.
    runs: folder of its runs.
  """
  timed = runs / ("timing" if wanted.base else "sft")
  learned, each = _seconds(runs / "grpo"), _seconds(timed)
  steps = max(1, round(len(learned) * _usual(learned) / _usual(each)))
  job = _stage("sft", Wanted(seed=wanted.seed + _CONTROL_SEED))
  return _tuning(job, "control", left_by(wanted, runs, "sft/model"), steps)


def _tuning(job: Job, name: str, model: str | pathlib.Path, steps: int) -> Job:
  """The stage `sft` from another model, for so many steps."""
  replaced = ("--workdir=", "--config.init.model=")
  return Job(
    name,
    (
      *(a for a in job.argv if not a.startswith(replaced)),
      f"--workdir=runs/{name}",
      f"--config.init.model={model}",
      # Drawing is compared, not answering; a phase has a step at least.
      "--config.phases.1_answer.steps=1",
      "--config.phases.1_answer.warmup_steps=0",
      f"--config.phases.2_all.steps={steps}",
    ),
    f"{name}/model",
  )


def _usual(seconds: list[float]) -> float:
  """Of a step, without compilation: the median over runs of _ALIKE steps.

  Single steps would not do: those of posters take twice as long as of signs.
  """
  runs = [seconds[i : i + _ALIKE] for i in range(0, len(seconds), _ALIKE)]
  whole = [statistics.mean(run) for run in runs if len(run) == _ALIKE]
  # The first is slow in all runs: programs are compiled in it.
  rest = seconds[_ALIKE:] or seconds
  return statistics.median(whole[1:] or [statistics.mean(rest)])


def _seconds(run: pathlib.Path) -> list[float]:
  """Of each step of a run; those between two lines of its log are alike."""
  found, before = [], 0
  for line in (run / "metrics.jsonl").read_text().splitlines():
    row = json.loads(line)
    if "time/step_seconds" in row:
      found += [row["time/step_seconds"]] * (row["step"] - before)
      before = row["step"]
  return found


def _stage(stage: str, wanted: Wanted) -> Job:
  settings = [
    f"init.{name}={left_by(wanted, pathlib.Path('runs'), left)}"
    for name, left in STARTS[stage].items()
  ]
  settings.append(f"seed={wanted.seed}")
  if wanted.quick:
    steps = [s for s in _QUICK[stage] if ".steps=" in s]
    total = sum(int(s.rpartition("=")[2]) for s in steps)
    settings += _QUICK[stage]
    settings += [
      f"{name}={total}"
      for name in (
        "report.eval_every",
        "report.preview_every",
        "checkpoint.every",
      )
    ]
  if stage in _RL and wanted.rl_steps:
    settings += [
      f"phases.1_all.steps={wanted.rl_steps}",
      f"phases.1_all.warmup_steps={min(5, wanted.rl_steps // 2)}",
    ]
  return Job(
    stage,
    (
      "train",
      f"--config={CONFIGS}/{stage}.py:tiny",
      f"--workdir=runs/{stage}",
      "--cpu-devices=auto",
      *(f"--config.{setting}" for setting in settings),
    ),
    f"{stage}/model",
  )


def left_by(
  wanted: Wanted, runs: pathlib.Path, left: str
) -> pathlib.Path | str:
  """What a stage before reinforcement learning left, or the package has."""
  if wanted.base == SHIPPED:
    return SHIPPED
  return pathlib.Path(wanted.base or runs) / left
