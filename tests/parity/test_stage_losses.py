"""Losses of the VAE and decoder stages against diffusers' models in float64.

The random draws are ours, by the keys of the rows; all else is computed anew.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests import peers
from tests.helpers import agree, params_from_torch
from xomni_jax.inference import flow
from xomni_jax.models import flux, siglip, text_encoders, vae, vq
from xomni_jax.training import configure
from xomni_jax.training.stage import Context, row_keys
from xomni_jax.training.stages import decoder_program, vae_program

torch = pytest.importorskip("torch")

# Of losses of order one: float32 sums through a dozen layers.
TOLERANCE = 2e-5
REAL = np.array([1, 0, 1], np.float32)
IDS = np.array([5, 9, 2**31 - 1], np.int32)

double = lambda x: torch.from_numpy(np.asarray(x, np.float64))


def parsed(stage, *settings):
  config = configure.read(f"configs/{stage}.py:tiny")
  configure.override(config, ["global_batch=3", *settings])
  return configure.parse(config, "test")


def pixels_of(*shape):
  return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def autoencoder(cfg):
  """diffusers' model in float64 with random weights, and our parameters."""
  model = peers.autoencoder(cfg)
  params = params_from_torch(
    vae.rows(cfg), vae.abstract(cfg), model.state_dict()
  )
  return model.double(), params


def posterior(model, image_bytes):
  """Mean and log-variance, channels first."""
  found = model.encode(double(to_float(image_bytes))).latent_dist
  return found.mean, found.logvar


def to_float(image_bytes):
  """[-1, 1], channels first."""
  return np.moveaxis(image_bytes.astype(np.float64) / 127.5 - 1, -1, 1)


def run(made, params, batch, key, train):
  context = Context(key, 0, made.totals(batch), train)
  return jax.jit(lambda p: made.loss(p, batch, context))(params)


def test_vae_loss_matches_diffusers():
  cfg, arch = parsed(
    "vae", "options.kl=0.3", "options.l2=0.7", "options.edges=1.5"
  )
  sizes = dataclasses.replace(
    arch.vae, block_out_channels=(8, 16), norm_num_groups=4
  )
  arch = dataclasses.replace(arch, vae=sizes)
  model, params = autoencoder(sizes)
  batch = {"pixels": pixels_of(3, 8, 12, 3), "id": IDS, "real": REAL}
  key = jax.random.key(3)
  made = vae_program.program(cfg, arch)
  value, metrics = run(made, {"vae": params}, batch, key, True)

  mean, logvar = posterior(model, batch["pixels"])
  shape = (4, 6, sizes.latent_channels)
  draw = jax.vmap(lambda k: jax.random.normal(k, shape))
  noise = np.moveaxis(np.asarray(draw(row_keys(key, IDS))), -1, 1)
  latents = mean + torch.exp(logvar / 2) * double(noise)
  error = (
    model.decode(latents).sample - double(to_float(batch["pixels"]))
  ).numpy()
  kl = (mean**2 + logvar.exp() - 1 - logvar).numpy() / 2
  kept = REAL > 0  # what is left is a plain mean
  error, kl = error[kept], kl[kept]
  edges = [abs(np.diff(error, axis=axis)).mean() for axis in (2, 3)]
  expected = {
    "l1": abs(error).mean(),
    "l2": (error**2).mean(),
    "edges": np.mean(edges),
    "kl": kl.mean(),
  }
  for name, x in expected.items():
    ours = metrics[f"vae/{name}"]
    agree("VAE stage", "diffusers in float64", name, ours, x, TOLERANCE * 10)
  total = (
    expected["l1"]
    + 0.7 * expected["l2"]
    + 1.5 * expected["edges"]
    + 0.3 * expected["kl"]
  )
  agree("VAE stage", "diffusers in float64", "loss", value, total,
        TOLERANCE * total)  # fmt: skip


@functools.cache
def transformer(cfg):
  """diffusers' model in float64, weight of `siglip_embed`, our parameters."""
  model = peers.flux_transformer(cfg)
  for key, weight in model.named_parameters():
    if "timestep_embedder.linear_1" in key:
      # Sinusoids of 1000 sigma lose what `exp` rounds off a frequency.
      weight *= 0.01
  extra = np.random.default_rng(5).standard_normal(
    (cfg.width, cfg.siglip_channels), np.float32
  )
  extra = torch.from_numpy(extra * 0.2)
  state = {**model.state_dict(), "siglip_embed.weight": extra}
  params = params_from_torch(flux.rows(cfg), flux.abstract(cfg), state)
  return model.double(), extra.double(), params


def velocity(cfg, model, extra, at, grid, text, pooled, features):
  """diffusers' prediction, with features added before the single blocks."""

  def add(module, args, kwargs):
    image = kwargs["hidden_states"] + double(features) @ extra.T
    return args, {**kwargs, "hidden_states": image}

  hook = model.single_transformer_blocks[0].register_forward_pre_hook(
    add, with_kwargs=True
  )
  latents, sigma = at
  ids = np.stack(np.indices(grid), -1).reshape(-1, 2)
  out = model(
    hidden_states=latents,
    encoder_hidden_states=double(text),
    pooled_projections=double(pooled),
    timestep=double(sigma),
    guidance=torch.ones(len(sigma), dtype=torch.float64),
    img_ids=torch.nn.functional.pad(double(ids), (1, 0)),
    txt_ids=torch.zeros(text.shape[1], 3, dtype=torch.float64),
    return_dict=False,
  )[0]
  hook.remove()
  return out


def packed(latents):
  """[B, C, 2h, 2w] -> [B, h*w, 4C], as diffusers' FluxPipeline has it."""
  B, C, H, W = latents.shape
  x = latents.reshape(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5)
  return x.reshape(B, H * W // 4, 4 * C)


def test_decoder_loss_matches_diffusers():
  """On held-out rows, which see all features: dropping is a matter of chance
  and has a test of its own."""
  grid, text_len = (2, 3), 5
  cfg, arch = parsed(
    "decoder",
    "options.text_len=5",
    "options.grids=((2, 3),)",
    "options.token_dropout=0.5",
  )
  # The sizes of configs/model.py:world, but for FLUX's convenience.
  sizes = dataclasses.replace(arch.vae, scaling_factor=0.5, shift_factor=0.25)
  arch = dataclasses.replace(arch, vae=sizes)
  coder, vae_params = autoencoder(sizes)
  model, extra, flux_params = transformer(arch.flux)
  made = decoder_program.program(cfg, arch)
  params = jax.jit(made.init)(jax.random.key(0))
  params |= {"vae": vae_params, "flux": flux_params}
  rng = np.random.default_rng(1)
  batch = {
    "pixels": pixels_of(3, 32, 48, 3),
    "clip_ids": rng.integers(0, 600, (3, 48), dtype=np.int32),
    "t5_ids": rng.integers(0, 300, (3, text_len), dtype=np.int32),
    "seen": np.array([1, 1, 0], np.float32),
    "id": IDS,
    "real": REAL,
  }
  value, metrics = run(made, params, batch, jax.random.key(3), False)

  noise_key = Context(jax.random.key(4), 0, {}, train=False).noise_key
  keys = [jax.random.split(k, 4) for k in row_keys(noise_key, IDS)]
  draw = lambda i, *shape: np.stack(
    [jax.random.normal(k[i], shape) for k in keys]
  )
  mean, logvar = posterior(coder, batch["pixels"])
  drawn = np.moveaxis(draw(0, 4, 6, sizes.latent_channels), -1, 1)
  latents = mean + torch.exp(logvar / 2) * double(drawn)
  x0 = packed((latents - 0.25) * 0.5)
  # FlowMatchEulerDiscreteScheduler's shift by image size, 6 tokens here.
  mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (6 - 256)
  level = 1 / (1 + np.exp(-draw(1).astype(np.float64)))
  sigma = np.exp(mu) / (np.exp(mu) + (1 / level - 1))
  noise = double(draw(2, 6, arch.flux.in_channels))
  at = double(sigma)[:, None, None]
  text = text_encoders.T5Encoder(arch.t5).apply(
    {"params": params["t5"]}, batch["t5_ids"]
  )
  _, pooled = text_encoders.CLIPText(arch.clip).apply(
    {"params": params["clip"]}, batch["clip_ids"]
  )
  features = features_of(params, batch["pixels"], arch)
  features *= batch["seen"][:, None, None]
  v = velocity(
    arch.flux,
    model,
    extra,
    ((1 - at) * x0 + at * noise, sigma),
    grid,
    text,
    pooled,
    features,
  )
  error = ((v - (noise - x0)) ** 2).mean(dim=(1, 2)).numpy()
  expected = (error * REAL).sum() / REAL.sum()
  agree("decoder stage", "diffusers in float64", "loss", value, expected,
        TOLERANCE * expected)  # fmt: skip
  shift = flow.shift(decoder_program.FLUX_SCHEDULER, 6)
  shares = decoder_program.shares_of_sigma("logit_normal", shift)
  for i, name in enumerate(("0", "0.25", "0.5", "0.75")):
    own = (np.floor(sigma * 4) == i) * REAL
    part = (error * own).sum() / REAL.sum() / shares[i]
    agree("decoder stage", "diffusers in float64", "loss by noise level",
          metrics[f"decoder/loss_at_{name}"], part,
          TOLERANCE * max(part, 1))  # fmt: skip


def features_of(params, image_bytes, arch):
  """Our ViT's codes as features, one image at a time."""
  model, own = vq.VQ(arch.vq), {"params": params["vq"]}
  found = []
  for image in np.moveaxis(to_float(image_bytes), 1, -1).astype(np.float32):
    x = siglip.Siglip(arch.siglip).apply(
      {"params": params["siglip"]}, image[None]
    )
    codes = model.apply(own, x, method="encode")
    found.append(model.apply(own, codes, method="decode")[0])
  return np.stack(found).reshape(len(found), -1, arch.vq.z_channels)
