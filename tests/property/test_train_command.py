"""What `xomni train` does before there is a run."""

import pytest

from tests.train_runs import ROOT
from xomni_jax import checks, cli


@pytest.mark.parametrize("how", ["0", "two", "-1", ""])
def test_number_of_cpu_devices_has_to_be_one(how, capsys, tmp_path):
  flags = [f"--config={ROOT}/configs/sft.py:tiny", f"--workdir={tmp_path}"]
  assert cli.main(["train", *flags, f"--cpu-devices={how}"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "--cpu-devices" in line and "expected auto or a number" in line


def test_folder_of_a_bucket_is_refused(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  flags = [f"--config={ROOT}/configs/vae.py:tiny", "--workdir=gs://bucket/vae"]
  # Were it taken, that there is no such setting would end it.
  assert cli.main(["train", *flags, "--config.none=1"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "gs://bucket/vae is a URL, expected a folder; mount" in line


def test_folder_that_another_run_writes_to_is_refused(
  tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(checks, "PATIENCE", 0.0)
  flags = [f"--config={ROOT}/configs/vae.py:tiny", f"--workdir={tmp_path}"]
  with checks.alone(tmp_path):
    assert cli.main(["train", *flags]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert f"{tmp_path} is being written to by another process" in line
  assert not any(tmp_path.iterdir())
