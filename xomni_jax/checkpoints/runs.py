"""Checkpoints of a run's state: written in the background, checked on reading.

Orbax writes a checkpoint to a temporary folder, which gets its name
`<folder>/<step>` when it is complete. Into it goes, as the last file, a
manifest of the sizes and hashes of all others: what has one is finished, and
what was changed afterwards is noticed.
"""

import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from xomni_jax.checkpoints import manifest
from xomni_jax.errors import InputError
from xomni_jax.train_config import CheckpointConfig

_COMMITTED = "commit_success.txt"  # Orbax's, after everything else
_TEMPORARY = ".orbax-checkpoint-tmp"
# Of a whole save, hashing included; hundreds of GB take a while.
_TIMEOUT = 2 * 3600


class _Handler(ocp.StandardCheckpointHandler):
  """Orbax's, which writes the manifest before the checkpoint gets its name."""

  def finalize(self, directory):  # on process 0, after all have written
    super().finalize(directory)
    manifest.write(pathlib.Path(directory))


@ocp.args.register_with_handler(_Handler, for_save=True)
class _Save(ocp.args.StandardSave):
  pass


@ocp.args.register_with_handler(_Handler, for_restore=True)
class _Restore(ocp.args.StandardRestore):
  pass


class Runs:
  """The checkpoints of one run, in `folder`; every process makes one.

  The folder is on a file system that all processes share.
  """

  def __init__(self, folder, cfg: CheckpointConfig):
    """Makes the folder, and removes what a killed run left half written."""

  def steps(self) -> list[int]:
    """Steps of finished checkpoints, ascending; their bytes not checked."""

  def save(self, step: int, state: Any) -> None:
    """Saves a pytree of `jax.Array`s; returns once it is copied to the host.

    The state may be donated afterwards. A checkpoint of this step that is
    already good stays; all of later steps are removed, since they belong to a
    history that was left.

    Raises:
      InputError: this or the previous checkpoint could not be written.
    """

  def wait(self) -> None:
    """Waits until the last checkpoint is written, and removes old ones.

    Raises:
      InputError: it could not be written; older checkpoints are as they were.
    """

  def close(self) -> None:
    """`wait`, and gives back Orbax's threads."""

  def restore(self, abstract: Any) -> tuple[int, Any] | None:
    """(step, state) of the newest good checkpoint; None: there are none.

    One that is not finished, or of which a file is missing or altered, is
    passed over with a line on standard output.

    Args:
      abstract: the state as ShapeDtypeStructs with shardings, of any mesh.
    Raises:
      InputError: there are checkpoints but no good one, or the newest good one
        has other arrays than `abstract`; all differences are listed.
    """
