"""The ViT and the quantiser in other shapes against PyTorch, in which the same
arithmetic is written out.

Weights are random, as in `test_torch_models.py`.
"""

import jax
import numpy as np
import pytest
from einops import rearrange

from tests.helpers import agree, params_from_torch, random_state, recorded
from xomni_jax.config import Compute, SiglipConfig, VQConfig
from xomni_jax.models import siglip, vq

torch = pytest.importorskip("torch")
F = torch.nn.functional

# Values reach 10; see test_golden_models.py on what float32 allows.
TOLERANCE = 1e-4

tensor = lambda x: torch.from_numpy(np.array(x))


def noise(*shape):
  return np.random.default_rng(0).standard_normal(shape, np.float32)


# ViT

VITS = {  # config, grid of patches
  "patch 14, smaller grid": (SiglipConfig(40, 2, 5, 90, 14, 9), (3, 5)),
  "patch 8, larger grid": (SiglipConfig(48, 3, 4, 179, 8, 4), (7, 6)),
}


def torch_vit(cfg, state, image):
  """States after the embedding and every block, [B, h*w, D]."""
  x = F.conv2d(
    image,
    state["patch_embed.proj.weight"],
    state["patch_embed.proj.bias"],
    stride=cfg.patch,
  )
  D, h, w = x.shape[1:]
  table = state["pos_embed"].reshape(1, cfg.grid, cfg.grid, D)
  table = F.interpolate(table.permute(0, 3, 1, 2), (h, w), mode="bilinear")
  x = (x + table).flatten(2).transpose(1, 2)
  states = [x]
  for i in range(cfg.layers):
    get = lambda name, i=i: (
      state[f"blocks.{i}.{name}.weight"],
      state[f"blocks.{i}.{name}.bias"],
    )
    y = F.layer_norm(x, (D,), *get("norm1"), eps=1e-6)
    qkv = F.linear(y, *get("attn.qkv"))
    q, k, v = rearrange(qkv, "b l (t n d) -> t b n l d", t=3, n=cfg.heads)
    y = F.scaled_dot_product_attention(q, k, v)
    x = x + F.linear(rearrange(y, "b n l d -> b l (n d)"), *get("attn.proj"))
    y = F.layer_norm(x, (D,), *get("norm2"), eps=1e-6)
    y = F.gelu(F.linear(y, *get("mlp.fc1")))
    x = x + F.linear(y, *get("mlp.fc2"))
    states.append(x)
  return states


@pytest.mark.parametrize("name", VITS)
def test_vit_of_other_shapes_matches_torch_at_every_block(name):
  cfg, (h, w) = VITS[name]
  table, tree = siglip.rows(cfg), siglip.abstract(cfg)
  state = {k: tensor(v) for k, v in random_state(table, tree).items()}
  image = np.clip(noise(2, 3, h * cfg.patch, w * cfg.patch), -1, 1)
  model = siglip.Siglip(cfg)

  @jax.jit
  def run(params, image):
    out, calls = recorded(
      siglip.Block, lambda: model.apply({"params": params}, image)
    )
    return out, [calls[0][1][0], *(result[0] for *_, result in calls)]

  ours, states = run(
    params_from_torch(table, tree, state), image.transpose(0, 2, 3, 1)
  )
  theirs = torch_vit(cfg, state, tensor(image))
  for x, y in zip(states, theirs, strict=True):
    agree("ViT", "PyTorch", "every block", x, y, TOLERANCE)
  theirs = theirs[-1].reshape(2, h, w, cfg.width)
  agree("ViT", "PyTorch", "features", ours, theirs, TOLERANCE)


@pytest.mark.parametrize(
  ("grid", "size"),
  [
    (16, (5, 7)),
    (128, (6, 6)),
    (128, (72, 72)),
    (128, (128, 128)),
    (5, (11, 17)),  # upscaling
    (7, (7, 20)),
    (3, (1, 2)),
    (1, (4, 3)),
  ],
)
def test_position_table_is_resized_as_torch_interpolates(grid, size):
  table = noise(grid * grid, 6)
  ours = siglip.resize_table(table, *size)
  theirs = F.interpolate(
    tensor(table).T.reshape(1, 6, grid, grid), size, mode="bilinear"
  )[0].permute(1, 2, 0)
  agree("ViT", "PyTorch", "resized position table", ours, theirs, 2e-6)


# Quantiser


def torch_post(state, x):
  """post_quant_conv and the two residual blocks."""
  get = lambda name: (state[f"{name}.weight"], state[f"{name}.bias"])
  x = F.conv2d(x, *get("post_quant_conv"))
  for i in range(2):
    h = x
    for j in (1, 2):
      h = F.group_norm(h, 32, *get(f"post_conv.{i}.norm{j}"), eps=1e-5)
      h = F.conv2d(F.gelu(h), *get(f"post_conv.{i}.conv{j}"), padding=1)
    x = x + h
  return x


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_quantiser_of_another_shape_matches_torch(offset):
  cfg = VQConfig(codebook_size=37, codebook_dim=10, z_channels=96)
  table, tree = vq.rows(cfg), vq.abstract(cfg)
  state = {k: tensor(v) for k, v in random_state(table, tree).items()}
  state["post_quant_conv.bias"] += offset  # groups that are far off centre
  params = params_from_torch(table, tree, state)
  model, features = vq.VQ(cfg, Compute()), noise(2, 4, 3, 96)
  apply = lambda x, method: jax.jit(model.apply, static_argnames="method")(
    {"params": params}, x, method=method
  )

  z = F.conv2d(
    tensor(features).permute(0, 3, 1, 2),
    state["quant_conv.weight"],
    state["quant_conv.bias"],
  )
  rows = state["quantize.embedding.weight"]
  distance = torch.cdist(
    F.normalize(z, dim=1).permute(0, 2, 3, 1).reshape(-1, 10).double(),
    F.normalize(rows, dim=1).double(),
  )
  codes = distance.argmin(-1).reshape(2, 4, 3)
  nearest = distance.topk(2, largest=False).values
  assert (nearest[:, 1] - nearest[:, 0]).min() > 1e-4, "ties prove nothing"
  agree("quantiser", "PyTorch", "codes", apply(features, "encode"), codes, 0)

  # In float64: off centre, PyTorch's own float32 is 2e-4 from it.
  double = {key: weight.double() for key, weight in state.items()}
  theirs = torch_post(double, rows[codes].permute(0, 3, 1, 2).double())
  ours = apply(codes.numpy().astype(np.int32), "decode")
  agree("quantiser", "PyTorch", "decoded features", ours,
        theirs.permute(0, 2, 3, 1), TOLERANCE)  # fmt: skip
