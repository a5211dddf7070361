"""Stopping in time when a machine is about to be taken away."""

import os
import signal

import jax
from jax.experimental import multihost_utils

EXIT_PREEMPTED = 143  # 128 + SIGTERM: the state is saved, start it again


class Preemption:
  """Notes SIGTERM and the first SIGINT, for the loop to stop after a step.

  with Preemption() as preemption:
    for step in ...:
      ...
      if preemption.should_stop(step):
        save; return EXIT_PREEMPTED

  A second SIGINT does what it did before.
  """

  def __init__(self):
    self._stop = False
    self._before = {}

  def __enter__(self):
    # Where JAX's processes are connected, its service has SIGTERM already, and
    # it also tells the other processes; SIGINT is passed on to it.
    self._connected = jax.distributed.is_initialized()
    self._handle(signal.SIGINT, self._interrupted)
    if not self._connected:
      self._handle(signal.SIGTERM, self._terminated)
    return self

  def __exit__(self, *exception):
    for number in list(self._before):
      self._restore(number)

  def should_stop(self, step: int) -> bool:
    """Whether to save and stop now, after `step`.

    Connected processes all call it after every step. They get True at the same
    one, soon after any of them was told to stop.
    """
    if self._connected:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._stop

  def _handle(self, number, handler):
    self._before[number] = signal.signal(number, handler)

  def _restore(self, number):
    signal.signal(number, self._before.pop(number))

  def _terminated(self, number, frame):
    self._stop = True

  def _interrupted(self, number, frame):
    self._restore(signal.SIGINT)
    print("stopping after this step; interrupt again to stop now", flush=True)
    if self._connected:
      os.kill(os.getpid(), signal.SIGTERM)
    self._stop = True
