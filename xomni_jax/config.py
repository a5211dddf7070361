"""Frozen configurations of every part.

Above this file nothing looks a setting up with a default: a config either
holds a value or was refused. Field names are those of the released files.
"""

import dataclasses

from xomni_jax.errors import InputError


def _validate(config, *checks):
  """Raises one InputError that lists every failed (ok, message) check."""
  problems = [message for ok, message in checks if not ok]
  if problems:
    raise InputError(f"{type(config).__name__}: " + "; ".join(problems))


def _positive(config, *names):
  return [
    (getattr(config, n) > 0, f"{n} is {getattr(config, n)}, expected above 0")
    for n in names
  ]


@dataclasses.dataclass(frozen=True)
class Compute:
  """How a model is computed; no effect on its parameters.

  Attributes:
    dtype: of matmuls, "float32" or "bfloat16". Norm statistics, softmax, RoPE
      angles, log-probs and VQ distances are float32 whatever this says.
    scan_layers: `lax.scan` over stacked layers (fast to compile) or static
      slices (fast on CPU: training 1.7x, decoding 3x).
    query_chunk: longest query run whose attention scores exist at once.
    remat: what of a block is made again in the backward pass instead of kept:
      "none", "full" (all of it), "dots" (all but results of matmuls).
    attention: of packed sequences and of FLUX in training: "chunked" runs
      anywhere, "splash" is JAX's kernel for TPUs (here also with
      "splash_interpret", which checks it on a CPU).
  """

  dtype: str = "float32"
  scan_layers: bool = False
  query_chunk: int = 1024
  remat: str = "none"
  attention: str = "chunked"

  def __post_init__(self):
    _validate(
      self,
      (
        self.dtype in ("float32", "bfloat16"),
        f"dtype is {self.dtype!r}, expected 'float32' or 'bfloat16'",
      ),
      (
        self.remat in ("none", "full", "dots"),
        f"remat is {self.remat!r}, expected 'none', 'full' or 'dots'",
      ),
      (
        self.attention in ("chunked", "splash", "splash_interpret"),
        f"attention is {self.attention!r}, expected 'chunked' or 'splash'",
      ),
      *_positive(self, "query_chunk"),
    )


@dataclasses.dataclass(frozen=True)
class ARConfig:
  """Qwen2 with vision-only blocks before and after.

  `num_hidden_layers` counts all blocks: the first `num_mm_adap_layers` and the
  last `num_mm_head_layers` of them are vision-only. Ids below `vocab_size` are
  text; image code i is `vocab_size + i`; ids above are special, of the image.
  """

  vocab_size: int
  image_vocab_size: int
  mm_vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_mm_adap_layers: int
  num_mm_head_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  rope_theta: float
  rms_norm_eps: float
  max_position_embeddings: int

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_attention_heads

  @property
  def num_lm_layers(self) -> int:
    return (
      self.num_hidden_layers - self.num_mm_adap_layers - self.num_mm_head_layers
    )

  def __post_init__(self):
    heads, kv = self.num_attention_heads, self.num_key_value_heads
    _validate(
      self,
      *_positive(
        self,
        "vocab_size",
        "image_vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
      ),
      (
        min(self.num_mm_adap_layers, self.num_mm_head_layers) >= 0
        and self.num_lm_layers > 0,
        f"{self.num_hidden_layers} layers can't hold "
        f"{self.num_mm_adap_layers} + {self.num_mm_head_layers} vision-only "
        "ones and at least one of the language model",
      ),
      (
        heads > 0 and self.hidden_size % (2 * heads) == 0,
        f"hidden_size {self.hidden_size} is not an even multiple of the "
        f"{heads} attention heads",
      ),
      (
        kv > 0 and heads % kv == 0,
        f"{heads} attention heads are not a multiple of {kv} key/value heads",
      ),
      (
        self.mm_vocab_size >= self.image_vocab_size,
        f"mm_vocab_size {self.mm_vocab_size} is below image_vocab_size "
        f"{self.image_vocab_size}",
      ),
    )


@dataclasses.dataclass(frozen=True)
class LMConfig:
  """A plain Qwen2 causal language model; names as in `ARConfig`.

  `tie_word_embeddings`: the text embedding is the head, too.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  rope_theta: float
  rms_norm_eps: float
  max_position_embeddings: int
  tie_word_embeddings: bool

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_attention_heads

  def __post_init__(self):
    heads, kv = self.num_attention_heads, self.num_key_value_heads
    _validate(
      self,
      *_positive(
        self,
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
      ),
      (
        heads > 0 and self.hidden_size % (2 * heads) == 0,
        f"hidden_size {self.hidden_size} is not an even multiple of the "
        f"{heads} attention heads",
      ),
      (
        kv > 0 and heads % kv == 0,
        f"{heads} attention heads are not a multiple of {kv} key/value heads",
      ),
    )


@dataclasses.dataclass(frozen=True)
class TransformConfig:
  """Image preprocessing of the tokenizer; sizes in px."""

  short_size: int
  long_size: int
  patch_size: int
  min_short_size: int
  max_aspect_ratio: float
  filtering: bool
  random_ratio: float | None = None

  def __post_init__(self):
    _validate(
      self,
      *_positive(self, "short_size", "long_size", "patch_size"),
      (
        self.short_size <= self.long_size,
        f"short_size {self.short_size} is above long_size {self.long_size}",
      ),
      (
        self.max_aspect_ratio >= 1,
        f"max_aspect_ratio is {self.max_aspect_ratio}, expected at least 1",
      ),
      (
        self.random_ratio is None,
        f"random_ratio is {self.random_ratio}, only null is known",
      ),
    )


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
  """SigLIP ViT; `grid` is the side of the square position table."""

  width: int
  layers: int
  heads: int
  mlp: int
  patch: int
  grid: int

  def __post_init__(self):
    _validate(
      self,
      *_positive(self, "width", "layers", "heads", "mlp", "patch", "grid"),
      (
        self.heads > 0 and self.width % self.heads == 0,
        f"width {self.width} is not a multiple of {self.heads} heads",
      ),
    )


@dataclasses.dataclass(frozen=True)
class VQConfig:
  """Quantiser and its convolutions."""

  codebook_size: int
  codebook_dim: int
  z_channels: int

  def __post_init__(self):
    _validate(
      self,
      *_positive(self, "codebook_size", "codebook_dim"),
      (
        self.z_channels > 0 and self.z_channels % 32 == 0,
        f"z_channels {self.z_channels} is not a multiple of the 32 norm groups",
      ),
    )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Defaults of the decoding loop; `upscale_factor` is px per image token.

  `image_size` (height, width), in px, is drawn where none is asked for; the
  released model has none, and draws a square of the transform's `long_size`.
  """

  upscale_factor: int
  num_inference_steps: int
  cfg_scale: float
  image_size: tuple[int, ...] = ()

  def __post_init__(self):
    _validate(
      self,
      *_positive(self, "upscale_factor", "num_inference_steps"),
      (
        len(self.image_size) in (0, 2) and min(self.image_size, default=1) > 0,
        f"image_size is {self.image_size}, expected height and width or none",
      ),
      (
        self.cfg_scale >= 1,
        f"cfg_scale is {self.cfg_scale}, expected at least 1",
      ),
    )


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
    _validate(
      self,
      *_positive(
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
    _validate(
      self,
      *_positive(
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
    _validate(
      self,
      *_positive(
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
    _validate(
      self,
      *_positive(
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


@dataclasses.dataclass(frozen=True)
class XOmniConfig:
  """What a released `config.json` says of a whole model.

  Attributes:
    siglip_name, siglip_heads: the ViT's released name, and its number of heads
      (looked up by name, else `vision_config.siglip_heads`).
    siglip_path, projector_path, flux_path: relative to the model folder.
    eos_token_ids: text generation stops at any of them.
  """

  ar: ARConfig
  transform: TransformConfig
  vq: VQConfig
  decoder: DecoderConfig
  siglip_name: str
  siglip_heads: int
  siglip_path: str
  projector_path: str
  flux_path: str
  eos_token_ids: tuple[int, ...]

  @property
  def image_size(self) -> tuple[int, int]:
    """(height, width) in px of an image for which no size is asked."""
    px = self.decoder.upscale_factor
    square = (self.transform.long_size // px * px,) * 2
    return self.decoder.image_size or square

  def __post_init__(self):
    ar, vq = self.ar, self.vq
    _validate(
      self,
      (
        vq.codebook_size == ar.image_vocab_size,
        f"codebook_size {vq.codebook_size} is not image_vocab_size "
        f"{ar.image_vocab_size}",
      ),
    )


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Sizes of every part of a model, without its files."""

  ar: ARConfig
  siglip: SiglipConfig
  vq: VQConfig
  flux: FluxConfig
  vae: VAEConfig
  clip: CLIPConfig
  t5: T5Config
