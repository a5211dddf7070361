"""Small training runs by the real command, and what they leave behind.

Three phases of three steps from the golden checkpoint: the second unfreezes
what the first froze, the third freezes it again. A checkpoint every two steps,
so that one boundary (3) lies between checkpoints and one (6) on them.
"""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.helpers import GOLDEN
from xomni_jax.config_files import read_config
from xomni_jax.data import protocol, records, sequences

ROOT = pathlib.Path(__file__).parents[1]
STEPS, EVERY, LENGTH, ROWS = 9, 2, 96, 4
VISION = ("ar/vision_in/", "ar/vision_out/", "ar/mm_")
_WORDS = ("red", "sign", "with", "a", "cat", "and", "seven", "boats", "near")


def write_data(folder: pathlib.Path, count: int = 48) -> pathlib.Path:
  """Records of random codes and short texts, of several lengths."""
  rng = np.random.default_rng(0)
  tokenizer = protocol.load_tokenizer(GOLDEN / "xomni", 448, 64)
  made = [
    {
      "key": str(i),
      "codes": rng.integers(0, 64, rng.integers(2, 5, 2), np.int32),
      "text": " ".join(rng.choice(_WORDS, rng.integers(1, 6))),
    }
    for i in range(count)
  ]
  lengths = [sequences.lengths(record, tokenizer) for record in made]
  folder.mkdir(parents=True, exist_ok=True)
  records.write_records(folder / "codes.array_record", made, lengths)
  return folder


def write_config(folder: pathlib.Path, data: pathlib.Path) -> pathlib.Path:
  """A config file of the run; its settings are overridden by the tests."""
  source = lambda task, weight: {
    "path": str(data),
    "task": task,
    "weight": weight,
  }
  mixture = {
    "sources": (source("text_to_image", 0.7), source("image_to_text", 0.3)),
    "seq_len": LENGTH,
    "window": 16,
  }
  phase = lambda train, **more: {
    "steps": 3,
    "train": train,
    "lr_scale": 1.0,
    **more,
  }
  config = {
    "stage": "pretrain",
    "seed": 3,
    "global_batch": ROWS,
    "phases": {
      "1_vision": phase(VISION, warmup_steps=2),
      "2_all": phase(("ar/",), decay="cosine"),
      "3_anneal": phase(
        VISION,
        decay="linear",
        data=mixture | {"sources": (source("text_to_image", 1.0),)},
      ),
    },
    "data": mixture,
    "eval_data": mixture | {"shuffle": False},
    "init": {"model": str(GOLDEN / "xomni"), "flux": ""},
    "optim": {
      "lr": 1e-2,
      "weight_decay": 0.1,
      "clip_norm": 1.0,
      "accumulate": 1,
      "ema": 0.5,
    },
    "checkpoint": {"every": EVERY, "keep_last": STEPS, "export": True},
    "report": {
      "log_every": 1,
      "eval_every": 3,
      "eval_batches": 1,
      "preview_every": 0,
    },
    "compute": {
      "dtype": "float32",
      "scan_layers": True,  # compiles fastest
      "remat": "none",
      "attention": "chunked",
      "query_chunk": 96,
    },
    "mesh": {"data": -1},
    "frozen_dtype": "float32",
    "options": {"loss_chunk": 96},
    "architecture": read_config(
      str(ROOT / "configs" / "model.py"), "tiny"
    ).to_dict(),
  }
  path = folder / "run.py"
  path.write_text(
    "from ml_collections import ConfigDict\n\n\n"
    f"def get_config(size=''):\n  return ConfigDict({config!r})\n"
  )
  return path


def arguments(config, workdir, *more) -> list[str]:
  """Of `python -m xomni_jax`."""
  return ["train", f"--config={config}", f"--workdir={workdir}", *more]


def start(config, workdir, *more, devices: int = 1) -> subprocess.Popen:
  """Starts `xomni train` in a process of its own.

  Programs are compiled once for all runs beside each other, which takes
  that they come out alike: sets of strings are ordered by Python's hash seed.
  """
  cache = pathlib.Path(workdir).parent / "compiled"
  count = f"--xla_force_host_platform_device_count={devices}"
  return subprocess.Popen(
    [sys.executable, "-m", "xomni_jax", *arguments(config, workdir, *more)],
    cwd=ROOT,
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {count}".strip(),
      "PYTHONHASHSEED": "0",
      "JAX_COMPILATION_CACHE_DIR": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
  """(exit status, standard output, standard error)."""
  try:
    # Seconds: of two processes that compile while others need the cores.
    out, err = process.communicate(timeout=900)
  finally:
    process.kill()
  return process.returncode, out, err


def run(config, workdir, *more) -> tuple[int, str, str]:
  """`start` and `finish`."""
  return finish(start(config, workdir, *more))


def start_together(config, workdir, *more, count: int, devices: int = 1):
  """Starts a run of `count` connected processes of `devices` devices each."""
  if count == 1:
    return [start(config, workdir, *more, devices=devices)]
  with socket.socket() as s:
    s.bind(("localhost", 0))
    address = f"localhost:{s.getsockname()[1]}"
  return [
    start(
      *(config, workdir, *more, f"--distributed={address},{count},{i}"),
      devices=devices,
    )
    for i in range(count)
  ]


def finish_together(started) -> list[tuple[int, str, str]]:
  """`finish` of each."""
  try:
    return [finish(process) for process in started]
  finally:
    for process in started:
      process.kill()


def together(config, workdir, *more, count: int, devices: int = 1):
  """`run` with several processes."""
  started = start_together(config, workdir, *more, count=count, devices=devices)
  return finish_together(started)


def stopped(config, workdir, *more, step: int, count: int = 1):
  """The same, told to stop by SIGTERM to the last process after a step."""
  started = start_together(config, workdir, *more, count=count)
  signal_after(started[-1], workdir, step, signal.SIGTERM)
  return finish_together(started)


# Its threads write at once, so that a line may hold pieces of two of its own.
OF_GLOO = re.compile(
  r"(\[Gloo\] Rank | is connected to | ?peer ranks\. "
  r"|Expected number of connected peer ranks is : |\d)*"
)


def says(out: str) -> list[str]:
  """Lines of standard output but those of the library that connects."""
  return [x for x in out.splitlines() if not OF_GLOO.fullmatch(x)]


def signal_after(
  process, workdir, step: int, number=signal.SIGKILL, path=None
) -> None:
  """Sends a signal as soon as a step is in a file; None: in the metrics."""
  path = path or pathlib.Path(workdir) / "metrics.jsonl"
  deadline = time.time() + 240
  mark = f'{{"step": {step},'
  while process.poll() is None and time.time() < deadline:
    if path.exists() and mark in path.read_text():
      process.send_signal(number)
      return
    time.sleep(0.002)
  process.kill()
  raise AssertionError(f"no step {step}: {process.communicate()[1][-3000:]}")


def metrics(workdir) -> list[dict]:
  """Lines of metrics.jsonl, without what depends on the clock."""
  text = (pathlib.Path(workdir) / "metrics.jsonl").read_text()
  return [
    {k: v for k, v in json.loads(x).items() if not k.startswith("time/")}
    for x in text.splitlines()
  ]


def checkpoints(workdir) -> list[int]:
  """Steps of the checkpoints."""
  folder = pathlib.Path(workdir) / "checkpoints"
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def state(workdir, step: int = STEPS) -> dict[str, np.ndarray]:
  """The arrays of a checkpoint by name, read by Orbax alone."""
  reader = ocp.Checkpointer(ocp.StandardCheckpointHandler())
  folder = pathlib.Path(workdir).absolute() / "checkpoints" / str(step)
  # It may have been saved by more devices than there are here.
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  args = ocp.args.StandardRestore(fallback_sharding=here)
  return {
    k: np.asarray(v) for k, v in reader.restore(folder, args=args).items()
  }


def assert_same_state(ours: dict, theirs: dict) -> None:
  """Bit by bit."""
  assert ours.keys() == theirs.keys()
  other = [k for k in ours if ours[k].tobytes() != theirs[k].tobytes()]
  assert not other
