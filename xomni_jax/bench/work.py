"""The timed work: figures, and calls that do them in JAX.

A maker gets everything ready and returns a call; a call does the work once,
waits for it, and returns what both frameworks must agree on. `torch_work` does
the same in PyTorch, but for this: JAX's prefill stops at the last block's keys
and values, as nothing else of it is used; its vision-only blocks select where
they write; and it adds semantic features (zeros here), one small linear layer a
step that the model of diffusers does not have.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xomni_jax import params as params_lib
from xomni_jax.config import ARConfig, Compute
from xomni_jax.flux_config import FluxConfig
from xomni_jax.inference import flow, sampling
from xomni_jax.models import ar

Call = Callable[[], np.ndarray]
Makers = dict[str, Callable[[], Call]]

# Sigmas of the timed step; 1 apart, so that the velocity counts in full.
LEVELS = (1.0, 0.0)
CFG_SCALE = 2.0  # any but 1 gives the two-fold batch


@dataclasses.dataclass(frozen=True)
class Load:
  """How much work a call does.

  Attributes:
    prompt: tokens prefilled.
    steps: tokens decoded by one call.
    batches: sequences decoded at once, for one figure each.
    grid: (rows, columns) of image tokens, 16 x 16 px each.
    text: text tokens beside them.
  """

  prompt: int
  steps: int
  batches: tuple[int, ...]
  grid: tuple[int, int]
  text: int

  @property
  def prefill(self) -> str:
    return f"prefill of {self.prompt}, tokens/s"

  def decode(self, batch: int) -> str:
    return f"decode, batch {batch}, tokens/s"

  @property
  def denoise(self) -> str:
    h, w = self.grid
    return f"denoising {16 * h} x {16 * w} px, steps/s"

  def figures(self) -> dict[str, dict[str, float]]:
    """{model: {figure: amount of work of one call, in the figure's unit}}."""
    decode = {self.decode(b): b * self.steps for b in self.batches}
    return {
      "ar": {self.prefill: self.prompt, **decode},
      "flux": {self.denoise: 1},
    }


LOADS = {
  # 512 x 512 px with FLUX's 512 text tokens: seconds a call on few cores.
  "100m": Load(prompt=512, steps=32, batches=(1, 8), grid=(32, 32), text=512),
  # The released image size: 1152 px, 5184 tokens.
  "7b": Load(prompt=1024, steps=64, batches=(1, 64), grid=(72, 72), text=512),
  "tiny": Load(prompt=16, steps=4, batches=(1, 4), grid=(2, 3), text=8),
}


def random_params(tree: Any, dtype: str) -> dict[str, Any]:
  """Weights of a model: uniform of deviation 0.02, norm scales around 1.

  They are drawn on the device, in arithmetic that fuses into one loop a leaf:
  neither the host nor the device's peak memory sees more than the weights, and
  it compiles in a fraction of jax.random's time.
  """
  leaves = params_lib.flatten(tree)
  return params_lib.unflatten(
    {
      path: _leaf(np.uint32(i), leaf.shape, dtype, path.endswith("/scale"))
      for i, (path, leaf) in enumerate(leaves.items())
    }
  )


@partial(jax.jit, static_argnames=("shape", "dtype", "is_scale"))
def _leaf(seed, shape, dtype, is_scale):
  index = seed * np.uint32(0x9E3779B9)
  for axis, size in enumerate(shape):
    iota = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    index = index * np.uint32(size) + iota  # may wrap, which does no harm
  # The finaliser of MurmurHash3: every bit of the index changes half the bits.
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    index = (index ^ (index >> shift)) * np.uint32(factor)
  index ^= index >> 16
  uniform = index.astype(jnp.float32) * 2.0**-31 - 1  # in [-1, 1)
  return (is_scale + 0.02 * 3**0.5 * uniform).astype(dtype)


def count(tree: Any) -> int:
  """Parameters in a tree of arrays or shapes."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def codes(cfg: ARConfig, length: int) -> np.ndarray:
  """The prompt, i32[1, length], as indices into the image vocabulary."""
  return np.random.default_rng(0).integers(
    0, cfg.image_vocab_size, (1, length), dtype=np.int32
  )


def jax_ar(cfg: ARConfig, compute: Compute, params: Any, load: Load) -> Makers:
  """The AR figures with the code that generates images.

  Calls return keys of the last block f32[1, K, T, H], or the log-probs
  f32[batch, steps] of what was drawn.
  """
  # The last token goes through the first decoding step, not the prefill.
  tokens = codes(cfg, load.prompt + 1) + cfg.vocab_size
  last = list(ar.stacks(cfg))[-1] if cfg.num_mm_head_layers else "lm"

  def prefill(copies):
    return sampling.prefill(
      params,
      tokens,
      np.ones(tokens.shape, bool),
      sampling.sequence_keys(0, copies),
      cfg=cfg,
      compute=compute,
      steps=load.steps,
      copies=(copies,),
    )

  def prefill_call():
    cache = prefill(1).cache[last]
    keys = cache.k[-1] if compute.scan_layers else cache[-1].k
    return _numpy(keys[:, :, : load.prompt])

  def decode(batch):
    state = prefill(batch)
    # What a call changes besides the cache, whose new slots the next call
    # overwrites; on the host, as the arrays themselves are donated.
    start = {n: np.asarray(getattr(state, n)) for n in ("token", "position")}
    start["slot"] = np.asarray(state.slot)
    held = [state._replace(**start)]

    def call():
      state, drawn = sampling.image_steps(
        params,
        held.pop(),
        cfg=cfg,
        compute=compute,
        sampling=sampling.Sampling(greedy=True),
        steps=load.steps,
      )
      held.append(state._replace(**start))
      return _numpy(drawn.raw_logprob)

    return call

  decodes = {load.decode(b): partial(decode, b) for b in load.batches}
  return {load.prefill: lambda: prefill_call, **decodes}


def jax_flux(
  cfg: FluxConfig, compute: Compute, params: Any, load: Load
) -> Makers:
  """The FLUX figure with the decoding loop's step.

  The call returns the latents f32[1, L, C].
  """

  def make():
    latents, text, pooled = denoising_inputs(cfg, load)
    dtype = jnp.dtype(compute.dtype)
    text, pooled = jnp.asarray(text, dtype), jnp.asarray(pooled, dtype)
    features = jnp.zeros((1, latents.shape[1], cfg.siglip_channels), dtype)

    def call():
      return _numpy(
        flow.euler_step(
          params,
          latents,  # from the host each time: the step takes its memory
          *map(np.float32, LEVELS),
          text,
          pooled,
          features,
          cfg=cfg,
          compute=compute,
          grid=load.grid,
          cfg_scale=CFG_SCALE,
        )
      )

    return call

  return {load.denoise: make}


def denoising_inputs(cfg: FluxConfig, load: Load):
  """latents [1, L, C], text [2, T, E], pooled [2, P], standard normal f32."""
  rng = np.random.default_rng(0)
  return tuple(
    rng.standard_normal(shape, dtype=np.float32)
    for shape in (
      (1, math.prod(load.grid), cfg.in_channels),
      (2, load.text, cfg.joint_attention_dim),
      (2, cfg.pooled_projection_dim),
    )
  )


def _numpy(x) -> np.ndarray:
  return np.asarray(x, np.float32)
