"""What the loss of every stage of pictures has to do.

`value_of(batch)` is the loss of a batch of four rows, and its metrics; a batch
has the records' numbers as "id".
"""

import jax
import jax.numpy as jnp
import numpy as np


def adds_up_over_devices(program, loss, params, batch):
  """Halves, each divided by the whole batch's totals, make the whole."""
  totals, key = program.totals(batch), jax.random.key(1)
  whole = loss(params, batch, totals, key)
  halves = [
    loss(params, {k: x[i : i + 2] for k, x in batch.items()}, totals, key)
    for i in (0, 2)
  ]
  total = jax.tree.map(jnp.add, *halves)
  # The same sums in another order; some are 0.
  assert jax.tree.all(
    jax.tree.map(lambda a, b: abs(a - b) <= 1e-5 * abs(a), whole, total)
  )


def rows_draw_by_record_and_not_by_place(value_of, batch, least):
  """Other records' draws change the loss by more than `least`."""
  order = np.array([2, 0, 3, 1])
  moved = {name: x[order] for name, x in batch.items()}
  assert abs(value_of(batch)[0] - value_of(moved)[0]) < 1e-5
  other = {**batch, "id": batch["id"] + 1}
  assert abs(value_of(batch)[0] - value_of(other)[0]) > least
