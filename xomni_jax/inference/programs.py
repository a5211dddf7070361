"""What a loaded model runs: encoding, logits, and sequences that go on.

Functions of parameters and settings; what is compiled is compiled once for
each shape. Callers set the mesh.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from xomni_jax.config import ARConfig, Compute
from xomni_jax.data import protocol
from xomni_jax.inference import sampling
from xomni_jax.inference.sampling import Drawn, Sampling
from xomni_jax.mesh import to_host
from xomni_jax.models import ar, siglip, vq

# Prompts are padded to a multiple of this, so that a new length seldom means a
# new program.
_PROMPT_BUCKET = 32
# Tokens of an answer made by one call, between two looks at the progress bar.
_TEXT_RUN = 32


@partial(jax.jit, static_argnames=("vit", "quantiser", "compute"))
def encode(vit_params, vq_params, pixels, *, vit, quantiser, compute):
  """Codes i32[B, h, w] of pixels f32[B, H, W, 3]."""
  features = siglip.Siglip(vit, compute).apply({"params": vit_params}, pixels)
  return vq.VQ(quantiser, compute).apply(
    {"params": vq_params}, features, method="encode"
  )


@partial(jax.jit, static_argnames=("quantiser", "compute"))
def features(vq_params, codes, *, quantiser, compute):
  """Semantic features [B, h*w, Z] of codes i32[B, h, w]."""
  x = vq.VQ(quantiser, compute).apply(
    {"params": vq_params}, codes, method="decode"
  )
  return x.reshape(x.shape[0], -1, x.shape[-1])


@partial(jax.jit, static_argnames=("cfg", "compute", "mode"))
def logits(params, tokens, mask, *, cfg, compute, mode):
  hidden, _ = ar.XOmniAR(cfg, compute).apply(
    {"params": params}, tokens, ar.positions_of(mask), mask
  )
  return ar.joint_logits(params, hidden, cfg, mode)


def draw_codes(
  params: dict[str, Any],
  rows: Sequence[Sequence[int]],
  copies: tuple[int, ...],
  keys: jax.Array,
  grid: tuple[int, int],
  *,
  cfg: ARConfig,
  compute: Compute,
  how: Sampling,
  pad_id: int,
  made: Callable[[int], Any] | None = None,
) -> Drawn:
  """Codes [N, h*w] that follow sequences, with their log-probs, on the host.

  Args:
    params: of the AR model.
    rows: ids up to the first code; with guidance the last row is the negative.
    copies: sequences that each row's prefill serves.
    keys: [N], one a sequence.
    grid: (h, w) of codes.
    how: codes are drawn.
    pad_id: fills rows up on the left.
    made: told how many codes each call has made, which it then waits for.
  """
  h, w = grid
  state = _prefill(params, rows, keys, h * w, copies, cfg, compute, pad_id)
  drawn = []
  for _ in range(h):
    state, new = sampling.image_steps(
      params, state, cfg=cfg, compute=compute, sampling=how, steps=w
    )
    drawn.append(new)
    if made is not None:
      new.token.block_until_ready()  # work that is done, not queued
      made(new.token.size)
  return jax.tree.map(
    lambda *parts: np.concatenate([to_host(x) for x in parts], axis=1), *drawn
  )


def continue_text(
  params: dict[str, Any],
  ids: Sequence[int],
  key: jax.Array,
  *,
  cfg: ARConfig,
  compute: Compute,
  how: Sampling,
  limit: int,
  ends: tuple[int, ...],
  pad_id: int,
  made: Callable[[int], Any],
) -> list[int]:
  """Text tokens that follow a sequence, without the one that ends it.

  Args:
    params: of the AR model.
    ids: joint ids.
    key: [1], of the draws.
    how: tokens are drawn.
    limit: of tokens.
    ends: tokens that end the text.
    pad_id: fills the row up on the left.
    made: told how many tokens each call has made.
  """
  # Rounded up to whole runs, so that another limit is no other program.
  runs = -(-limit // _TEXT_RUN)
  length = runs * _TEXT_RUN
  state = _prefill(params, [ids], key, length, (1,), cfg, compute, pad_id)
  tokens: list[int] = []
  for _ in range(runs):
    state, new, count = sampling.text_steps(
      params,
      state,
      cfg=cfg,
      compute=compute,
      sampling=how,
      steps=_TEXT_RUN,
      ends=ends,
    )
    tokens += to_host(new)[0, : int(count)].tolist()
    made(int(count))
    if state.done.all():
      break
  tokens = tokens[:limit]
  if tokens[-1] in ends:
    tokens.pop()
  return tokens


def _prefill(params, rows, keys, steps, copies, cfg, compute, pad_id):
  tokens, mask = protocol.left_pad(rows, pad_id, _PROMPT_BUCKET)
  return sampling.prefill(
    params,
    tokens,
    mask,
    keys,
    cfg=cfg,
    compute=compute,
    steps=steps,
    copies=copies,
  )
