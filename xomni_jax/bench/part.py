"""One model in one framework, in a process of its own.

So that its memory is all given back before the next, and its peak is its own.
The results are rewritten after every figure: a later failure does not lose
them.
"""

import dataclasses
import json
import pathlib
import sys
import time
import traceback
from typing import Any

from xomni_jax.bench import measure
from xomni_jax.config import Compute
from xomni_jax.config_files import load_architecture
from xomni_jax.errors import InputError

DTYPE = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Task:
  """What to run.

  Attributes:
    model: "ar" or "flux".
    framework: "jax" or "torch".
    config, size: `get_config(size)` of this file gives the sizes.
    gpu: refuse to run without one.
    scan: `Compute.scan_layers` of JAX.
    repeats: timed calls a figure.
    out: file for the results.
  """

  model: str
  framework: str
  config: str
  size: str
  gpu: bool
  scan: bool
  repeats: int
  out: str


def command(task: Task) -> list[str]:
  """The command line that runs a task in another process."""
  code = "import sys; from xomni_jax.bench import part; part.main(sys.argv[1])"
  return [sys.executable, "-c", code, json.dumps(dataclasses.asdict(task))]


def main(task: str) -> None:
  """Runs a task that is given as JSON."""
  run(Task(**json.loads(task)))


def run(task: Task) -> None:
  """Does a task; the results are in its file.

  The file holds `device`, `parameters`, `figures` {figure: units/s}, `memory`
  (peak bytes on the device; None where nothing counts them) and, of JAX,
  `needs` {figure: bytes read per token, or FLOPs per denoising step}. `absent`,
  `refused` or `failed` say why something is not there.
  """
  results: dict[str, Any] = {"figures": {}}
  write = lambda: pathlib.Path(task.out).write_text(json.dumps(results))
  try:
    (_run_jax if task.framework == "jax" else _run_torch)(task, results, write)
  except InputError as e:
    results["refused"] = str(e)
  except Exception as e:
    traceback.print_exc()
    reason = str(e).strip().split("\n")[0]
    results["failed"] = f"{type(e).__name__}: {reason}"
  write()


def _run_jax(task, results, write):
  import jax

  from xomni_jax.bench import roofline, work
  from xomni_jax.models import ar, flux

  device = jax.devices()[0]
  if task.gpu and device.platform != "gpu":
    raise InputError(
      f"size {task.size} needs a GPU, jax sees only {device.platform}; "
      "on a machine with one, install xomni_jax[gpu]"
    )
  cfg = getattr(load_architecture(f"{task.config}:{task.size}"), task.model)
  load = work.LOADS[task.size]
  compute = Compute(dtype=DTYPE, scan_layers=task.scan)
  results["device"] = device.device_kind
  tree = (ar if task.model == "ar" else flux).abstract(cfg)
  results["parameters"] = work.count(tree)
  itemsize = 2  # bfloat16
  if task.model == "ar":
    # The cache is filled to its mean over the timed steps.
    length = load.prompt + (load.steps + 1) / 2
    results["needs"] = {
      load.decode(b): roofline.decode_bytes(cfg, b, length, itemsize) / b
      for b in load.batches
    }
  else:
    h, w = load.grid
    results["needs"] = {
      load.denoise: roofline.step_flops(cfg, load.text, h * w, rows=2)
    }
  measure.say(f"{task.model} jax: weights ...")
  params = work.random_params(tree, DTYPE)
  jax.block_until_ready(params)
  make = work.jax_ar if task.model == "ar" else work.jax_flux

  def memory():
    return (device.memory_stats() or {}).get("peak_bytes_in_use")

  _time(task, make(cfg, compute, params, load), load, results, memory, write)


def _run_torch(task, results, write):
  needed = ("torch", "transformers" if task.model == "ar" else "diffusers")
  if missing := measure.absent(*needed):
    results["absent"] = f"{' and '.join(missing)} not installed"
    return
  import torch

  if task.gpu and not torch.cuda.is_available():
    results["absent"] = f"torch {torch.__version__} sees no GPU"
    return
  from xomni_jax.bench import torch_work, work

  cfg = getattr(load_architecture(f"{task.config}:{task.size}"), task.model)
  load = work.LOADS[task.size]
  on_gpu = torch.cuda.is_available()
  device = "cuda" if on_gpu else "cpu"
  results["device"] = torch.cuda.get_device_name() if on_gpu else device
  measure.say(f"{task.model} torch: weights ...")
  if task.model == "ar":
    model = torch_work.qwen2(cfg, DTYPE, device)
    makers = torch_work.ar_calls(cfg, model, load)
  else:
    model = torch_work.flux_transformer(cfg, DTYPE, device)
    makers = torch_work.flux_calls(cfg, model, load)
  results["parameters"] = work.count(dict(model.named_parameters()))

  def memory():
    return torch.cuda.max_memory_allocated() if on_gpu else None

  _time(task, makers, load, results, memory, write)


def _time(task, makers, load, results, memory, write):
  """Times every figure; one's arrays are gone before the next."""
  for figure, amount in load.figures()[task.model].items():
    start = time.perf_counter()
    call = makers[figure]()
    call()  # the warm-up
    ready = time.perf_counter()
    seconds = measure.median_seconds([call], task.repeats)[0]
    del call
    results["figures"][figure] = amount / seconds
    results["memory"] = memory()
    write()
    measure.say(
      f"{task.model} {task.framework}: {figure}: "
      f"{measure.number(amount / seconds)} (ready in {ready - start:.0f} s)"
    )
