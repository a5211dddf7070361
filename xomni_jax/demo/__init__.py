"""`xomni demo`: the tiny model draws, reads and learns, on one HTML page.

The model before reinforcement learning draws signs and posters that say words
it never saw; then GRPO runs for a while on signs, rewarded by OCR, and it draws
them again.
"""

import collections
import json
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
from PIL import Image

import xomni_jax
from xomni_jax.checkpoints import run_config
from xomni_jax.checks import make_folder, replacing
from xomni_jax.data import prompts as prompts_lib
from xomni_jax.data import world
from xomni_jax.data.images import codes_picture
from xomni_jax.demo import page
from xomni_jax.errors import ArgumentParser, InputError, RunError
from xomni_jax.evals.answers import QUESTIONS
from xomni_jax.inference import arguments, sheets
from xomni_jax.rewards import ocr, wire

_CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "grpo.py"
# Of each level of the world: prompts that are drawn, of them shown, and images
# that are asked about.
_LEVELS = {"signs": (72, 12, 4), "posters": (24, 6, 2)}
# Of reinforcement learning, on signs alone: a poster takes as long as three.
_STEPS = 40
_SIGNS = (
  "data.sources=({'path': 'world:signs:train', 'task': 'prompt'},)",
  "options.sizes=((96, 96),)",
  "options.prompt_len=32",
)


class Drawn(NamedTuple):
  """What a model drew for one prompt.

  Attributes:
    image: of it.
    codes: i32[h, w].
    score: what OCR says of it.
  """

  image: Image.Image
  codes: np.ndarray
  score: wire.Score


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
  args = _parse(argv)
  out = make_folder(args.out)
  workdir = out / "grpo"
  _check_steps(workdir, args.steps)
  # Told to stop, it stops what it started.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  clock = _Clock()
  score = ocr.make_scorer(ocr.open_engine("rapidocr", 2), spaces=False)
  asked = {}
  for level, (count, *_) in _LEVELS.items():
    known = prompts_lib.open_prompts(f"world:{level}:test")
    asked[level] = [known[i] for i in range(count)]
  asked |= _own(args.prompt, asked["posters"][0].size)

  model = clock("load the model", lambda: xomni_jax.load("tiny-sft"))
  before = clock("draw before", lambda: draw(model, asked, score))
  answers = clock("answer questions", lambda: answer(model))
  done = ", done before" if (workdir / "model").exists() else ""
  clock(
    f"{args.steps} steps of reinforcement learning{done}",
    lambda: learn(workdir, args.steps),
  )
  model = clock(
    "load what learned",
    lambda: xomni_jax.load(workdir / "model", flux="tiny-sft"),
  )
  after = clock("draw after", lambda: draw(model, asked, score))
  model = clock("load the shipped model", lambda: xomni_jax.load("tiny"))
  shipped = clock("draw with it", lambda: draw(model, asked, score))
  for name, scale in (("", 1.0), (", with guidance (twice the rows)", 1.5)):
    seconds = one_sign(model, scale)
    clock.rows.append((f"one sign, warm{name}", f"{seconds:.2f} s"))
  columns = {"before": before, "after": after, "shipped": shipped}
  rewards = [_means(column["signs"])[0] for column in columns.values()]
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
  sheets.save(out / "drawings.png", _sheet(asked, shipped))
  with replacing(where) as temporary:
    text = page.page("X-Omni in JAX", parts)
    temporary.write_text(text, encoding="utf-8")
  print(
    f"{where}: reward of signs {rewards[0]:.3f} before, {rewards[1]:.3f} after "
    f"{args.steps} steps, {rewards[2]:.3f} of the shipped model"
  )
  return 0


def _parse(argv):
  parser = ArgumentParser(prog="xomni demo", description=__doc__)
  parser.add_argument(
    "--prompt",
    action="append",
    default=[],
    help="to draw too; repeat it. OCR looks for what it has in double quotes; "
    "several quotes are the lines of a poster",
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
  if args.steps < 1:
    raise InputError(f"--steps is {args.steps}, expected 1 or more")
  if args.prompt:
    arguments.prompts_list(args.prompt)
  return args


def _check_steps(workdir, steps):
  """Raises InputError where another number was learned for: `learn` would, but
  after a minute."""
  if not run_config.has_made(workdir):
    return
  path = workdir / "checkpoints" / run_config.FILE
  try:
    before = json.loads(path.read_text("utf-8"))["phases"]["1_all"]["steps"]
  except (OSError, ValueError, KeyError, TypeError):  # `learn` says what it is
    return
  if before != steps:
    raise InputError(
      f"--steps is {steps}, and {workdir} has a run of {before}; give "
      f"--steps {before}, or remove the folder, or name another --out"
    )


def draw(
  model: xomni_jax.Model,
  asked: dict[str, list[prompts_lib.Prompt]],
  score: ocr.Scorer,
) -> dict[str, list[Drawn]]:
  """An image of each prompt, and what OCR says of it."""
  found = {}
  for level, prompts in asked.items():
    size = prompts[0].size or model.config.image_size
    texts = [p.text for p in prompts]
    made = model.generate(texts, size, seed=0, batch_size=24)
    items = [
      wire.Item(p.key, np.asarray(image), p.text, p.targets, p.lang)
      for p, image in zip(prompts, made.images, strict=True)
    ]
    found[level] = [*map(Drawn, made.images, made.codes, score(items))]
  return found


def one_sign(
  model: xomni_jax.Model, cfg_scale: float = 1.0, times: int = 5
) -> float:
  """Seconds that a sign alone takes from prompt to image, once compiled.

  Args:
    cfg_scale: guidance, of codes and of the decoder.
    times: that it is drawn.
  """
  text = prompts_lib.open_prompts("world:signs:test")[0].text
  size = model.config.image_size

  def make(seed):
    drawn = model.generate(
      [text], size, seed=seed, cfg_scale=cfg_scale, decode=False
    )
    model.decode(drawn.codes[0], text, cfg_scale=cfg_scale, seed=seed)

  make(0)
  start = time.monotonic()
  for seed in range(1, times + 1):
    make(seed)
  return (time.monotonic() - start) / times


def answer(
  model: xomni_jax.Model,
) -> list[tuple[Image.Image, list[tuple[str, str, str]]]]:
  """(image, [(question, answer, truth)]) of images that no training shows."""
  found = []
  for level, (drawn, _, count) in _LEVELS.items():
    source = world.open_world(level, "test")
    for i in range(drawn, drawn + count):
      record = source[i]
      truth = dict(record["qa"])
      asked = [(q, model.chat(record["image"], q), truth[q]) for q in QUESTIONS]
      found.append((record["image"], asked))
  return found


def learn(workdir: pathlib.Path, steps: int) -> None:
  """Runs `xomni train` on from the model before reinforcement learning."""
  settings = (
    "init.model=tiny-sft",
    "init.flux=tiny-sft",
    *_SIGNS,
    f"phases.1_all.steps={steps}",
    f"phases.1_all.warmup_steps={min(5, steps // 2)}",
    "report.eval_every=0",
    f"report.preview_every={max(1, steps // 4)}",
    f"checkpoint.every={steps}",
  )
  command = (
    *(sys.executable, "-m", "xomni_jax", "train"),
    *(f"--config={_CONFIG}:tiny", f"--workdir={workdir}"),
    "--cpu-devices=auto",
    *(f"--config.{setting}" for setting in settings),
  )
  # Its progress goes where people look; what this command prints is the page.
  child = subprocess.Popen(command, stdout=sys.stderr)
  try:
    child.wait()
  finally:
    # An interrupt or SIGTERM: training saves before it ends.
    if child.poll() is None:
      child.terminate()
      child.wait()
  if child.returncode:
    # Of bad input it has told itself.
    on = "see above; " if child.returncode == 2 else "start again to go on, or "
    raise RunError(
      f"reinforcement learning ended with status {child.returncode}; "
      f"{on}remove {workdir} to begin anew"
    )


def _own(texts, poster):
  """Prompts of one's own by size; what they quote is to be read."""
  found = collections.defaultdict(list)
  for text in texts:
    said = tuple(re.findall(r'"([^"]+)"', text))
    level, size = ("your posters", poster) if said[1:] else ("your signs", None)
    found[level].append(prompts_lib.Prompt("own", text, said, size=size))
  return found


def _sheet(asked, drawn):
  """What was drawn for prompts that are shown, as one picture."""
  pictures = [
    sheets.Picture(d.image, prompt.text)
    for level, (_, shown, _) in _LEVELS.items()
    for prompt, d in zip(asked[level][:shown], drawn[level], strict=False)
  ]
  return sheets.grid(pictures, columns=6)


def _means(drawn):
  """Reward and share read exactly, of images that have a target."""
  found = [d.score.score for d in drawn if d.score.score is not None]
  count = max(len(found), 1)
  return sum(found) / count, sum(x == 1 for x in found) / count


def _drawings(asked, columns, codes, steps):
  """Some prompts with what was drawn before, after and by what ships."""
  grids = collections.defaultdict(list)
  for level, prompts in asked.items():
    _, shown, _ = _LEVELS.get(level, (0, len(prompts), 0))
    for i, prompt in enumerate(prompts[:shown]):
      drawn = {name: column[level][i] for name, column in columns.items()}
      pictures = [codes_picture(drawn["before"].codes, codes, 16)]
      pictures += [d.image for d in drawn.values()]
      lines = [page.text(prompt.text)]
      lines += [f"{name}: {_reading(d.score)}" for name, d in drawn.items()]
      grids[level].append(page.figure(pictures, *lines))
  rows = []
  for level, (count, *_) in _LEVELS.items():
    for name, column in columns.items():
      reward, exact = _means(column[level])
      rows.append((f"{level}, {name}", count, f"{reward:.3f}", f"{exact:.0%}"))
  own = [page.grid(grids[level]) for level in asked if level not in _LEVELS]
  parts = page.section("Your prompts", "As below, each.", *own) if own else ""
  return parts + page.section(
    "Signs and posters that say words which no training image shows",
    "Of each prompt: the codes that were drawn before (equal colours are equal "
    f"codes), their image, the image after {steps} steps of reinforcement "
    "learning, and that of the shipped model, which learned for longer; all "
    "at temperature 1, without guidance. Under them is what OCR read, and its "
    "reward.",
    page.table(("model", "prompts", "mean reward", "read exactly"), rows),
    *(page.grid(grids[level]) for level in _LEVELS),
  )


def _reading(score):
  if score.score is None:
    return "nothing in quotes to look for" if score.ok else "not read"
  read = (score.raw or {}).get("text", "").replace("\n", " / ") or "nothing"
  return page.text(f"{read} ({score.score:.2f})", score.score == 1)


def _curve(workdir):
  """The reward by step, as the run drew it."""
  pictures = sorted((workdir / "pictures").glob("curves-*.png"))
  shown = [page.figure([Image.open(path)], "") for path in pictures[-1:]]
  return page.section(
    "Reinforcement learning",
    "Each step draws 8 signs for each of 8 prompts, a little hotter than "
    "above. What OCR reads better than its group's mean becomes likelier, the "
    "codes of each line by that line's own score (option line_advantages).",
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
    "The released architecture in small, trained from nothing on drawn signs "
    "and posters.",
    page.table(("part", "parameters"), rows),
  )


def _millions(tree):
  import jax

  return f"{sum(x.size for x in jax.tree.leaves(tree)) / 1e6:.2f} M"
