"""The timed work, for JAX and for PyTorch: figures, and calls that do them.

A maker gets everything ready and returns a call; a call does the work once,
waits for it, and returns what both frameworks must agree on. PyTorch runs
eagerly in inference mode, with transformers' DynamicCache (what `generate`
uses by default).

The work is the same but for this: JAX's prefill stops at the last block's keys
and values, as nothing else of it is used; JAX's vision-only blocks select where
they write; and JAX adds semantic features (zeros here), which the model of
diffusers does not have, one small linear layer a step.
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
from xomni_jax.config import ARConfig, Compute, FluxConfig
from xomni_jax.inference import flow, sampling
from xomni_jax.models import ar, flux

Call = Callable[[], np.ndarray]
Makers = dict[str, Callable[[], Call]]

_LEVELS = (np.float32(1.0), np.float32(0.9))  # sigmas of the timed step
_CFG_SCALE = 2.0  # any but 1 gives the two-fold batch


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


def random_params(tree: Any, dtype: str) -> dict[str, Any]:
  """Weights of a model: normal * 0.02, norm scales around 1.

  They are drawn on the device, in parts, so that neither the host nor the peak
  of the device's memory sees more than the weights themselves.
  """
  leaves = params_lib.flatten(tree)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  return params_lib.unflatten(
    {
      path: _leaf(key, leaf.shape, dtype, float(path.endswith("/scale")))
      for key, (path, leaf) in zip(keys, leaves.items(), strict=True)
    }
  )


@partial(jax.jit, static_argnames=("shape", "dtype", "mean"))
def _leaf(key, shape, dtype, mean):
  parts = max(n for n in range(1, 65) if shape[0] % n == 0)
  part = (shape[0] // parts, *shape[1:])
  draw = lambda key: (mean + 0.02 * jax.random.normal(key, part)).astype(dtype)
  return jax.lax.map(draw, jax.random.split(key, parts)).reshape(shape)


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
          *_LEVELS,
          text,
          pooled,
          features,
          cfg=cfg,
          compute=compute,
          grid=load.grid,
          cfg_scale=_CFG_SCALE,
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


def torch_qwen2(cfg: ARConfig, dtype: str, device: str, state=None):
  """transformers' Qwen2ForCausalLM of the same sizes, over the image codes.

  Args:
    cfg: vision-only blocks become ordinary ones, which cost the same.
    dtype, device: PyTorch's names.
    state: {released key: array} to load; None: random weights.
  """
  from transformers import Qwen2Config, Qwen2ForCausalLM

  config = Qwen2Config(
    vocab_size=cfg.image_vocab_size,
    hidden_size=cfg.hidden_size,
    intermediate_size=cfg.intermediate_size,
    num_hidden_layers=cfg.num_hidden_layers,
    num_attention_heads=cfg.num_attention_heads,
    num_key_value_heads=cfg.num_key_value_heads,
    rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
    rms_norm_eps=cfg.rms_norm_eps,
    max_position_embeddings=cfg.max_position_embeddings,
    tie_word_embeddings=False,
  )
  make = lambda: Qwen2ForCausalLM(config)
  if state is not None:
    # Codes have the embedding, norm and head of the image side.
    theirs = {
      "model.mm_embed_tokens.weight": "model.embed_tokens.weight",
      "model.mm_norm.weight": "model.norm.weight",
      "mm_head.weight": "lm_head.weight",
    }
    text = ("model.lm_embed_tokens", "model.lm_norm", "lm_head")
    state = {
      theirs.get(k, k): v for k, v in state.items() if not k.startswith(text)
    }
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
      state[key] = state[key][: cfg.image_vocab_size]
  return _torch_model(make, dtype, device, state)


def torch_flux_model(cfg: FluxConfig, dtype: str, device: str, state=None):
  """diffusers' FluxTransformer2DModel of the same sizes."""
  from diffusers import FluxTransformer2DModel

  make = lambda: FluxTransformer2DModel(
    **{
      field.name: getattr(cfg, field.name)
      for field in dataclasses.fields(cfg)
      if field.name != "siglip_channels"
    }
  )
  if state is not None:
    state = {k: v for k, v in state.items() if k != "siglip_embed.weight"}
  return _torch_model(make, dtype, device, state)


def _torch_model(make, dtype, device, state):
  """A model born in its dtype on its device: no second copy, no host copy."""
  import torch

  before = torch.get_default_dtype()
  torch.set_default_dtype(getattr(torch, dtype))
  try:
    with torch.device(device):
      model = make()
  finally:
    torch.set_default_dtype(before)
  if state is not None:
    # Copied, as arrays that come from JAX are read-only.
    model.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
  return model.eval().requires_grad_(False)


def torch_ar(cfg: ARConfig, model: Any, load: Load) -> Makers:
  """The AR figures; calls return what those of `jax_ar` do."""
  import torch
  from transformers import DynamicCache

  device = model.device
  tokens = torch.tensor(codes(cfg, load.prompt + 1), device=device).long()

  def prefill():
    cache = DynamicCache()
    model.model(tokens[:, :-1], past_key_values=cache, use_cache=True)
    return cache

  @torch.inference_mode()
  def prefill_call():
    return prefill().layers[-1].keys.float().cpu().numpy()

  @torch.inference_mode()
  def decode(batch):
    cache = prefill()
    cache.batch_repeat_interleave(batch)
    first = tokens[:, -1:].expand(batch, 1)

    @torch.inference_mode()
    def call():
      token, picked = first, []
      for _ in range(load.steps):
        out = model(token, past_key_values=cache, use_cache=True)
        logp = out.logits[:, -1].float().log_softmax(-1)
        token = logp.argmax(-1, keepdim=True)
        picked.append(logp.gather(-1, token))
      cache.crop(-load.steps)
      return torch.cat(picked, 1).cpu().numpy()

    return call

  decodes = {load.decode(b): partial(decode, b) for b in load.batches}
  return {load.prefill: lambda: prefill_call, **decodes}


def torch_flux(cfg: FluxConfig, model: Any, load: Load) -> Makers:
  """The FLUX figure; the call returns what that of `jax_flux` does."""
  import torch

  def make():
    to = {"dtype": model.dtype, "device": model.device}
    latents, text, pooled = map(torch.tensor, denoising_inputs(cfg, load))
    latents, text, pooled = (
      latents.to(to["device"]),
      text.to(**to),
      pooled.to(**to),
    )
    h, w = load.grid
    cells = torch.cartesian_prod(torch.arange(h), torch.arange(w))
    ids = torch.cat([torch.zeros(h * w, 1), cells], 1).to(**to)
    level, following = map(float, _LEVELS)
    guidance = torch.full((2,), flow.GUIDANCE, **to)

    @torch.inference_mode()
    def call():
      v = model(
        hidden_states=torch.cat([latents, latents]).to(model.dtype),
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=torch.full((2,), level, **to),
        guidance=guidance if cfg.guidance_embeds else None,
        img_ids=ids,
        txt_ids=torch.zeros(load.text, 3, **to),
        return_dict=False,
      )[0]
      v, negative = v.float().chunk(2)
      v = negative + _CFG_SCALE * (v - negative)
      return (latents + (following - level) * v).cpu().numpy()

    return call

  return {load.denoise: make}
