"""What the tests of files share; both are read only."""

import pytest

from tests.released_files import SOURCE, read_all
from xomni_jax.inference import checkpoint


@pytest.fixture(scope="session")
def original():
  """{part: {key: array}} of the golden checkpoint."""
  return read_all(SOURCE)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
  """The golden checkpoint exported as it is."""
  out = tmp_path_factory.mktemp("export") / "copy"
  checkpoint.export(SOURCE, out)
  return out
