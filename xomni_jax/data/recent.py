"""What a source keeps between reads: files that are open, parts of them."""

import collections
from collections.abc import Callable, Hashable
from typing import Any

# Files of a source that stay open: all of a mixture of ten in a process are
# below 1024, the usual limit.
OPEN_FILES = 64


class Recent:
  """The last things asked for, at most so many; under its owner's lock.

  One that goes is left to whoever still has it: a file that another thread
  reads is closed when that is done.
  """

  def __init__(self, size: int):
    self._size = size
    self._things = collections.OrderedDict()

  def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
    """The thing of this key, made where it is not there; errors are make's."""
    if key not in self._things:
      made = make()
      while len(self._things) >= self._size:
        self._things.popitem(last=False)
      self._things[key] = made
    self._things.move_to_end(key)
    return self._things[key]
