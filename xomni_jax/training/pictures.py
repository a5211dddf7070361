"""Pictures that a run leaves: curves of its metrics, and where files go."""

import io
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from PIL import Image

from xomni_jax.inference import sheets


def curves(metrics: Iterable[Mapping[str, Any]], prefix: str) -> Image.Image:
  """Metrics over steps, a line each.

  Args:
    metrics: one mapping a step, with "step" among its names.
    prefix: of the names that are drawn.
  """
  import matplotlib.figure

  lines: dict[str, list[tuple[int, float]]] = {}
  for values in metrics:
    for name, value in values.items():
      if name.startswith(prefix) and value is not None:
        lines.setdefault(name, []).append((values["step"], value))
  # Without pyplot, which keeps every figure that it makes.
  figure = matplotlib.figure.Figure((8, 5), layout="constrained")
  axes = figure.add_subplot()
  for name, points in sorted(lines.items()):
    axes.plot(*zip(*points, strict=True), label=name.removeprefix(prefix))
  axes.set_xlabel("step")
  axes.grid(alpha=0.3)
  if lines:
    axes.legend()
  page = io.BytesIO()
  figure.savefig(page, format="png", dpi=100)
  return Image.open(page).convert("RGB")


def save(workdir, step: int, tag: str, image: Image.Image) -> pathlib.Path:
  """Writes `<workdir>/pictures/<tag>-<step>.png`, as `sheets.save` does."""
  path = pathlib.Path(workdir) / "pictures" / f"{tag}-{step:07d}.png"
  sheets.save(path, image)
  return path
