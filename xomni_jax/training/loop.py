"""The training loop, the only one: all stages run through it.

Everything a step needs is a function of the config and the step's number: its
batch, its randomness, its phase. So the state of a run is the arrays of
`step.State` and nothing else, and a killed run goes on as if it had not been.
"""

import pathlib
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from xomni_jax import mesh as mesh_lib
from xomni_jax.checkpoints import run_config
from xomni_jax.checkpoints import runs as runs_lib
from xomni_jax.data.pipeline import BadRecords
from xomni_jax.errors import InputError, RunError
from xomni_jax.inference import sheets
from xomni_jax.train_config import TrainConfig
from xomni_jax.training import log as log_lib
from xomni_jax.training import optim, pictures, start
from xomni_jax.training import step as step_lib
from xomni_jax.training.layout import flatten, make_layout, nest
from xomni_jax.training.meter import Meter, start_profile
from xomni_jax.training.preemption import EXIT_PREEMPTED, Preemption
from xomni_jax.training.stage import Stage
from xomni_jax.training.workdir import EXPORTED, MODEL

# Keys of a run: parameters, steps, held-out batches. A step's key is folded
# from the second with its number.
_INIT, _STEPS, _HELD_OUT = range(3)


def train(
  cfg: TrainConfig,
  stage: Stage,
  workdir: str | pathlib.Path,
  *,
  settings: Mapping[str, Any],
  resume: bool = True,
  allow_config_change: bool = False,
) -> int:
  """Runs a stage to its end, or until it is told to stop.

  Args:
    cfg: of the run.
    stage: what differs.
    workdir: of the run: checkpoints, metrics, pictures, the exported model.
    settings: the config as a nested mapping, kept beside the checkpoints.
    resume: go on from the newest good checkpoint; False: there must be none.
    allow_config_change: go on though `settings`, or parameters that are read
      from their files, have changed.
  Returns:
    exit status: 0 when the run is done, 143 when it was stopped and saved.
  Raises:
    InputError: config, data or checkpoints do not fit.
    RunError: the loss is no longer finite, or too many scores failed.
  """
  workdir = pathlib.Path(workdir)
  mesh = mesh_lib.make_mesh(**mesh_lib.fill(dict(cfg.mesh), jax.device_count()))
  step_lib.check_devices(cfg, mesh)
  layout = make_layout(stage.program.parts, cfg.phases, mesh, cfg.frozen_dtype)
  folder = workdir / "checkpoints"
  runs = runs_lib.Runs(folder, cfg.checkpoint)
  if runs.steps() and not resume:
    raise InputError(
      f"{folder}: holds checkpoints of steps {runs.steps()}; resume them, or "
      "name another --workdir"
    )
  # A config that failed at once may be mended.
  may_change = allow_config_change or not run_config.has_made(workdir)
  if run_config.check_config(folder, settings, may_change):
    (workdir / EXPORTED).unlink(missing_ok=True)  # it was of the old one
  log = log_lib.Log(workdir, jax.process_index() == 0)
  try:
    with jax.set_mesh(mesh), Preemption() as preemption:
      run = _Run(
        *(cfg, stage, layout, runs, log, workdir, settings),
        allow_config_change,
      )
      return run.go(preemption)
  finally:
    try:
      runs.close()  # a checkpoint on its way is worth waiting for
    finally:
      stage.close()
      log.close()


def _complain(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


class _Run:
  """One process's view of a run; its arrays are in `state` and `frozen`."""

  def __init__(self, cfg, stage, layout, runs, log, workdir, settings, allow):
    self.cfg, self.stage, self.layout = cfg, stage, layout
    self.runs, self.log, self.workdir = runs, log, workdir
    key = jax.random.key(cfg.seed)
    self.init_key = jax.random.fold_in(key, _INIT)
    self.step_key = jax.random.fold_in(key, _STEPS)
    self.held_out_key = jax.random.fold_in(key, _HELD_OUT)
    self.state, self.frozen = start.begin(
      cfg, stage, layout, self.init_key, runs, allow
    )
    self.step = int(self.state["step"])
    log.cut(self.step)
    log.line(
      log_lib.start_report(
        settings,
        layout.mesh,
        nest({**self.state["params"], **self.frozen}),
        set(layout.trained).__contains__,
        {k: v for k, v in self.state.items() if k not in ("params", "step")},
        workdir,
      )
    )
    if self.step:
      log.line(f"resumed at step {self.step} of {cfg.steps}")
    # Each process sees records of its own, and only the first one logs.
    say = log.line if jax.process_index() == 0 else _complain
    self.bad = BadRecords(cfg.data.max_bad_rate, say)
    self.uncounted = np.zeros(2, np.int64)  # records: bad, good
    self.profiling = False
    self.pending: dict[str, Any] | None = None
    self.compiled: dict[frozenset[str], Any] = {}
    self.meter = Meter(cfg, stage, layout, self.step)
    self.evaluate = step_lib.eval_step(cfg, stage.program, layout)
    self.measure = stage.program.measure and step_lib.rows_step(
      cfg, layout, stage.program.measure
    )

  def go(self, preemption: Preemption) -> int:
    """Trains what is left; returns the exit status."""
    if self.step and not self._is_evaluated():  # it ended before it got there
      self._evaluate()
    while self.step < self.cfg.steps:
      phase, first = self.cfg.phase_at(self.step)
      if self._phase(phase, first, preemption):
        self.runs.wait()  # or it would not be true yet
        self.log.line(
          f"stopped at step {self.step} of {self.cfg.steps}, saved; start "
          f"again to go on (exit status {EXIT_PREEMPTED})"
        )
        self._profile(over=True)
        return EXIT_PREEMPTED
    self._profile(over=True)
    self.runs.wait()
    self._export()
    self.log.line(f"done: {self.cfg.steps} steps")
    return 0

  def _phase(self, phase: int, first: int, preemption: Preemption) -> bool:
    """Trains a phase to its end; True: stopped and saved before."""
    cfg, end = self.cfg, first + self.cfg.phases[phase].steps
    train_step = self._step(phase)
    batches = self.stage.batches and self.stage.batches(phase)
    rows_of = batches and batches.iterate(self.step - first)
    try:
      while self.step < end:
        self._prepare(batches)
        self._profile()
        if self.stage.collect:  # draws from no parameters that are no good
          self._read()
        with self.meter.waiting():
          batch, made = self._next(rows_of)
        lr = optim.rate(cfg.phases[phase], cfg.optim.lr, self.step - first)
        self.state, metrics = train_step(
          self.state, self.frozen, batch, self.step_key, np.float32(lr)
        )
        # The step before is read only now, while the device is busy.
        self._read()
        self.step += 1
        self.pending = {**metrics, **made}
        stop = preemption.should_stop(self.step)
        if stop or self.step % cfg.checkpoint.every == 0 or (
          self.step == cfg.steps
        ):  # fmt: skip
          self._read()
          self.runs.save(self.step, self.state)
        if stop and self.step < cfg.steps:
          return True
        # Last: it may take longer than a machine that is taken away has left.
        self._evaluate()
        self._preview()
    finally:
      if rows_of:
        rows_of.close()
    return False

  def _next(self, rows_of) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The global batch of a step, and metrics of how it was made."""
    if self.stage.collect is None:
      rows = next(rows_of)
      self._count(rows)
      return step_lib.place_batch(rows.arrays, self.layout.mesh), {}
    rows, self.state["extra"], made = self.stage.collect(
      self._measured, self._params(), self.state["extra"], self.step
    )
    return step_lib.place_whole(rows, self.layout.mesh), made

  def _measured(self, rows):
    """What the program measures of rows under the present parameters."""
    batch = step_lib.place_whole(rows, self.layout.mesh)
    return self.measure({**self.state["params"], **self.frozen}, batch)

  def _count(self, rows) -> None:
    """Bad records stop a run, at once if there is one process."""
    self.bad.show(rows.bad)
    self.uncounted += len(rows.bad), rows.good
    if jax.process_count() == 1:
      self._judge_records()

  def _judge_records(self) -> None:
    """Of all processes together, or one would stop and the others wait."""
    counts, self.uncounted = self.uncounted, np.zeros(2, np.int64)
    if jax.process_count() > 1:
      counts = multihost_utils.process_allgather(counts).sum(axis=0)
    self.bad.count(*map(int, counts))

  def _step(self, phase: int):
    """The compiled step; phases that train the same share it."""
    active = self.layout.active[phase]
    if active not in self.compiled:
      self.compiled[active] = step_lib.train_step(
        self.cfg, self.stage.program, self.layout, phase
      )
    return self.compiled[active]

  def _read(self) -> None:
    """Looks at the last step's metrics, if nobody has; raises RunError."""
    if self.pending is None:
      return
    metrics, self.pending = jax.device_get(self.pending), None
    wrong = [
      name
      for name in ("loss", "grad_norm", "param_norm")
      if not np.isfinite(metrics[name]).all()
    ]
    if wrong or self._is_logged(self.step):
      self._judge_records()
      name = self.cfg.phases[self.cfg.phase_at(self.step - 1)[0]].name
      self._log(metrics, name)
    if wrong:
      kept = self.runs.steps()
      raise RunError(
        f"step {self.step}: {' and '.join(wrong)} not finite "
        f"({', '.join(str(metrics[n]) for n in wrong)}); stopped, the newest "
        f"checkpoint is of step {kept[-1] if kept else 'none'}; lower the "
        "learning rate or look at the data of this step"
      )

  def _is_logged(self, step: int) -> bool:
    every, of_rollout = self.cfg.report.log_every, self.stage.collected_steps
    # Metrics of a rollout come with its first step: that is logged where any
    # step of the rollout is.
    ahead = of_rollout if (step - 1) % of_rollout == 0 else 1
    steps = range(step, step + ahead)
    return any(s % every == 0 or s == self.cfg.steps for s in steps)

  def _log(self, metrics, phase):
    values = {
      f"{self.cfg.stage}/{n}" if "/" not in n else n: float(v)
      for n, v in metrics.items()
    }
    speed = self.meter.read(self.step)
    self.log.scalars(self.step, {**values, **speed.scalars})
    hidden = ("/lr", "/param_norm")
    shown = {n: v for n, v in values.items() if not n.endswith(hidden)}
    self.log.line(
      log_lib.progress_line(
        self.step,
        self.cfg.steps,
        phase,
        shown,
        seconds=speed.seconds,
        wait=speed.wait,
        tokens=self.stage.program.tokens,
        flops=self.stage.program.flops,
        devices=self.layout.mesh.size,
        peak=self.meter.peak,
      )
    )

  def _is_due(self, every: int) -> bool:
    at_end = self.step == self.cfg.steps
    return bool(every) and (self.step % every == 0 or at_end)

  def _is_evaluated(self) -> bool:
    """Whether the log has held-out metrics of this step, as process 0 has it.

    A run that is stopped or killed may have a checkpoint of a step without.
    """
    found = any(
      line["step"] == self.step and any(n.startswith("held_out/") for n in line)
      for line in self.log.metrics()
    )
    return bool(runs_lib.of_main(found))

  def _evaluate(self) -> None:
    """Held-out metrics, where they are due."""
    evaluate = self.stage.evaluate
    if not self._is_due(self.cfg.report.eval_every) or (
      evaluate is None and self.stage.held_out is None
    ):
      return
    self._read()
    with self.meter.paused():
      if evaluate:
        values = evaluate(self._params(), self.step)
      else:
        values = self.held_out()
    self.log.scalars(self.step, values)
    self.log.line(
      "  held out: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items())
    )

  def _preview(self) -> None:
    """Pictures, where they are due."""
    if self.stage.preview is None or not self._is_due(
      self.cfg.report.preview_every
    ):
      return
    self._read()
    with self.meter.paused():
      made = self.stage.preview(self._params(), self.step)
      if made and jax.process_index() == 0:
        self._show("samples", sheets.grid(made))
      if self.stage.curves and jax.process_index() == 0:
        shown = pictures.curves(self.log.metrics(), self.stage.curves)
        self._show("curves", shown)

  def _show(self, tag: str, image) -> None:
    pictures.save(self.workdir, self.step, tag, image)
    self.log.image(self.step, tag, image)

  def held_out(self) -> dict[str, float]:
    """Metrics of the held-out batches, each weighted alike."""
    total: dict[str, float] = {}
    count = self.cfg.report.eval_batches
    for i in range(count):
      rows = self.stage.held_out[i]
      metrics = self.evaluate(
        self.state["params"],
        self.frozen,
        step_lib.place_batch(rows.arrays, self.layout.mesh),
        self.held_out_key,
        np.int32(max(self.step - 1, 0)),
      )
      for name, value in jax.device_get(metrics).items():
        name = f"held_out/{name.removeprefix(self.cfg.stage + '/')}"
        total[name] = total.get(name, 0.0) + float(value) / count
    return total

  def _prepare(self, batches) -> None:
    """What a stage does once before some steps, such as a k-means start."""
    prepare = self.stage.prepare.get(self.step)
    if prepare is None:
      return
    self._read()
    with self.meter.paused():
      tree, extra = prepare(self._params(), self.state["extra"], batches)
    flat, before = flatten(tree), self.state["params"]
    self.state["params"] = after = {
      path: jax.device_put(flat[path], self.layout.sharding(path))
      for path in before
    }
    # The average of what was set anew begins anew.
    self.state["ema"] = {
      path: jnp.where(after[path] == before[path], x, after[path])
      for path, x in self.state["ema"].items()
    }
    self.state["extra"] = extra

  def _params(self):
    return nest({**self.state["params"], **self.frozen})

  def _profile(self, over: bool = False) -> None:
    """Begins or ends a profile where it is due; it ends with the run."""
    first, last = self.cfg.report.profile
    if self.profiling and (over or self.step == last):
      self._read()  # by all processes: it may gather their counts
      if jax.process_index() == 0:
        jax.profiler.stop_trace()
      self.profiling = False
      self.log.line(f"profile from step {first}: {self.workdir}/profile")
    elif self.step == first != last and not over:
      if jax.process_index() == 0:
        start_profile(self.workdir / "profile")
      self.profiling = True

  def _export(self) -> None:
    """The model as files for people, from the average where there is one."""
    if self.stage.export is None or not self.cfg.checkpoint.export:
      return
    where, mark = self.workdir / MODEL, self.workdir / EXPORTED
    # A run that goes on beyond its first end has a model of that end; a slower
    # process sees the one that process 0 has just written.
    done = where.exists() and mark.exists() and mark.read_text()
    if runs_lib.of_main(done == str(self.step)):
      return
    params = {**self.state["params"], **self.state["ema"], **self.frozen}
    if jax.process_count() == 1:
      self._write_model(nest(params))
    else:
      params = {path: self._whole(path, x) for path, x in params.items()}
      if jax.process_index() == 0:
        # On a device of its own: the others do not take part.
        with jax.set_mesh(mesh_lib.make_mesh(devices=jax.local_devices())):
          self._write_model(nest(params))
      multihost_utils.sync_global_devices("export")
    self.log.line(f"model written to {where}")

  def _write_model(self, params) -> None:
    """The model and what lies beside it, each whole or not at all."""
    part, mark = self.workdir / "export.part", self.workdir / EXPORTED
    try:
      shutil.rmtree(part, ignore_errors=True)
      part.mkdir()
      self.stage.export(params, part / MODEL)
      mark.unlink(missing_ok=True)
      # The model last: where it is, all is.
      for made in sorted(part.iterdir(), key=lambda path: path.name == MODEL):
        shutil.rmtree(self.workdir / made.name, ignore_errors=True)
        made.rename(self.workdir / made.name)
      part.rmdir()
      mark.write_text(str(self.step))
    except (OSError, InputError) as e:
      reason = getattr(e, "strerror", None) or e
      raise InputError(
        f"{self.workdir}: the model can't be written ({reason}); training is "
        "done and saved, make room and start again"
      ) from None

  def _whole(self, path: str, x: jax.Array) -> np.ndarray | None:
    """A parameter on the host of process 0; all processes call it."""
    gather = lambda x: multihost_utils.process_allgather(x, tiled=True)
    if self.layout.rows[path].stacked:  # layers at once would not fit
      out = np.stack([gather(x[i]) for i in range(x.shape[0])])
    else:
      out = gather(x)
    return None if jax.process_index() else out
