"""Images that rewards are asked about, of random pixels."""

import numpy as np

from xomni_jax.rewards.wire import Item


def items(count, seed=0):
  rng = np.random.default_rng(seed)
  return [
    Item(
      f"i{n}", rng.integers(0, 256, (6, 5, 3), np.uint8), f"p{n}", ("A", "b")
    )
    for n in range(count)
  ]
