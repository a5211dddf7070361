"""Stopping when the machine is about to be taken away."""

EXIT_PREEMPTED = 143  # 128 + SIGTERM: saved, and to be started again


class Preemption:
  """Notes SIGTERM and SIGINT, for the loop to stop after a step.

  with Preemption() as preemption:
    for step in ...:
      ...
      if preemption.should_stop(step):
        break
  """

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    pass

  def should_stop(self, step: int) -> bool:
    """Whether to save and stop now; called by every process at every step.

    With several processes all get True at the same step, after any of them got
    a signal (or JAX a preemption notice).
    """
