"""The training step in PyTorch: X-Omni's AR model of transformers' layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from xomni_jax.bench import torch_work
from xomni_jax.config import ARConfig
from xomni_jax.models import ar
from xomni_jax.train_config import TrainConfig


def network(cfg: ARConfig, state: Mapping[str, np.ndarray]) -> Any:
  """A module with the released names and these weights, {released key: array}.

  Its blocks are transformers' Qwen2DecoderLayer; `loss` runs it.
  """
  import torch
  from torch import nn
  from transformers.models.qwen2 import modeling_qwen2 as qwen2

  config = torch_work.qwen2_config(cfg)
  # Flash attention on the CPU, masks included.
  config._attn_implementation = "sdpa"
  width = cfg.hidden_size
  norm = lambda: qwen2.Qwen2RMSNorm(width, eps=cfg.rms_norm_eps)
  net, inner = nn.Module(), nn.Module()
  inner.lm_embed_tokens = nn.Embedding(cfg.vocab_size, width)
  inner.mm_embed_tokens = nn.Embedding(cfg.mm_vocab_size, width)
  inner.layers = nn.ModuleList(
    qwen2.Qwen2DecoderLayer(config, i) for i in range(cfg.num_hidden_layers)
  )
  inner.lm_norm, inner.mm_norm = norm(), norm()
  net.model = inner
  net.lm_head = nn.Linear(width, cfg.vocab_size, bias=False)
  net.mm_head = nn.Linear(width, cfg.mm_vocab_size, bias=False)
  # Copied, as arrays that come from JAX are read-only.
  net.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
  net.rope = qwen2.Qwen2RotaryEmbedding(config)  # has no parameters
  return net


def loss(net: Any, cfg: TrainConfig, sizes: ARConfig, batch: Mapping[str, Any]):
  """The loss that stage `pretrain` has of a global batch of tensors.

  Logits are computed where they count only: eager shapes may vary, where JAX
  computes both heads everywhere.
  """
  import torch
  from torch.nn import functional

  tokens, segments = batch["tokens"], batch["segments"]
  x, image = hidden(net, sizes, tokens, segments, batch["positions"])
  targets, weights = tokens[:, 1:], batch["weights"][:, 1:]
  of_image = image[:, 1:]
  total, share = 0.0, 0.0
  for head, side, first, scale in (
    (net.lm_head, ~of_image, 0, cfg.options.text_weight),
    (net.mm_head, of_image, sizes.vocab_size, cfg.options.image_weight),
  ):
    chosen = side & (weights > 0)
    nll = functional.cross_entropy(
      head(x[:, :-1][chosen]), targets[chosen] - first, reduction="none"
    )
    total = total + scale * torch.sum(weights[chosen] * nll)
    share = share + scale * torch.sum(weights[chosen])
  return total / share


def hidden(net: Any, cfg: ARConfig, tokens, segments, positions):
  """(normed hidden states [B, T, D], where the image side is [B, T])."""
  import torch

  inner, image = net.model, tokens >= cfg.vocab_size
  at_image = image[..., None]
  x = torch.where(
    at_image,
    inner.mm_embed_tokens(torch.where(image, tokens - cfg.vocab_size, 0)),
    inner.lm_embed_tokens(torch.where(image, 0, tokens)),
  )
  rope = net.rope(x, positions)
  length = tokens.shape[1]
  causal = torch.ones(length, length, dtype=torch.bool).tril()
  mask = (segments[:, None, :, None] == segments[:, None, None]) & causal
  kinds = [name for name, n in ar.stacks(cfg).items() for _ in range(n)]
  for kind, layer in zip(kinds, inner.layers, strict=True):
    y = layer(x, attention_mask=mask, position_embeddings=rope)
    x = y if kind == "lm" else torch.where(at_image, y, x)
  return torch.where(at_image, inner.mm_norm(x), inner.lm_norm(x)), image


def trainer(
  cfg: TrainConfig,
  sizes: ARConfig,
  state: Mapping[str, np.ndarray],
  batches: Sequence[Mapping[str, np.ndarray]],
) -> Callable[[], np.ndarray]:
  """A call that trains a step on each batch and returns their losses f64[n]."""
  import torch

  net = network(sizes, state)
  # What `OptimConfig.no_decay` names has one axis, and nothing else has.
  flat = [p for p in net.parameters() if p.ndim == 1]
  deep = [p for p in net.parameters() if p.ndim > 1]
  optim = cfg.optim
  adam = torch.optim.AdamW(
    [
      {"params": deep, "weight_decay": optim.weight_decay},
      {"params": flat, "weight_decay": 0.0},
    ],
    lr=optim.lr,
    betas=(optim.b1, optim.b2),
    eps=optim.eps,
    fused=True,
  )

  def step(rows):
    batch = {
      k: torch.from_numpy(v).to(
        torch.float32 if v.dtype == np.float32 else torch.int64
      )
      for k, v in rows.items()
    }
    adam.zero_grad(set_to_none=True)
    value = loss(net, cfg, sizes, batch)
    value.backward()
    torch.nn.utils.clip_grad_norm_([*deep, *flat], optim.clip_norm)
    adam.step()
    return value.item()

  return lambda: np.array([step(rows) for rows in batches])
