"""diffusers' models of our sizes, with random weights of order one."""

import pytest

from tests.helpers import randomise
from xomni_jax.flux_config import FluxConfig, VAEConfig


def flux_transformer(cfg: FluxConfig):
  """diffusers' FLUX; `siglip_embed`, which is X-Omni's, is not in it."""
  diffusers = pytest.importorskip("diffusers")
  model = diffusers.FluxTransformer2DModel(
    patch_size=1,
    in_channels=cfg.in_channels,
    num_layers=cfg.num_layers,
    num_single_layers=cfg.num_single_layers,
    attention_head_dim=cfg.attention_head_dim,
    num_attention_heads=cfg.num_attention_heads,
    joint_attention_dim=cfg.joint_attention_dim,
    pooled_projection_dim=cfg.pooled_projection_dim,
    guidance_embeds=cfg.guidance_embeds,
    axes_dims_rope=cfg.axes_dims_rope,
  )
  randomise(model)
  for key, weight in model.named_parameters():
    if "norm" in key and ".linear." in key:
      weight *= 0.3  # small gates, or states grow to 60 and errors with them
  return model


def autoencoder(cfg: VAEConfig):
  """diffusers' autoencoder without the convolutions that FLUX.1 has not."""
  diffusers = pytest.importorskip("diffusers")
  levels = len(cfg.block_out_channels)
  model = diffusers.AutoencoderKL(
    in_channels=cfg.in_channels,
    out_channels=cfg.out_channels,
    down_block_types=("DownEncoderBlock2D",) * levels,
    up_block_types=("UpDecoderBlock2D",) * levels,
    block_out_channels=cfg.block_out_channels,
    layers_per_block=cfg.layers_per_block,
    latent_channels=cfg.latent_channels,
    norm_num_groups=cfg.norm_num_groups,
    use_quant_conv=False,
    use_post_quant_conv=False,
  )
  return randomise(model)
