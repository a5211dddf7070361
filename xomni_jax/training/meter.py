"""How fast a run goes, and where its time goes."""

import contextlib
import dataclasses
import pathlib
import time

import jax

from xomni_jax.train_config import TrainConfig
from xomni_jax.training import peaks
from xomni_jax.training.layout import Layout
from xomni_jax.training.stage import Stage


@dataclasses.dataclass(frozen=True)
class Speed:
  """Of the steps since the last reading.

  Attributes:
    seconds: a step.
    wait: share of them spent waiting for data, 0 to 1.
    scalars: both, and tokens/s, for the log.
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
    wait = min(self._wait / spent, 1.0)
    self._start, self._step, self._wait = now, step, 0.0
    seconds = spent / steps
    return Speed(
      seconds,
      wait,
      {
        "time/step_seconds": seconds,
        "time/data_wait": wait,
        "time/tokens_per_second": self._tokens / seconds,
      },
    )
