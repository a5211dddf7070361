"""HPSv2: a CLIP model whose cosine of image and prompt is a preference score.

Source: Human Preference Score v2 (arXiv 2306.09341). Weights: `xswu/HPSv2`,
HPS_v2_compressed.pt (2.0) and HPS_v2.1_compressed.pt (2.1), for open_clip's
ViT-H-14. Scores of the two do not compare, nor do those of different prompts.
"""

import hashlib
import pathlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from xomni_jax.errors import InputError
from xomni_jax.rewards.wire import Item, Score

VERSIONS = ("2.0", "2.1")
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Model(NamedTuple):
  """An open model.

  Attributes:
    score: items -> one Score each; may raise.
    rev: version and what identifies the checkpoint.
    preprocessing: JSON.
  """

  score: Callable[[Sequence[Item]], list[Score]]
  rev: str
  preprocessing: Mapping[str, Any]


def open_hps(
  checkpoint: str, version: str, arch: str = "ViT-H-14", device: str = ""
) -> Model:
  """Loads a checkpoint; arguments as of `engines.hps`.

  Raises:
    InputError: open_clip is missing, or the checkpoint does not fit.
  """
  if version not in VERSIONS:
    raise InputError(f"HPS version is {version!r}, expected 2.0 or 2.1")
  try:
    import open_clip
    import torch
  except ImportError as e:
    raise InputError(
      f"hps can't be loaded ({e}); install open_clip_torch: launch/sidecar.sh"
    ) from None
  device = device or ("cuda" if torch.cuda.is_available() else "cpu")
  config = _config(open_clip, arch)
  # No pretrained weights of open_clip's: the checkpoint has them all.
  net = open_clip.CLIP(**config, output_dict=True)
  net.load_state_dict(_state(torch, checkpoint, net.state_dict()))
  net = net.eval().float().to(device)
  side, length = config["vision_cfg"]["image_size"], net.context_length
  tokenizer = open_clip.SimpleTokenizer(context_length=length)
  rev = f"hps-{version}({arch_name(arch)},{_digest(checkpoint)})"

  @torch.inference_mode()
  def score(items):
    pixels = np.stack([preprocess(item.image, side) for item in items])
    texts = tokenizer([item.prompt for item in items])
    images = net.encode_image(torch.from_numpy(pixels).to(device))
    texts = net.encode_text(texts.to(device))
    images = torch.nn.functional.normalize(images.double(), dim=-1)
    texts = torch.nn.functional.normalize(texts.double(), dim=-1)
    cosines = (images * texts).sum(-1).tolist()
    return [
      Score(item.id, True, cosine, _raw(tokenizer, item, length), None, rev)
      for item, cosine in zip(items, cosines, strict=True)
    ]

  said = {
    "image": f"RGB, short side {side} bicubic (Pillow), centre crop",
    "mean": MEAN,
    "std": STD,
    "text": f"open_clip's BPE, cut at {length} tokens",
    "version": version,
  }
  return Model(score, rev, said)


def preprocess(image: np.ndarray, side: int = 224) -> np.ndarray:
  """f32[3, side, side] of u8[H, W, 3]: resized, cropped, standardised.

  Sizes and offsets are rounded as by torchvision's Resize and CenterCrop of
  PIL images, which open_clip uses.
  """
  height, width = image.shape[:2]
  short, long = min(height, width), max(height, width)
  sizes = {short: side, long: int(side * long / short)}
  new_height, new_width = sizes[height], sizes[width]
  if short == long:
    new_height = new_width = side
  picture = Image.fromarray(image)
  if (new_width, new_height) != (width, height):
    picture = picture.resize((new_width, new_height), Image.BICUBIC)
  left = round((new_width - side) / 2)
  top = round((new_height - side) / 2)
  picture = picture.crop((left, top, left + side, top + side))
  x = np.asarray(picture, np.float32) / 255
  x = (x - np.float32(MEAN)) / np.float32(STD)
  return np.ascontiguousarray(x.transpose(2, 0, 1))


def arch_name(arch: str) -> str:
  """The name of an open_clip architecture or of a config file."""
  return pathlib.Path(arch).stem if arch.endswith(".json") else arch


def _config(open_clip, arch):
  """{"embed_dim": .., "vision_cfg": .., "text_cfg": ..}."""
  if arch.endswith(".json"):
    open_clip.add_model_config(arch)
  config = open_clip.get_model_config(arch_name(arch))
  if config is None:
    raise InputError(
      f"open_clip has no architecture {arch!r}, expected ViT-H-14 or the path "
      "of a config (.json)"
    )
  return config


def _state(torch, checkpoint, wanted):
  """The checkpoint's {name: tensor}, which fits exactly."""
  where = f"HPS checkpoint {checkpoint}"
  try:
    file = torch.load(checkpoint, map_location="cpu", weights_only=True)
  except OSError as e:
    raise InputError(
      f"{where} can't be read ({e.strerror or e}); expected "
      "HPS_v2.1_compressed.pt or HPS_v2_compressed.pt of xswu/HPSv2"
    ) from None
  except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as e:
    reason = " ".join(str(e).split())[:120]
    raise InputError(
      f"{where} is no PyTorch file of tensors ({reason})"
    ) from None
  if not isinstance(file, dict) or not isinstance(file.get("state_dict"), dict):
    raise InputError(f'{where} has no "state_dict", expected a file of HPSv2')
  state = file["state_dict"]
  missing = sorted(set(wanted) - set(state))
  unused = sorted(set(state) - set(wanted))
  wrong = sorted(
    f"{key} {tuple(state[key].shape)}, expected {tuple(wanted[key].shape)}"
    for key in set(wanted) & set(state)
    if state[key].shape != wanted[key].shape
  )
  if missing or unused or wrong:
    raise InputError(
      f"{where} does not fit: missing {missing}, unused {unused}, misshapen "
      f"{wrong}"
    )
  return state


def _raw(tokenizer, item, length):
  """How long the prompt is, with its two marks; beyond `length`, it is cut."""
  tokens = len(tokenizer.encode(item.prompt)) + 2
  return {"tokens": tokens, "cut": tokens > length}


def _digest(checkpoint):
  """8 hex digits of the file's content."""
  with pathlib.Path(checkpoint).open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()[:8]
