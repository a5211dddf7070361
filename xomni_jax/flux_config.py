"""Frozen configurations of the parts of FLUX.1-dev; as `xomni_jax.config`."""

import dataclasses

from xomni_jax.checks import positive, validate


@dataclasses.dataclass(frozen=True)
class FluxConfig:
  """FLUX transformer with the linear layer that adds semantic features."""

  num_layers: int
  num_single_layers: int
  num_attention_heads: int
  attention_head_dim: int
  in_channels: int
  joint_attention_dim: int
  pooled_projection_dim: int
  guidance_embeds: bool
  axes_dims_rope: tuple[int, ...]
  siglip_channels: int

  @property
  def width(self) -> int:
    return self.num_attention_heads * self.attention_head_dim

  @property
  def mlp(self) -> int:
    return 4 * self.width  # fixed in diffusers, no config field

  def __post_init__(self):
    validate(
      self,
      *positive(
        self,
        "num_layers",
        "num_single_layers",
        "num_attention_heads",
        "attention_head_dim",
        "siglip_channels",
      ),
      (
        self.in_channels > 0 and self.in_channels % 4 == 0,
        f"in_channels {self.in_channels} is not a multiple of 4 (2x2 latents)",
      ),
      (
        sum(self.axes_dims_rope) == self.attention_head_dim
        and len(self.axes_dims_rope) == 3
        and all(d % 2 == 0 for d in self.axes_dims_rope),
        f"axes_dims_rope {self.axes_dims_rope} are not 3 even sizes that add "
        f"up to attention_head_dim {self.attention_head_dim}",
      ),
    )


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """FLUX autoencoder: a latent is 2**(levels - 1) px."""

  block_out_channels: tuple[int, ...]
  layers_per_block: int
  norm_num_groups: int
  latent_channels: int
  in_channels: int
  out_channels: int
  scaling_factor: float
  shift_factor: float

  @property
  def factor(self) -> int:
    return 2 ** (len(self.block_out_channels) - 1)

  def __post_init__(self):
    validate(
      self,
      *positive(
        self,
        "layers_per_block",
        "norm_num_groups",
        "latent_channels",
        "scaling_factor",
      ),
      (
        self.norm_num_groups > 0
        and all(c % self.norm_num_groups == 0 for c in self.block_out_channels)
        and len(self.block_out_channels) > 0,
        f"block_out_channels {self.block_out_channels} are not multiples of "
        f"the {self.norm_num_groups} norm groups",
      ),
    )


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  """CLIP text encoder."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  max_position_embeddings: int
  layer_norm_eps: float
  hidden_act: str
  eos_token_id: int

  def __post_init__(self):
    validate(
      self,
      *positive(
        self,
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "max_position_embeddings",
      ),
      (
        self.hidden_act in ("quick_gelu", "gelu"),
        f"hidden_act is {self.hidden_act!r}, expected 'quick_gelu' or 'gelu'",
      ),
      (
        self.num_attention_heads > 0
        and self.hidden_size % self.num_attention_heads == 0,
        f"hidden_size {self.hidden_size} is not a multiple of "
        f"{self.num_attention_heads} heads",
      ),
    )


@dataclasses.dataclass(frozen=True)
class T5Config:
  """T5 v1.1 encoder (gated tanh-GELU)."""

  vocab_size: int
  d_model: int
  d_kv: int
  d_ff: int
  num_layers: int
  num_heads: int
  relative_attention_num_buckets: int
  relative_attention_max_distance: int
  layer_norm_epsilon: float

  def __post_init__(self):
    buckets = self.relative_attention_num_buckets
    validate(
      self,
      *positive(
        self, "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"
      ),
      (
        buckets >= 4 and buckets % 4 == 0,
        f"relative_attention_num_buckets is {buckets}, not a multiple of 4",
      ),
      (
        self.relative_attention_max_distance > buckets // 4,
        f"relative_attention_max_distance is "
        f"{self.relative_attention_max_distance}, expected above "
        f"{buckets // 4}, the buckets of single distances",
      ),
    )


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
  """Flow-matching sigmas with a shift that depends on the image's tokens."""

  base_image_seq_len: int
  max_image_seq_len: int
  base_shift: float
  max_shift: float

  def __post_init__(self):
    validate(
      self,
      (
        self.max_image_seq_len > self.base_image_seq_len,
        f"max_image_seq_len is {self.max_image_seq_len}, expected above "
        f"base_image_seq_len {self.base_image_seq_len}",
      ),
    )
