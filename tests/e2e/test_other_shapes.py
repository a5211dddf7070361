"""Random checkpoints of other shapes load, read, draw, paint and talk.

Nothing may be tuned to the golden checkpoint: widths, depths, heads,
vocabularies, patch, px per code, levels of the autoencoder and forms of files
all differ.
"""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

import xomni_jax
from tests.random_checkpoint import Recipe, write_checkpoint
from xomni_jax.config import (
  Architecture,
  ARConfig,
  SiglipConfig,
  TransformConfig,
  VQConfig,
)
from xomni_jax.flux_config import CLIPConfig, FluxConfig, T5Config, VAEConfig

# Vocabularies in the order text, codes, image side; px in the name.
RECIPES = {
  "8 px, all heads, unguided": Recipe(
    Architecture(
      # As many key/value heads as heads; no vision-only block at the end.
      ar=ARConfig(400, 40, 44, 24, 40, 3, 1, 0, 3, 3, 1e4, 1e-5, 256),
      siglip=SiglipConfig(32, 1, 2, 50, 8, 12),
      vq=VQConfig(40, 20, 32),
      flux=FluxConfig(1, 2, 2, 12, 32, 16, 12, False, (4, 4, 4), 32),
      vae=VAEConfig((8, 12, 16), 2, 4, 8, 3, 3, 0.5, 0.2),  # 1 latent: 4 px
      clip=CLIPConfig(590, 12, 30, 1, 2, 40, 1e-5, "gelu", 583),
      t5=T5Config(200, 16, 5, 24, 1, 2, 8, 20, 1e-6),
    ),
    TransformConfig(32, 80, 8, 16, 3.0, True),
    upscale_factor=8,
    shards=1,
    vit_format="safetensors",
  ),
  "16 px, grouped heads, sharded": Recipe(
    Architecture(
      ar=ARConfig(460, 100, 104, 60, 72, 4, 2, 1, 6, 2, 5e5, 1e-6, 300),
      siglip=SiglipConfig(64, 2, 4, 100, 16, 5),
      vq=VQConfig(100, 12, 64),
      flux=FluxConfig(2, 1, 3, 8, 16, 24, 18, True, (4, 2, 2), 64),
      vae=VAEConfig((4, 8, 8, 12), 1, 2, 4, 3, 3, 0.3, 0.0),  # 1 latent: 8 px
      clip=CLIPConfig(584, 18, 20, 2, 3, 77, 1e-5, "quick_gelu", 2),
      t5=T5Config(192, 24, 8, 40, 2, 3, 32, 128, 1e-6),
    ),
    TransformConfig(48, 96, 16, 16, 2.0, False),
    upscale_factor=16,
    shards=3,
  ),
  "4 px, patch 14, bfloat16": Recipe(
    Architecture(
      # One key/value head; no vision-only block at the start.
      ar=ARConfig(379, 33, 40, 32, 48, 2, 0, 1, 4, 1, 1e6, 1e-6, 256),
      siglip=SiglipConfig(32, 1, 4, 64, 14, 6),
      vq=VQConfig(33, 8, 32),
      flux=FluxConfig(1, 1, 1, 16, 8, 12, 16, True, (4, 6, 6), 32),
      vae=VAEConfig((8, 8), 1, 4, 2, 3, 3, 0.4, 0.1),  # 1 latent: 2 px
      clip=CLIPConfig(584, 16, 20, 1, 2, 77, 1e-5, "quick_gelu", 2),
      t5=T5Config(192, 12, 4, 20, 1, 2, 32, 128, 1e-6),
    ),
    TransformConfig(42, 84, 14, 14, 3.0, True),
    upscale_factor=4,
    shards=2,
  ),
}
DTYPES = dict.fromkeys(RECIPES, "float32") | {
  "4 px, patch 14, bfloat16": "bfloat16"
}
PROMPTS = ["a red square", "a house by the sea, at night"]


@pytest.fixture(scope="module", params=RECIPES)
def case(request, tmp_path_factory):
  """A recipe and the model loaded from its checkpoint."""
  recipe = RECIPES[request.param]
  folder = tmp_path_factory.mktemp("checkpoint")
  xomni, flux1 = write_checkpoint(folder, recipe)
  model = xomni_jax.load(xomni, flux=flux1, dtype=DTYPES[request.param])
  return recipe, model


def size_of(recipe):
  """Height and width, px, of 2 x 3 codes."""
  return 2 * recipe.upscale_factor, 3 * recipe.upscale_factor


def draw(recipe, model, seed, **kwargs):
  settings = {"cfg_scale": 2.0, "top_p": 0.95, "num_images": 2}
  return model.generate(
    PROMPTS, size_of(recipe), seed=seed, **(settings | kwargs)
  )


@pytest.fixture(scope="module")
def drawn(case):
  return draw(*case, seed=5)


def test_configs_are_read_as_they_were_written(case):
  recipe, model = case
  sizes = recipe.sizes
  assert model.config.ar == sizes.ar
  assert model.config.vq == sizes.vq
  assert model.config.transform == recipe.transform
  assert model.config.siglip_heads == sizes.siglip.heads
  assert model.pixels_per_token == recipe.upscale_factor
  counts = {
    name: sum(x.size for x in jax.tree.leaves(tree))
    for name, tree in model.params.items()
  }
  assert set(counts) == {f.name for f in dataclasses.fields(sizes)}
  assert min(counts.values()) > 0


def test_encode_gives_codes_of_the_resized_image(case):
  recipe, model = case
  transform = recipe.transform
  pixels = np.random.default_rng(0).integers(0, 256, (50, 75, 3), np.uint8)
  codes = model.encode(Image.fromarray(pixels))
  # 50 x 75 px is within the sizes of every recipe: it is only rounded.
  assert codes.shape == (
    round(50 / transform.patch_size),
    round(75 / transform.patch_size),
  )
  assert codes.dtype == np.int32
  assert 0 <= codes.min() < codes.max() < recipe.sizes.vq.codebook_size
  np.testing.assert_array_equal(codes, model.encode(pixels))


def test_generate_draws_codes_with_logprobs_and_paints_them(case, drawn):
  recipe, _ = case
  height, width = size_of(recipe)
  assert drawn.codes.shape == (4, 2, 3)
  assert drawn.codes.dtype == np.int32
  assert drawn.codes.min() >= 0
  assert drawn.codes.max() < recipe.sizes.ar.image_vocab_size
  for logprobs in (drawn.logprobs, drawn.raw_logprobs):
    assert logprobs.shape == (4, 6)
    assert logprobs.dtype == np.float32
    assert np.isfinite(logprobs).all() and (logprobs <= 0).all()
  assert [image.size for image in drawn.images] == [(width, height)] * 4
  assert len({image.tobytes() for image in drawn.images}) == 4


def test_generate_repeats_with_its_seed_and_varies_with_another(case, drawn):
  recipe, model = case
  again = draw(recipe, model, seed=5)
  np.testing.assert_array_equal(again.codes, drawn.codes)
  np.testing.assert_array_equal(again.logprobs, drawn.logprobs)
  for ours, theirs in zip(again.images, drawn.images, strict=True):
    assert ours.tobytes() == theirs.tobytes()
  other = draw(recipe, model, seed=6, decode=False)
  assert other.images == []
  assert (other.codes != drawn.codes).any()


def test_decode_depends_on_codes_prompt_and_seed(case, drawn):
  recipe, model = case
  codes = drawn.codes[0]
  image = model.decode(codes, PROMPTS[0], seed=1)
  assert image.shape == (*size_of(recipe), 3)
  assert image.dtype == np.uint8
  np.testing.assert_array_equal(image, model.decode(codes, PROMPTS[0], seed=1))
  for other in (
    model.decode(codes, PROMPTS[0], seed=2),
    model.decode(codes, PROMPTS[1], seed=1),
    model.decode(codes[:, ::-1] // 2, PROMPTS[0], seed=1),
  ):
    assert (image != other).any()


def test_chat_answers_about_an_image(case):
  _, model = case
  pixels = np.random.default_rng(1).integers(0, 256, (50, 75, 3), np.uint8)
  answer = model.chat(pixels, "What is this?", max_new_tokens=5)
  assert isinstance(answer, str)
  assert answer == model.chat(pixels, "What is this?", max_new_tokens=5)


def test_logits_cover_the_joint_vocabulary(case):
  recipe, model = case
  cfg = recipe.sizes.ar
  total = cfg.vocab_size + cfg.mm_vocab_size
  ids = model.tokenizer.encode("a <SOM>1 2<IMAGE><MM-Token-0><MM-Token-9><EOM>")
  assert max(ids) < total
  logits = model.logits([ids], "image")
  assert logits.shape == (1, len(ids), total)
  codes = slice(cfg.vocab_size, cfg.vocab_size + cfg.image_vocab_size)
  active = logits > np.finfo(np.float32).min
  assert active[..., codes].all()
  assert active.sum() == len(ids) * cfg.image_vocab_size
