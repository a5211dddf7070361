"""`xomni demo`: the tiny model draws, reads and learns, on one HTML page.

The model before reinforcement learning draws signs that say words it never
saw; then GRPO runs for a while, rewarded by OCR, and it draws them again.
"""

import argparse
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

import xomni_jax
from xomni_jax.data import prompts as prompts_lib
from xomni_jax.data import world
from xomni_jax.data.images import codes_picture
from xomni_jax.demo import page
from xomni_jax.errors import InputError, RunError
from xomni_jax.rewards import ocr, wire

_CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "grpo.py"
_SOURCE = "world:signs:test"
_DRAWN, _ASKED = 16, 6  # prompts that are drawn, signs that are asked about
_STEPS = 60
_QUESTIONS = ("What does the sign say?", "Which colour is the text?")


class Drawn(NamedTuple):
  """What a model drew.

  Attributes:
    images: of each prompt.
    codes: i32[N, h, w].
    scores: what OCR says of each.
  """

  images: list[Image.Image]
  codes: np.ndarray
  scores: list[wire.Score]

  @property
  def reward(self) -> float:
    """Mean over images that have a target."""
    found = [s.score for s in self.scores if s.score is not None]
    return sum(found) / max(len(found), 1)

  @property
  def exact(self) -> float:
    """Share of images that OCR reads as they should."""
    found = [s.score == 1 for s in self.scores if s.score is not None]
    return sum(found) / max(len(found), 1)


class _Clock:
  """Says what is being done, and keeps how long it took."""

  def __init__(self):
    self.rows: list[tuple[str, str]] = []

  def __call__(self, what, run):
    print(f"{what} ...", file=sys.stderr, flush=True)
    start = time.monotonic()
    result = run()
    seconds = time.monotonic() - start
    self.rows.append((what, f"{seconds:.1f} s"))
    return result


def main(argv: list[str]) -> int:
  """Writes the page; returns the exit status.

  Raises:
    InputError: bad arguments, or no configs to train by.
    RunError: the training failed.
  """
  parser = argparse.ArgumentParser(prog="xomni demo", description=__doc__)
  parser.add_argument(
    "--prompt", action="append", default=[], help="to draw too; repeat it"
  )
  parser.add_argument(
    "--steps", type=int, default=_STEPS, help="of reinforcement learning"
  )
  parser.add_argument("--out", default="runs/demo", help="folder of the page")
  args = parser.parse_args(argv)
  if not _CONFIG.is_file():
    raise InputError(
      f"{_CONFIG}: no such file; run the demo from a clone of the repository"
    )
  out = pathlib.Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  clock = _Clock()
  score = ocr.make_scorer(ocr.open_engine("rapidocr", 2), spaces=False)
  known = prompts_lib.open_prompts(_SOURCE)
  asked = [known[i] for i in range(_DRAWN)]
  asked += [prompts_lib.Prompt("own", text) for text in args.prompt]

  model = clock("load the model", lambda: xomni_jax.load("tiny-sft"))
  before = clock("draw before", lambda: draw(model, asked, score))
  answers = clock("answer questions", lambda: answer(model))
  workdir = out / "grpo"
  clock(
    f"{args.steps} steps of reinforcement learning",
    lambda: learn(workdir, args.steps),
  )
  model = clock(
    "load what learned",
    lambda: xomni_jax.load(workdir / "model", flux="tiny-sft"),
  )
  after = clock("draw after", lambda: draw(model, asked, score))
  model = clock("load the shipped model", lambda: xomni_jax.load("tiny"))
  shipped = clock("draw with it", lambda: draw(model, asked, score))
  columns = {"before": before, "after": after, "shipped": shipped}
  where = out / "index.html"
  parts = (
    _drawings(asked, columns, model.config.vq.codebook_size, args.steps),
    _curve(workdir),
    _answers(answers),
    _about(model),
    page.section(
      "Timings",
      "On this machine, compilation included where a program runs for the "
      "first time.",
      page.table(("what", "time"), clock.rows),
    ),
  )
  where.write_text(page.page("X-Omni in JAX", parts), encoding="utf-8")
  print(
    f"{where}: reward {before.reward:.2f} before, {after.reward:.2f} after "
    f"{args.steps} steps, {shipped.reward:.2f} of the shipped model"
  )
  return 0


def draw(
  model: xomni_jax.Model, asked: Sequence[prompts_lib.Prompt], score: ocr.Scorer
) -> Drawn:
  """An image of each prompt at temperature 1, and what OCR says of it."""
  size = model.config.image_size
  made = model.generate([p.text for p in asked], size, seed=0, batch_size=32)
  items = [
    wire.Item(p.key, np.asarray(image), p.text, p.targets, p.lang)
    for p, image in zip(asked, made.images, strict=True)
  ]
  return Drawn(made.images, made.codes, score(items))


def answer(
  model: xomni_jax.Model,
) -> list[tuple[Image.Image, list[tuple[str, str, str]]]]:
  """(image, [(question, answer, truth)]) of signs that no training shows."""
  source = world.open_world("signs", "test")
  found = []
  for i in range(_DRAWN, _DRAWN + _ASKED):
    record = source[i]
    truth = dict(record["qa"])
    asked = [(q, model.chat(record["image"], q), truth[q]) for q in _QUESTIONS]
    found.append((record["image"], asked))
  return found


def learn(workdir: pathlib.Path, steps: int) -> None:
  """Runs `xomni train` on from the model before reinforcement learning."""
  settings = (
    "init.model=tiny-sft",
    "init.flux=tiny-sft",
    f"phases.1_all.steps={steps}",
    f"phases.1_all.warmup_steps={min(5, steps // 2)}",
    "report.eval_every=0",
    f"report.preview_every={max(1, steps // 4)}",
    f"checkpoint.every={steps}",
  )
  command = (
    *(sys.executable, "-m", "xomni_jax", "train"),
    *(f"--config={_CONFIG}:tiny", f"--workdir={workdir}"),
    *(f"--config.{setting}" for setting in settings),
  )
  # Its progress goes where people look; what this command prints is the page.
  done = subprocess.run(command, stdout=sys.stderr, check=False)
  if done.returncode:
    raise RunError(
      f"reinforcement learning ended with status {done.returncode}; remove "
      f"{workdir} to begin again"
    )


def _drawings(asked, columns, codes, steps):
  """Each prompt with what was drawn before, after and by what ships."""
  figures = []
  for i, prompt in enumerate(asked):
    drawn = list(columns.values())
    pictures = [codes_picture(drawn[0].codes[i], codes, 16)]
    pictures += [d.images[i] for d in drawn]
    lines = [page.text(prompt.text)]
    for name, d in columns.items():
      lines.append(f"{name}: {_reading(d.scores[i])}")
    figures.append(page.figure(pictures, *lines))
  rows = [
    (name, f"{d.reward:.3f}", f"{d.exact:.0%}") for name, d in columns.items()
  ]
  return page.section(
    "Signs that say words which no training sign shows",
    "Of each prompt: the codes that were drawn before (equal colours are equal "
    f"codes), their image, the image after {steps} steps of reinforcement "
    "learning, and that of the shipped model, which learned for longer. All "
    "at temperature 1, without guidance. Under them, what OCR read and its "
    "reward.",
    page.table(("model", "mean reward", "read exactly"), rows),
    page.grid(figures),
  )


def _reading(score):
  if score.score is None:
    return "—"
  read = (score.raw or {}).get("text", "").replace("\n", " / ") or "nothing"
  return page.text(f"{read} ({score.score:.2f})", score.score == 1)


def _curve(workdir):
  """The reward by step, as the run drew it."""
  pictures = sorted((workdir / "pictures").glob("curves-*.png"))
  shown = [page.figure([Image.open(path)], "") for path in pictures[-1:]]
  return page.section(
    "Reinforcement learning",
    "Each step draws 8 signs for each of 8 prompts; what OCR reads better than "
    "its group's mean becomes likelier.",
    page.grid(shown, wide=True),
  )


def _answers(answers):
  figures = []
  for image, asked in answers:
    lines = [
      f"{page.text(q)} {page.text(a, a.strip() == truth)}"
      for q, a, truth in asked
    ]
    figures.append(page.figure([image], *lines))
  return page.section(
    "Answers about images",
    "The image's codes and a question go in, text comes out.",
    page.grid(figures),
  )


def _about(model):
  sizes = {name: _millions(tree) for name, tree in model.params.items()}
  what = {
    "siglip": "SigLIP: pixels to features",
    "vq": "quantiser: features to codes and back",
    "ar": "autoregressive transformer: text and codes",
    "clip": "CLIP: the prompt for the decoder",
    "t5": "T5: the same, word by word",
    "flux": "FLUX: diffusion decoder, noise to latents",
    "vae": "autoencoder: latents to pixels",
  }
  rows = [(what[name], sizes[name]) for name in what]
  return page.section(
    "What each part is",
    "The released architecture in small, trained from nothing on drawn signs.",
    page.table(("part", "parameters"), rows),
  )


def _millions(tree):
  import jax

  return f"{sum(x.size for x in jax.tree.leaves(tree)) / 1e6:.2f} M"
