"""What a stage gives the loop.

A stage is data and pure functions: which parameters there are, the loss of a
batch, and, for people, pictures and files. It knows nothing of optimisers,
meshes, checkpoints or logs.

Losses and metrics are *contributions*: the loop adds up what it gets from
every device and every microbatch. So a loss divides by the totals of the whole
global batch, which the loop hands to it, and not by its own counts. Only of a
metric called "..._max", never negative, the greatest is taken.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from xomni_jax.inference.sheets import Picture
from xomni_jax.params import Row

Params = dict[str, Any]
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

_HELD_OUT_SEED = 20_250_728


@dataclasses.dataclass(frozen=True)
class Part:
  """One model of a stage: its parameter table and abstract parameters."""

  table: Sequence[Row]
  tree: Any


class Context(NamedTuple):
  """What a loss gets besides parameters and rows.

  Attributes:
    key: of this step, the same on every device; draw per row with `row_keys`.
    step: i32[], of the run; on held-out batches the last that is done.
    totals: sums over the global batch of what `Program.totals` returned.
    train: False on held-out batches (no dropout).
  """

  key: jax.Array
  step: jax.Array
  totals: Mapping[str, jax.Array]
  train: bool = True

  @property
  def noise_key(self) -> jax.Array:
    """Key of noise that held-out rows need too.

    There it is the same whatever the step and the run, so that two evaluations
    differ by the model alone.
    """
    return self.key if self.train else jax.random.key(_HELD_OUT_SEED)


def row_keys(key: jax.Array, ids: jax.Array) -> jax.Array:
  """A key for each row, by its record's id i32[B] and not by its place."""
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)


@dataclasses.dataclass(frozen=True)
class Program:
  """The part of a stage that is compiled.

  Attributes:
    parts: every model whose parameters the loss reads, by name.
    init: key -> random f32 parameters {part: tree}; jittable.
    totals: batch -> {name: f32[]}, sums of what counts in the given rows;
      a step where all are 0 leaves parameters and moments as they are.
    loss: (params, batch, context) -> contribution f32[], {metric: array}.
    batch: one global batch as shapes; the first axis is rows.
    tokens: counted as work in tokens/s, of a global batch.
    flops: of one step, forward and backward, counted analytically.
    summarise: metrics summed over the batch -> scalars to report.
    update: (params, extra, metrics, context) -> params, extra, after the
      optimiser; for state that no gradient reaches.
    extra: what is carried from step to step, at the start; arrays below a
      name "rows" lie split as a batch does.
    measure: (params, batch) -> arrays of each row, which `Stage.collect` asks
      for.
  """

  parts: Mapping[str, Part]
  init: Callable[[jax.Array], Params]
  totals: Callable[[Batch], Mapping[str, jax.Array]]
  loss: Callable[[Params, Batch, Context], tuple[jax.Array, Metrics]]
  batch: Mapping[str, jax.ShapeDtypeStruct]
  tokens: int
  flops: float
  summarise: Callable[[Metrics], Metrics] = lambda metrics: metrics
  update: Callable | None = None
  extra: Callable[[], Any] = dict
  measure: Callable[[Params, Batch], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
  """A program, and what it needs from and leaves in the world.

  Attributes:
    program: what is compiled.
    batches: phase index -> its batches (`data.pipeline.Batches`).
    held_out: the held-out batches; None: there are none.
    load: mesh, dtype by part -> {part: params} of the parts that come from
      files; the rest is drawn by `program.init`.
    preview: params, step -> pictures; None: there are none.
    export: params, folder -> None: writes the model for people to use into a
      new folder, and what goes with it beside that.
    prepare: {step: (params, extra, batches) -> params, extra}, done before
      that step, such as a k-means start.
    collect: (measure, params, extra, step) -> rows, extra, metrics: the rows
      of a step that the parameters make themselves, such as a rollout, whole
      in every process; and what is carried on, saved with the state.
      `measure` is the program's, of such rows.
    collected_steps: steps that `collect` makes rows for at once; its metrics
      come with the first of them.
    evaluate: (params, step) -> metrics, where held-out rows are not enough.
    curves: prefix of metrics that are drawn over steps; "": of none.
    close: called at the end, however it comes.
  """

  program: Program
  batches: Callable[[int], Any] | None = None
  held_out: Any = None
  load: Callable[..., Params] = lambda mesh, dtypes: {}
  preview: Callable[[Params, int], list[Picture]] | None = None
  export: Callable[[Params, Any], None] | None = None
  prepare: Mapping[int, Callable] = dataclasses.field(default_factory=dict)
  collect: Callable | None = None
  collected_steps: int = 1
  evaluate: Callable[[Params, int], Mapping[str, float]] | None = None
  curves: str = ""
  close: Callable[[], None] = lambda: None
