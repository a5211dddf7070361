"""What a run tells people: metrics, progress, pictures; and how it is stopped."""

import io
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from xomni_jax import mesh as mesh_lib
from xomni_jax.errors import InputError
from xomni_jax.inference import sheets
from xomni_jax.inference.sheets import Picture
from xomni_jax.training import log as log_lib
from xomni_jax.training import meter, peaks, pictures
from xomni_jax.training.preemption import EXIT_PREEMPTED, Preemption

PROGRESS = {"seconds": 0.5, "wait": 0.021, "tokens": 4096}


def started(folder, step=0):
  log = log_lib.Log(folder, True)
  log.cut(step)
  return log


def records(folder):
  """All lines; only JSON as the standard has it, so no NaN."""
  refuse = lambda name: pytest.fail(f"{name} is no JSON")
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line, parse_constant=refuse) for line in lines]


def events(folder):
  """{tag: [(step, value)]} that TensorBoard shows.

  By its documented rules: files in the order of their names, and a session's
  start takes away what came before of its step and later.
  """
  found = []
  for path in sorted((folder / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:  # TFRecord: length, checksum, event, checksum
      (size,) = struct.unpack("<Q", data[:8])
      event = Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]
      if event.session_log.status == SessionLog.START:
        found = [entry for entry in found if entry[1] < event.step]
      found += [(v.tag, event.step, v) for v in event.summary.value]
  return {
    tag: [(step, value) for name, step, value in found if name == tag]
    for tag, _, _ in found
  }


def test_metrics_are_cut_back_to_the_restored_step(tmp_path):
  log = started(tmp_path)
  for step in (10, 20, 30, 40):
    log.scalars(step, {"loss": step / 8})
  log.close()
  with (tmp_path / "metrics.jsonl").open("a") as f:
    f.write('{"step": 50, "lo')  # torn by a kill
  log = started(tmp_path, 20)
  assert [r["step"] for r in records(tmp_path)] == [10, 20]
  log.scalars(30, {"loss": 7.5})
  log.close()
  assert [(r["step"], r["loss"]) for r in records(tmp_path)] == [
    (10, 1.25), (20, 2.5), (30, 7.5)
  ]  # fmt: skip
  shown = [(step, v.simple_value) for step, v in events(tmp_path)["loss"]]
  assert shown == [(10, 1.25), (20, 2.5), (30, 7.5)]


def test_torn_last_line_does_not_join_the_next(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"ste')
  log = started(tmp_path, 5)
  log.scalars(6, {"loss": 1.0})
  assert [r["step"] for r in records(tmp_path)] == [1, 6]


def test_run_from_the_start_forgets_an_earlier_one(tmp_path):
  started(tmp_path).scalars(3, {"loss": 1.0})
  started(tmp_path)
  assert records(tmp_path) == []


def test_values_that_are_not_finite_are_null_and_named(tmp_path):
  log = started(tmp_path)
  values = {"a": jnp.float32("nan"), "b": np.float32("-inf"), "c": np.int32(2)}
  log.scalars(np.int64(1), values)
  assert records(tmp_path) == [
    {
      "step": 1, "a": None, "b": None, "c": 2.0,
      "nonfinite": {"a": "nan", "b": "-inf"},
    }
  ]  # fmt: skip


def test_pictures_reach_tensorboard(tmp_path):
  log = started(tmp_path)
  log.image(5, "samples", Image.new("RGB", (8, 6)))
  log.close()
  shown = events(tmp_path)
  ((step, value),) = shown["samples"]
  assert step == 5
  image = Image.open(io.BytesIO(value.image.encoded_image_string))
  assert image.size == (8, 6)


def test_other_processes_write_and_print_nothing(tmp_path, capsys):
  log = log_lib.Log(tmp_path, False)
  log.cut(0)
  log.scalars(1, {"loss": 1.0})
  log.image(1, "samples", Image.new("RGB", (8, 8)))
  log.line("line")
  log.close()
  assert list(tmp_path.iterdir()) == []
  assert capsys.readouterr().out == ""


def test_full_disk_is_one_line(tmp_path):
  log = started(tmp_path)
  (tmp_path / "metrics.jsonl").unlink()
  (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
  with pytest.raises(
    InputError, match=r"metrics cannot be written .* No space"
  ):
    log.scalars(1, {"loss": 1.0})


def test_progress_line_says_where_and_how_fast():
  line = log_lib.progress_line(
    1200, 5000, "all", {"pretrain/accuracy": 0.25, "pretrain/loss": 3.21456},
    flops=1e15, devices=8, peak=459e12, **PROGRESS,
  )  # fmt: skip
  assert line == (
    "step 1200/5000 all: loss 3.215, accuracy 0.25, 8.19k tokens/s, "
    "MFU 54.5%, 500 ms/step, data 2%, ETA 31m40s"
  )


@pytest.mark.parametrize("known", [{"flops": 1e15}, {"peak": 1e15}])
def test_progress_line_has_no_mfu_where_it_is_not_known(known):
  assert "MFU" not in log_lib.progress_line(1, 2, "p", {}, **PROGRESS, **known)


@pytest.mark.parametrize(
  ("steps", "eta"),
  [(0, "0s"), (119, "1m00s"), (7199, "1h00m"), (7200 * 24 + 7200, "1d01h")],
)
def test_progress_line_tells_the_time_left(steps, eta):
  line = log_lib.progress_line(0, steps, "p", {"loss": 1}, **PROGRESS)
  assert line.endswith(f"ETA {eta}")


def test_speed_that_is_shown_is_of_whole_rollouts(monkeypatch):
  # The first update of a rollout waits for it, the second does not; the log
  # keeps each as it was.
  now = [0.0]
  monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
  stage = types.SimpleNamespace(
    collected_steps=2, program=types.SimpleNamespace(tokens=90)
  )
  device = types.SimpleNamespace(device_kind="cpu")
  layout = types.SimpleNamespace(
    mesh=types.SimpleNamespace(devices=np.array([device]))
  )
  cfg = types.SimpleNamespace(report=types.SimpleNamespace(peak_flops=0))
  of = meter.Meter(cfg, stage, layout, 0)

  def passed(step, wait, spent):
    with of.waiting():
      now[0] += wait
    with of.paused():
      now[0] += 100
    now[0] += spent - wait
    return of.read(step)

  alone = passed(1, 8, 9)
  assert (alone.seconds, alone.wait) == pytest.approx((9, 8 / 9))
  for step in (2, 4, 6):
    second = passed(step, 0, 1)
    assert (second.seconds, second.wait) == pytest.approx((5, 0.8))
    assert second.scalars == pytest.approx({
      "time/step_seconds": 1, "time/data_wait": 0, "time/tokens_per_second": 90
    })  # fmt: skip
    first = passed(step + 1, 8, 9)
    assert (first.seconds, first.wait) == pytest.approx((5, 0.8))
  # Readings of whole rollouts stand alone; others take in what came before.
  assert passed(17, 40, 60).seconds == pytest.approx(6)
  assert passed(20, 16, 19).seconds == pytest.approx(79 / 13)
  assert passed(21, 0, 1).seconds == pytest.approx(5)
  assert passed(24, 8, 11).seconds == pytest.approx(3)


@pytest.mark.parametrize(
  ("kind", "tera"),
  [
    ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v5p", 459),
    ("TPU v6 lite", 918), ("TPU7x", 1153.5), ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 0), ("cpu", 0), ("TPU v99", 0),
  ],
)  # fmt: skip
def test_peaks_are_those_of_one_device(kind, tera):
  assert peaks.flops(kind) == tera * 1e12


def test_start_report_counts_parameters_and_bytes(tmp_path):
  mesh = mesh_lib.make_mesh()
  split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
  array = lambda shape, dtype, sharding=None: jax.ShapeDtypeStruct(
    shape, dtype, sharding=sharding
  )
  params = {
    "ar": {
      "lm": {"kernel": array((3, 8, 4), jnp.float32, split), "bias": array((4,), jnp.float32)},
      "head": array((16, 8), jnp.float32),
    },
    "vae": {"lm": array((1024, 1024), jnp.bfloat16)},
  }  # fmt: skip
  text = log_lib.start_report(
    {
      "stage": "sft",
      "optim": {"lr": 0.1, "no": ["a"]},
      "phases": [{"steps": 3}],
    },
    mesh,
    params,
    lambda path: path.startswith("ar/lm/"),
    {"optimizer": {"mu": array((100,), jnp.float32)}, "extra": {}},
    tmp_path,
  )
  assert text.splitlines() == [
    "config",
    "  stage: 'sft'",
    "  optim: lr=0.1, no=['a']",
    "  phases.0: steps=3",
    "mesh 1 x cpu",
    "parameters      count  dtype              per device",
    "ar/head           128  float32   frozen        512 B",
    "ar/lm             100  float32   trained       400 B",
    "vae/lm      1,048,576  bfloat16  frozen        2 MiB",
    "on every device: parameters 2 MiB, optimizer 400 B; in all 2 MiB",
  ]
  lines = (tmp_path / "parameters.txt").read_text().splitlines()
  assert [line.split() for line in lines[1:]] == [
    ["ar/head", "16x8", "float32", "frozen", "whole", "512"],
    ["ar/lm/bias", "4", "float32", "trained", "whole", "16"],
    ["ar/lm/kernel", "3x8x4", "float32", "trained", "-,fsdp", "384"],
    ["vae/lm", "1024x1024", "bfloat16", "frozen", "whole", "2,097,152"],
  ]


def test_grid_shows_every_picture_above_its_caption(tmp_path):
  colours = [
    (250, 0, 0),
    (0, 250, 0),
    (0, 0, 250),
    (250, 250, 0),
    (0, 250, 250),
  ]
  made = [
    Picture(Image.new("RGB", (16, 48), c), f"caption {i}\nschön 好")
    for i, c in enumerate(colours)
  ]
  page = sheets.grid(made, columns=3)
  pixels = np.asarray(page).astype(int)
  tops, lefts = [], []
  for colour in colours:
    ys, xs = np.nonzero((pixels == colour).all(-1))
    box = 160, 480  # ten times as large, so that it is 160 px wide
    assert len(ys) == box[0] * box[1]
    assert (np.ptp(xs) + 1, np.ptp(ys) + 1) == box
    tops.append(ys.min())
    lefts.append(xs.min())
    below = pixels[ys.max() + 1 : ys.max() + 36, xs.min() : xs.min() + 200]
    assert (below < 128).all(-1).sum() > 50  # ink
  assert tops[0] == tops[1] == tops[2] < tops[3] == tops[4]
  assert lefts[0] == lefts[3] < lefts[1] == lefts[4] < lefts[2]


def test_captions_are_broken_at_the_width_and_cut(tmp_path):
  page = sheets.grid(
    [Picture(Image.new("RGB", (300, 20)), text) for text in ("word " * 999, "x" * 99, "")]
  )  # fmt: skip
  assert page.width == 3 * 308 + 8
  assert page.height < 20 + 10 * 17 + 30
  ink = (np.asarray(page) < 128).all(-1)[28:]
  # Nothing runs into the gaps between the columns, nor below an empty caption.
  assert not ink[:, 308:316].any() and not ink[:, 616:].any()
  assert ink[:, :308].any(0).sum() > 200 and ink[17:34, 316:616].any()


def test_curves_draw_the_metrics_of_a_prefix(tmp_path):
  log = log_lib.Log(tmp_path, is_main=True)
  log.cut(0)
  log.scalars(1, {"reward/ocr": 0.1, "grpo/kl": 50.0})
  log.scalars(2, {"reward/ocr": 0.9, "reward/hps": float("nan")})
  blue = lambda image: int(
    (np.abs(np.asarray(image).astype(int) - (31, 119, 180)).sum(-1) < 30).sum()
  )
  ours = pictures.curves(log.metrics(), "reward/")
  assert blue(ours) > 300 and blue(pictures.curves([], "reward/")) == 0
  # One line: the others are of another prefix, or have no value.
  orange = (np.asarray(ours) == (255, 127, 14)).all(axis=-1)
  assert not orange.any()
  log.close()


def test_picture_file_is_complete_or_not_there(tmp_path, monkeypatch):
  image = Image.new("RGB", (8, 8), "red")
  path = pictures.save(tmp_path, 12, "samples", image)
  assert path == tmp_path / "pictures" / "samples-0000012.png"
  assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)

  def full(self, file, kind):
    pathlib.Path(file).write_bytes(b"PNG")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(Image.Image, "save", full)
  with pytest.raises(InputError, match=r"can't be written \(No space left"):
    pictures.save(tmp_path, 13, "samples", image)
  assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_noted_and_handlers_come_back(number):
  before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
  with Preemption() as preemption:
    assert not preemption.should_stop(1)
    os.kill(os.getpid(), number)
    assert preemption.should_stop(2)
    assert preemption.should_stop(3)
  assert {n: signal.getsignal(n) for n in before} == before
  with Preemption() as preemption:
    assert not preemption.should_stop(1)


def test_second_interrupt_interrupts():
  with Preemption() as preemption, pytest.raises(KeyboardInterrupt):
    os.kill(os.getpid(), signal.SIGINT)
    assert preemption.should_stop(1)
    os.kill(os.getpid(), signal.SIGINT)
    preemption.should_stop(2)


def test_terminated_program_ends_with_143():
  code = (
    "import sys, time\n"
    "from xomni_jax.training.preemption import EXIT_PREEMPTED, Preemption\n"
    "with Preemption() as preemption:\n"
    "  print('ready', flush=True)\n"
    "  while not preemption.should_stop(1): time.sleep(0.01)\n"
    "sys.exit(EXIT_PREEMPTED)\n"
  )
  with subprocess.Popen(
    [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.wait(30) == EXIT_PREEMPTED == 128 + signal.SIGTERM
