"""Pretraining at a size that compiles in seconds, sharded as the full one."""

import pathlib

from xomni_jax.config_files import read_config

_PRETRAIN = pathlib.Path(__file__).parents[2] / "configs" / "pretrain.py"


def get_config():
  """Widths whose shards are multiples of a tile, as 3584 over 32 is."""
  config = read_config(str(_PRETRAIN), "7b")
  config.global_batch = 16
  config.mesh = {"data": 2, "fsdp": 8}
  config.data.seq_len = 1024
  config.architecture.ar.update(
    vocab_size=4096,
    image_vocab_size=2048,
    mm_vocab_size=2112,
    hidden_size=896,  # 112 a device, as at full size: no multiple of 128 lanes
    intermediate_size=1024,
    num_attention_heads=7,
    num_key_value_heads=7,  # one head alone is laid out by its width
    num_hidden_layers=4,
    num_mm_adap_layers=1,
    num_mm_head_layers=1,
  )
  return config
