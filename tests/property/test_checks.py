"""Files and folders that several processes write at the same time.

As on hosts that share a disk, where processes have equal numbers.
"""

import pytest

from xomni_jax import checks
from xomni_jax.checkpoints import released
from xomni_jax.errors import InputError


def test_files_written_at_the_same_time_are_whole(tmp_path):
  path = tmp_path / "file"
  with checks.replacing(path) as first, checks.replacing(path) as second:
    first.write_text("first")
    second.write_text("second")
  assert path.read_text() == "first"  # which ended last
  assert [*tmp_path.iterdir()] == [path]


def test_of_folders_written_at_the_same_time_one_is_there(tmp_path):
  out = tmp_path / "out"
  with (
    pytest.raises(InputError, match="can't be written"),
    released.staged(out) as first,
    released.staged(out) as second,
  ):
    (first / "file").write_text("first")
    (second / "file").write_text("second")
  assert (out / "file").read_text() == "second"
  assert [*tmp_path.iterdir()] == [out]
