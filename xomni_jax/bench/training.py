"""The training step: packed rows beside padded ones, JAX beside PyTorch.

The step is that of `configs/pretrain.py:tiny`, in float32 on the CPU, with all
parameters training, by AdamW. The samples are signs of the drawn world as the
stage reads them, but with random codes, as there is no tokenizer to ask. Speeds
count tokens of samples only: padding is no work that anyone wants.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from xomni_jax import mesh as mesh_lib
from xomni_jax import params as params_lib
from xomni_jax.bench import measure, torch_training, work
from xomni_jax.config import Architecture, ARConfig
from xomni_jax.data import build_tokenizers, plan, protocol, sequences, world
from xomni_jax.models import ar
from xomni_jax.train_config import TrainConfig
from xomni_jax.training import step as step_lib
from xomni_jax.training.layout import flatten, make_layout
from xomni_jax.training.stages import ar as ar_stage

PACKED, PADDED = "packed rows, tokens/s", "padded rows, tokens/s"
SCANNED = "packed rows, layers as a scan, tokens/s"

# Largest differences of losses that count as the same: float32 sums in another
# order leave 1e-7 of the first. After a step of AdamW, which divides each
# gradient by its own size, those near zero, mostly rounding, count in full.
_FIRST, _LATER = 1e-4, 1e-2

_GRID = (6, 6)  # image tokens of a sign of 96 px
_LINES = 400  # signs whose text the tokenizer learns from

Batch = dict[str, np.ndarray]


def samples(cfg: ARConfig, count: int) -> list[sequences.Sample]:
  """Signs as token sequences: 7 of 10 to be drawn, the others to be read."""
  with tempfile.TemporaryDirectory() as folder:
    build_tokenizers.build_qwen(
      build_tokenizers.world_lines(_LINES),
      folder,
      cfg.vocab_size,
      cfg.image_vocab_size,
      cfg.mm_vocab_size,
    )
    tokenizer = protocol.load_tokenizer(
      folder, cfg.vocab_size, cfg.image_vocab_size
    )
  rng = np.random.default_rng(0)
  signs, out = world.open_world("signs"), []
  for i in range(count):
    codes = rng.integers(0, cfg.image_vocab_size, _GRID, dtype=np.int32)
    task = "text_to_image" if i % 10 < 7 else "image_to_text"
    record = signs[i] | {"codes": codes}
    out.append(sequences.sample(record, task, tokenizer, rng))
  return out


def packed_and_padded(
  cfg: TrainConfig, sizes: ARConfig
) -> tuple[list[Batch], list[Batch], int, int]:
  """The same samples in one packed global batch, and one a row.

  Returns:
    packed batch, padded batches, samples and their tokens. Rows are packed as
    a run does it, of a window of `data.window` samples.
  """
  drawn = samples(sizes, cfg.data.window)
  lengths = np.array([len(s.tokens) for s in drawn])
  rows, _ = plan.pack(lengths, cfg.data.seq_len)
  rows = plan.shuffled(rows, cfg.seed, 0)[: cfg.global_batch]
  chosen = [n for row in rows for n in row]
  alone = [[n] for n in chosen]
  batches = [
    _batch(cfg, [[drawn[n] for n in row] for row in group])
    for group in (
      rows,
      *(
        alone[i : i + cfg.global_batch]
        for i in range(0, len(alone), cfg.global_batch)
      ),
    )
  ]
  return batches[:1], batches[1:], len(chosen), int(lengths[chosen].sum())


def _batch(cfg, rows) -> Batch:
  """A global batch, filled up with rows of padding."""
  shape = (cfg.global_batch, cfg.data.seq_len)
  out = {
    name: np.zeros(shape, np.int32)
    for name in ("tokens", "segments", "positions")
  }
  out["weights"] = np.zeros(shape, np.float32)
  for b, row in enumerate(rows):
    at = 0
    for segment, sample in enumerate(row, 1):
      span = slice(at, at + len(sample.tokens))
      out["tokens"][b, span] = sample.tokens
      out["weights"][b, span] = sample.weights
      out["segments"][b, span] = segment
      out["positions"][b, span] = np.arange(len(sample.tokens))
      at = span.stop
  return out


def jax_trainer(
  cfg: TrainConfig, arch: Architecture, params: Any
) -> Callable[[Sequence[Batch]], Callable[[], np.ndarray]]:
  """batches -> a call that trains a step on each and returns their losses.

  The step is compiled once for all batches; each call's run starts from
  `params` and goes on from call to call.
  """
  program = ar_stage.program(cfg, arch)
  mesh = mesh_lib.make_mesh(data=1, devices=jax.devices()[:1])
  phases = [dataclasses.replace(cfg.phases[0], train=("ar/",))]
  layout = make_layout(program.parts, phases, mesh, cfg.frozen_dtype)
  step = step_lib.train_step(cfg, program, layout, 0)
  lr, key = np.float32(cfg.optim.lr), jax.random.key(0)

  def start(batches):
    with jax.set_mesh(mesh):
      begin = jax.jit(
        lambda flat: step_lib.init_state(cfg, program, layout, flat),
        out_shardings=jax.tree.map(
          lambda x: x.sharding, step_lib.abstract_state(cfg, program, layout)
        ),
      )
      held = [begin(flatten({"ar": params}))]

    def call():
      losses = []
      with jax.set_mesh(mesh):
        for rows in batches:
          placed = step_lib.place_batch(rows, mesh)
          state, report = step(held.pop(), {}, placed, key, lr)
          held.append(state)
          losses.append(report["loss"])
      return np.array(jax.device_get(losses), np.float64)

    return call

  return start


def compare(
  cfg: TrainConfig, arch: Architecture, repeats: int
) -> dict[str, Any]:
  """Speeds of both frameworks, all calls in turn.

  Args:
    cfg, arch: of stage `pretrain`.
    repeats: timed calls a figure.
  Returns:
    parameters, samples, tokens, padded_steps: counts; absent: packages without
    which PyTorch's speeds are None; figures: {figure: {"jax", "torch":
    tokens/s, "ratio", "first", "second"}}, the last two being differences of
    the losses before and after an update; packing: {framework: packed / padded
    speed}.
  Raises:
    RuntimeError: the losses differ, so that a ratio would mean nothing.
  """
  # PyTorch's side has AdamW alone.
  cfg = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, muon=()))
  missing = measure.absent("torch", "transformers")
  if not missing:
    import torch

    torch.set_num_threads(measure.cores())
  measure.say("train: samples and weights ...")
  packed, padded, count, tokens = packed_and_padded(cfg, arch.ar)
  params = work.random_params(ar.abstract(arch.ar), "float32")
  state = dict(params_lib.to_torch(ar.rows(arch.ar), params))
  unrolled, scanned = (
    jax_trainer(_with_scan(cfg, scan), arch, params) for scan in (False, True)
  )
  calls = {
    (PACKED, "jax"): unrolled(packed),
    (PADDED, "jax"): unrolled(padded),
    (SCANNED, "jax"): scanned(packed),
  }
  if not missing:
    for figure, batches in ((PACKED, packed), (PADDED, padded)):
      call = torch_training.trainer(cfg, arch.ar, state, batches)
      calls[figure, "torch"] = call
  start = time.perf_counter()
  losses = {}
  for name, call in calls.items():
    losses[name] = [call(), call()]
    measure.say(
      f"train: {' in '.join(name)}: ready ({time.perf_counter() - start:.0f} s)"
    )
  ordered = sorted(calls, key=lambda name: name[0])  # a figure's pair together
  seconds = measure.median_seconds([calls[n] for n in ordered], repeats)
  speeds = {n: tokens / s for n, s in zip(ordered, seconds, strict=True)}
  measure.say(f"train: {time.perf_counter() - start:.0f} s")
  figures = {
    figure: _figure(figure, speeds, losses)
    for figure in (PACKED, PADDED, SCANNED)
  }
  ours, theirs = (
    figures[PACKED][name] and figures[PACKED][name] / figures[PADDED][name]
    for name in ("jax", "torch")
  )
  return {
    "parameters": work.count(params),
    "samples": count,
    "tokens": tokens,
    "padded_steps": len(padded),
    "rows": [cfg.global_batch, cfg.data.seq_len],
    "absent": missing,
    "figures": figures,
    "packing": {"jax": ours, "torch": theirs},
  }


def _with_scan(cfg, scan):
  compute = dataclasses.replace(cfg.compute, scan_layers=scan)
  return dataclasses.replace(cfg, compute=compute)


def _figure(figure, speeds, losses) -> dict[str, float | None]:
  """A line of the report; what PyTorch does not do is compared with `PACKED`.

  Raises:
    RuntimeError: the losses differ.
  """
  ours, theirs = (speeds.get((figure, f)) for f in ("jax", "torch"))
  other = losses.get((figure, "torch"))
  if figure == SCANNED:
    other = losses[PACKED, "jax"]
  first = second = None
  if other is not None:
    first, second = (
      float(np.abs(a[0] - b[0]))
      for a, b in zip(losses[figure, "jax"], other, strict=True)
    )
    if not (first <= _FIRST and second <= _LATER):
      raise RuntimeError(
        f"{figure}: losses differ by {first:.1e}, and by {second:.1e} in the "
        f"second call, expected at most {_FIRST:.0e} and {_LATER:.0e}; their "
        "times can't be compared"
      )
  ratio = ours / theirs if theirs else None
  return {
    "jax": ours,
    "torch": theirs,
    "ratio": ratio,
    "first": first,
    "second": second,
  }


def table(report: Mapping[str, Any]) -> str:
  """The comparison, with lines above it about what was compared."""
  rows, length = report["rows"]
  lines = [
    f"training step, float32, {report['parameters'] / 1e6:.2f}M parameters, "
    f"{rows} x {length} tokens;",
    f"{report['samples']} samples of {report['tokens']} tokens, in 1 packed "
    f"step or {report['padded_steps']} padded ones;",
    "differences are of the losses of the first and the second call",
  ]
  if report["absent"]:
    lines.append(f"not installed: {', '.join(report['absent'])}")
  shown = lambda x: "-" if x is None else f"{x:.0e}"
  number = measure.number
  body = [
    [
      figure,
      *(number(e[name]) for name in ("jax", "torch", "ratio")),
      *(shown(e[name]) for name in ("first", "second")),
    ]
    for figure, e in report["figures"].items()
  ]
  packing = report["packing"]
  pair = [number(packing[name]) for name in ("jax", "torch")]
  body.append(["packed / padded", *pair, "", "", ""])
  header = ["", "JAX", "PyTorch", "ratio", "first", "second"]
  return "\n".join([*lines, measure.table(header, body)])
