"""FLUX's autoencoder: images to latents and back.

AutoencoderKL as diffusers has it, without quant convolutions. Arrays are
channels-last; shape letters: B batch, H and W rows and columns (h, w: those of
the latents), C channels. Modules bear diffusers' names with "_" for the "."
before an index, so that a parameter's path says its key.
"""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from xomni_jax.config import Compute
from xomni_jax.flux_config import VAEConfig
from xomni_jax.mesh import constrain
from xomni_jax.models.layers import attention
from xomni_jax.params import Row, abstract_tree, flatten

_LOGVAR = -5.0  # what the encoder says of every latent before it has learned


def _conv(channels, size, compute, name, how=None):
  return nn.Conv(
    channels,
    (size, size),
    padding=size // 2,
    dtype=jnp.dtype(compute.dtype),
    conv_general_dilated=how,
    name=name,
  )


def _pointwise(x_BHWC, kernel, *_, **__):
  """A 1 x 1 convolution as a product; on a CPU a fifth of the time."""
  y = x_BHWC.reshape(-1, x_BHWC.shape[-1]) @ kernel[0, 0]
  return y.reshape(*x_BHWC.shape[:-1], -1)


def _doubled(x_BHWC, kernel, *_, **__):
  """A 3 x 3 convolution of an image of twice the size, nearest neighbours.

  Of the three rows that an output sees two are the same, and so of columns: a
  2 x 2 convolution for each of the four places of an output in its pixel has
  four ninths of the products.
  """
  B, H, W, _ = x_BHWC.shape
  taps = kernel.astype(jnp.float32)

  def merged(taps, axis, second):
    first, middle, last = jnp.split(taps, 3, axis)
    pair = (first + middle, last) if second else (first, middle + last)
    return jnp.concatenate(pair, axis)

  def at(row, column):
    return jax.lax.conv_general_dilated(
      x_BHWC,
      merged(merged(taps, 0, row), 1, column).astype(kernel.dtype),
      window_strides=(1, 1),
      padding=((1 - row, row), (1 - column, column)),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )

  rows = [jnp.stack([at(r, c) for c in (0, 1)], axis=3) for r in (0, 1)]
  return jnp.stack(rows, axis=2).reshape(B, 2 * H, 2 * W, -1)


class GroupNorm(nn.Module):
  """Flax's, without its fast variance, at half the time on a CPU.

  E[x^2] - E[x]^2 cancels where a group is off centre. Channels are summed
  first, and groups of these then.
  """

  cfg: VAEConfig
  compute: Compute

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    B, H, W, C = x_BHWC.shape
    scale_C = self.param("scale", nn.initializers.ones, (C,))
    bias_C = self.param("bias", nn.initializers.zeros, (C,))
    G = self.cfg.norm_num_groups

    def mean(x_BNC):
      groups_BG = x_BNC.mean(1).reshape(B, G, C // G).mean(-1)
      return jnp.repeat(groups_BG, C // G, axis=1)[:, None]

    x_BNC = x_BHWC.astype(jnp.float32).reshape(B, H * W, C)
    x_BNC -= mean(x_BNC)
    scale_B1C = scale_C * jax.lax.rsqrt(mean(x_BNC**2) + 1e-6)
    out_BHWC = (x_BNC * scale_B1C + bias_C).reshape(x_BHWC.shape)
    return out_BHWC.astype(self.compute.dtype)


class ResnetBlock(nn.Module):
  """norm, SiLU, conv, twice, plus the input."""

  channels: int
  cfg: VAEConfig
  compute: Compute

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    h_BHWC = x_BHWC
    for i in (1, 2):
      norm = GroupNorm(self.cfg, self.compute, name=f"norm{i}")
      conv = _conv(self.channels, 3, self.compute, f"conv{i}")
      h_BHWC = conv(nn.silu(norm(h_BHWC)))
    if x_BHWC.shape[-1] != self.channels:
      shortcut = _conv(
        self.channels, 1, self.compute, "conv_shortcut", _pointwise
      )
      x_BHWC = shortcut(x_BHWC)
    return constrain(x_BHWC + h_BHWC, "batch", None, None, None)


class Attention(nn.Module):
  """Single-head attention over all cells, plus the input."""

  cfg: VAEConfig
  compute: Compute

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    B, H, W, C = x_BHWC.shape
    dtype = jnp.dtype(self.compute.dtype)
    dense = lambda name: nn.Dense(C, dtype=dtype, name=name)
    norm = GroupNorm(self.cfg, self.compute, name="group_norm")
    h_BTC = norm(x_BHWC).reshape(B, H * W, C)
    out_BTNC = attention(
      dense("to_q")(h_BTC)[:, :, None],
      dense("to_k")(h_BTC)[:, None],
      dense("to_v")(h_BTC)[:, None],
      scale=C**-0.5,
      chunk=self.compute.query_chunk,
    )
    return x_BHWC + dense("to_out_0")(out_BTNC).reshape(B, H, W, C)


class MidBlock(nn.Module):
  """Resnet, attention, resnet at the smallest level."""

  cfg: VAEConfig
  compute: Compute

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    args = (self.cfg, self.compute)
    C = x_BHWC.shape[-1]
    x_BHWC = ResnetBlock(C, *args, name="resnets_0")(x_BHWC)
    x_BHWC = Attention(*args, name="attentions_0")(x_BHWC)
    return ResnetBlock(C, *args, name="resnets_1")(x_BHWC)


class Downsample(nn.Module):
  """Half the size, by a strided convolution."""

  compute: Compute

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    return nn.Conv(
      x_BHWC.shape[-1],
      (3, 3),
      strides=2,
      padding=((0, 1), (0, 1)),  # right and bottom only, as diffusers has it
      dtype=jnp.dtype(self.compute.dtype),
      name="conv",
    )(x_BHWC)


class Upsample(nn.Module):
  """Twice the size: nearest neighbours, then a convolution."""

  compute: Compute

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    conv = _conv(x_BHWC.shape[-1], 3, self.compute, "conv", _doubled)
    return conv(x_BHWC)


class Level(nn.Module):
  """Resnets at one size, then `resample`, "down", "up" or None."""

  channels: int
  resnets: int
  resample: str | None
  cfg: VAEConfig
  compute: Compute

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    for i in range(self.resnets):
      x_BHWC = ResnetBlock(
        self.channels, self.cfg, self.compute, name=f"resnets_{i}"
      )(x_BHWC)
    if self.resample == "down":
      x_BHWC = Downsample(self.compute, name="downsamplers_0")(x_BHWC)
    elif self.resample == "up":
      x_BHWC = Upsample(self.compute, name="upsamplers_0")(x_BHWC)
    return x_BHWC


class Encoder(nn.Module):
  """Image [B, H, W, in_channels] to moments [B, h, w, 2 latent_channels]."""

  cfg: VAEConfig
  compute: Compute = Compute()

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    cfg, compute = self.cfg, self.compute
    levels = cfg.block_out_channels
    x_BHWC = _conv(levels[0], 3, compute, "conv_in")(x_BHWC)
    for i, channels in enumerate(levels):
      x_BHWC = Level(
        channels,
        cfg.layers_per_block,
        "down" if i + 1 < len(levels) else None,
        cfg,
        compute,
        name=f"down_blocks_{i}",
      )(x_BHWC)
    x_BHWC = MidBlock(cfg, compute, name="mid_block")(x_BHWC)
    return _out(2 * cfg.latent_channels, cfg, compute, x_BHWC)


class Decoder(nn.Module):
  """Latents [B, h, w, latent_channels] to image [B, H, W, out_channels]."""

  cfg: VAEConfig
  compute: Compute = Compute()

  @nn.compact
  def __call__(self, x_BhwC: jax.Array) -> jax.Array:
    cfg, compute = self.cfg, self.compute
    levels = cfg.block_out_channels[::-1]
    x_BHWC = _conv(levels[0], 3, compute, "conv_in")(x_BhwC)
    x_BHWC = MidBlock(cfg, compute, name="mid_block")(x_BHWC)
    for i, channels in enumerate(levels):
      x_BHWC = Level(
        channels,
        cfg.layers_per_block + 1,
        "up" if i + 1 < len(levels) else None,
        cfg,
        compute,
        name=f"up_blocks_{i}",
      )(x_BHWC)
    return _out(cfg.out_channels, cfg, compute, x_BHWC)


def _out(channels, cfg, compute, x_BHWC):
  """norm, SiLU and convolution that end both halves."""
  norm = GroupNorm(cfg, compute, name="conv_norm_out")
  return _conv(channels, 3, compute, "conv_out")(nn.silu(norm(x_BHWC)))


def decode(
  params: dict[str, Any],
  latents: jax.Array,
  cfg: VAEConfig,
  compute: Compute,
) -> jax.Array:
  """The image of latents.

  Args:
    params: as `abstract`; "encoder" is not read.
    latents: [B, h, w, latent_channels], the autoencoder's own (see
      `from_model_space`).
  Returns:
    f32[B, h * cfg.factor, w * cfg.factor, out_channels], about [-1, 1], not
    clamped.
  """
  image = Decoder(cfg, compute).apply({"params": params["decoder"]}, latents)
  return image.astype(jnp.float32)


def encode(
  params: dict[str, Any],
  image: jax.Array,
  cfg: VAEConfig,
  compute: Compute,
) -> tuple[jax.Array, jax.Array]:
  """The distribution of an image's latents.

  Args:
    params: as `abstract`; "decoder" is not read.
    image: [B, H, W, in_channels] in [-1, 1], H and W multiples of cfg.factor.
  Returns:
    mean and log-variance, f32[B, H / cfg.factor, W / cfg.factor,
    latent_channels] each, the autoencoder's own (see `to_model_space`);
    log-variance in [-30, 20], as diffusers clamps it.
  """
  moments = Encoder(cfg, compute).apply({"params": params["encoder"]}, image)
  mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
  return mean, jnp.clip(logvar, -30.0, 20.0)


def to_model_space(latents: jax.Array, cfg: VAEConfig) -> jax.Array:
  """The autoencoder's latents as the diffusion transformer has them."""
  return (latents - cfg.shift_factor) * cfg.scaling_factor


def from_model_space(latents: jax.Array, cfg: VAEConfig) -> jax.Array:
  """The diffusion transformer's latents as the autoencoder has them."""
  return latents / cfg.scaling_factor + cfg.shift_factor


def to_bytes(image: jax.Array) -> jax.Array:
  """f32 about [-1, 1] -> u8, clipped and rounded as diffusers does."""
  image = jnp.clip(image / 2 + 0.5, 0, 1)
  return jnp.round(image * 255).astype(jnp.uint8)


def init(key: jax.Array, cfg: VAEConfig) -> dict[str, Any]:
  """Random parameters, {"encoder": ..., "decoder": ...}."""
  encoder_key, decoder_key = jax.random.split(key)
  side = cfg.factor
  image = jnp.zeros((1, side, side, cfg.in_channels))
  latents = jnp.zeros((1, 1, 1, cfg.latent_channels))
  encoder = Encoder(cfg).init(encoder_key, image)["params"]
  # Latents begin with noise of 0.08, not of 1, which would hide for long what
  # they say: 18.5 dB after 600 steps on drawn signs instead of 17.6.
  bias = encoder["conv_out"]["bias"]
  encoder["conv_out"]["bias"] = bias.at[cfg.latent_channels :].set(_LOGVAR)
  return {
    "encoder": encoder,
    "decoder": Decoder(cfg).init(decoder_key, latents)["params"],
  }


@abstract_tree
def abstract(cfg: VAEConfig) -> dict[str, Any]:
  """The parameter tree as shapes, nothing allocated."""
  return init(jax.random.key(0), cfg)


# No axis has a rule: at 84M parameters the whole is replicated.
_LAYOUTS = {
  4: "cout cin kh kw -> kh kw cin cout",
  2: "cout cin -> cin cout",
  1: "cout -> cout",
}


def rows(cfg: VAEConfig) -> list[Row]:
  """The parameter table, in which only kernels are laid out otherwise.

  "decoder/up_blocks_0/resnets_1/norm1/scale" is diffusers'
  "decoder.up_blocks.0.resnets.1.norm1.weight".
  """

  def key(path):
    dotted = re.sub(r"_(\d+)(?=/)", r".\1", path).replace("/", ".")
    return re.sub(r"(kernel|scale)$", "weight", dotted)

  return [
    Row(path, key(path), _LAYOUTS[leaf.ndim])
    for path, leaf in flatten(abstract(cfg)).items()
  ]
