"""JAX and PyTorch on the CPU, in one process and with the same weights."""

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xomni_jax import params as params_lib
from xomni_jax.bench import measure, torch_work, work
from xomni_jax.config import ARConfig, Compute
from xomni_jax.flux_config import FluxConfig
from xomni_jax.models import ar, flux

# Largest difference that counts as the same result, as a share of the largest
# value: float32 sums in another order leave 1e-6 to 1e-5.
_TOLERANCE = 1e-3

# About 100M parameters each, with the proportions of the full-size models:
# heads of 64 and 128, few key/value heads, one double block for two single
# ones. No vision-only blocks, so that transformers' Qwen2 is the same model.
AR_100M = ARConfig(
  vocab_size=1,
  image_vocab_size=16384,
  mm_vocab_size=16384,
  hidden_size=640,
  intermediate_size=3072,
  num_hidden_layers=12,
  num_mm_adap_layers=0,
  num_mm_head_layers=0,
  num_attention_heads=10,
  num_key_value_heads=2,
  rope_theta=1e6,
  rms_norm_eps=1e-6,
  max_position_embeddings=4096,
)
FLUX_100M = FluxConfig(
  num_layers=4,
  num_single_layers=8,
  num_attention_heads=5,
  attention_head_dim=128,
  in_channels=64,
  joint_attention_dim=512,
  pooled_projection_dim=512,
  guidance_embeds=True,
  axes_dims_rope=(16, 56, 56),
  siglip_channels=64,
)


def compare(
  configs: Mapping[str, ARConfig | FluxConfig],
  load: work.Load,
  compute: Compute,
  repeats: int,
) -> dict[str, Any]:
  """Speeds of both frameworks in float32.

  Args:
    configs: sizes of "ar", "flux" or both; no vision-only blocks.
    load, compute: what to compute, and how JAX does it.
    repeats: timed calls a figure.
  Returns:
    parameters: {model: count}; absent: packages without which PyTorch's
    speeds are None; figures: {figure: {"jax", "torch": units/s, "ratio",
    "difference"}}, where the difference is the largest one between the two
    results as a share of the largest value; `logits` has a difference only.
  Raises:
    RuntimeError: the results differ, so that a ratio would mean nothing.
  """
  if not measure.absent("torch"):
    import torch

    torch.set_num_threads(measure.cores())
  out: dict[str, Any] = {"parameters": {}, "absent": [], "figures": {}}
  for name, cfg in configs.items():
    needed = ("torch", "transformers" if name == "ar" else "diffusers")
    measure.say(f"{name}: weights ...")
    missing = measure.absent(*needed)
    out["absent"] += [p for p in missing if p not in out["absent"]]
    tree = (ar if name == "ar" else flux).abstract(cfg)
    out["parameters"][name] = work.count(tree)
    params = work.random_params(tree, "float32")
    jax_calls = {"ar": work.jax_ar, "flux": work.jax_flux}[name]
    makers = [jax_calls(cfg, compute, params, load)]
    if not missing:
      model, torch_calls = _in_torch(name, cfg, params)
      makers.append(torch_calls(cfg, model, load))
      if name == "ar":
        out["figures"]["logits"] = {
          "difference": _logits_difference(cfg, compute, params, model)
        }
    for figure, amount in load.figures()[name].items():
      start = time.perf_counter()
      calls = [make[figure]() for make in makers]
      results = [call() for call in calls]  # the warm-up
      difference = _difference(figure, *results) if not missing else None
      seconds = measure.median_seconds(calls, repeats)
      speeds = [amount / s for s in seconds]
      took = time.perf_counter() - start
      shown = " | ".join(map(measure.number, speeds))
      measure.say(f"{name}: {figure}: {shown} ({took:.0f} s)")
      theirs = speeds[1] if not missing else None
      out["figures"][figure] = {
        "jax": speeds[0],
        "torch": theirs,
        "ratio": theirs and speeds[0] / theirs,
        "difference": difference,
      }
  return out


def _in_torch(name, cfg, params):
  """The PyTorch model with our weights, and its calls."""
  if name == "ar":
    state = dict(params_lib.to_torch(ar.rows(cfg), params))
    return torch_work.qwen2(cfg, "float32", "cpu", state), torch_work.ar_calls
  state = dict(params_lib.to_torch(flux.rows(cfg), params))
  model = torch_work.flux_transformer(cfg, "float32", "cpu", state)
  return model, torch_work.flux_calls


def _logits_difference(cfg, compute, params, model) -> float:
  """Of the logits at every position of a prompt, without a cache."""
  import torch

  codes = work.codes(cfg, 32)

  @jax.jit
  def logits(params, tokens):
    valid = jnp.ones(tokens.shape, bool)
    hidden, _ = ar.XOmniAR(cfg, compute).apply(
      {"params": params}, tokens, ar.positions_of(valid), valid
    )
    return ar.image_logits(params, hidden, cfg)

  ours = np.asarray(logits(params, codes + cfg.vocab_size))
  with torch.inference_mode():
    theirs = model(torch.tensor(codes).long()).logits.numpy()
  return _difference("logits", ours, theirs)


def _difference(what, ours, theirs) -> float:
  """Largest difference as a share of the largest value."""
  value = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
  if not value <= _TOLERANCE:
    raise RuntimeError(
      f"{what}: JAX and PyTorch differ by {value:.1e} of the largest value, "
      f"expected at most {_TOLERANCE:.0e}; their times can't be compared"
    )
  return value
