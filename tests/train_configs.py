"""The config of a run whose data, if any, a test makes itself."""

from xomni_jax.config import Compute
from xomni_jax.stage_options import ARTrainOptions
from xomni_jax.train_config import (
  CheckpointConfig,
  DataConfig,
  InitConfig,
  OptimConfig,
  Phase,
  ReportConfig,
  SourceConfig,
  TrainConfig,
)


def data(seq_len: int = 1) -> DataConfig:
  """Records that nobody reads, as rows of so many tokens."""
  return DataConfig((SourceConfig("none", "text"),), seq_len=seq_len)


def train_config(steps: int, train: str, **settings) -> TrainConfig:
  """One phase of so many steps that trains what `train` matches.

  Args:
    settings: of TrainConfig, in the place of what stands here.
  """
  return TrainConfig(
    **{
      "stage": "pretrain",
      "seed": 0,
      "global_batch": 8,
      "phases": (Phase("all", steps, (train,)),),
      "data": data(),
      "eval_data": None,
      "init": InitConfig(),
      "optim": OptimConfig(lr=1e-2),
      "checkpoint": CheckpointConfig(),
      "report": ReportConfig(),
      "compute": Compute(),
      "mesh": (),
      "frozen_dtype": "float32",
      "options": ARTrainOptions(),
    }
    | settings
  )
