"""What the tests of files and of the command line share."""

import shutil

import pytest

from tests.helpers import GOLDEN
from tests.released_files import SOURCE, read_all
from xomni_jax import cli
from xomni_jax.inference import checkpoint


@pytest.fixture(scope="session")
def original():
  """{part: {key: array}} of the golden checkpoint; read only."""
  return read_all(SOURCE)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
  """The golden checkpoint exported as it is; read only."""
  out = tmp_path_factory.mktemp("export") / "copy"
  checkpoint.export(SOURCE, out)
  return out


@pytest.fixture
def tree(tmp_path):
  """A copy of the tiny checkpoint whose files may be replaced."""
  shutil.copytree(
    GOLDEN, tmp_path / "tiny", ignore=shutil.ignore_patterns("golden.*")
  )
  return tmp_path / "tiny"


@pytest.fixture
def fails(tmp_path, capsys):
  """Runs the command and returns its one-line error."""

  def run(*argv, writes=()):
    before = sorted(p for p in tmp_path.rglob("*") if "tiny" not in p.parts)
    try:
      status = cli.main([str(a) for a in argv])
    except SystemExit as e:
      status = e.code
    out, err = capsys.readouterr()
    assert status == 2, (status, out, err)
    assert err.endswith("\n") and len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    after = sorted(p for p in tmp_path.rglob("*") if "tiny" not in p.parts)
    assert set(after) - set(before) <= set(writes), "left something behind"
    return err

  return run
