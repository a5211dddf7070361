"""HPSv2: a tiny model of its class in its file format, against plain NumPy.

open_clip needs a torchvision that fits torch, and is thus in an environment of
its own: `launch/sidecar.sh hps test` runs this there.
"""

import json
import math

import numpy as np
import pytest
from PIL import Image

from tests.sidecar_client import scores, served
from xomni_jax.errors import InputError
from xomni_jax.rewards.wire import Item
from xomni_jax.sidecar import engines, hps

MODEL = {
  "embed_dim": 24,
  "vision_cfg": {
    "image_size": 32,
    "layers": 2,
    "width": 48,
    "head_width": 16,
    "patch_size": 8,
  },
  "text_cfg": {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 32,
    "heads": 2,
    "layers": 2,
  },
}


def open_clip():
  return pytest.importorskip(
    "open_clip", reason="needs open_clip_torch: launch/sidecar.sh hps test"
  )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """(checkpoint, config, state dict): random weights of order one."""
  clip = open_clip()
  import torch

  folder = tmp_path_factory.mktemp("hps")
  config = folder / "tiny-clip.json"
  config.write_text(json.dumps(MODEL))
  net = clip.CLIP(**MODEL)
  state = net.state_dict()
  generator = torch.Generator().manual_seed(0)
  for key, value in state.items():
    noise = torch.randn(value.shape, generator=generator)
    fan = math.prod(value.shape[1:]) if value.ndim > 1 else 1
    norm = "ln_" in key and key.endswith("weight")
    state[key] = noise / fan**0.5 if value.ndim > 1 else 0.3 * noise + norm
  path = folder / "HPS_v2.1_compressed.pt"
  torch.save({"epoch": 1, "state_dict": state}, path)
  return path, config, state


@pytest.fixture(scope="module")
def reward(files):
  return engines.hps(str(files[0]), "2.1", str(files[1]), "cpu")


def picture(seed, height=50, width=70):
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (height // 5, width // 5, 3), np.uint8)
  return np.asarray(Image.fromarray(small).resize((width, height)))


def normed(x, state, name):
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def blocks(x, state, prefix, layers, heads, mask):
  """A pre-norm transformer over f64[T, D]; mask: added to the logits."""
  length, width = x.shape
  for i in range(layers):
    at = f"{prefix}transformer.resblocks.{i}."
    y = normed(x, state, f"{at}ln_1")
    y = (
      y @ state[f"{at}attn.in_proj_weight"].T + state[f"{at}attn.in_proj_bias"]
    )
    q, k, v = (
      part.reshape(length, heads, -1).transpose(1, 0, 2)
      for part in np.split(y, 3, -1)
    )
    logits = q @ k.transpose(0, 2, 1) / math.sqrt(width // heads) + mask
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = (weights @ v).transpose(1, 0, 2).reshape(length, width)
    out = f"{at}attn.out_proj"
    x = x + y @ state[f"{out}.weight"].T + state[f"{out}.bias"]
    y = normed(x, state, f"{at}ln_2")
    y = y @ state[f"{at}mlp.c_fc.weight"].T + state[f"{at}mlp.c_fc.bias"]
    y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    y = y @ state[f"{at}mlp.c_proj.weight"].T + state[f"{at}mlp.c_proj.bias"]
    x = x + y
  return x


def cosine(pixels, tokens, state):
  """The score of f[3, 32, 32] and token ids, in float64."""
  state = {key: value.double().numpy() for key, value in state.items()}
  patches = pixels.reshape(3, 4, 8, 4, 8).transpose(1, 3, 0, 2, 4)
  kernel = state["visual.conv1.weight"].reshape(48, -1)
  x = patches.reshape(16, -1).astype(np.float64) @ kernel.T
  x = np.concatenate([state["visual.class_embedding"][None], x])
  x = normed(x + state["visual.positional_embedding"], state, "visual.ln_pre")
  x = blocks(x, state, "visual.", 2, 3, 0.0)
  image = normed(x[0], state, "visual.ln_post") @ state["visual.proj"]
  y = state["token_embedding.weight"][tokens] + state["positional_embedding"]
  y = blocks(y, state, "", 2, 2, np.triu(np.full((77, 77), -np.inf), 1))
  y = normed(y, state, "ln_final")
  text = y[list(tokens).index(49407)] @ state["text_projection"]
  return image @ text / np.linalg.norm(image) / np.linalg.norm(text)


def test_hps_score_is_the_cosine_of_plain_numpy(files, reward):
  prompts = ["a red cat", "Two DOGS  on a mat", "蓝色的猫", "", "word " * 100]
  items = [Item(f"{i}", picture(i), p) for i, p in enumerate(prompts)]
  found = reward.score(items)
  assert [s.id for s in found] == [i.id for i in items]
  values = []
  for item, score in zip(items, found, strict=True):
    (tokens,) = open_clip().get_tokenizer("ViT-H-14")([item.prompt]).numpy()
    values.append(cosine(hps.preprocess(item.image, 32), tokens, files[2]))
    assert score.ok and score.score == pytest.approx(values[-1], abs=2e-6)
  assert np.ptp(values) > 0.1  # or any number would do
  assert [s.raw["cut"] for s in found] == [False] * 4 + [True]
  assert found[0].raw["tokens"] == 5 and found[4].raw["tokens"] == 102


GOLDEN_SCORES = (0.051222, -0.142612, 0.151908, -0.134421)


def test_hps_score_is_open_clips_from_image_to_cosine(files, reward):
  """By its own transform, tokenizer and forward pass; and as it was.

  Remake GOLDEN_SCORES: print(want).
  """
  clip = open_clip()
  import torch

  net = clip.CLIP(**MODEL)
  net.load_state_dict(files[2])
  net.eval()
  transform = clip.image_transform(
    32, is_train=False, mean=hps.MEAN, std=hps.STD, resize_mode="shortest",
    interpolation="bicubic",
  )  # fmt: skip
  tokenizer = clip.get_tokenizer("ViT-H-14")
  sizes = [(50, 70), (95, 40), (32, 32), (330, 220)]
  prompts = [
    "a red cat",
    'A sign "OPEN 24h", by night',
    "蓝色的猫",
    "word " * 90,
  ]
  items = [
    Item(f"{i}", picture(i, *size), prompt)
    for i, (size, prompt) in enumerate(zip(sizes, prompts, strict=True))
  ]
  want = []
  for item in items:
    pixels = transform(Image.fromarray(item.image))[None]
    with torch.inference_mode():
      image, text, _ = net(pixels, tokenizer([item.prompt]))
    want.append(round((image @ text.T).item(), 6))
  found = [score.score for score in reward.score(items)]
  np.testing.assert_allclose(found, want, atol=2e-6)
  # Weights are of order one, so scores spread: 1e-4 is close.
  np.testing.assert_allclose(found, GOLDEN_SCORES, atol=1e-4)


def test_hps_says_that_a_prompt_is_cut_from_the_78th_token(reward):
  items = [Item(f"{n}", picture(0), "word " * n) for n in (75, 76, 90)]
  found = reward.score(items)
  assert [s.raw["tokens"] for s in found] == [77, 78, 92]
  assert [s.raw["cut"] for s in found] == [False, True, True]
  assert found[0].score == found[1].score == found[2].score


def test_hps_score_does_not_depend_on_its_batch(reward):
  items = [Item(f"{i}", picture(i, 40 + i), f"cat {i}") for i in range(5)]
  together = [s.score for s in reward.score(items)]
  alone = [reward.score([item])[0].score for item in items]
  np.testing.assert_allclose(together, alone, atol=1e-6)


def test_hps_behind_a_sidecar_scores_as_in_this_process(files, reward):
  items = [Item(str(i), picture(i), f"a picture {i}") for i in range(3)]
  command = ["xomni_jax.sidecar", "--config", "configs/sidecar.py:tiny"]
  more = ["--app", "hps", "--no-ray", "--set", "port=0"]
  for setting in (f"checkpoint={files[0]}", f"arch={files[1]}", "device=cpu"):
    more += ["--set", f"settings.{setting}"]
  with served([*command, *more], seconds=240) as url:
    theirs = scores(url, items)
  for ours, found in zip(reward.score(items), theirs, strict=True):
    assert found.ok and found.model_rev == ours.model_rev
    assert found.score == pytest.approx(ours.score, abs=1e-6)


@pytest.mark.parametrize(
  "size", [(50, 70), (70, 50), (32, 32), (33, 65), (224, 224), (31, 32), (97, 501), (1, 16)]
)  # fmt: skip
def test_hps_preprocessing_is_open_clips(size):
  clip = open_clip()
  theirs = clip.image_transform(
    32, is_train=False, mean=hps.MEAN, std=hps.STD, resize_mode="shortest",
    interpolation="bicubic",
  )  # fmt: skip
  rng = np.random.default_rng(1)
  image = rng.integers(0, 256, (*size, 3), np.uint8)
  want = theirs(Image.fromarray(image)).numpy()
  np.testing.assert_allclose(hps.preprocess(image, 32), want, atol=1e-6)


def test_hps_preprocessing_at_full_size_is_what_it_was():
  # Remake: print(x[:, ::75, ::75].round(4).tolist()) of the line below.
  x = hps.preprocess(picture(3, 300, 400))
  assert x.shape == (3, 224, 224) and x.dtype == np.float32
  golden = [
    [
      [-0.2448, -0.8142, -0.9456],
      [-0.4346, 0.4413, 0.2953],
      [0.1347, -0.7704, 1.7990],
    ],
    [
      [-0.0112, 2.0149, 0.6041],
      [0.0338, 0.5741, -0.2363],
      [1.0393, 2.0449, 0.8142],
    ],
    [
      [-0.4706, 0.9656, -1.4802],
      [0.4537, -0.7408, -0.1009],
      [0.6101, 1.7335, -1.3949],
    ],
  ]
  np.testing.assert_allclose(
    x[:, ::75, ::75], golden, atol=2e-2
  )  # a level is 0.015


def test_hps_revision_names_version_and_file(files, reward):
  assert reward.model_rev.startswith("hps-2.1(tiny-clip,")
  other = engines.hps(str(files[0]), "2.0", str(files[1]), "cpu")
  assert other.model_rev != reward.model_rev
  assert other.preprocessing_hash() != reward.preprocessing_hash()
  item = Item("a", picture(0), "cat")
  assert reward.score([item])[0].model_rev == reward.model_rev


def test_hps_file_that_does_not_fit_is_one_line(files, tmp_path):
  open_clip()
  import torch

  path, config, state = files

  def error(checkpoint, version="2.1", arch=str(config)):
    with pytest.raises(InputError) as e:
      engines.hps(str(checkpoint), version, arch, "cpu")
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)

  def saved(value):
    torch.save(value, tmp_path / "file.pt")
    return tmp_path / "file.pt"

  assert "can't be read" in error(tmp_path / "none.pt")
  (tmp_path / "text.pt").write_text("no tensors")
  assert "no PyTorch file" in error(tmp_path / "text.pt")
  assert 'no "state_dict"' in error(saved(state))
  changed = {**state, "visual.proj": torch.zeros(3, 4), "extra": torch.ones(1)}
  del changed["ln_final.weight"]
  message = error(saved({"state_dict": changed}))
  for part in ("ln_final.weight", "'extra'", "visual.proj (3, 4), expected"):
    assert part in message
  assert "no PyTorch file" in error(
    saved({"state_dict": tmp_path})
  )  # a pickle that is more than tensors
  more = {"state_dict": {**state, "extra": torch.ones(1)}}
  assert "unused ['extra']" in error(saved(more))
  assert "'3.0'" in error(path, "3.0")
  assert "no architecture" in error(path, arch="ViT-X-99")


def test_hps_isolates_an_item_that_the_model_breaks_on(reward, monkeypatch):
  real = hps.preprocess

  def breaks(image, side):
    if image[0, 0, 0] == 7:
      raise RuntimeError("out of memory")
    return real(image, side)

  monkeypatch.setattr(hps, "preprocess", breaks)
  bad = np.full((40, 40, 3), 7, np.uint8)
  items = [Item("a", picture(0), "x"), Item("b", bad, "x")]
  good, failed = reward.score(items)
  assert good.ok and not failed.ok and failed.error_kind == "engine"
