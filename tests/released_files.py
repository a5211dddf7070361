"""Reading a model folder in the released layout without the code under test."""

import json
import re

import ml_dtypes
from safetensors.numpy import load_file

from tests.helpers import GOLDEN, read_folder

SOURCE = GOLDEN / "xomni"
VIT = "vit/siglip_tiny_a_patch16"
PROJECTOR = "vit/projector"


def read_pt(path):
  """{key: array} of a pickled state dict, bfloat16 included."""
  import torch

  state = torch.load(path, weights_only=True)
  return {
    key: t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if t.dtype == torch.bfloat16
    else t.numpy()
    for key, t in state.items()
  }


def read_all(folder):
  """{part: {key: array}} of a model folder, whatever its files are called."""

  def either(stem):
    safe = folder / f"{stem}.safetensors"
    return load_file(safe) if safe.exists() else read_pt(folder / f"{stem}.pt")

  return {
    "ar": read_folder(folder),
    "siglip": either(VIT),
    "vq": either(PROJECTOR),
    "flux": read_folder(folder / "flux"),
  }


def ignored(part, key):
  """Whether the reference ignores a tensor, so that it may be left out."""
  return part == "siglip" and bool(re.match(r"norm\.", key))


def assert_same_bits(ours, theirs, change=lambda array: array):
  """Two {part: tensors}, the second changed as said."""
  assert ours.keys() == theirs.keys()
  for part, tensors in theirs.items():
    wanted = {k for k in tensors if not ignored(part, k)}
    assert {k for k in ours[part] if not ignored(part, k)} == wanted
    for key in wanted:
      mine, other = ours[part][key], change(tensors[key])
      assert mine.dtype == other.dtype, (part, key)
      assert mine.shape == other.shape, (part, key)
      assert mine.tobytes() == other.tobytes(), (part, key)


def read_json(path):
  return json.loads(path.read_text("utf-8"))
