"""Frozen configurations of training runs: phases, optimiser, data, run.

What a stage needs besides is in stage_options.py; the sizes of models are in
config.py.
"""

import dataclasses
import re

from xomni_jax.checks import positive, validate
from xomni_jax.config import Compute

DECAYS = ("constant", "cosine", "linear")
TASKS = (
  "text",  # a document
  "text_to_image",  # prompt, then image
  "image_to_text",  # image, then caption
  "generate",  # instruction: prompt -> image
  "chat",  # instruction: image + question -> answer
  "image",  # pixels (and a caption), for tokenizer, decoder and vae
  "prompt",  # what to draw, and what rewards need, for grpo
)


def _patterns(config, *names):
  """Checks that every entry of these fields is a regular expression."""
  out = []
  for name in names:
    for pattern in getattr(config, name):
      try:
        re.compile(pattern)
      except re.error as e:
        out.append((False, f"{name} has {pattern!r}, no expression ({e})"))
  return out


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """One data set of a mixture.

  Attributes:
    path: a folder, file or glob of records; "world:LEVEL" is the drawn world.
    task: what a record becomes, one of TASKS.
    weight: share of records drawn from it, relative to the others.
    first, count: use records first .. first + count - 1; count 0: to the end.
  """

  path: str
  task: str
  weight: float = 1.0
  first: int = 0
  count: int = 0

  def __post_init__(self):
    validate(
      self,
      (
        self.task in TASKS,
        f"task is {self.task!r}, expected one of {', '.join(TASKS)}",
      ),
      *positive(self, "weight"),
      (
        min(self.first, self.count) >= 0,
        f"first {self.first} and count {self.count} are not both from 0",
      ),
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """How batches are made of records.

  Attributes:
    sources: the mixture.
    seq_len: tokens of a packed row; 0 where nothing is packed.
    window: records that are packed, or sorted into buckets, together.
    shuffle: visit records in a new random order each epoch.
    prompt_dropout: share of image prompts (or captions) left out.
    turns: most questions on an image that a chat has; fewer where more do not
      fit a row.
    workers: processes that prepare batches; 0: threads of this one.
    max_bad_rate: the run stops above this share of unreadable records.
    text_backend: "tensorflow_text" or "tokenizers", for T5 ids and Unicode
      normalisation; the ids are the same.
  """

  sources: tuple[SourceConfig, ...]
  seq_len: int = 0
  window: int = 1024
  shuffle: bool = True
  prompt_dropout: float = 0.0
  turns: int = 1
  workers: int = 0
  max_bad_rate: float = 0.01
  text_backend: str = "tokenizers"

  def __post_init__(self):
    validate(
      self,
      (len(self.sources) > 0, "sources is empty, name at least one"),
      *positive(self, "window", "turns"),
      (
        min(self.seq_len, self.workers) >= 0,
        f"seq_len {self.seq_len}, workers {self.workers}: expected from 0",
      ),
      (
        0 <= self.prompt_dropout <= 1,
        f"prompt_dropout is {self.prompt_dropout}, expected 0 to 1",
      ),
      (
        0 <= self.max_bad_rate <= 1,
        f"max_bad_rate is {self.max_bad_rate}, expected 0 to 1",
      ),
      (
        self.text_backend in ("tensorflow_text", "tokenizers"),
        f"text_backend is {self.text_backend!r}, expected 'tensorflow_text' "
        "or 'tokenizers'",
      ),
    )


@dataclasses.dataclass(frozen=True)
class Phase:
  """A part of a run in which the same parameters train.

  Attributes:
    name: for logs.
    steps: optimiser steps.
    train: regular expressions; a parameter trains if one matches the start of
      its path, such as "ar/vision_in/".
    freeze: expressions that take parameters out again.
    lr_scale: the phase's peak learning rate, as a multiple of `optim.lr`.
    warmup_steps: linear from 0 to the peak, counted from the phase's start.
    decay: after that "constant", or "cosine" or "linear" down to `end_scale`
      times the peak.
    data: the mixture of this phase; None: the run's.
  """

  name: str
  steps: int
  train: tuple[str, ...]
  lr_scale: float = 1.0
  warmup_steps: int = 0
  decay: str = "constant"
  end_scale: float = 0.0
  freeze: tuple[str, ...] = ()
  data: DataConfig | None = None

  def __post_init__(self):
    validate(
      self,
      *positive(self, "steps", "lr_scale"),
      (
        0 <= self.warmup_steps <= self.steps,
        f"warmup_steps is {self.warmup_steps}, expected 0 to {self.steps}",
      ),
      (
        self.decay in DECAYS,
        f"decay is {self.decay!r}, expected one of {', '.join(DECAYS)}",
      ),
      (
        0 <= self.end_scale <= 1,
        f"end_scale is {self.end_scale}, expected 0 to 1",
      ),
      (len(self.train) > 0, "train is empty, name parameters by path"),
      *_patterns(self, "train", "freeze"),
    )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW, or for some parameters Muon.

  Attributes:
    lr: peak learning rate, of a phase whose `lr_scale` is 1.
    b1, b2, eps, weight_decay: AdamW's; the last is Muon's too.
    muon: expressions of parameter paths, of kernels of blocks: their momentum
      is made orthogonal, and as large as AdamW's steps (arXiv:2502.16982).
    no_decay: expressions of parameter paths without weight decay.
    clip_norm: global norm of the gradient; 0: not clipped.
    accumulate: microbatches of a step, one after the other.
    ema: decay of the averaged copy of the parameters; 0: none.
  """

  lr: float
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0
  muon: tuple[str, ...] = ()
  no_decay: tuple[str, ...] = (r".*(bias|scale)$",)
  clip_norm: float = 1.0
  accumulate: int = 1
  ema: float = 0.0

  def __post_init__(self):
    validate(
      self,
      *positive(self, "lr", "eps", "accumulate"),
      (
        0 <= self.b1 < 1 and 0 <= self.b2 < 1 and 0 <= self.ema < 1,
        f"b1 {self.b1}, b2 {self.b2}, ema {self.ema}: expected 0 to below 1",
      ),
      (
        min(self.weight_decay, self.clip_norm) >= 0,
        f"weight_decay {self.weight_decay} and clip_norm {self.clip_norm}: "
        "expected from 0",
      ),
      *_patterns(self, "no_decay", "muon"),
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When the state is saved.

  Attributes:
    every: steps between checkpoints.
    keep_last: this many newest ones stay.
    keep_every: multiples of this many steps stay for good; 0: none.
    export: write the model in the released layout when the run is done.
  """

  every: int = 1000
  keep_last: int = 2
  keep_every: int = 0
  export: bool = True

  def __post_init__(self):
    validate(
      self,
      *positive(self, "every", "keep_last"),
      (self.keep_every >= 0, f"keep_every is {self.keep_every}, below 0"),
    )


@dataclasses.dataclass(frozen=True)
class ReportConfig:
  """What a person sees, and how often (steps; 0: never).

  Attributes:
    log_every: a line of progress, and metrics in TensorBoard and JSONL.
    eval_every, eval_batches: the loss on held-out batches.
    preview_every: a picture of samples.
    profile: (first, last) step of a profile; (0, 0): none.
    peak_flops: of one device, for MFU; 0: by the device's name.
  """

  log_every: int = 10
  eval_every: int = 0
  eval_batches: int = 4
  preview_every: int = 0
  profile: tuple[int, int] = (0, 0)
  peak_flops: float = 0.0

  def __post_init__(self):
    validate(
      self,
      *positive(self, "log_every", "eval_batches"),
      (
        min(self.eval_every, self.preview_every) >= 0,
        f"eval_every {self.eval_every}, preview_every {self.preview_every}: "
        "expected from 0",
      ),
      (
        len(self.profile) == 2 and 0 <= self.profile[0] <= self.profile[1],
        f"profile is {self.profile}, expected (first, last)",
      ),
    )


@dataclasses.dataclass(frozen=True)
class InitConfig:
  """Where parameters come from; what is not named is drawn at random.

  Attributes:
    model: X-Omni folder in the released layout, or hub id; its text tokenizer
      is also that of what is trained.
    flux: FLUX.1-dev folder or hub id: autoencoder, text encoders, tokenizers.
    qwen: Qwen2.5 folder or hub id, in Hugging Face layout: the AR model's
      `lm` stack, text embedding, norm and head; the tokenizer's LM. Needs a
      `model` with a tokenizer of Qwen's vocabulary, such as X-Omni's or what
      `data.build_tokenizers.extend_qwen` makes of Qwen's.
  """

  model: str = ""
  flux: str = ""
  qwen: str = ""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A training run.

  Attributes:
    stage: one of stage_options.OPTIONS, such as "pretrain".
    seed: of parameters, data order and everything drawn.
    global_batch: rows of a step, over all processes.
    phases: one after the other.
    data, eval_data: training and held-out records.
    mesh: (axis, size) pairs; an axis left out is 1, one of -1 gets all devices
      that are left.
    frozen_dtype: of the parameters that no phase trains.
    options: the stage's own settings, one of the dataclasses of
      stage_options.py.
  """

  stage: str
  seed: int
  global_batch: int
  phases: tuple[Phase, ...]
  data: DataConfig
  eval_data: DataConfig | None
  init: InitConfig
  optim: OptimConfig
  checkpoint: CheckpointConfig
  report: ReportConfig
  compute: Compute
  mesh: tuple[tuple[str, int], ...]
  frozen_dtype: str
  options: object

  @property
  def steps(self) -> int:
    """Steps of all phases."""
    return sum(phase.steps for phase in self.phases)

  def phase_at(self, step: int) -> tuple[int, int]:
    """(index of the phase, steps before it) of a step."""
    first = 0
    for i, phase in enumerate(self.phases):
      if step < first + phase.steps or i + 1 == len(self.phases):
        return i, first
      first += phase.steps
    raise AssertionError("a run has at least one phase")

  def __post_init__(self):
    validate(
      self,
      *positive(self, "global_batch"),
      (len(self.phases) > 0, "phases is empty, name at least one"),
      (
        0 <= self.seed < 2**32,
        f"seed is {self.seed}, expected 0 to {2**32 - 1}",
      ),
      (
        self.global_batch % self.optim.accumulate == 0,
        f"global_batch {self.global_batch} is not a multiple of "
        f"optim.accumulate {self.optim.accumulate}",
      ),
      (
        self.frozen_dtype in ("float32", "bfloat16"),
        f"frozen_dtype is {self.frozen_dtype!r}, expected 'float32' or "
        "'bfloat16'",
      ),
      (
        not (self.report.eval_every and self.eval_data is None),
        "report.eval_every is set, but there is no eval_data",
      ),
    )
