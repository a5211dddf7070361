"""Frozen settings that one stage of training has and no other."""

import dataclasses

from xomni_jax.checks import positive, validate
from xomni_jax.reward_config import CombineConfig, RewardConfig, check_rewards


@dataclasses.dataclass(frozen=True)
class VAEOptions:
  """Of stage `vae`.

  Attributes:
    crops: sides of the square crops it trains on, px: of each phase, or one of
      all. Held-out images are cropped to the last.
    align: corners of crops lie on multiples of it, px; 1: anywhere.
    l1, l2: weights of the pixel errors.
    edges: weight of the error in pixel differences, for sharp strokes.
    kl: weight of the KL divergence from a unit Gaussian, per latent value.
    fit_scale: set shift_factor and scaling_factor at the end, so that latents
      have mean 0 and deviation 1, as FLUX's do.
  """

  crops: tuple[int, ...]
  align: int = 1
  l1: float = 1.0
  l2: float = 0.0
  edges: float = 0.0
  kl: float = 1e-6
  fit_scale: bool = True

  def __post_init__(self):
    validate(
      self,
      (
        len(self.crops) > 0 and min(self.crops, default=0) > 0,
        f"crops is {self.crops}, expected sides in px, above 0",
      ),
      *positive(self, "align"),
      *(
        (getattr(self, name) >= 0, f"{name}: expected from 0")
        for name in ("l1", "l2", "edges", "kl")
      ),
    )


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
    validate(
      self,
      _pairs(self, "grids", "(rows, columns) of image tokens"),
      *positive(
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
  """

  text_weight: float = 1.0
  image_weight: float = 1.0
  loss_chunk: int = 1024

  def __post_init__(self):
    validate(
      self,
      *positive(self, "loss_chunk"),
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
    text_len: T5 tokens of a prompt, at most FLUX.1-dev's 512.
    preview_steps: of denoising, in previews.
  """

  grids: tuple[tuple[int, int], ...]
  times: str = "logit_normal"
  token_dropout: float = 0.0
  text_len: int = 512
  preview_steps: int = 8

  def __post_init__(self):
    validate(
      self,
      _pairs(self, "grids", "(rows, columns) of image tokens"),
      (
        self.times in ("logit_normal", "uniform"),
        f"times is {self.times!r}, expected 'logit_normal' or 'uniform'",
      ),
      (
        0 <= self.token_dropout < 1,
        f"token_dropout is {self.token_dropout}, expected 0 to below 1",
      ),
      *positive(self, "text_len", "preview_steps"),
      (self.text_len <= 512, f"text_len is {self.text_len}, above 512"),
    )


@dataclasses.dataclass(frozen=True)
class GRPOOptions:
  """Of stage `grpo`; a step's `global_batch` counts images.

  Attributes:
    group_size: images of a prompt.
    minibatches, epochs: a rollout has `minibatches` global batches, which are
      gone through `epochs` times; 1 and 1: strictly on-policy.
    overlap: 1: rewards of a rollout are awaited while the next one is drawn,
      by a policy that is `minibatches` x `epochs` updates behind; 0: never
      stale.
    clip_low, clip_high: of the ratio, below and above 1.
    beta: weight of the KL divergence from the reference policy.
    normalise: divide advantages by the deviation of their group.
    line_advantages: of each prompt's target lines so many are told apart, where
      a reward says how each was read and where it stands (OCR does, but for
      GOT alone; of several engines it is what they say together): their
      codes learn from their own line's score in the place of the image's;
      0: all codes of an image learn alike.
    aggregate: "token" or "sequence", what the loss is a mean over.
    importance_cap: truncated importance weights of what the sampler computed
      against what training does; 0: none.
    temperature, top_k, top_p, min_p: how images are drawn.
    cfg_scale: of drawing; only 1 is scored.
    prompt_len: tokens of a prompt, padded on the left.
    sample_rows, paint_rows, score_rows: images that are drawn, painted, and
      scored by the training forward at once, over all devices.
    paint_steps, paint_cfg_scale: of denoising.
    same_noise: images of a prompt are painted from the same noise, so that
      they differ in what the policy drew and not in the decoder's luck.
    sizes: (height, width) of images, px; the first where a prompt names none.
    rewards: what images are rewarded for.
    reward_path: "host" asks for rewards in threads, beside what devices do;
      "fused" in a callback of the program that paints.
    combine: how scores become one reward, and when failures stop a run.
    loss_chunk: positions whose logits exist at once.
    rollout_mesh: (axis, size) pairs of the mesh that draws and paints, over
      the same devices; (): the run's. To draw a token all weights are read:
      they should lie split over `tensor`, not over `fsdp`.
  """

  sizes: tuple[tuple[int, int], ...]
  rewards: tuple[RewardConfig, ...]
  group_size: int = 16
  minibatches: int = 1
  epochs: int = 1
  overlap: int = 0
  clip_low: float = 0.2
  clip_high: float = 0.2
  beta: float = 0.01
  normalise: bool = True
  line_advantages: int = 0
  aggregate: str = "token"
  importance_cap: float = 0.0
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  cfg_scale: float = 1.0
  prompt_len: int = 256
  sample_rows: int = 0
  paint_rows: int = 16
  score_rows: int = 0
  paint_steps: int = 8
  paint_cfg_scale: float = 1.0
  same_noise: bool = True
  reward_path: str = "host"
  combine: CombineConfig = dataclasses.field(default_factory=CombineConfig)
  loss_chunk: int = 1024
  rollout_mesh: tuple[tuple[str, int], ...] = ()

  def __post_init__(self):
    validate(
      self,
      *positive(
        self,
        *("minibatches", "epochs", "temperature", "prompt_len", "paint_rows"),
        *("paint_steps", "loss_chunk"),
      ),
      _pairs(self, "sizes", "(height, width) in px"),
      *(
        (
          size == -1 or size > 0,
          f"rollout_mesh: {axis} is {size}, expected -1 or above 0",
        )
        for axis, size in self.rollout_mesh
      ),
      (self.top_k >= 0, f"top_k is {self.top_k}, expected from 0"),
      (0 < self.top_p <= 1, f"top_p is {self.top_p}, expected above 0 to 1"),
      (0 <= self.min_p < 1, f"min_p is {self.min_p}, expected 0 to below 1"),
      (
        self.paint_cfg_scale >= 1,
        f"paint_cfg_scale is {self.paint_cfg_scale}, expected at least 1",
      ),
      (self.group_size >= 2, f"group_size is {self.group_size}, below 2"),
      (self.overlap in (0, 1), f"overlap is {self.overlap}, expected 0 or 1"),
      (
        0 < self.clip_low < 1 and self.clip_high > 0,
        f"clip_low {self.clip_low} and clip_high {self.clip_high}: expected "
        "above 0, and clip_low below 1",
      ),
      *(
        (getattr(self, name) >= 0, f"{name}: expected from 0")
        for name in (
          *("beta", "importance_cap", "line_advantages"),
          *("sample_rows", "score_rows"),
        )
      ),
      (
        self.aggregate in ("token", "sequence"),
        f"aggregate is {self.aggregate!r}, expected 'token' or 'sequence'",
      ),
      (
        self.reward_path in ("host", "fused")
        and not (self.reward_path == "fused" and self.overlap),
        f"reward_path is {self.reward_path!r} and overlap {self.overlap}, "
        "expected 'host', or 'fused' without overlap",
      ),
      (
        self.cfg_scale == 1,
        f"cfg_scale is {self.cfg_scale}: only 1 can be scored; X-Omni needs no "
        "guidance",
      ),
    )
    check_rewards(self.rewards)


OPTIONS = {
  "vae": VAEOptions,
  "tokenizer": TokenizerOptions,
  "pretrain": ARTrainOptions,
  "sft": ARTrainOptions,
  "decoder": DecoderOptions,
  "grpo": GRPOOptions,
}


def _pairs(config, name, what):
  """A check for `validate`: a field holds pairs of numbers above 0."""
  pairs = getattr(config, name)
  return (
    len(pairs) > 0 and all(len(p) == 2 and min(p) > 0 for p in pairs),
    f"{name} is {pairs}, expected one or more {what}, above 0",
  )
