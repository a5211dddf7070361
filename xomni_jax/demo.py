"""`xomni demo`: every part of a model at work, on one HTML page.

By default the model is the tiny reference checkpoint of the tests. Its weights
are random, so its pictures are noise; what the page shows is that each part
runs and gives the numbers of the PyTorch reference.
"""

import argparse
import base64
import dataclasses
import html
import io
import json
import pathlib
import sys
import time

import numpy as np
from PIL import Image

import xomni_jax
from xomni_jax.data.images import codes_picture, open_image
from xomni_jax.errors import InputError

_TINY = pathlib.Path(__file__).parents[1] / "tests" / "golden" / "tiny-a"


def main(argv: list[str]) -> int:
  """Writes the page; returns the exit status."""
  parser = argparse.ArgumentParser(prog="xomni demo", description=__doc__)
  parser.add_argument("--model", help="X-Omni folder; unset: the tiny one")
  parser.add_argument("--flux", help="FLUX.1-dev folder; unset: the tiny one")
  parser.add_argument(
    "--prompt", action="append", help="to draw; may be given several times"
  )
  parser.add_argument("--image", action="append", help="to read; likewise")
  parser.add_argument(
    "--question", default="Describe this image in detail.", help="about it"
  )
  parser.add_argument("--out", default="runs/demo", help="folder of the page")
  args = parser.parse_args(argv)
  if (args.model is None) != (args.flux is None):
    raise InputError("name both --model and --flux, or neither")
  if args.model is None and not _TINY.is_dir():
    raise InputError(
      f"{_TINY}: no such folder; run from a clone of the repository, or name "
      "--model and --flux"
    )
  tiny = args.model is None
  start = time.monotonic()
  model = xomni_jax.load(
    args.model or _TINY / "xomni",
    args.flux or _TINY / "flux1",
    progress=sys.stderr.isatty(),
  )
  loading = time.monotonic() - start
  golden = _Golden(_TINY) if tiny else None
  pictures = args.image or (
    [str(_TINY / "images" / f"{n}.png") for n in _Golden.IMAGES] if tiny else []
  )
  prompts = args.prompt or (
    golden.prompts if tiny else ["A poster that says “Hello, world”."]
  )
  _log(f"loaded {model} in {loading:.1f} s")
  rows = [_Row("load", str(model), loading, None)]
  sections = [
    _tokenizer(model, pictures, rows, golden),
    _drawing(model, prompts, rows, golden),
    _chat(model, pictures, args.question, rows, golden),
  ]
  out = pathlib.Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  page = out / "index.html"
  page.write_text(_page(tiny, sections, rows), encoding="utf-8")
  checks = [row for row in rows if row.check is not None]
  wrong = [row.what for row in checks if not row.check]
  print(
    f"{page}: {len(rows)} steps, "
    f"{len(checks) - len(wrong)} of {len(checks)} equal the reference"
  )
  return 1 if wrong else 0


@dataclasses.dataclass(frozen=True)
class _Row:
  """A line of the page's table; `check`: equals the reference (None: none)."""

  part: str
  what: str
  seconds: float
  check: bool | None


class _Golden:
  """What the reference made of the tiny checkpoint."""

  IMAGES = ("square", "wide")

  def __init__(self, folder: pathlib.Path):
    self.arrays = np.load(folder / "golden.npz")
    texts = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    self.prompts = [texts["gen"]["prompt_en"], texts["gen"]["prompt_zh"]]
    self.grid = texts["gen"]["token_h"], texts["gen"]["token_w"]
    self.answers = {
      name: texts["protocol"][f"chat_{name}"]["response"]
      for name in self.IMAGES
    }

  def codes(self, name: str) -> np.ndarray:
    """i32[h, w] of a test image."""
    return self.arrays[f"tok/{name}/indices"]

  def drawn(self, vocab_size: int) -> np.ndarray:
    """i32[2, h, w], the prompts' greedy codes without guidance."""
    tokens = self.arrays["gen/g1_batch/new_tokens"]
    return tokens.reshape(-1, *self.grid) - vocab_size

  def painted(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, noise, and the u8 image painted from them."""
    at = lambda what: self.arrays[f"pipe/{name}/{what}"]
    return at("tokens"), at("latents_init"), at("image_u8")


def _log(text):
  print(text, file=sys.stderr, flush=True)


def _timed(rows, part, what, run, check=None):
  """The result of `run`, timed and checked as a row of the table."""
  start = time.monotonic()
  result = run()
  seconds = time.monotonic() - start
  ok = None if check is None else bool(check(result))
  rows.append(_Row(part, what, seconds, ok))
  _log(f"{part}: {what}: {seconds:.1f} s" + _mark(ok))
  return result


def _mark(ok):
  return {None: "", True: ", equal to the reference", False: ", WRONG"}[ok]


def _tokenizer(model, pictures, rows, golden):
  """Images to codes, and the codes painted again."""
  figures = []
  for i, path in enumerate(pictures):
    name = pathlib.Path(path).stem
    known = golden is not None and name in golden.IMAGES
    codes = _timed(
      rows,
      "tokenizer",
      f"{name} to codes",
      lambda path=path: model.encode(path),
      (lambda c, name=name: np.array_equal(c, golden.codes(name)))
      if known
      else None,
    )
    noise = check = None
    prompt = ""
    if known and i == 0:
      _, noise, image = golden.painted(name)
      prompt = golden.prompts[0]
      check = lambda x, image=image: _close(x, image)
    painted = _timed(
      rows,
      "decoder",
      f"{name} painted from its codes",
      lambda codes=codes, prompt=prompt, noise=noise: model.decode(
        codes, prompt, noise=noise
      ),
      check,
    )
    figures += [
      _figure(open_image(path), f"{name}, as given"),
      _figure(_codes(model, codes), f"its {_grid(codes)} codes"),
      _figure(Image.fromarray(painted), "painted from the codes"),
    ]
  return _section(
    "Image tokenizer",
    "SigLIP features, quantised: one code for each square of "
    f"{model.config.transform.patch_size} px. Equal colours are equal codes.",
    figures,
  )


def _drawing(model, prompts, rows, golden):
  """Prompts to codes to images."""
  px = model.pixels_per_token
  side = min(1152, model.config.transform.long_size) // px * px
  size = tuple(n * px for n in golden.grid) if golden else (side, side)
  check = None
  if golden and prompts == golden.prompts:
    want = golden.drawn(model.config.ar.vocab_size)
    check = lambda g: np.array_equal(g.codes, want)
  greedy = _timed(
    rows,
    "AR transformer",
    f"{len(prompts)} prompts to codes, greedy",
    lambda: model.generate(prompts, size, greedy=True, decode=False),
    check,
  )
  sampled = _timed(
    rows,
    "AR transformer and decoder",
    f"{len(prompts)} prompts to images, sampled, min-p 0.03",
    lambda: model.generate(prompts, size, min_p=0.03, seed=1),
  )
  figures = []
  for i, prompt in enumerate(prompts):
    figures += [
      _figure(_codes(model, greedy.codes[i]), f"“{prompt}”: likeliest codes"),
      _figure(_codes(model, sampled.codes[i]), "codes drawn at temperature 1"),
      _figure(sampled.images[i], "painted from those"),
    ]
  return _section(
    "From prompts to images",
    "One transformer writes text and image codes alike; the diffusion decoder "
    "paints the codes.",
    figures,
  )


def _chat(model, pictures, question, rows, golden):
  """Questions about images."""
  figures = []
  for path in pictures:
    name = pathlib.Path(path).stem
    # One token less than the reference made: it drops its last one.
    limit = 15 if golden else 128
    check = None
    if golden and name in golden.IMAGES:
      check = lambda a, name=name: a == golden.answers[name]
    answer = _timed(
      rows,
      "chat",
      f"a question about {name}",
      lambda path=path, limit=limit: model.chat(
        path, question, max_new_tokens=limit
      ),
      check,
    )
    figures.append(_figure(open_image(path), f"{question} — {answer}"))
  return _section(
    "Answers about images",
    "The image's codes and a question go in, text comes out.",
    figures,
  )


def _close(image, reference):
  return np.abs(image.astype(int) - reference.astype(int)).max() <= 1


def _codes(model, codes):
  return codes_picture(codes, model.config.vq.codebook_size, 16)


def _grid(codes):
  return " × ".join(map(str, codes.shape))


def _figure(image, caption):
  data = io.BytesIO()
  image.save(data, "PNG")
  url = base64.b64encode(data.getvalue()).decode()
  return (
    f'<figure><img alt="" src="data:image/png;base64,{url}">'
    f"<figcaption>{html.escape(caption)}</figcaption></figure>"
  )


def _section(title, text, figures):
  return (
    f"<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>"
    f'<div class="figures">{"".join(figures)}</div>'
  )


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem;
       max-width: 60rem; color: #222; background: #fff; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; }
.figures { display: grid; gap: 1.5rem; grid-template-columns: repeat(3, 1fr); }
@media (max-width: 40rem) { .figures { grid-template-columns: 1fr; } }
figure { margin: 0; }
img { width: 100%; height: 12rem; object-fit: contain; object-position: left;
      image-rendering: pixelated; }
figcaption { font-size: .9rem; color: #555; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0;
         border-bottom: 1px solid #ddd; vertical-align: top; }
td.number, th.number { text-align: right; }
.bad { color: #b00020; font-weight: bold; }
"""


def _page(tiny, sections, rows):
  lines = "".join(
    f"<tr><td>{html.escape(row.part)}</td><td>{html.escape(row.what)}</td>"
    f'<td class="number">{row.seconds:.1f}</td><td>{_verdict(row.check)}</td>'
    "</tr>"
    for row in rows
  )
  note = (
    "<p>The model is the tiny reference checkpoint. Its weights are random, so "
    "its pictures are noise and its answers babble: the page shows that every "
    "part runs and gives the numbers of the PyTorch reference.</p>"
    if tiny
    else ""
  )
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
    f"<title>xomni_jax demo</title><style>{_STYLE}</style></head><body>"
    f"<h1>X-Omni in JAX</h1>{note}{''.join(sections)}"
    "<h2>Timings</h2><p>Seconds on this machine, compilation included where a "
    "program runs for the first time.</p><table><tr><th>part</th><th>what</th>"
    '<th class="number">seconds</th><th>against the reference</th></tr>'
    f"{lines}</table></body></html>\n"
  )


def _verdict(ok):
  if ok is None:
    return "—"
  return "equal" if ok else '<span class="bad">differs</span>'
