"""How fast a run goes, and where its time goes."""

import contextlib
import dataclasses
import itertools
import pathlib
import time

import jax

from xomni_jax.train_config import TrainConfig
from xomni_jax.training import peaks
from xomni_jax.training.layout import Layout
from xomni_jax.training.stage import Stage


@dataclasses.dataclass(frozen=True)
class Speed:
  """How fast steps are.

  Attributes:
    seconds: a step takes, over those since the last reading, and before it as
      many as make whole rollouts: one of a rollout's steps alone waits for it.
    wait: share of them spent waiting for data, 0 to 1.
    scalars: both, and tokens/s, of those since the last reading, for the log.
  """

  seconds: float
  wait: float
  scalars: dict[str, float]


def start_profile(folder: pathlib.Path) -> None:
  """Begins a profile of this process, without the frames of its Python code.

  Those are had by a hook in each thread, and where a thread is just beginning
  there is nothing to put it on: the process dies of a segmentation fault.
  """
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  jax.profiler.start_trace(str(folder), profiler_options=options)


class Meter:
  """How long steps take; pauses (evaluation, pictures) do not count."""

  def __init__(self, cfg: TrainConfig, stage: Stage, layout: Layout, step: int):
    self._tokens = stage.program.tokens
    self._alike = stage.collected_steps
    # (steps, seconds, of them waiting) of the last readings.
    self._recent: list[tuple[int, float, float]] = []
    device = layout.mesh.devices.flat[0]
    self.peak = cfg.report.peak_flops or peaks.flops(device.device_kind) or 0.0
    self._start, self._step, self._wait = time.perf_counter(), step, 0.0

  @contextlib.contextmanager
  def waiting(self):
    """Time in which a step waits for its batch."""
    start = time.perf_counter()
    yield
    self._wait += time.perf_counter() - start

  @contextlib.contextmanager
  def paused(self):
    """Time that is no step's."""
    start = time.perf_counter()
    yield
    self._start += time.perf_counter() - start

  def read(self, step: int) -> Speed:
    """Since the last reading."""
    now = time.perf_counter()
    spent = max(now - self._start, 1e-9)
    steps = max(step - self._step, 1)
    wait = min(self._wait, spent)
    self._recent.append((steps, spent, wait))
    self._start, self._step, self._wait = now, step, 0.0
    counts = itertools.accumulate(n for n, *_ in reversed(self._recent))
    for kept, count in enumerate(counts, 1):
      if count % self._alike == 0:
        self._recent = self._recent[-kept:]
        break
    counted, seconds, waited = map(sum, zip(*self._recent, strict=True))
    return Speed(
      seconds / counted,
      waited / seconds,
      {
        "time/step_seconds": spent / steps,
        "time/data_wait": wait / spent,
        "time/tokens_per_second": self._tokens * steps / spent,
      },
    )
