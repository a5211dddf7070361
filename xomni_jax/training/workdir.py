"""A run's folder, looked at before anything is written into it."""

import pathlib
import secrets
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from xomni_jax.checkpoints import run_config
from xomni_jax.errors import InputError
from xomni_jax.train_config import TrainConfig

# What a run leaves at its end, in the place of what an earlier end left, and
# the step that it is of.
MODEL, EXPORTED = "model", "exported"
_LEFT = (MODEL, "flux1")
_PATIENCE = 10.0  # seconds until what one host wrote is seen by all


def check(folder: pathlib.Path, cfg: TrainConfig) -> None:
  """InputError where a run would destroy what it did not make, or hang."""
  named = {"init.model": cfg.init.model, "init.flux": cfg.init.flux}
  for left in (folder / name for name in _LEFT):
    for setting, value in named.items():
      if value and pathlib.Path(value).resolve().is_relative_to(left.resolve()):
        raise InputError(
          f"config: {setting} is {value}, which this run would replace at its "
          "end; give another --workdir"
        )
    begun = (folder / EXPORTED).exists() or run_config.has_saved(folder)
    if left.exists() and not begun:
      raise InputError(
        f"{left}: is there, but no run made it, and one would replace it at "
        "its end; move it, or give another --workdir"
      )
  if jax.process_count() > 1:
    _check_shared(folder)


def _check_shared(folder):
  """Checkpoints of several processes never end in folders of their own."""
  token = np.frombuffer(secrets.token_bytes(8), np.uint32)
  is_main = jax.process_index() == 0
  mark = lambda token: folder / f".seen-{token.tobytes().hex()}"
  if is_main:
    folder.mkdir(parents=True, exist_ok=True)
    mark(token).touch()
  seen = mark(np.asarray(multihost_utils.broadcast_one_to_all(token)))
  end = time.monotonic() + _PATIENCE
  while not seen.exists() and time.monotonic() < end:
    time.sleep(0.1)
  all_see = multihost_utils.process_allgather(np.array(seen.exists())).all()
  if is_main:
    seen.unlink()
  if not all_see:
    raise InputError(
      f"{folder}: made by process 0, but not to be seen by all; put --workdir "
      "on a file system that all processes share"
    )
