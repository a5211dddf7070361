"""Every model against the golden values, block by block and whole.

Two float32 implementations that sum in another order differ by 1e-5 to 4e-5
here (values reach 9). The mildest mistakes show as more: the other GELU as
5e-4, a wrong norm epsilon as 1e-3, everything else as 0.1 and above. CLIP, T5
and the autoencoder have files of their own.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import GOLDEN, agree, layer, recorded
from xomni_jax.checkpoints import released_config
from xomni_jax.config import Compute
from xomni_jax.data import images
from xomni_jax.models import ar, flux, layers, siglip, vq

TOLERANCE = 1e-4
LOGITS = 2e-4  # sums of 64 products of numbers up to 9

UNROLLED = Compute(scan_layers=False)
SCANNED = Compute(scan_layers=True)
MODES = ("text", "image")
FLOAT32_MIN = np.finfo(np.float32).min
WITNESS = "golden values"

# A table of the golden file is channels-first, [1, C, h, w].
channels_last = lambda x: np.moveaxis(np.asarray(x), 1, -1)


# ViT and quantiser


@functools.partial(jax.jit, static_argnums=(2, 3))
def vit_states(params, pixels, cfg, compute):
  """Features, and what goes into the first block and comes out of each."""
  model = siglip.Siglip(cfg, compute)
  out, calls = recorded(
    siglip.Block, lambda: model.apply({"params": params}, pixels)
  )
  return out, [args[0] for _, args, _ in calls], [r[0] for *_, r in calls]


def vit_config(tiny):
  shapes = {
    "pos_embed": (1, 16384, 64),
    "patch_embed.proj.weight": (64, 3, 16, 16),
    **{f"blocks.{i}.mlp.fc1.weight": (256, 64) for i in range(3)},
  }
  return released_config.siglip_config(shapes, tiny.config.siglip_heads, "vit")


@pytest.mark.parametrize("image", ["square", "wide"])
def test_vit_matches_golden_after_embedding_and_every_block(
  tiny, golden, image
):
  pixels = images.preprocess(
    GOLDEN / "images" / f"{image}.png", tiny.config.transform
  )
  features, ins, outs = vit_states(
    tiny.params["siglip"], pixels[None], vit_config(tiny), UNROLLED
  )
  name = f"tok/{image}"
  agree("ViT", WITNESS, "embeddings", ins[0], golden[f"{name}/vit_embed"], 1e-5)
  blocks = golden[f"{name}/vit_blocks"]
  assert len(outs) == len(blocks)
  for ours, theirs in zip(outs, blocks, strict=True):
    agree("ViT", WITNESS, "every block", ours[0], theirs, TOLERANCE)
  h, w = golden[f"{name}/indices"].shape
  theirs = golden[f"{name}/vit_features"].reshape(1, h, w, -1)
  agree("ViT", WITNESS, "features", features, theirs, TOLERANCE)


def test_vit_block_matches_golden_from_golden_input(tiny, golden):
  block = siglip.Block(vit_config(tiny), UNROLLED)
  apply = jax.jit(lambda p, x: block.apply({"params": p}, x)[0])
  blocks = golden["tok/square/vit_blocks"][:, None]
  inputs = [golden["tok/square/vit_embed"], *blocks[:-1]]
  for i, (x, y) in enumerate(zip(inputs, blocks, strict=True)):
    ours = apply(layer(tiny.params["siglip"]["blocks"], i), x)
    agree("ViT", WITNESS, "one block", ours, y, TOLERANCE)


def test_vit_scanned_matches_golden(tiny, golden):
  pixels = golden["tok/wide/preprocessed"].transpose(1, 2, 0)
  model = siglip.Siglip(vit_config(tiny), SCANNED)
  ours = jax.jit(model.apply)({"params": tiny.params["siglip"]}, pixels[None])
  theirs = golden["tok/wide/vit_features"].reshape(ours.shape)
  agree("ViT", WITNESS, "features", ours, theirs, TOLERANCE)


@functools.partial(jax.jit, static_argnums=(2,))
def quantise(params, features, cfg):
  """z, codes, codebook rows, post_quant_conv and decoded features."""
  model = vq.VQ(cfg)
  apply = lambda x, method: model.apply({"params": params}, x, method=method)
  z, codes = apply(features, "project"), apply(features, "encode")
  decoded, calls = recorded(nn.Dense, lambda: apply(codes, "decode"))
  (_, (rows,), post) = calls[0]
  return z, codes, rows, post, decoded


@pytest.mark.parametrize("image", ["square", "wide"])
def test_quantiser_matches_golden_at_every_stage(tiny, golden, image):
  name = f"tok/{image}"
  indices = golden[f"{name}/indices"]
  h, w = indices.shape
  features = golden[f"{name}/vit_features"].reshape(1, h, w, -1)
  z, codes, rows, post, decoded = quantise(
    tiny.params["vq"], features, tiny.config.vq
  )
  agree("quantiser", WITNESS, "codes", codes[0], indices, 0)
  for ours, key, quantity, tolerance in (
    (z, "z", "z", TOLERANCE),
    (rows, "codebook_entry", "codebook rows", 0),
    (post, "post_quant", "post_quant_conv", TOLERANCE),
    (decoded, "decoded", "decoded features", TOLERANCE),
  ):
    theirs = channels_last(golden[f"{name}/{key}"])
    agree("quantiser", WITNESS, quantity, ours, theirs, tolerance)


def test_encode_of_an_image_file_gives_the_golden_codes(tiny, golden):
  for image in ("square", "wide"):
    codes = tiny.encode(GOLDEN / "images" / f"{image}.png")
    theirs = golden[f"tok/{image}/indices"]
    assert codes.dtype == np.int32
    agree("tokenizer", WITNESS, "codes of an image file", codes, theirs, 0)


# AR transformer


@functools.partial(jax.jit, static_argnums=(2, 3))
def ar_states(params, tokens, cfg, compute):
  """Final-norm output, logits in both modes, what goes in and out of blocks."""
  model = ar.XOmniAR(cfg, compute)
  valid = jnp.ones(tokens.shape, bool)
  (hidden, _), calls = recorded(
    ar.Block,
    lambda: model.apply(
      {"params": params}, tokens, ar.positions_of(valid), valid
    ),
  )
  logits = {m: ar.joint_logits(params, hidden, cfg, m) for m in MODES}
  if compute.scan_layers:
    return hidden, logits  # a scan keeps what is inside it
  return hidden, logits, [c[1][0] for c in calls], [c[2][0] for c in calls]


def check_joint_logits(ours, theirs, mode, quantity):
  """Active entries agree, inactive ones are float32's least number."""
  active = slice(0, 448) if mode == "text" else slice(448, 448 + 64)
  agree("AR", WITNESS, quantity, ours[..., active], theirs[..., active], LOGITS)
  outside = np.ones(ours.shape[-1], bool)
  outside[active] = False
  assert (ours[..., outside] == FLOAT32_MIN).all()
  assert (theirs[..., outside] == FLOAT32_MIN).all()


def test_ar_matches_golden_after_embedding_and_every_block(tiny, golden):
  hidden, logits, ins, outs = ar_states(
    tiny.params["ar"],
    golden["ar/mixed/input_ids"][None],
    tiny.config.ar,
    UNROLLED,
  )
  states = golden["ar/mixed/hidden_states"]
  agree("AR", WITNESS, "embeddings", ins[0][0], states[0], 0)
  assert len(outs) == len(states) - 1 == 6
  last = golden["ar/mixed/last_block_prenorm"]
  for ours, theirs in zip(outs, [*states[1:-1], last], strict=True):
    agree("AR", WITNESS, "every block", ours[0], theirs, TOLERANCE)
  agree("AR", WITNESS, "final norm", hidden[0], states[-1], TOLERANCE)
  for mode in MODES:
    theirs = golden[f"ar/mixed/logits_{mode}"]
    ours = np.asarray(logits[mode][0])
    check_joint_logits(ours, theirs, mode, f"{mode} logits")


def test_ar_scanned_matches_golden(tiny, golden):
  hidden, logits = ar_states(
    tiny.params["ar"],
    golden["ar/mixed/input_ids"][None],
    tiny.config.ar,
    SCANNED,
  )
  states = golden["ar/mixed/hidden_states"]
  agree("AR", WITNESS, "final norm", hidden[0], states[-1], TOLERANCE)
  for mode in MODES:
    theirs = golden[f"ar/mixed/logits_{mode}"]
    ours = np.asarray(logits[mode][0])
    check_joint_logits(ours, theirs, mode, f"{mode} logits")


def test_ar_block_matches_golden_from_golden_input(tiny, golden):
  cfg = tiny.config.ar
  tokens = golden["ar/mixed/input_ids"][None]
  image, valid = tokens >= cfg.vocab_size, np.ones(tokens.shape, bool)
  rope = layers.rope_angles(
    ar.positions_of(valid), cfg.head_dim, cfg.rope_theta
  )
  apply = jax.jit(
    lambda p, x, vision: ar.Block(cfg, UNROLLED, vision).apply(
      {"params": p}, x, rope, image, valid
    )[0],
    static_argnums=2,
  )
  states = golden["ar/mixed/hidden_states"][:, None]
  states = [*states[:-1], golden["ar/mixed/last_block_prenorm"][None]]
  position = 0
  for stack, length in ar.stacks(cfg).items():
    for i in range(length):
      weights = layer(tiny.params["ar"][stack], i)
      ours = apply(weights, states[position], stack != "lm")
      position += 1
      agree("AR", WITNESS, "one block", ours, states[position], TOLERANCE)
  assert position == 6


@pytest.mark.parametrize("mode", MODES)
def test_logits_of_a_left_padded_batch_match_golden(tiny, golden, mode):
  mask = golden["ar/batch/attention_mask"] == 1
  assert not mask.all()
  tokens = golden["ar/batch/input_ids"]
  ours = tiny.logits(tokens, mode, mask=mask)
  theirs = golden[f"ar/batch/logits_{mode}"]
  quantity = f"{mode} logits, left-padded batch"
  check_joint_logits(ours[mask], theirs[mask], mode, quantity)


def test_position_ids_match_golden(golden):
  ours = ar.positions_of(golden["ar/batch/attention_mask"] == 1)
  agree("AR", WITNESS, "position ids", ours, golden["ar/batch/position_ids"], 0)


# FLUX


def flux_config():
  folder = GOLDEN / "xomni" / "flux"
  path = folder / "config.json"
  return released_config.flux_config(released_config.read_json(path), "flux")


def flux_inputs(golden):
  """Positional arguments of `Flux`, up to the guidance, and the grid."""
  names = (
    "hidden_states encoder_hidden_states pooled_projections timestep guidance"
  )
  rows, columns = golden["flux/in/img_ids"][:, 1:].astype(int).max(axis=0) + 1
  # Row-major ids of a grid, which is all that our model can express.
  expected = np.stack(np.indices((rows, columns)), -1).reshape(-1, 2)
  np.testing.assert_array_equal(golden["flux/in/img_ids"][:, 1:], expected)
  inputs = [golden[f"flux/in/{name}"] for name in names.split()]
  return inputs, (int(rows), int(columns))


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def flux_states(params, inputs, features, grid, cfg, compute):
  """Velocity, and the calls of linear layers and blocks on the way."""
  kinds = (nn.Dense, flux.DoubleBlock, flux.SingleBlock)
  model = flux.Flux(cfg, compute)
  out, calls = recorded(
    kinds, lambda: model.apply({"params": params}, *inputs, grid, features)
  )
  # Of linear layers the outermost are kept: blocks have a proj_out too.
  linear = {name: (args, result) for name, args, result in calls if name}
  blocks = [(args, result[0]) for name, args, result in calls if not name]
  return out, linear, blocks


def test_flux_matches_golden_at_every_stage(tiny, golden):
  inputs, grid = flux_inputs(golden)
  out, linear, blocks = flux_states(
    tiny.params["flux"],
    inputs,
    golden["flux/in/siglip_tensor"],
    grid,
    flux_config(),
    UNROLLED,
  )
  check = lambda name, ours, tolerance=TOLERANCE, quantity=None: agree(
    "FLUX", WITNESS, quantity or name, ours, golden[f"flux/mid/{name}"],
    tolerance,
  )  # fmt: skip
  check("x_embed", linear["x_embedder"][1], quantity="embedders")
  check("context_embed", linear["context_embedder"][1], quantity="embedders")
  assert len(blocks) == 4
  for args, _ in blocks:
    _, temb, (cos, sin) = args
    check("temb", temb)
    # The reference stores each angle twice, for both numbers of a pair.
    check("rope_cos", np.repeat(cos, 2, axis=-1), 1e-6, "RoPE")
    check("rope_sin", np.repeat(sin, 2, axis=-1), 1e-6, "RoPE")
  for i, (_, (txt, img)) in enumerate(blocks[:2]):
    check(f"double_{i}_txt", txt, quantity="double blocks")
    check(f"double_{i}_img", img, quantity="double blocks")
  for i, (_, x) in enumerate(blocks[2:]):
    check(f"single_{i}", x, quantity="single blocks")
  check("norm_out", linear["proj_out"][0][0])
  agree("FLUX", WITNESS, "velocity", out, golden["flux/out"], TOLERANCE)


def test_flux_blocks_match_golden_from_golden_input(tiny, golden):
  cfg, params = flux_config(), tiny.params["flux"]
  mid = lambda name: golden[f"flux/mid/{name}"]
  rope = tuple(mid(f"rope_{name}")[:, ::2] for name in ("cos", "sin"))
  apply = jax.jit(
    lambda p, x, block: block(cfg, UNROLLED).apply(
      {"params": p}, x, mid("temb"), rope
    )[0],
    static_argnums=2,
  )
  streams = (mid("context_embed"), mid("x_embed"))
  for i in range(2):
    txt, img = apply(layer(params["double"], i), streams, flux.DoubleBlock)
    streams = mid(f"double_{i}_txt"), mid(f"double_{i}_img")
    agree("FLUX", WITNESS, "one double block", txt, streams[0], TOLERANCE)
    agree("FLUX", WITNESS, "one double block", img, streams[1], TOLERANCE)
  # `siglip_embed` comes between the two kinds, once.
  features = golden["flux/in/siglip_tensor"]
  img = streams[1] + features @ np.asarray(params["siglip_embed"]["kernel"])
  x = np.concatenate([streams[0], img], axis=1)
  for i in range(2):
    ours = apply(layer(params["single"], i), x, flux.SingleBlock)
    x = mid(f"single_{i}")
    agree("FLUX", WITNESS, "one single block", ours, x, TOLERANCE)


def test_flux_without_features_matches_golden(tiny, golden):
  inputs, grid = flux_inputs(golden)
  model = flux.Flux(flux_config(), SCANNED)
  out = jax.jit(model.apply, static_argnums=6)(
    {"params": tiny.params["flux"]}, *inputs, grid
  )
  theirs = golden["flux/out_no_siglip"]
  agree("FLUX", WITNESS, "velocity without features", out, theirs, TOLERANCE)


def test_flux_scanned_and_chunked_matches_golden(tiny, golden):
  inputs, grid = flux_inputs(golden)
  features = golden["flux/in/siglip_tensor"]
  compute = dataclasses.replace(SCANNED, query_chunk=8)  # 19 queries: 8, 8, 3
  model = flux.Flux(flux_config(), compute)
  out = jax.jit(model.apply, static_argnums=6)(
    {"params": tiny.params["flux"]}, *inputs, grid, features
  )
  agree("FLUX", WITNESS, "velocity", out, golden["flux/out"], TOLERANCE)
