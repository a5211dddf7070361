"""Connected processes save together, and other numbers of them go on."""

import json
import os
import socket
import subprocess
import sys

from tests.train_runs import ROOT, says

DEVICES = "--xla_force_host_platform_device_count=2"


def together(what, count, folder):
  """Runs `count` processes of run_processes.py: [(exit status, lines)]."""
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  flags = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()
  started = [
    subprocess.Popen(
      [sys.executable, "-m", "tests.multidevice.run_processes", what]
      + [str(x) for x in (index, count, port, folder)],
      cwd=ROOT,
      env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(count)
  ]
  try:
    outputs = [process.communicate(timeout=120) for process in started]
  finally:
    for process in started:
      process.kill()
  for process, (_, err) in zip(started, outputs, strict=True):
    assert process.returncode in (0, 143), err[-3000:]
  lines = [says(out) for out, _ in outputs]
  statuses = [process.returncode for process in started]
  return list(zip(statuses, lines, strict=True))


def test_two_processes_save_one_restores_two_go_on(tmp_path):
  saved = together("save:3", 2, tmp_path)
  assert saved == [(0, ["saved [2, 3] from None []"])] * 2
  assert (tmp_path / "3" / "ocdbt.process_1").is_dir()  # both have written
  changed = "['count: 2 -> 1']"
  saved = together("save:4", 1, tmp_path)
  assert saved == [(0, [f"saved [3, 4] from 3 {changed}"])]
  # One byte of the newest; the file falls to one of the two to check.
  names = json.loads((tmp_path / "4" / "manifest.json").read_text())["files"]
  name = max(names, key=lambda entry: entry[1])[0]
  path = tmp_path / "4" / name
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  restored = together("restore", 2, tmp_path)
  line = f"checkpoint of step 4 passed over: {path} has other bytes"
  # Process 0 alone reports it.
  assert restored == [(0, [line, "restored 3"]), (0, ["restored 3"])]


def test_sigterm_to_one_process_stops_all_at_the_same_step(tmp_path):
  (first, out), (second, other) = together("preempted", 2, tmp_path)
  assert first == second == 143
  assert out == other
  step = int(out[0].removeprefix("stopped "))
  assert 5 <= step < 200
  assert (tmp_path / str(step) / "manifest.json").exists()
