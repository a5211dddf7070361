"""What `xomni train` does before there is a run."""

import socket

import pytest

from tests.train_runs import ROOT
from xomni_jax import checks, cli
from xomni_jax.errors import InputError
from xomni_jax.training import command


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


@pytest.mark.parametrize("name", ["model", "flux1"])
def test_folder_that_the_end_would_replace_is_kept(tmp_path, capsys, name):
  mine = tmp_path / name / "mine.txt"
  mine.parent.mkdir()
  mine.touch()
  flags = [f"--config={ROOT}/configs/vae.py:tiny", f"--workdir={tmp_path}"]
  assert cli.main(["train", *flags]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert f"{mine.parent}: is there, but no run made it" in line
  assert [p.name for p in tmp_path.iterdir()] == [name]
  assert mine.exists()


def test_model_that_a_run_starts_from_is_not_what_it_leaves(tmp_path, capsys):
  (tmp_path / "checkpoints" / "1").mkdir(parents=True)  # it has begun
  (tmp_path / "model").mkdir()
  flags = [f"--config={ROOT}/configs/sft.py:tiny", f"--workdir={tmp_path}"]
  model = f"--config.init.model={tmp_path}/./model"
  assert cli.main(["train", *flags, model]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "model, which this run would replace at its end" in line


def test_port_of_process_0_that_is_taken_is_one_line():
  with socket.socket() as other:
    other.bind(("", 0))
    other.listen()
    port = other.getsockname()[1]
    with pytest.raises(InputError, match=f"port {port} can't be used"):
      command.connect(f"localhost:{port},2,0")


def test_process_0_that_is_not_there_is_one_line(monkeypatch):
  monkeypatch.setattr(command, "_PATIENCE", 0.0)
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  with pytest.raises(InputError, match=f"no process 0 at localhost:{port} in"):
    command.connect(f"localhost:{port},2,1")
  with pytest.raises(InputError, match="no process 0 at nowhere"):
    command.connect("nowhere.invalid:1,2,1")
  with pytest.raises(InputError, match="port is 99999, expected at most 65535"):
    command.connect("localhost:99999,2,1")
