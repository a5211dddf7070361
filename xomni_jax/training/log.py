"""What a run tells: metrics on disk, a line of progress, a report at the start.

Only process 0 writes or prints.
"""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from xomni_jax.errors import InputError
from xomni_jax.training.report import start_report

__all__ = ["Log", "progress_line", "start_report"]


class Log:
  """Metrics of a run, in `metrics.jsonl` and for TensorBoard.

  Every method raises InputError where the disk takes no more.
  """

  def __init__(self, workdir, is_main: bool):
    """Writes below `workdir`; with `is_main` False it does nothing at all."""
    self._folder = pathlib.Path(workdir) / "tensorboard"
    self._path = pathlib.Path(workdir) / "metrics.jsonl"
    self._is_main = is_main
    self._events = None  # tensorboardX's EventsWriter

  def cut(self, step: int) -> None:
    """Forgets what was logged of later steps: the run goes on from `step`.

    Called once, before anything is logged; with 0 where a run begins. A line
    that a kill left incomplete goes, too.
    """
    if not self._is_main:
      return
    # Here, since tensorboardX imports torch where it is installed (3 s).
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      kept = [x for x in _lines(self._path) if json.loads(x)["step"] <= step]
      temporary = self._path.with_suffix(".tmp")
      temporary.write_text("".join(f"{x}\n" for x in kept), "utf-8")
      temporary.replace(self._path)
      # Not SummaryWriter: its thread dies of a full disk, and then the queue
      # to it fills up and the run hangs. File names hold seconds, so that a
      # quick restart needs the rest to differ.
      suffix = f".{step}.{os.getpid()}"
      self._events = EventsWriter(str(self._folder / "events"), suffix)
      # TensorBoard's sign to drop what it has seen from this step on.
      start = SessionLog(status=SessionLog.START)
      self._write(Event(step=step + 1, session_log=start))
    except OSError as e:
      raise self._failed(e) from e

  def metrics(self) -> list[dict[str, Any]]:
    """What was logged so far, a mapping a line."""
    return [json.loads(line) for line in _lines(self._path)]

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Logs numbers of a step, as one line of JSON.

    One that is not finite is null there, and stands as text in "nonfinite".
    """
    if not self._is_main:
      return
    values = {name: float(value) for name, value in values.items()}
    odd = {n: str(v) for n, v in values.items() if not math.isfinite(v)}
    record = {"step": int(step)}
    record |= {n: None if n in odd else v for n, v in values.items()}
    if odd:
      record["nonfinite"] = odd
    try:
      with self._path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(record, allow_nan=False) + "\n")
      for name, value in values.items():
        self._summary(step, "scalar", name, value)
    except OSError as e:
      raise self._failed(e) from e

  def image(self, step: int, tag: str, image: Image.Image) -> None:
    """Shows a picture in TensorBoard."""
    if self._is_main:
      pixels = np.asarray(image.convert("RGB"))
      self._summary(step, "image", tag, pixels, dataformats="HWC")

  def line(self, text: str) -> None:
    """Prints on standard output."""
    if self._is_main:
      print(text, flush=True)

  def close(self) -> None:
    """Closes the files; nothing is lost without it."""
    events, self._events = self._events, None
    if events is not None:
      try:
        events.close()
      except OSError as e:
        raise self._failed(e) from e

  def _summary(self, step, kind, *args, **how):
    from tensorboardX import summary
    from tensorboardX.proto.event_pb2 import Event

    value = getattr(summary, kind)(*args, **how)
    try:
      self._write(Event(step=step, summary=value))
    except OSError as e:
      raise self._failed(e) from e

  def _write(self, event):
    event.wall_time = time.time()
    self._events.write_event(event)
    self._events.flush()

  def _failed(self, error):
    return InputError(
      f"metrics cannot be written to {self._path.parent}: {error.strerror}; "
      "make room there"
    )


def _lines(path):
  """The lines of a JSONL file that are complete records."""
  if not path.exists():
    return
  for line in path.read_text("utf-8", errors="replace").splitlines():
    try:
      if isinstance(json.loads(line)["step"], int):
        yield line
    except (ValueError, TypeError, KeyError):
      continue


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
  """One line: how far a run is, what it has learnt, and how fast it goes.

  Args:
    step, total: steps done, and of the whole run.
    phase: its name.
    metrics: shown in this order, the loss first wherever it stands, and
      without what comes before the last "/" of a name.
    seconds: a step takes.
    wait: share of that time in which the devices wait for data, 0 to 1.
    tokens: of a step; 0: not shown.
    flops: of a step, on all devices together.
    devices: how many.
    peak: bf16 FLOP/s of one of them; MFU is left out if it is 0, or flops are.
  """
  short = {n.rpartition("/")[2]: v for n, v in metrics.items()}
  short = {n: short[n] for n in ("loss", *short) if n in short}
  shown = [f"{n} {v:.4g}" for n, v in short.items()]
  if tokens:
    shown.append(f"{_count(tokens / seconds)} tokens/s")
  if flops and peak:
    shown.append(f"MFU {flops / (seconds * devices * peak):.1%}")
  shown += [f"{_seconds(seconds)}/step", f"data {wait:.0%}"]
  shown.append(f"ETA {_duration((total - step) * seconds)}")
  return f"step {step}/{total} {phase}: {', '.join(shown)}"


def _count(number: float) -> str:
  for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if number >= size:
      return f"{number / size:.3g}{unit}"
  return f"{number:.3g}"


def _seconds(number: float) -> str:
  return f"{number:.3g} s" if number >= 1 else f"{number * 1e3:.3g} ms"


def _duration(seconds: float) -> str:
  """Such as 2d03h, 3h05m, 5m07s or 7s."""
  seconds = round(seconds)
  for size, unit, part, name in (
    (86400, "d", 3600, "h"),
    (3600, "h", 60, "m"),
    (60, "m", 1, "s"),
  ):
    if seconds >= size:
      return f"{seconds // size}{unit}{seconds % size // part:02d}{name}"
  return f"{seconds}s"
