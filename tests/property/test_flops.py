"""Counted operations against those of the traced programs, matmul by matmul."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest

from xomni_jax.config import Compute
from xomni_jax.config_files import load_architecture
from xomni_jax.models import ar, flux, siglip, text_encoders, vae, vq
from xomni_jax.training import flops

ARCH = load_architecture("configs/model.py:world")
GRID, TEXT = (3, 5), 7
# Whole rows of queries at once, as a chunked one is a scan.
COMPUTE = Compute(query_chunk=4096)


def operations(jaxpr):
  """2 x multiplications of every matmul and convolution, traced."""
  total = 0
  for eqn in jaxpr.eqns:
    out = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      shape = eqn.invars[0].aval.shape
      total += 2 * out * math.prod(shape[i] for i in contracted)
    elif eqn.primitive.name == "conv_general_dilated":
      kernel = eqn.invars[1].aval.shape
      features = eqn.params["dimension_numbers"].rhs_spec[0]
      total += 2 * out * math.prod(kernel) / kernel[features]
    for inner in jax.core.jaxprs_in_params(eqn.params):
      total += operations(inner)
  return total


def shape(*dims, dtype=jnp.float32):
  return jax.ShapeDtypeStruct((1, *dims), dtype)


def ids(length):
  return shape(length, dtype=jnp.int32)


@functools.cache
def models():
  """{name: (counted, function, arguments)}, each of one row."""
  a, (h, w) = ARCH, GRID
  L, side = h * w, (8 * h, 8 * w)
  apply = lambda module, **how: (
    lambda p, *x: module.apply({"params": p}, *x, **how)
  )
  f = a.flux
  run_flux = lambda p, x, t, c, s, z: flux.Flux(f, COMPUTE).apply(
    {"params": p}, x, t, c, s, s, GRID, z
  )
  flux_args = (
    shape(L, f.in_channels),
    shape(TEXT, f.joint_attention_dim),
    shape(f.pooled_projection_dim),
    shape(),
    shape(L, f.siglip_channels),
  )
  cells = shape(h, w, a.vq.z_channels)
  codes = shape(h, w, dtype=jnp.int32)
  return {
    "VAE encoder": (
      flops.vae_encoder(a.vae, *side),
      lambda p, x: vae.encode(p, x, a.vae, COMPUTE),
      (vae.abstract(a.vae), shape(*side, 3)),
    ),
    "VAE decoder": (
      flops.vae_decoder(a.vae, *side),
      lambda p, x: vae.decode(p, x, a.vae, COMPUTE),
      (vae.abstract(a.vae), shape(h, w, a.vae.latent_channels)),
    ),
    "ViT": (
      # Not in the count: the position table is resized once a batch.
      flops.siglip(a.siglip, GRID) + resized(a.siglip),
      apply(siglip.Siglip(a.siglip, COMPUTE)),
      (siglip.abstract(a.siglip), shape(16 * h, 16 * w, 3)),
    ),
    "VQ encoder": (
      flops.vq_encoder(a.vq, GRID),
      apply(vq.VQ(a.vq, COMPUTE), method="encode"),
      (vq.abstract(a.vq), cells),
    ),
    "VQ decoder": (
      flops.vq_decoder(a.vq, GRID),
      apply(vq.VQ(a.vq, COMPUTE), method="decode"),
      (vq.abstract(a.vq), codes),
    ),
    "CLIP": (
      flops.clip(a.clip, TEXT),
      apply(text_encoders.CLIPText(a.clip, COMPUTE)),
      (text_encoders.clip_abstract(a.clip), ids(TEXT)),
    ),
    "T5": (
      flops.t5(a.t5, TEXT),
      apply(text_encoders.T5Encoder(a.t5, COMPUTE)),
      (text_encoders.t5_abstract(a.t5), ids(TEXT)),
    ),
    "FLUX": (
      flops.flux(f, GRID, TEXT),
      run_flux,
      (flux.abstract(f), *flux_args),
    ),
    "FLUX without guidance": (
      flops.flux(dataclasses.replace(f, guidance_embeds=False), GRID, TEXT),
      lambda p, x, t, c, s, z: flux.Flux(
        dataclasses.replace(f, guidance_embeds=False), COMPUTE
      ).apply({"params": p}, x, t, c, s, s, GRID, z),
      (
        flux.abstract(dataclasses.replace(f, guidance_embeds=False)),
        *flux_args,
      ),
    ),
    "AR": (
      # Scores of masked keys are computed all the same.
      flops.ar_blocks(a.ar, TEXT, context=TEXT),
      lambda p, t, keep: ar.XOmniAR(a.ar, COMPUTE).apply(
        {"params": p}, t, t, keep
      ),
      (ar.abstract(a.ar), ids(TEXT), shape(TEXT, dtype=bool)),
    ),
  }


def resized(cfg):
  """Operations of `siglip.resize_table` at GRID: of its cheapest order."""
  h, w = GRID
  return min(
    2 * cfg.grid * cfg.width * (cfg.grid * h + h * w),
    2 * cfg.grid * cfg.width * (cfg.grid * w + h * w),
  )


@pytest.mark.parametrize("name", models())
def test_flops_count_every_matmul_and_convolution(name):
  counted, run, args = models()[name]
  traced = operations(jax.make_jaxpr(run)(*args).jaxpr)
  # Exact but for floats' last bits.
  assert abs(counted / traced - 1) < 1e-6, (counted, traced)


def test_flops_agree_with_xla():
  """XLA counts norms and softmax too, but no multiplication by padding."""
  for name, slack in (("FLUX", 0.05), ("AR", 0.05), ("VAE decoder", 0.2)):
    counted, run, args = models()[name]
    found = jax.jit(run).lower(*args).cost_analysis()["flops"]
    assert abs(found / counted - 1) < slack, (name, found / counted)


def test_flops_of_a_causal_row_are_of_the_keys_before():
  cfg = ARCH.ar
  half, whole = flops.ar_blocks(cfg, 99), flops.ar_blocks(cfg, 99, context=99)
  heads = cfg.num_attention_heads * cfg.head_dim
  pairs = 99 * 100 / 2  # of a query and a key up to it
  per_pair = 4 * heads * cfg.num_hidden_layers
  assert whole - half == pytest.approx(per_pair * (99**2 - pairs))
