"""Models that come with the package, by name.

The package's folder `tiny` has an X-Omni folder after reinforcement learning,
a FLUX.1-dev folder, and what is other before it: the weights of the language
model. The rest is stored once.
"""

import pathlib
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1] / "tiny"
# Folders in ROOT. "sft" has weights of the language model and nothing else.
MODEL, SFT, FLUX1 = "xomni", "sft", "flux1"
NAMES = ("tiny", "tiny-sft")
DEFAULT = NAMES[0]


class Shipped(NamedTuple):
  """Where a shipped model lies.

  Attributes:
    model: an X-Omni folder.
    language_model: the folder of the language model's weights.
    flux1: a FLUX.1-dev folder.
  """

  model: pathlib.Path
  language_model: pathlib.Path
  flux1: pathlib.Path


def find(name: str | pathlib.Path) -> Shipped | None:
  """The model of a name in NAMES; None: it is a folder's or a hub id.

  A folder of your own that is called so is `./tiny`, or any Path.
  """
  if not isinstance(name, str) or name not in NAMES:
    return None
  model = ROOT / MODEL
  own = model if name == DEFAULT else ROOT / SFT
  return Shipped(model, own, ROOT / FLUX1)
