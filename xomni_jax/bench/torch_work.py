"""The timed work in PyTorch: the same sizes in transformers and diffusers.

Eager, in inference mode, with transformers' DynamicCache (what `generate` uses
by default). Makers and calls are those of `work`.
"""

import dataclasses
from functools import partial
from typing import Any

from xomni_jax.bench import work
from xomni_jax.config import ARConfig
from xomni_jax.flux_config import FluxConfig
from xomni_jax.inference import flow


def qwen2_config(cfg: ARConfig):
  """transformers' Qwen2Config of the same sizes, over the image codes."""
  from transformers import Qwen2Config

  return Qwen2Config(
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


def qwen2(cfg: ARConfig, dtype: str, device: str, state=None):
  """transformers' Qwen2ForCausalLM of the same sizes, over the image codes.

  Args:
    cfg: vision-only blocks become ordinary ones, which cost the same.
    dtype, device: PyTorch's names.
    state: {released key: array} to load; None: random weights.
  """
  from transformers import Qwen2ForCausalLM

  config = qwen2_config(cfg)
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
  return _born(make, dtype, device, state)


def flux_transformer(cfg: FluxConfig, dtype: str, device: str, state=None):
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
  return _born(make, dtype, device, state)


def _born(make, dtype, device, state):
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


def ar_calls(cfg: ARConfig, model: Any, load: work.Load) -> work.Makers:
  """The AR figures; calls return what those of `work.jax_ar` do."""
  import torch
  from transformers import DynamicCache

  device = model.device
  tokens = torch.tensor(work.codes(cfg, load.prompt + 1), device=device).long()

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


def flux_calls(cfg: FluxConfig, model: Any, load: work.Load) -> work.Makers:
  """The FLUX figure; the call returns what that of `work.jax_flux` does."""
  import torch

  def make():
    to = {"dtype": model.dtype, "device": model.device}
    inputs = [torch.tensor(x) for x in work.denoising_inputs(cfg, load)]
    latents = inputs[0].to(model.device)
    text, pooled = (x.to(**to) for x in inputs[1:])
    h, w = load.grid
    cells = torch.cartesian_prod(torch.arange(h), torch.arange(w))
    ids = torch.cat([torch.zeros(h * w, 1), cells], 1).to(**to)
    level, following = work.LEVELS
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
      v = negative + work.CFG_SCALE * (v - negative)
      return (latents + (following - level) * v).cpu().numpy()

    return call

  return {load.denoise: make}
