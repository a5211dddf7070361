"""What a device could do at best: counted bytes and FLOPs, known peaks."""

import dataclasses
import math

import jax

from xomni_jax.config import ARConfig
from xomni_jax.flux_config import FluxConfig
from xomni_jax.models import ar
from xomni_jax.training import peaks

_TIME_DIM = 256  # sinusoids of FLUX's timestep and guidance


@dataclasses.dataclass(frozen=True)
class Peak:
  """Peak rates of a device; None: not known.

  Attributes:
    bandwidth: of its memory, bytes/s.
    flops: dense bf16 FLOP/s.
    source: where the two come from, for the report.
  """

  bandwidth: float | None
  flops: float | None
  source: str


def peak(
  device: str, bandwidth: float | None = None, flops: float | None = None
) -> Peak:
  """The peak of a device by name; TB/s and TFLOP/s given here go first."""
  known = peaks.rates(device)
  values = (bandwidth or known[0], flops or known[1])
  shown = [
    f"{value:g} {unit} ({'given' if own else 'data sheet'})"
    if value
    else f"unknown {unit}"
    for value, own, unit in zip(
      values, (bandwidth, flops), ("TB/s", "bf16 TFLOP/s"), strict=True
    )
  ]
  source = f"{device}, {' and '.join(shown)}"
  return Peak(*(v and v * 1e12 for v in values), source)


def decode_bytes(
  cfg: ARConfig, batch: int, length: float, itemsize: int
) -> float:
  """Bytes that one decode step has to read.

  All blocks, the image head and the keys and values of what came before:

    itemsize * (blocks + image_vocab_size * D
                + 2 * layers * kv_heads * head_dim * batch * length)

  Args:
    batch: sequences, a token each.
    length: mean number of tokens that are attended to.
    itemsize: of weights and cache, in bytes.
  """
  tree = ar.abstract(cfg)
  blocks = sum(
    math.prod(leaf.shape)
    for name, size in ar.stacks(cfg).items()
    if size
    for leaf in jax.tree.leaves(tree[name])
  )
  head = cfg.image_vocab_size * cfg.hidden_size
  heads = cfg.num_key_value_heads * cfg.head_dim
  cache = 2 * cfg.num_hidden_layers * heads * batch * length
  return itemsize * (blocks + head + cache)


def step_flops(cfg: FluxConfig, text: int, image: int, rows: int) -> float:
  """FLOPs of the matrix products of one pass of the FLUX transformer.

  With width D, MLP width F, S = T + L tokens, C latent channels, Z feature
  channels, E text width and P pooled width, a row takes

    double block: 2 S (4 D D + 2 D F) + 4 S S D + 2 (12 D D)
    single block: 2 S (3 D D + D F + (D + F) D) + 4 S S D + 2 (3 D D)
    outside:      2 L (2 C + Z) D + 2 T E D + 2 (2 D D)
                  + 2 (P + D) D + 2 (256 + D) D, the latter twice with guidance

  where the last term of a block is its modulation, and 4 S S D its scores and
  their product with the values.

  Args:
    text: T, text tokens.
    image: L, image tokens.
    rows: of the batch; two with guidance on the negative branch.
  """
  width, mlp, total = cfg.width, cfg.mlp, text + image
  square, attend = width * width, 4 * total * total * width
  double = 2 * total * (4 * square + 2 * width * mlp) + attend + 24 * square
  single = (
    2 * total * (3 * square + width * mlp + (width + mlp) * width)
    + attend
    + 6 * square
  )
  channels = 2 * cfg.in_channels + cfg.siglip_channels
  times = 1 + cfg.guidance_embeds
  outside = (
    2 * image * channels * width
    + 2 * text * cfg.joint_attention_dim * width
    + 4 * square
    + 2 * (cfg.pooled_projection_dim + width) * width
    + times * 2 * (_TIME_DIM + width) * width
  )
  blocks = cfg.num_layers * double + cfg.num_single_layers * single
  return rows * (blocks + outside)
