"""Pictures of samples: grids with captions, as PNG files."""

import pathlib
from collections.abc import Sequence

from PIL import Image

from xomni_jax.training.stage import Picture


def grid(pictures: Sequence[Picture], columns: int) -> Image.Image:
  """Pictures in rows of `columns`, each with its caption under it."""


def save(workdir, step: int, tag: str, image: Image.Image) -> pathlib.Path:
  """Writes `<workdir>/pictures/<tag>-<step>.png`, all of it or nothing."""
