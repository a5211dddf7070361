"""launch/sidecar.sh: what it installs and starts; a script stands for Python."""

import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "sidecar.sh"


@pytest.fixture
def launch(tmp_path):
  """Runs the script with `python`, which notes what it is asked, in bash."""
  python = tmp_path / "python"
  python.write_text(
    "#!/usr/bin/env bash\n"
    f'echo "$PYTHONPATH|$@" >>{tmp_path}/calls\n'
    f'[ "$2" = venv ] && mkdir -p "$3/bin" && cp "$0" "$3/bin/python"\n'
    'while [ $# -gt 0 ]; do [ "$1" = -r ] && cat "$2" >>'
    f"{tmp_path}/pins; shift; done\n"
    "exit 0\n"
  )
  python.chmod(0o755)

  def run(*args):
    (tmp_path / "calls").write_text("")
    run = subprocess.run(
      ["bash", SCRIPT, *args],
      env={
        **os.environ,
        "PYTHONPATH": "",
        "PYTHON": str(python),
        "XOMNI_SIDECARS": str(tmp_path / "venvs"),
      },
      capture_output=True,
      text=True,
      timeout=30,
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    return run, [call.partition("|")[2] for call in calls], calls

  run.pins = tmp_path / "pins"
  return run


def test_sidecar_launcher_sets_up_once_and_serves(launch):
  done, calls, raw = launch("hps", "--set", "port=3")
  assert done.returncode == 0, done.stderr
  (install,) = [call for call in calls if " install " in call]
  for name in ("torch==", "torchvision==", "open_clip_torch=="):
    assert name in install
  serve = f"--config {ROOT}/configs/sidecar.py --app hps --set port=3"
  assert calls[-1] == f"-m xomni_jax.sidecar {serve}"
  assert raw[-1].startswith(f"{ROOT}|")
  _, again, _ = launch("hps", "--app", "mine", "--config", "c.py")
  assert len(again) == 1 and again[0].endswith("--app mine --config c.py")


def test_sidecar_launcher_gives_each_kind_its_own_environment(launch):
  _, ocr, _ = launch("ocr", "setup")
  _, judge, _ = launch("unified_reward", "setup")
  assert any("rapidocr==" in call for call in ocr)
  assert any(" install " in call for call in judge)
  assert not any("torch" in call or "rapidocr" in call for call in judge)


def test_sidecar_launcher_leaves_out_pins_that_paddle_cannot_have(launch):
  launch("ocr", "setup")
  all_pins = launch.pins.read_text()
  assert all_pins == (ROOT / "launch/requirements-sidecar.txt").read_text()
  launch.pins.unlink()
  launch("paddleocr", "setup")
  left_out = set(all_pins.splitlines()) - set(
    launch.pins.read_text().splitlines()
  )
  assert sorted(pin.split("==")[0] for pin in left_out) == ["PyYAML", "numpy"]


def test_sidecar_launcher_names_kinds_and_refuses_others(launch):
  done, calls, _ = launch("hsp")
  assert done.returncode == 2 and not calls
  assert done.stderr.startswith("sidecar.sh: error: no kind of reward")
  done, calls, _ = launch()
  assert done.returncode == 0 and not calls
  for kind in ("ocr", "tesseract", "paddleocr", "got", "hps", "qwen_alignment"):
    assert kind in done.stdout
  assert "pipefail" not in done.stdout


def test_sidecar_pins_are_those_of_the_tests():
  def pins(name):
    lines = (ROOT / "launch" / name).read_text().splitlines()
    pairs = (line.partition(";")[0].partition("==") for line in lines)
    return {name.lower(): version for name, found, version in pairs if found}

  ours, theirs = pins("requirements-sidecar.txt"), pins("requirements-cpu.txt")
  common = set(ours) & set(theirs)
  assert len(common) > 20
  assert {n: ours[n] for n in common} == {n: theirs[n] for n in common}
