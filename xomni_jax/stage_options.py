"""Frozen settings that one stage of training has and no other."""

import dataclasses

from xomni_jax.config import _positive, _validate


@dataclasses.dataclass(frozen=True)
class VAEOptions:
  """Of stage `vae`.

  Attributes:
    crop: side of the square crops it trains on, px.
    l1, l2: weights of the pixel errors.
    edges: weight of the error in pixel differences, for sharp strokes.
    kl: weight of the KL divergence from a unit Gaussian, per latent value.
    fit_scale: set shift_factor and scaling_factor at the end, so that latents
      have mean 0 and deviation 1, as FLUX's do.
  """

  crop: int
  l1: float = 1.0
  l2: float = 0.0
  edges: float = 0.0
  kl: float = 1e-6
  fit_scale: bool = True


@dataclasses.dataclass(frozen=True)
class TokenizerOptions:
  """Of stage `tokenizer`.

  Attributes:
    grids: (rows, columns) of image tokens of the aspect buckets.
    text_len: tokens of questions and answers beside the image.
    temperature: of the softmax over codes; the reference's class has 2.
    entropy: weight of the auxiliary term that spreads the use of codes.
    commitment: weight of mean((z_hard - sg(z))^2); the reference has 0.25.
    skip: share of samples whose features bypass the quantiser.
    quantise_from: step from which on features are quantised.
    kmeans: iterations of the k-means start at that step; 0: none.
    kmeans_batches: batches of features it sees.
    revive_every: steps between replacements of dead codes; 0: never.
    revive_until: no code is replaced from this step on; 0: to the end.
    dead_below: a code is dead below this share of the mean use.
    features, pixels: weights of optional reconstruction terms, of the ViT's
      features (1 - cosine) and of pixels (squared error).
    loss_chunk: tokens of a row whose logits exist at once.
  """

  grids: tuple[tuple[int, int], ...]
  text_len: int
  temperature: float
  entropy: float = 0.0
  commitment: float = 0.25
  skip: float = 0.1
  quantise_from: int = 0
  kmeans: int = 10
  kmeans_batches: int = 8
  revive_every: int = 0
  revive_until: int = 0
  dead_below: float = 0.05
  features: float = 0.0
  pixels: float = 0.0
  loss_chunk: int = 1024

  def __post_init__(self):
    _validate(
      self,
      (len(self.grids) > 0, "grids is empty"),
      *_positive(
        self, "text_len", "temperature", "kmeans_batches", "loss_chunk"
      ),
      (0 <= self.skip <= 1, f"skip is {self.skip}, expected 0 to 1"),
      *(
        (getattr(self, n) >= 0, f"{n} is {getattr(self, n)}, expected from 0")
        for n in (
          *("entropy", "commitment", "quantise_from", "kmeans"),
          *("revive_every", "revive_until", "dead_below"),
          *("features", "pixels"),
        )
      ),
    )


@dataclasses.dataclass(frozen=True)
class ARTrainOptions:
  """Of stages `pretrain` and `sft`.

  Attributes:
    text_weight, image_weight: of a target in the text vocabulary, and of one
      in the multimodal vocabulary.
    loss_chunk: tokens whose logits exist at once.
    preview_size: (rows, columns) of image tokens of previews.
  """

  text_weight: float = 1.0
  image_weight: float = 1.0
  loss_chunk: int = 1024
  preview_size: tuple[int, int] = (4, 4)

  def __post_init__(self):
    _validate(
      self,
      *_positive(self, "loss_chunk"),
      (
        min(self.text_weight, self.image_weight) >= 0,
        "text_weight and image_weight: expected from 0",
      ),
    )


@dataclasses.dataclass(frozen=True)
class DecoderOptions:
  """Of stage `decoder`.

  Attributes:
    grids: (rows, columns) of image tokens of the aspect buckets.
    times: "logit_normal" or "uniform", before the shift by image size.
    token_dropout: share of image tokens whose features are zeroed.
    text_len: T5 tokens of a prompt.
    preview_steps: of denoising, in previews.
  """

  grids: tuple[tuple[int, int], ...]
  times: str = "logit_normal"
  token_dropout: float = 0.0
  text_len: int = 512
  preview_steps: int = 8

  def __post_init__(self):
    _validate(
      self,
      (len(self.grids) > 0, "grids is empty"),
      (
        self.times in ("logit_normal", "uniform"),
        f"times is {self.times!r}, expected 'logit_normal' or 'uniform'",
      ),
      (
        0 <= self.token_dropout < 1,
        f"token_dropout is {self.token_dropout}, expected 0 to below 1",
      ),
    )


OPTIONS = {
  "vae": VAEOptions,
  "tokenizer": TokenizerOptions,
  "pretrain": ARTrainOptions,
  "sft": ARTrainOptions,
  "decoder": DecoderOptions,
}
