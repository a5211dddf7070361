"""The AR transformer and FLUX in other shapes against transformers' Qwen2 and
diffusers' FLUX.

Weights are random, of order one in the output, norms and biases included, and
come in through the parameter table as PyTorch state dicts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import peers
from tests.helpers import agree, params_from_torch, randomise, recorded
from xomni_jax.config import ARConfig
from xomni_jax.flux_config import FluxConfig
from xomni_jax.models import ar, flux

torch = pytest.importorskip("torch")
F = torch.nn.functional

# Values reach 10; see test_golden_models.py on what float32 allows.
TOLERANCE = 1e-4
LOGITS = 2e-4

tensor = lambda x: torch.from_numpy(np.array(x))


def noise(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


# AR transformer

QWEN2 = {  # vocabularies, width, mlp, layers (before, after), heads, theta, eps
  "4 heads, 4 kv": ARConfig(50, 20, 30, 48, 80, 4, 1, 1, 4, 4, 1e4, 1e-5, 64),
  "6 heads, 2 kv": ARConfig(40, 30, 33, 60, 44, 5, 2, 1, 6, 2, 5e5, 1e-6, 64),
  "3 heads, 1 kv": ARConfig(30, 16, 16, 24, 96, 3, 0, 1, 3, 1, 1e6, 1e-3, 64),
}


@functools.cache
def qwen2(name):
  """Config, transformers' model of all blocks, and the image side's tensors."""
  transformers = pytest.importorskip("transformers")
  cfg = QWEN2[name]
  model = transformers.Qwen2ForCausalLM(
    transformers.Qwen2Config(
      vocab_size=cfg.vocab_size,
      hidden_size=cfg.hidden_size,
      intermediate_size=cfg.intermediate_size,
      num_hidden_layers=cfg.num_hidden_layers,
      num_attention_heads=cfg.num_attention_heads,
      num_key_value_heads=cfg.num_key_value_heads,
      max_position_embeddings=cfg.max_position_embeddings,
      rms_norm_eps=cfg.rms_norm_eps,
      rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
      tie_word_embeddings=False,
      attn_implementation="eager",
    )
  )
  image = {
    "mm_embed_tokens": noise(cfg.mm_vocab_size, cfg.hidden_size, seed=1),
    "mm_norm": 1 + 0.3 * noise(cfg.hidden_size, seed=2),
    "mm_head": noise(cfg.mm_vocab_size, cfg.hidden_size, seed=3) * 0.2,
  }
  return cfg, randomise(model), {k: tensor(v) for k, v in image.items()}


def ar_params(cfg, model, image):
  """Our parameters out of transformers' model and the image side."""
  state = model.state_dict()
  state["model.lm_embed_tokens.weight"] = state.pop("model.embed_tokens.weight")
  state["model.lm_norm.weight"] = state.pop("model.norm.weight")
  state["model.mm_embed_tokens.weight"] = image["mm_embed_tokens"]
  state["model.mm_norm.weight"] = image["mm_norm"]
  state["mm_head.weight"] = image["mm_head"]
  return params_from_torch(ar.rows(cfg), ar.abstract(cfg), state)


@functools.partial(jax.jit, static_argnums=3)
def ar_states(params, tokens, valid, cfg):
  """What goes into every block and comes out, final norm, both logits."""
  model = ar.XOmniAR(cfg)
  (hidden, _), calls = recorded(
    ar.Block,
    lambda: model.apply(
      {"params": params}, tokens, ar.positions_of(valid), valid
    ),
  )
  states = [calls[0][1][0], *(result[0] for *_, result in calls)]
  text = ar.text_logits(params, hidden)
  return states, hidden, text, ar.image_logits(params, hidden, cfg)


def left_padded(cfg, high, seed=0):
  """Tokens below `high` and a mask, one row whole and one padded."""
  tokens = np.random.default_rng(seed).integers(0, high, (2, 17))
  valid = np.ones(tokens.shape, bool)
  valid[1, :5] = False
  return tokens.astype(np.int32), valid


@pytest.mark.parametrize("name", ["4 heads, 4 kv", "6 heads, 2 kv"])
def test_ar_without_vision_blocks_matches_qwen2(name):
  cfg, model, image = qwen2(name)
  cfg = dataclasses.replace(cfg, num_mm_adap_layers=0, num_mm_head_layers=0)
  tokens, valid = left_padded(cfg, cfg.vocab_size)
  states, _, logits, _ = ar_states(
    ar_params(cfg, model, image), tokens, valid, cfg
  )
  # RoPE is relative: transformers' positions count the padding too.
  theirs = model(
    tensor(tokens.astype(np.int64)),
    attention_mask=tensor(valid.astype(np.int64)),
    output_hidden_states=True,
  )
  # Its last hidden state comes after the final norm.
  pairs = zip(states[:-1], theirs.hidden_states[:-1], strict=True)
  for ours, state in pairs:
    agree("AR", "transformers' Qwen2", "every block", ours[valid],
          state.numpy()[valid], TOLERANCE)  # fmt: skip
  agree("AR", "transformers' Qwen2", "text logits", np.asarray(logits)[valid],
        theirs.logits.numpy()[valid], LOGITS)  # fmt: skip


def qwen2_with_vision_blocks(cfg, model, image, tokens, valid):
  """The mixed forward pass composed of transformers' decoder layers."""
  ids, real = tensor(tokens.astype(np.int64)), tensor(valid)
  is_image = (ids >= cfg.vocab_size)[..., None]
  mm_ids = (ids - cfg.vocab_size).clamp(min=0)
  text = model.model.embed_tokens(ids.clamp(max=cfg.vocab_size - 1))
  x = torch.where(is_image, image["mm_embed_tokens"][mm_ids], text)
  rope = model.model.rotary_emb(x, real.cumsum(-1) - 1)
  T = ids.shape[1]
  seen = torch.tril(torch.ones(T, T, dtype=torch.bool)) & real[:, None]
  bias = torch.zeros(seen.shape).masked_fill(~seen, -1e30)[:, None]
  states = [x]
  for i, block in enumerate(model.model.layers):
    y = block(x, attention_mask=bias, position_embeddings=rope)
    y = y[0] if isinstance(y, tuple) else y
    depth = cfg.num_hidden_layers - i
    vision = i < cfg.num_mm_adap_layers or depth <= cfg.num_mm_head_layers
    x = torch.where(is_image, y, x) if vision else y
    states.append(x)
  shape = (cfg.hidden_size,)
  mm_norm = F.rms_norm(x, shape, image["mm_norm"], cfg.rms_norm_eps)
  hidden = torch.where(is_image, mm_norm, model.model.norm(x))
  codes = hidden @ image["mm_head"][: cfg.image_vocab_size].T
  return states, hidden, model.lm_head(hidden), codes


@pytest.mark.parametrize("name", QWEN2)
def test_ar_with_vision_blocks_matches_qwen2_layers(name):
  cfg, model, image = qwen2(name)
  total = cfg.vocab_size + cfg.mm_vocab_size
  tokens, valid = left_padded(cfg, total, seed=4)
  ours = ar_states(ar_params(cfg, model, image), tokens, valid, cfg)
  theirs = qwen2_with_vision_blocks(cfg, model, image, tokens, valid)
  part, witness = "AR", "Qwen2 layers, text restored"
  for x, y in zip(ours[0], theirs[0], strict=True):
    agree(part, witness, "every block", x[valid], y.numpy()[valid], TOLERANCE)
  for x, y, quantity, tolerance in zip(
    ours[1:],
    theirs[1:],
    ("final norm", "text logits", "image logits"),
    (TOLERANCE, LOGITS, LOGITS),
    strict=True,
  ):
    x = np.asarray(x)
    agree(part, witness, quantity, x[valid], y.numpy()[valid], tolerance)


# FLUX

FLUXES = {
  "guided, 5 heads": (
    FluxConfig(2, 1, 5, 8, 32, 20, 14, True, (4, 2, 2), 24), (3, 4), 5,
  ),
  "unguided, 2 heads": (
    FluxConfig(1, 3, 2, 24, 16, 12, 30, False, (8, 10, 6), 40), (5, 2), 3,
  ),
}  # fmt: skip


@functools.cache
def diffusers_flux(name):
  """Config, diffusers' model, weight of `siglip_embed`, our parameters."""
  cfg, _, _ = FLUXES[name]
  model = peers.flux_transformer(cfg)
  extra = tensor(noise(cfg.width, cfg.siglip_channels, seed=5) * 0.2)
  state = {**model.state_dict(), "siglip_embed.weight": extra}
  return (
    cfg,
    model,
    extra,
    params_from_torch(flux.rows(cfg), flux.abstract(cfg), state),
  )


def flux_inputs(cfg, grid, text):
  """latents, T5 features, pooled vector, sigma, guidance; features."""
  L = grid[0] * grid[1]
  inputs = [
    noise(2, L, cfg.in_channels),
    noise(2, text, cfg.joint_attention_dim, seed=1),
    noise(2, cfg.pooled_projection_dim, seed=2),
    # Small: of a sinusoid of 3500 a frequency's last bit is worth 2e-4, which
    # `exp` has on one machine and not on another. The golden values have large
    # ones.
    np.array([0.05, 0.01], np.float32),
    np.array([0.04, 0.02], np.float32),
  ]
  return inputs, noise(2, L, cfg.siglip_channels, seed=3)


@functools.partial(jax.jit, static_argnums=(3, 4))
def flux_states(params, inputs, features, grid, cfg):
  """Velocity, and what comes out of every block, text first."""
  out, calls = recorded(
    (flux.DoubleBlock, flux.SingleBlock),
    lambda: flux.Flux(cfg).apply({"params": params}, *inputs, grid, features),
  )
  join = lambda x: x if isinstance(x, jax.Array) else jnp.concatenate(x, 1)
  return out, [join(result[0]) for *_, result in calls]


@pytest.mark.parametrize("with_features", [True, False])
@pytest.mark.parametrize("name", FLUXES)
def test_flux_matches_diffusers_at_every_block(name, with_features):
  _, grid, text = FLUXES[name]
  cfg, model, extra, params = diffusers_flux(name)
  inputs, features = flux_inputs(cfg, grid, text)
  ours, blocks = flux_states(
    params, inputs, features if with_features else None, grid, cfg
  )

  states, hooks = [], []

  def keep(module, args, result):
    states.append(torch.cat(result, dim=1).numpy())

  def add_features(module, args, kwargs):
    kwargs["hidden_states"] = (
      kwargs["hidden_states"] + tensor(features) @ extra.T
    )
    return args, kwargs

  for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
    hooks.append(block.register_forward_hook(keep))
  if with_features:
    hooks.append(
      model.single_transformer_blocks[0].register_forward_pre_hook(
        add_features, with_kwargs=True
      )
    )
  latents, text_states, pooled, sigma, guidance = map(tensor, inputs)
  ids = np.stack(np.indices(grid), -1).reshape(-1, 2).astype(np.float32)
  theirs = model(
    hidden_states=latents,
    encoder_hidden_states=text_states,
    pooled_projections=pooled,
    timestep=sigma,
    guidance=guidance if cfg.guidance_embeds else None,
    img_ids=F.pad(tensor(ids), (1, 0)),
    txt_ids=torch.zeros(text, 3),
    return_dict=False,
  )[0]
  for hook in hooks:
    hook.remove()

  witness = "diffusers' FLUX"
  for x, y in zip(blocks, states, strict=True):
    agree("FLUX", witness, "every block", x, y, TOLERANCE)
  agree("FLUX", witness, "velocity", ours, theirs, TOLERANCE)
