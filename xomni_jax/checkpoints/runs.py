"""Checkpoints of a run's state: written in the background, checked on reading.

Orbax writes a checkpoint into a temporary folder, which gets its name
`<folder>/<step>` once it is complete. The last file in it is a manifest of the
sizes and hashes of the others: a checkpoint that has one is finished, and one
that was altered later is noticed.
"""

import logging
import os
import pathlib
import re
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from xomni_jax.checkpoints import manifest
from xomni_jax.errors import InputError
from xomni_jax.train_config import CheckpointConfig

_COMMITTED = "commit_success.txt"  # Orbax's, the very last
_TEMPORARY = ".orbax-checkpoint-tmp"
_TIMEOUT = 2 * 3600  # seconds of a save; hundreds of GB take a while


class _Handler(ocp.StandardCheckpointHandler):
  """Orbax's, which adds the manifest before the checkpoint gets its name."""

  def finalize(self, directory):  # by process 0, after all have written
    super().finalize(directory)
    manifest.write(pathlib.Path(directory))


@ocp.args.register_with_handler(_Handler, for_save=True)
class _Save(ocp.args.StandardSave):
  pass


@ocp.args.register_with_handler(_Handler, for_restore=True)
class _Restore(ocp.args.StandardRestore):
  pass


class Runs:
  """The checkpoints of one run; all processes make one, of the same folder.

  The folder lies on a file system that all of them share.
  """

  def __init__(self, folder, cfg: CheckpointConfig):
    """Looks at nothing yet, so that a run's folder can be read while it runs.

    Raises:
      InputError: the folder cannot be made.
    """
    self.folder = pathlib.Path(folder).absolute()
    self._cfg = cfg
    for name in ("absl", "asyncio"):
      logging.getLogger(name).addFilter(_is_no_traceback)
    self._handler = _Handler()
    self._checkpointer = ocp.AsyncCheckpointer(
      self._handler, timeout_secs=_TIMEOUT
    )
    self._writing: int | None = None  # the step that is being written
    self._last: int | None = None  # saved or restored; -1: nothing to restore
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
      raise InputError(
        f"checkpoint folder {self.folder} cannot be made: {e.strerror}; "
        "give another one"
      ) from None

  def steps(self) -> list[int]:
    """Steps of finished checkpoints, ascending; their bytes not checked."""
    return [s for s in self._folders() if self._has(s, manifest.FILE)]

  def save(self, step: int, state: Any) -> None:
    """Saves a pytree of `jax.Array`s; returns once the host has a copy.

    The state may be donated or deleted then. A checkpoint of this step that
    this run has written or restored is left as it is. Once the new one is
    written, those of later steps are removed: `restore` has passed them over.

    Raises:
      InputError: this checkpoint or the one before could not be written, or
        there are later ones that `restore` was not asked for.
    """
    self.wait()
    if step == self._last:
      return
    newest = max(self._folders(), default=-1)
    if self._last is None and newest >= step:
      raise InputError(
        f"{self.folder} has a checkpoint of step {newest}, and step {step} of "
        "another run cannot be saved there; resume from it, or give another "
        "folder"
      )
    self._writing = step
    try:
      if jax.process_index() == 0:
        self._clear_temporary()
      # `force`: one of this step may be there that was no good.
      self._checkpointer.save(
        self.folder / str(step), args=_Save(_flat(state)), force=True
      )
    except OSError as e:
      raise self._failed(e) from e

  def wait(self) -> None:
    """Waits until the last checkpoint is written, then removes old ones.

    Raises:
      InputError: it could not be written; those before are as they were.
    """
    if self._writing is None:
      return
    try:
      self._checkpointer.wait_until_finished()
    except Exception as e:  # TensorStore's errors have no class in common
      raise self._failed(e) from e
    self._last, self._writing = self._writing, None
    if jax.process_index() == 0:
      self._remove_old(self._last)

  def close(self) -> None:
    """`wait`, and gives back Orbax's threads; may be called again.

    A checkpoint in the making is lost if the program ends without it.
    """
    try:
      self.wait()
    finally:
      self._checkpointer.close()

  def restore(self, abstract: Any) -> tuple[int, Any] | None:
    """(step, state) of the newest good checkpoint; None: there never was one.

    One that is not finished, or of which a file is missing or altered, is
    passed over with a line on standard output.

    Args:
      abstract: the state as ShapeDtypeStructs with shardings, on any mesh.
    Raises:
      InputError: there are checkpoints but no good one, or the newest good one
        holds other arrays than `abstract`; all differences are listed.
    """
    self.wait()
    step, lost = None, []
    while (step := of_main(self._newest(step))) >= 0:
      problem, was_finished = self._problem(step)
      if problem is None:
        state = self._read(step, abstract)
        self._last = step
        return step, state
      _say(f"checkpoint of step {step} passed over: {problem}")
      if was_finished:
        lost.append(step)
    if lost:
      raise InputError(
        f"none of the checkpoints in {self.folder} is intact (steps "
        f"{', '.join(map(str, sorted(lost)))}); bring back a copy, or give "
        "an empty folder to start anew"
      )
    self._last = -1
    return None

  def _folders(self) -> list[int]:
    """Steps that have a folder, finished or not, ascending."""
    names = [p.name for p in self.folder.iterdir() if p.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())

  def _has(self, step, name) -> bool:
    return (self.folder / str(step) / name).exists()

  def _newest(self, below: int | None) -> int:
    steps = [s for s in self._folders() if below is None or s < below]
    return max(steps, default=-1)

  def _problem(self, step: int) -> tuple[str | None, bool]:
    """What is wrong with a checkpoint (None: nothing); was it once finished.

    Every process checks its share of the files; all get the same answer.
    """
    folder, files, problem = self.folder / str(step), [], None
    finished = self._has(step, manifest.FILE) or self._has(step, _COMMITTED)
    try:
      files = manifest.read(folder)
    except InputError as e:
      problem = str(e) if finished else "it is not finished"
    unread, finished = of_main(problem is not None), bool(of_main(finished))
    if unread:
      return problem or "its manifest is unreadable", finished
    count, me = jax.process_count(), jax.process_index()
    found = manifest.altered(folder, files[me::count])
    kinds = len(manifest.PROBLEMS)
    mine = -1 if found is None else found[0] * kinds + found[1]
    for process, code in enumerate(_of_all(mine)):
      if code >= 0:
        name = files[code // kinds * count + process][0]
        return f"{folder / name} {manifest.PROBLEMS[code % kinds]}", finished
    return None, finished

  def _read(self, step: int, abstract: Any) -> Any:
    folder, wanted = self.folder / str(step), _flat(abstract)
    found = self._handler.metadata(folder).tree
    problems = _differences(found, wanted)
    if problems:
      raise InputError(
        f"checkpoint {folder} does not fit the run's config: "
        f"{'; '.join(problems)}; use the config it was saved with, or another "
        "folder"
      )
    flat = self._checkpointer.restore(folder, args=_Restore(wanted))
    leaves = [flat[name] for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)

  def _failed(self, error: BaseException) -> InputError:
    """The error of a checkpoint that could not be written."""
    step, self._writing = self._writing, None
    if jax.process_index() == 0:  # what is half written takes up space
      self._clear_temporary()
    code = re.search(r"os_error_code='(\d+)'", str(error))
    reason = os.strerror(int(code[1])) if code else " ".join(str(error).split())
    return InputError(
      f"checkpoint of step {step} could not be written to {self.folder}: "
      f"{reason}; make room there, earlier checkpoints are intact"
    )

  def _clear_temporary(self) -> None:
    for path in self.folder.glob(f"*{_TEMPORARY}*"):
      shutil.rmtree(path, ignore_errors=True)

  def _remove_old(self, last: int) -> None:
    """Removes what is not to be kept, now that `last` is written."""
    steps = [s for s in self.steps() if s <= last]
    every = self._cfg.keep_every
    kept = set(steps[-self._cfg.keep_last :])
    kept |= {s for s in steps if every and s % every == 0}
    for step in set(self._folders()) - kept:
      folder = self.folder / str(step)
      try:
        # First what makes it a finished one: this may be cut short.
        for name in (manifest.FILE, _COMMITTED):
          (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder)
      except OSError as e:
        _say(f"old checkpoint {folder} could not be removed: {e.strerror}")


def _flat(tree) -> dict[str, Any]:
  """{path: leaf}; so what is stored does not depend on kinds of containers."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  flat = {name(path): leaf for path, leaf in leaves}
  assert len(flat) == len(leaves)
  return flat


def _differences(found, wanted) -> list[str]:
  """One text for each way in which stored arrays are not those wanted."""
  show = lambda x: f"{np.dtype(x.dtype).name}{list(x.shape)}"
  groups = {
    "missing": sorted(wanted.keys() - found.keys()),
    "unused": sorted(found.keys() - wanted.keys()),
    "other": [
      f"{name} {show(found[name])} instead of {show(wanted[name])}"
      for name in sorted(wanted.keys() & found.keys())
      if show(found[name]) != show(wanted[name])
    ],
  }
  return [
    f"{len(names)} {kind}: {', '.join(names)}"
    for kind, names in groups.items()
    if names
  ]


def _is_no_traceback(record: logging.LogRecord) -> bool:
  """False for the hundreds of lines Orbax logs of an error that it raises.

  Of several tasks that fail it raises the first one's error. Those of the
  others asyncio logs, with the place of their code, when it clears them away.
  """
  where = record.getMessage() if record.name == "asyncio" else record.pathname
  return not (record.exc_info and "orbax" in where)


def of_main(value: int) -> int:
  """Process 0's value, in every process."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _of_all(value: int) -> list[int]:
  """The values of all processes, in their order."""
  if jax.process_count() == 1:
    return [value]
  return multihost_utils.process_allgather(np.int32(value)).tolist()


def _say(text: str) -> None:
  if jax.process_index() == 0:
    print(text, flush=True)
