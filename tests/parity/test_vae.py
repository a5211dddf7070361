"""The autoencoder against golden values and diffusers' AutoencoderKL."""

import re
from functools import cache, partial

import jax
import numpy as np
import pytest
from einops import rearrange

from tests import peers
from tests.helpers import (
  GOLDEN,
  agree,
  max_difference,
  params_from_torch,
  read_folder,
)
from xomni_jax.checkpoints.released_config import read_json, vae_config
from xomni_jax.config import Compute
from xomni_jax.flux_config import VAEConfig
from xomni_jax.models import vae

# Values reach 3; float32 sums in another order differ by 1e-5 to 3e-5 of that,
# while the wrong norm epsilon moves them by 1e-3 (the mildest mistake).
TOLERANCE = 1e-4

SCALES = {"scaling_factor": 0.5, "shift_factor": 0.1}
CONFIGS = {
  "3 levels, 2 resnets": VAEConfig((8, 16, 24), 2, 4, 6, 3, 3, **SCALES),
  "2 levels, 1 group": VAEConfig((12, 12), 1, 1, 4, 1, 2, **SCALES),
  "1 level": VAEConfig((8,), 1, 8, 2, 3, 3, **SCALES),
}

decode = jax.jit(vae.decode, static_argnums=(2, 3))
encode = jax.jit(vae.encode, static_argnums=(2, 3))
channels_last = lambda x: np.moveaxis(np.asarray(x), 1, -1)


@cache
def tiny():
  """Config and parameters of the golden checkpoint."""
  folder = GOLDEN / "flux1" / "vae"
  cfg = vae_config(read_json(folder / "config.json"), "vae")
  state = read_folder(folder)
  return cfg, params_from_torch(vae.rows(cfg), vae.abstract(cfg), state)


@cache
def reference(name):
  """Config, diffusers' model with random weights, and our parameters."""
  cfg = CONFIGS[name]
  model = peers.autoencoder(cfg)
  # Log-variances over [-60, 60], so that both clamps are met.
  bias = model.encoder.conv_out.bias
  spread = np.linspace(-60, 60, cfg.latent_channels)
  bias[cfg.latent_channels :] = bias.new_tensor(spread)
  state = model.state_dict()
  return cfg, model, params_from_torch(vae.rows(cfg), vae.abstract(cfg), state)


def compare(witness, quantity, ours, theirs):
  theirs = channels_last(theirs)
  agree("autoencoder", witness, quantity, ours, theirs, TOLERANCE)


def noise(*shape):
  return np.random.default_rng(0).standard_normal(shape, np.float32)


def test_vae_decode_matches_golden(golden):
  cfg, params = tiny()
  ours = decode(params, channels_last(golden["vae/latents"]), cfg, Compute())
  compare("golden values", "decoded image", ours, golden["vae/decoded"])


def test_vae_encode_matches_golden(golden):
  cfg, params = tiny()
  image = channels_last(golden["vae/image"])
  mean, logvar = encode(params, image, cfg, Compute())
  compare("golden values", "mean", mean, golden["vae/enc_mean"])
  compare("golden values", "log-variance", logvar, golden["vae/enc_logvar"])


def test_vae_space_conversion_matches_golden(golden):
  cfg, _ = tiny()
  latents = rearrange(
    golden["pipe/square/latents_final"],
    "b (h w) (c p q) -> b (h p) (w q) c",
    h=6,
    p=2,
    q=2,
  )
  ours = vae.from_model_space(latents, cfg)
  compare("golden values", "latents", ours, golden["pipe/square/vae_in"])
  back = vae.to_model_space(ours, cfg)
  assert max_difference(back, latents) < 1e-5  # a sum and a product in f32


@pytest.mark.parametrize("name", CONFIGS)
def test_vae_decode_matches_diffusers(name):
  cfg, model, params = reference(name)
  import torch

  latents = noise(2, cfg.latent_channels, 5, 4)
  theirs = model.decode(torch.from_numpy(latents)).sample
  ours = decode(params, channels_last(latents), cfg, Compute())
  assert ours.shape[1:] == (5 * cfg.factor, 4 * cfg.factor, cfg.out_channels)
  compare("diffusers", "decoded image", ours, theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_vae_encode_matches_diffusers_beyond_the_clamps(name):
  cfg, model, params = reference(name)
  import torch

  image = noise(2, cfg.in_channels, 4 * cfg.factor, 6 * cfg.factor)
  theirs = model.encode(torch.from_numpy(image)).latent_dist
  mean, logvar = encode(params, channels_last(image), cfg, Compute())
  compare("diffusers", "mean", mean, theirs.mean)
  compare("diffusers", "log-variance", logvar, theirs.logvar)
  assert (logvar.min(), logvar.max()) == (-30, 20)


@pytest.mark.parametrize(
  ("key", "block", "channels"),
  [
    ("encoder.down_blocks.1.resnets.0", partial(vae.ResnetBlock, 16), 8),
    ("encoder.down_blocks.1.resnets.1", partial(vae.ResnetBlock, 16), 16),
    ("encoder.mid_block.attentions.0", vae.Attention, 24),
    ("encoder.mid_block", vae.MidBlock, 24),
    ("encoder.down_blocks.0.downsamplers.0", vae.Downsample, 8),
    ("decoder.up_blocks.0.upsamplers.0", vae.Upsample, 24),
  ],
)
def test_vae_block_matches_diffusers(key, block, channels):
  cfg, model, params = reference("3 levels, 2 resnets")
  import torch

  for part in re.sub(r"\.(\d+)", r"_\1", key).split("."):
    params = params[part]
  resamples = block in (vae.Downsample, vae.Upsample)
  block = block(Compute()) if resamples else block(cfg, Compute())
  x = noise(2, channels, 7, 6)
  time_embedding = (None,) if "resnets" in key else ()
  theirs = model.get_submodule(key)(torch.from_numpy(x), *time_embedding)
  ours = jax.jit(block.apply)({"params": params}, channels_last(x))
  compare("diffusers", "one block", ours, theirs)


def test_vae_attention_in_chunks_equals_whole():
  cfg, params = tiny()
  params = {"params": params["decoder"]["mid_block"]["attentions_0"]}
  x = noise(2, 5, 7, cfg.block_out_channels[-1])
  whole, chunked = (
    jax.jit(vae.Attention(cfg, Compute(query_chunk=chunk)).apply)(params, x)
    for chunk in (1024, 8)
  )
  assert max_difference(whole, chunked) < 1e-5  # the same sums in f32


def test_vae_bfloat16_stays_near_float32(golden):
  cfg, params = tiny()
  latents = channels_last(golden["vae/latents"])
  ours = decode(params, latents, cfg, Compute(dtype="bfloat16"))
  assert ours.dtype == np.float32
  # 0.073 of a largest value of 1.64; diffusers' own bf16 is 0.064 off.
  difference = max_difference(ours, channels_last(golden["vae/decoded"]))
  assert 1e-3 < difference < 0.1
