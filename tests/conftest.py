"""Settings and fixtures that every folder of tests shares.

`pytest tests/parity --parity-table` prints the worst error of every comparison
with a reference, as the table of the README.
"""

import json
import os

# Before jax is imported. A TPU or GPU is used where one is asked for.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes most of the time of most tests, and this cuts it by a third;
# errors against the golden values stay what they are.
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)
# Parity is claimed for float32; accelerators round its matmuls by default.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

import pytest

from tests import helpers

# Files of tests that take minutes, the longest first.
LONG = (
  *("test_recipe", "test_grpo_resume", "test_train_eight", "test_demo"),
  *("test_stage_tokenizer", "test_stage_decoder", "test_grpo", "test_eval"),
)


def pytest_addoption(parser):
  parser.addoption(
    "--parity-table",
    action="store_true",
    help="print the worst error of every comparison with a reference",
  )


def pytest_collection_modifyitems(items):
  # Started last, they would be run alone.
  place = {name: i for i, name in enumerate(LONG)}
  items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


def pytest_terminal_summary(terminalreporter, config):
  if config.getoption("parity_table"):
    terminalreporter.write_line(helpers.parity_table())


@pytest.fixture(scope="session")
def golden():
  """The golden arrays by name."""
  return helpers.golden()


@pytest.fixture(scope="session")
def golden_json():
  """Golden strings, settings and cases."""
  return json.loads((helpers.GOLDEN / "golden.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def tiny():
  """The golden checkpoint, loaded in float32 through the public API."""
  import xomni_jax

  return xomni_jax.load(
    helpers.GOLDEN / "xomni", flux=helpers.GOLDEN / "flux1", dtype="float32"
  )
