"""Floating-point operations of every model, counted from its config.

A multiplication with its addition is two operations; only matmuls and
convolutions count. All counts are of one forward pass of one row; a backward
pass costs twice that for the models that train. XLA's own count is no use
here: it sees the body of a scan once and custom calls not at all.
"""

from collections.abc import Sequence

from xomni_jax.config import ARConfig, SiglipConfig, VQConfig
from xomni_jax.flux_config import CLIPConfig, FluxConfig, T5Config, VAEConfig


def vae_encoder(cfg: VAEConfig, height: int, width: int) -> float:
  """Of an image of height x width px to its moments."""
  levels = cfg.block_out_channels
  area = height * width
  total = _conv(area, cfg.in_channels, levels[0])
  before = levels[0]
  for i, channels in enumerate(levels):
    total += _resnets(area, before, channels, cfg.layers_per_block)
    before = channels
    if i + 1 < len(levels):
      area /= 4
      total += _conv(area, channels, channels)
  total += _middle(area, before)
  return total + _conv(area, before, 2 * cfg.latent_channels)


def vae_decoder(cfg: VAEConfig, height: int, width: int) -> float:
  """Of latents to their image of height x width px."""
  levels = cfg.block_out_channels[::-1]
  area = height * width / 4 ** (len(levels) - 1)
  total = _conv(area, cfg.latent_channels, levels[0]) + _middle(area, levels[0])
  before = levels[0]
  for i, channels in enumerate(levels):
    total += _resnets(area, before, channels, cfg.layers_per_block + 1)
    before = channels
    if i + 1 < len(levels):
      area *= 4
      # Of a pixel that was doubled 2 x 2 neighbours differ, not 3 x 3.
      total += _conv(area, channels, channels, side=2)
  return total + _conv(area, before, cfg.out_channels)


def vae(cfg: VAEConfig, height: int, width: int) -> float:
  """Of an image through the autoencoder and back."""
  return vae_encoder(cfg, height, width) + vae_decoder(cfg, height, width)


def _conv(area, before, after, side=3):
  return 2.0 * area * before * after * side**2


def _resnets(area, before, channels, count):
  first = _conv(area, before, channels) + _conv(area, channels, channels)
  if before != channels:
    first += _conv(area, before, channels, side=1)
  return first + (count - 1) * 2 * _conv(area, channels, channels)


def _middle(area, channels):
  """Two resnets and attention over all cells."""
  projections = 4 * 2.0 * area * channels**2
  return (
    2 * _resnets(area, channels, channels, 1)
    + projections
    + attention(area, area, channels)
  )


def attention(queries: float, keys: float, width: int) -> float:
  """Scores and weighted values of all heads; `width` is theirs together."""
  return 4.0 * queries * keys * width


def transformer(
  *,
  length: float,
  width: int,
  heads_width: int,
  kv_width: int,
  mlp: int,
  gated: bool,
  layers: int,
  context: float | None = None,
) -> float:
  """Of pre-norm blocks with attention and MLP over one row.

  Args:
    length: tokens.
    width: of the residual stream.
    heads_width, kv_width: of all query heads, and of all key/value heads.
    mlp: hidden width; `gated`: with two matrices in (SwiGLU, gated GELU).
    layers: blocks.
    context: keys a query meets on average; None: all `length` of them. Of a
      causal model (length + 1) / 2, of a packed row that over its samples.
  """
  dense = width * (2 * heads_width + 2 * kv_width + (3 if gated else 2) * mlp)
  keys = length if context is None else context
  return layers * (2.0 * length * dense + attention(length, keys, heads_width))


def ar_blocks(
  cfg: ARConfig, length: float, context: float | None = None
) -> float:
  """Of the AR model's blocks over a row of `length` tokens, without heads.

  `context` as for `transformer`; None: causal over the whole row.
  """
  return transformer(
    length=length,
    width=cfg.hidden_size,
    heads_width=cfg.num_attention_heads * cfg.head_dim,
    kv_width=cfg.num_key_value_heads * cfg.head_dim,
    mlp=cfg.intermediate_size,
    gated=True,
    layers=cfg.num_hidden_layers,
    context=(length + 1) / 2 if context is None else context,
  )


def head(length: float, width: int, vocabulary: int) -> float:
  """Of logits at `length` positions."""
  return 2.0 * length * width * vocabulary


def siglip(cfg: SiglipConfig, grid: Sequence[int]) -> float:
  """Of the ViT over `grid` (rows, columns) of patches."""
  length = grid[0] * grid[1]
  return 2.0 * length * cfg.patch**2 * 3 * cfg.width + transformer(
    length=length,
    width=cfg.width,
    heads_width=cfg.width,
    kv_width=cfg.width,
    mlp=cfg.mlp,
    gated=False,
    layers=cfg.layers,
  )


def vq_encoder(cfg: VQConfig, grid: Sequence[int]) -> float:
  """Of features to codes."""
  length = grid[0] * grid[1]
  return head(length, cfg.codebook_dim, cfg.z_channels + cfg.codebook_size)


def vq_decoder(cfg: VQConfig, grid: Sequence[int]) -> float:
  """Of codes to features: a linear layer and four convolutions."""
  area = grid[0] * grid[1]
  return head(area, cfg.codebook_dim, cfg.z_channels) + 4 * _conv(
    area, cfg.z_channels, cfg.z_channels
  )


def clip(cfg: CLIPConfig, length: int) -> float:
  """Of CLIP's text model over `length` ids."""
  return transformer(
    length=length,
    width=cfg.hidden_size,
    heads_width=cfg.hidden_size,
    kv_width=cfg.hidden_size,
    mlp=cfg.intermediate_size,
    gated=False,
    layers=cfg.num_hidden_layers,
    # Computed whole and then masked (`models.layers.attention`).
    context=length,
  )


def t5(cfg: T5Config, length: int) -> float:
  """Of T5's encoder over `length` ids."""
  heads = cfg.num_heads * cfg.d_kv
  return transformer(
    length=length,
    width=cfg.d_model,
    heads_width=heads,
    kv_width=heads,
    mlp=cfg.d_ff,
    gated=True,
    layers=cfg.num_layers,
  )


def flux(cfg: FluxConfig, grid: Sequence[int], text: int) -> float:
  """Of the FLUX transformer over an image's and `text` text tokens."""
  image, width = grid[0] * grid[1], cfg.width
  joint = image + text
  blocks = transformer(
    length=joint,
    width=width,
    heads_width=width,
    kv_width=width,
    mlp=cfg.mlp,
    gated=False,
    layers=cfg.num_layers + cfg.num_single_layers,
  )
  embedders = 3 if cfg.guidance_embeds else 2
  vectors = (
    # The modulations of a double, of a single block, and of the end.
    (12 * cfg.num_layers + 3 * cfg.num_single_layers + 2) * width
    + embedders * width
    + (embedders - 1) * 256  # sinusoids
    + cfg.pooled_projection_dim
  )
  ends = image * (2 * cfg.in_channels + cfg.siglip_channels)
  return blocks + 2.0 * width * (
    vectors + ends + text * cfg.joint_attention_dim
  )
