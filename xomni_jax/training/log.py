"""What a run tells a person: metrics on disk, a line of progress, the start.

Only process 0 writes or prints.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image


class Log:
  """Metrics of a run, in `metrics.jsonl` and for TensorBoard."""

  def __init__(self, workdir, is_main: bool):
    """Writes below `workdir`; with `is_main` False it does nothing at all."""

  def cut(self, step: int) -> None:
    """Forgets what was logged of later steps: the run goes on from `step`.

    Called once, before anything else, with 0 where a run begins.
    """

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Logs finite numbers; others become null, their names a list."""

  def image(self, step: int, tag: str, image: Image.Image) -> None:
    """Shows a picture in TensorBoard."""

  def text(self, step: int, tag: str, text: str) -> None:
    """Shows a text in TensorBoard."""

  def line(self, text: str) -> None:
    """Prints on standard output."""

  def close(self) -> None:
    """Flushes and closes."""


def progress_line(
  step: int,
  total: int,
  phase: str,
  metrics: Mapping[str, float],
  *,
  seconds: float,
  wait: float,
  tokens: float,
  flops: float = 0.0,
  devices: int = 1,
  peak: float = 0.0,
) -> str:
  """One line: where a run is, what it has learnt, and how fast it goes.

  Args:
    step, total: steps done, and of the whole run.
    phase: its name.
    metrics: shown in this order; the loss first.
    seconds: a step takes.
    wait: share of that time in which the devices waited for data, 0 to 1.
    tokens: of a step.
    flops: of a step, on all devices; 0: unknown.
    devices: how many.
    peak: bf16 FLOP/s of one of them; 0: unknown, then MFU is left out.
  """


def start_report(
  config: Mapping[str, Any],
  mesh,
  params: Mapping[str, Any],
  trains: Callable[[str], bool],
  others: Mapping[str, Any],
  workdir: pathlib.Path,
) -> str:
  """What a run is about to do: config, mesh, parameters, bytes per device.

  The table of all parameters goes to `<workdir>/parameters.txt` (process 0).

  Args:
    config: settings, nested.
    params: {part: tree} of arrays or ShapeDtypeStructs with shardings.
    trains: path such as "ar/lm/q_proj/kernel" -> a phase trains it.
    others: {name: tree}, what else stays on the devices, such as optimiser
      state.
  """
