"""Drawing and painting images of the policy, all devices at once.

Everything a rollout has on the host is the same in every process: prompts,
codes, log-probs. Painted images stay with the process that painted them.
Shape letters: N images, P prompt tokens, L image tokens of the largest size.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xomni_jax import params as params_lib
from xomni_jax.config import Architecture, Compute
from xomni_jax.data import protocol
from xomni_jax.data.prompts import Prompt
from xomni_jax.errors import InputError
from xomni_jax.flux_config import SchedulerConfig
from xomni_jax.inference import flow, painter, sampling
from xomni_jax.mesh import to_host
from xomni_jax.params import Row
from xomni_jax.stage_options import GRPOOptions

DRAW, PAINT = range(2)  # what keys are for


def place_policy(params: Any, table: Sequence[Row], mesh: Mesh, dtype: str):
  """A policy's parameters as a rollout reads them: cast, and laid out anew.

  Args:
    params: of the AR model, on a mesh of the same devices.
    table: its parameter table.
    mesh: that draws.
  """
  here = jax.tree.leaves(params)[0].sharding.mesh
  if dtype != "float32":
    with jax.set_mesh(here):
      params = _cast(params, dtype)
  if mesh == here:
    return params
  return jax.device_put(params, params_lib.shardings(table, params, mesh))


@functools.partial(jax.jit, static_argnums=1)
def _cast(tree, dtype):
  return jax.tree.map(lambda x: x.astype(dtype), tree)


class Drawn(NamedTuple):
  """Images as codes.

  Attributes:
    tokens: i32[N, P + L - 1], joint ids: what the policy read.
    valid: bool[N, P + L - 1], False at padding, on the left of a prompt and
      behind a smaller image.
    codes: i32[N, L], 0 behind a smaller image.
    mask: f32[N, L], 1 where there is a code.
    logp_sampler: f32[N, L], log-probs as the sampler computed them.
    support: u8[N, L, ceil(V / 8)], see `sampling.Drawn`; None: all codes.
    grid: (rows, columns) of codes.
    fits: bool[N], False where the prompt was cut.
  """

  tokens: np.ndarray
  valid: np.ndarray
  codes: np.ndarray
  mask: np.ndarray
  logp_sampler: np.ndarray
  support: np.ndarray | None
  grid: tuple[int, int]
  fits: np.ndarray


@dataclasses.dataclass(frozen=True)
class Roller:
  """Draws and paints for one run.

  Attributes:
    options: of the stage.
    arch: sizes of all parts.
    compute: how models are computed.
    scheduler: of the decoder.
    tokenizer: of the policy.
    t5_ids, clip_ids: tokenizers of the decoder, texts -> i32[n, T].
    parts: {"vq", "flux", "vae", "clip", "t5": parameters}.
    key: of the run's rollouts.
  """

  options: GRPOOptions
  arch: Architecture
  compute: Compute
  scheduler: SchedulerConfig
  tokenizer: protocol.Tokenizer
  t5_ids: Callable[[Sequence[str]], np.ndarray]
  clip_ids: Callable[[Sequence[str]], np.ndarray]
  parts: dict[str, Any]
  key: jax.Array

  @property
  def pixels_per_token(self) -> int:
    """Side of an image token, px."""
    return self.arch.siglip.patch

  @functools.cached_property
  def length(self) -> int:
    """L, image tokens of the largest size."""
    return max(h * w for h, w in map(self.grid_of, self.options.sizes))

  def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of codes; InputError if a side is no multiple."""
    px = self.pixels_per_token
    if size[0] % px or size[1] % px:
      raise InputError(
        f"size {size[0]} x {size[1]} px is no multiple of {px} px a side "
        "(options.sizes)"
      )
    return size[0] // px, size[1] // px

  def keys(self, rollout: int, count: int, use: int) -> jax.Array:
    """[count] keys of a rollout's images; `use` is DRAW or PAINT."""
    key = jax.random.fold_in(jax.random.fold_in(self.key, use), rollout)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))

  def draw(
    self,
    policy: Any,
    prompts: Sequence[Prompt],
    rollout: int,
    *,
    greedy: bool = False,
    copies: int | None = None,
  ) -> Drawn:
    """`copies` images a prompt (the group's size), prompts of one size.

    Args:
      policy: parameters of the AR model.
      prompts: of the rollout; their number is a multiple of how many are drawn
        at once.
      rollout: number that keys come from.
      greedy: take the likeliest codes.
    """
    opts, G = self.options, copies or self.options.group_size
    h, w = grid = self.grid_of(prompts[0].size)
    ids, valid, fits = self._prompt_rows(prompts, grid)
    keys = self.keys(rollout, len(prompts) * G, DRAW)
    at_once = max(1, (opts.sample_rows or len(keys)) // G)
    how = sampling.Sampling(
      opts.temperature, opts.top_k, opts.top_p, opts.min_p, greedy
    )
    filters = not greedy and (opts.top_k or opts.top_p < 1 or opts.min_p)
    found = []
    for first in range(0, len(prompts), at_once):
      some = slice(first, first + at_once)
      state = sampling.prefill(
        policy,
        ids[some],
        valid[some],
        keys[first * G : (first + at_once) * G],
        cfg=self.arch.ar,
        compute=self.compute,
        steps=h * w,
        copies=(G,) * len(ids[some]),
      )
      _, drawn = sampling.image_steps(
        policy,
        state,
        cfg=self.arch.ar,
        compute=self.compute,
        sampling=how,
        steps=h * w,
        keep_support=bool(filters),
      )
      found.append(jax.tree.map(to_host, drawn))
    drawn = jax.tree.map(lambda *x: np.concatenate(x), *found)
    return self._drawn(drawn, ids, valid, fits, G, grid)

  def _drawn(self, drawn, ids, valid, fits, G, grid) -> Drawn:
    """With prompts repeated, and padded to the largest size."""
    behind = self.length - drawn.token.shape[1]
    pad = lambda x: np.pad(x, ((0, 0), (0, behind), *((0, 0),) * (x.ndim - 2)))
    codes, mask = pad(drawn.token), pad(np.ones(drawn.token.shape, np.float32))
    first = self.arch.ar.vocab_size
    return Drawn(
      tokens=np.concatenate(
        [np.repeat(ids, G, axis=0), codes[:, :-1] + first], axis=1
      ),
      valid=np.concatenate(
        [np.repeat(valid, G, axis=0), mask[:, :-1] > 0], axis=1
      ),
      codes=codes,
      mask=mask,
      logp_sampler=pad(drawn.logprob),
      support=None if drawn.support is None else pad(drawn.support),
      grid=grid,
      fits=np.repeat(fits, G),
    )

  def _prompt_rows(self, prompts, grid):
    """ids i32[n, P] and their mask, padded on the left; which ones fit."""
    P = self.options.prompt_len
    prefix = self.tokenizer.encode(protocol.image_prefix(*grid))
    if len(prefix) >= P:
      raise InputError(
        f"options.prompt_len is {P}, expected more than the {len(prefix)} "
        "tokens that begin an image"
      )
    ids = np.full((len(prompts), P), self.tokenizer.pad_id, np.int32)
    valid = np.zeros((len(prompts), P), bool)
    fits = np.ones(len(prompts), bool)
    for i, prompt in enumerate(prompts):
      row = self.tokenizer.encode(prompt.text)
      fits[i] = len(row) + len(prefix) <= P
      row = [*row[: P - len(prefix)], *prefix]
      ids[i, P - len(row) :], valid[i, P - len(row) :] = row, True
    return ids, valid, fits

  def paint(
    self,
    codes: np.ndarray,
    texts: Sequence[str],
    rollout: int,
    grid: tuple[int, int],
    score: Callable | None = None,
  ) -> tuple[dict[int, np.ndarray], np.ndarray | None]:
    """Images {row: u8[H, W, 3]} that are this process's to look at.

    Args:
      codes: i32[N, h*w].
      texts: N prompts, as the decoder reads them.
      rollout: number that the noise's keys come from.
      grid: (h, w).
      score: (images, rows i32) -> [n, R, 4 + 3K], computed in the same
        program; K are the lines that are told apart.
    Returns:
      the images, and None; where `score` is given, none, since it has seen
      them, and what it says of all rows, [R, N, 4 + 3K].
    """
    opts, count = self.options, len(codes)
    keys = self.keys(rollout, count, PAINT)
    if opts.same_noise:
      keys = keys[np.arange(count) // opts.group_size]
    levels = flow.sigmas(self.scheduler, grid[0] * grid[1], opts.paint_steps)
    empty = [""] * opts.paint_rows if opts.paint_cfg_scale != 1 else []
    mine, tables = {}, []
    for first in range(0, count, opts.paint_rows):
      # The last run is filled up with its first row: one program for all.
      rows = np.arange(first, first + opts.paint_rows)
      there = rows < count
      rows = np.where(there, rows, first)
      some = [*(texts[i] for i in rows), *empty]
      image, table = _paint_and_score(
        self.parts,
        codes[rows],
        self.t5_ids(some),
        self.clip_ids(some),
        keys[rows],
        levels,
        np.where(there, rows, -1).astype(np.int32),
        score=score,
        arch=self.arch,
        compute=self.compute,
        grid=tuple(grid),
        cfg_scale=opts.paint_cfg_scale,
      )
      if score:
        tables.append(to_host(table)[there])
        continue
      for i, pixels in own_rows(image):
        if first + i < count:
          mine[first + i] = pixels
    if not score:
      return mine, None
    return mine, np.moveaxis(np.concatenate(tables), 0, 1)


@functools.partial(
  jax.jit,
  static_argnames=("score", "arch", "compute", "grid", "cfg_scale"),
)
def _paint_and_score(parts, codes, t5, clip, keys, levels, rows, score, **how):
  image = painter.paint_rows(parts, codes, t5, clip, keys, levels, **how)
  return image, score(image, rows) if score else None


def own_rows(x: jax.Array):
  """(row, value) of the rows that this process is the first to hold.

  Rows that several processes hold go to the one of the lowest index, and a row
  is given once though several devices have it.
  """
  owner = {}
  for device, index in x.sharding.devices_indices_map(x.shape).items():
    first, last, _ = index[0].indices(x.shape[0])
    process = owner.get((first, last), device.process_index)
    owner[first, last] = min(process, device.process_index)
  done = set()
  for shard in x.addressable_shards:
    first, last, _ = shard.index[0].indices(x.shape[0])
    if (first, last) in done or owner[first, last] != jax.process_index():
      continue
    done.add((first, last))
    yield from enumerate(np.asarray(shard.data), first)
