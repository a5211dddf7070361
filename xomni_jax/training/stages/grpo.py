"""Stage `grpo`: the policy draws, images are painted and rewarded, it learns.

A rollout is `minibatches` global batches of images, which are gone through
`epochs` times. What is compiled is in grpo_program.py; drawing and painting
are in training/rollout.py, rewards in training/rewarding.py.
"""

import dataclasses
import pathlib
import re
import sys
import time
from typing import Any

import jax
import numpy as np

from xomni_jax import mesh as mesh_lib
from xomni_jax import params as params_lib
from xomni_jax.checkpoints import released
from xomni_jax.config import Architecture
from xomni_jax.data import encoder_ids, protocol
from xomni_jax.data.prompts import Prompt, Prompts
from xomni_jax.data.text_ops import T5Ids
from xomni_jax.errors import InputError
from xomni_jax.inference import checkpoint as checkpoint_lib
from xomni_jax.inference import fresh
from xomni_jax.inference.sheets import Picture
from xomni_jax.models import ar
from xomni_jax.rewards import combine
from xomni_jax.train_config import TrainConfig
from xomni_jax.training import credit
from xomni_jax.training.rewarding import Asked, Heard, Rewarder
from xomni_jax.training.rollout import Drawn, Roller, place_policy
from xomni_jax.training.stage import Params, Stage
from xomni_jax.training.stages import grpo_pictures, grpo_rows
from xomni_jax.training.stages.grpo_program import (
  POLICY,
  REFERENCE,
  program,
)

__all__ = ["program", "stage"]

# Keys of held-out rollouts: training never gets there.
_HELD_OUT = 2**30
# Sets the keys of rollouts apart from those of training.
_ROLLOUTS = 0x6790
_DECODER = ("vq", "flux", "vae", "clip", "t5")


def stage(
  cfg: TrainConfig,
  arch: Architecture,
  opened: checkpoint_lib.Checkpoint,
  workdir: pathlib.Path,
) -> Stage:
  """The stage on the prompts, folders and rewards that the config names.

  Args:
    cfg: of the run; `init.model` is where the policy starts, and what it must
      not stray from; `init.flux` is a FLUX.1-dev folder.
    arch: sizes; those of all parts are the folders'.
    opened: the model folder.
    workdir: of the run, where the ledger lies.
  Raises:
    InputError: sizes, files, prompts or rewards do not fit.
  """
  opts = cfg.options
  decoder = checkpoint_lib.open_decoder(opened, cfg.init.flux)
  arch = dataclasses.replace(
    arch,
    ar=opened.config.ar,
    siglip=opened.siglip,
    vq=opened.config.vq,
    flux=decoder.flux,
    vae=decoder.vae,
    clip=decoder.clip,
    t5=decoder.t5,
  )
  rows = cfg.global_batch * opts.minibatches
  grpo_rows.check(cfg, rows)
  made = program(cfg, arch)
  _check_phases(cfg.phases, made.parts[REFERENCE])
  run = _Run(cfg, arch, opened, decoder, rows, workdir)

  def load(mesh, dtypes):
    return {
      name: released.load(opened.parts["ar"], mesh, dtypes[name])
      for name in (POLICY, REFERENCE)
      if name in dtypes
    }

  return Stage(
    program=made,
    load=load,
    preview=run.preview if cfg.report.preview_every else None,
    export=lambda params, out: fresh.replace_parts(
      opened, out, {"ar": params[POLICY]}
    ),
    collect=run.collect,
    collected_steps=cfg.options.minibatches * cfg.options.epochs,
    evaluate=run.evaluate if cfg.eval_data else None,
    curves="reward/",
    close=run.close,
  )


def _check_phases(phases, reference):
  """InputError where a phase trains what KL is measured from, or has data."""
  for phase in phases:
    if phase.data is not None:
      raise InputError(
        f"phase {phase.name!r} has data of its own, which stage grpo does not "
        "know; put all prompts into the section 'data'"
      )
  rows = params_lib.matched(reference.table, reference.tree)
  for phase in phases:
    for path in (f"{REFERENCE}/{row.path}" for row, _ in rows):
      hits = lambda names, path=path: any(re.match(n, path) for n in names)
      if hits(phase.train) and not hits(phase.freeze):
        raise InputError(
          f"phase {phase.name!r} trains {path} of the reference policy, which "
          f"stays as it is; name what trains from its start, such as {POLICY}/"
        )


class _Run:
  """Rollouts of a run, and what is known of the last ones."""

  def __init__(self, cfg, arch, opened, decoder, rows, workdir):
    opts = cfg.options
    self._cfg, self._arch, self._decoder, self._rows = cfg, arch, decoder, rows
    self._files = {**opened.parts, **decoder.parts}
    self._tokenizer = protocol.load_tokenizer(
      opened.folder, arch.ar.vocab_size, arch.ar.image_vocab_size
    )
    per_rollout = rows // opts.group_size
    prompts = lambda data: Prompts(data, cfg.seed, per_rollout, opts.sizes)
    self._prompts = prompts(cfg.data)
    self._held_out = cfg.eval_data and prompts(cfg.eval_data)
    self._rewarder = Rewarder(
      opts.rewards,
      opts.combine,
      opts.group_size,
      workdir / "rewards",
      cfg.data.text_backend,
      opts.line_advantages,
    )
    self._roller: Roller | None = None
    self._next: tuple[dict, Asked] | None = None  # rows, scores on their way
    self._current: dict | None = None
    self._shown: tuple[Asked, Heard] | None = None

  def collect(self, measure, params: Params, extra, step: int):
    """The rows of a step, what is carried on, and metrics."""
    opts = self._cfg.options
    per_rollout = opts.minibatches * opts.epochs
    number, update = divmod(step, per_rollout)
    metrics: dict[str, Any] = {}
    if update == 0:
      extra, metrics = self._rollout(measure, params, extra, number)
    elif self._current is None:
      self._current = self._kept(extra["current"], number)
      if self._current is None:
        extra, metrics = self._rollout(measure, params, extra, number)
    first = update % opts.minibatches * self._cfg.global_batch
    some = slice(first, first + self._cfg.global_batch)
    rows = {k: x[some] for k, x in self._current.items()}
    grid = self._rolled(params).grid_of(self._prompts[number][0].size)
    return grpo_rows.tight(rows, grid), extra, metrics

  def _rollout(self, measure, params, extra, number):
    """A rollout with its advantages; with overlap, the next one drawn too."""
    opts, metrics = self._cfg.options, {}
    if self._next is None:
      rows = None
      if opts.overlap and number:  # the run was resumed: it is in the state
        rows = self._kept(extra["next"], number)
      self._next = self._begin(measure, params, number, rows, metrics)
    (rows, asked), self._next = self._next, None
    per_rollout = opts.minibatches * opts.epochs
    if opts.overlap and (number + 1) * per_rollout < self._cfg.steps:
      # Rewards of this rollout come in meanwhile.
      self._next = self._begin(measure, params, number + 1, None, metrics)
      kept = self._keep(params, self._next[0], number + 1)
      extra = {**extra, "next": kept}
    heard = self._rewarder.hear(asked)
    metrics |= {
      "time/reward_wait_seconds": heard.seconds,
      **heard.combined.metrics,
    }
    for line in heard.warnings:
      _say(line)
    grid = self._rolled(params).grid_of(self._prompts[number][0].size)
    rows, found = self._with_advantages(rows, heard, grid)
    metrics |= found
    self._shown, self._current = (asked, heard), rows
    if per_rollout > 1:
      extra = {**extra, "current": self._keep(params, rows, number)}
    return extra, metrics

  def _begin(self, measure, params, number, rows, metrics):
    """(rows, scores on their way); rows: drawn before, or None."""
    roller = self._rolled(params)
    prompts = self._prompts[number]
    grid = roller.grid_of(prompts[0].size)
    start = time.perf_counter()
    if rows is None:
      with jax.set_mesh(self._mesh):
        drawn = roller.draw(self._policy(params), prompts, number)
      drawn_at = time.perf_counter()
      rows = self._measured(measure, drawn)
      metrics["time/rollout_seconds"] = drawn_at - start
      metrics["time/logp_seconds"] = time.perf_counter() - drawn_at
    start = time.perf_counter()
    fits = rows["mask"].any(axis=1)
    asked = self._ask(number, prompts, rows["codes"], grid, fits)
    metrics["time/paint_seconds"] = time.perf_counter() - start
    return rows, asked

  def _policy(self, params):
    return place_policy(
      params[POLICY],
      ar.rows(self._arch.ar),
      self._mesh,
      self._cfg.compute.dtype,
    )

  def _ask(self, number, prompts, codes, grid, fits) -> Asked:
    """Paints images and asks for their rewards; fits: bool of each image."""
    opts = self._cfg.options
    for prompt, whole in zip(prompts, fits[:: opts.group_size], strict=True):
      if not whole:
        _say(
          f"prompt {prompt.key} has more than {opts.prompt_len} tokens, "
          "passed over; raise options.prompt_len"
        )
    texts = [p for p in prompts for _ in range(opts.group_size)]
    # Images of a prompt that was cut are not what it asks for.
    each = [p if fit else None for p, fit in zip(texts, fits, strict=True)]
    step = number * opts.minibatches * opts.epochs
    fused = None
    if opts.reward_path == "fused":
      fused = self._rewarder.fused(step, each, self._mesh)
    with jax.set_mesh(self._mesh):
      images, table = self._roller.paint(
        codes[:, : grid[0] * grid[1]],
        # The decoder reads a prompt as the vocabulary spells it.
        [self._spelled(p) for p in texts],
        number,
        grid,
        fused,
      )
    if fused:
      # Not those that a device holds: it asks for others where several of a
      # tensor group hold the same.
      return Asked(step, fused.images, each, {}, table)
    return self._rewarder.ask(step, each, images)

  def _spelled(self, prompt: Prompt) -> str:
    return self._tokenizer.text(self._tokenizer.encode(prompt.text))

  def _measured(self, measure, drawn: Drawn) -> dict[str, np.ndarray]:
    """Rows with their log-probs before any update, whole on every host."""
    opts = self._cfg.options
    rows = {
      "tokens": drawn.tokens,
      "valid": drawn.valid,
      "codes": drawn.codes,
      # A prompt that was cut asks for something else.
      "mask": drawn.mask * drawn.fits[:, None],
      "advantage": np.zeros(drawn.codes.shape, np.float32),
      "logp_sampler": drawn.logp_sampler,
    }
    if drawn.support is not None:
      rows["support"] = drawn.support
    at_once = opts.score_rows or self._cfg.global_batch
    found = []
    for first in range(0, self._rows, at_once):
      some = {k: x[first : first + at_once] for k, x in rows.items()}
      made = measure(grpo_rows.tight(some, drawn.grid))
      found.append(jax.tree.map(mesh_lib.to_host, made))
    joined = jax.tree.map(lambda *x: np.concatenate(x), *found)
    longest = drawn.codes.shape[1]
    pad = lambda x: np.pad(x, ((0, 0), (0, longest - x.shape[1])))
    return {**rows, **jax.tree.map(pad, joined)}

  def _with_advantages(self, rows, heard: Heard, grid):
    advantage, metrics = credit.advantages(
      heard.combined.rewards, heard.columns, self._cfg.options, grid
    )
    behind = rows["codes"].shape[1] - advantage.shape[1]
    there = np.isfinite(heard.combined.rewards)[:, None]
    return {
      **rows,
      "advantage": np.pad(advantage, ((0, 0), (0, behind))),
      "mask": rows["mask"] * there,
    }, metrics

  def _keep(self, params, rows, number):
    """Rows of a rollout as they are saved with the state."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    return grpo_rows.keep(rows, self._mark(number), mesh)

  def _kept(self, saved, number):
    """Rows of this rollout out of a state; None: it has others."""
    return grpo_rows.kept(saved, self._mark(number))

  def _mark(self, number):
    return grpo_rows.mark(self._cfg, number, self._prompts[number])

  def evaluate(self, params: Params, step: int) -> dict[str, float]:
    """Mean rewards of held-out prompts, a group of images each."""
    roller, opts = self._rolled(params), self._cfg.options
    found = []
    for i in range(self._cfg.report.eval_batches):
      number, prompts = _HELD_OUT + i, self._held_out[i]
      # The same keys at every step: what differs is the policy.
      with jax.set_mesh(self._mesh):
        drawn = roller.draw(self._policy(params), prompts, number)
      asked = self._ask(number, prompts, drawn.codes, drawn.grid, drawn.fits)
      found.append(self._rewarder.hear(asked, watch=False).columns)
    metrics = combine.combine(
      combine.joined(found), opts.rewards, opts.group_size, opts.combine.quorum
    ).metrics
    return {
      f"held_out/{name.removeprefix('reward/')}": value
      for name, value in metrics.items()
    }

  def preview(self, params: Params, step: int) -> list[Picture]:
    """Images of the last rollout, with what the rewards said of them."""
    del params, step
    if self._shown is None:  # resumed, and nothing drawn yet
      return []
    asked, heard = self._shown
    return grpo_pictures.pictures(
      asked.images, heard.scores, asked.prompts, self._cfg.options.group_size
    )

  def close(self) -> None:
    self._rewarder.close()

  def _rolled(self, params) -> Roller:
    """The roller; the decoder is loaded when it is first needed."""
    if self._roller is None:
      cfg, decoder = self._cfg, self._decoder
      mesh = jax.tree.leaves(params)[0].sharding.mesh
      if sizes := dict(cfg.options.rollout_mesh):
        mesh = mesh_lib.make_mesh(**mesh_lib.fill(sizes, mesh.size))
      self._mesh = mesh
      with jax.set_mesh(mesh):  # keys belong to a mesh as well
        key = jax.random.fold_in(jax.random.key(cfg.seed), _ROLLOUTS)
      self._roller = Roller(
        options=cfg.options,
        arch=self._arch,
        compute=cfg.compute,
        scheduler=decoder.scheduler,
        tokenizer=self._tokenizer,
        t5_ids=T5Ids(
          decoder.folder / "tokenizer_2",
          encoder_ids.t5_length(decoder.folder / "tokenizer_2"),
          cfg.data.text_backend,
        ),
        clip_ids=encoder_ids.load_clip_tokenizer(
          decoder.folder / "tokenizer", self._arch.clip.max_position_embeddings
        ),
        parts={
          name: released.load(self._files[name], mesh, cfg.compute.dtype)
          for name in _DECODER
        },
        key=key,
      )
    return self._roller


def _say(line: str) -> None:
  """A warning, by one process for all: they all see the same."""
  if jax.process_index() == 0:
    print(f"warning: {line}", file=sys.stderr, flush=True)
