"""Frozen configurations of every part.

Above this file nothing looks a setting up with a default: a config either
holds a value or was refused. Field names are those of the released files.
"""

import dataclasses

from xomni_jax.checks import positive, validate
from xomni_jax.flux_config import CLIPConfig, FluxConfig, T5Config, VAEConfig


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
    attention: of packed sequences: "chunked" runs anywhere, "splash" is JAX's
      kernel for TPUs (here also with "splash_interpret", which checks it on a
      CPU).
  """

  dtype: str = "float32"
  scan_layers: bool = False
  query_chunk: int = 1024
  remat: str = "none"
  attention: str = "chunked"

  def __post_init__(self):
    validate(
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
      *positive(self, "query_chunk"),
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
    validate(
      self,
      *positive(
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
    validate(
      self,
      *positive(
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
    validate(
      self,
      *positive(self, "short_size", "long_size", "patch_size"),
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
    validate(
      self,
      *positive(self, "width", "layers", "heads", "mlp", "patch", "grid"),
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
    validate(
      self,
      *positive(self, "codebook_size", "codebook_dim"),
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
    validate(
      self,
      *positive(self, "upscale_factor", "num_inference_steps"),
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
    validate(
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
