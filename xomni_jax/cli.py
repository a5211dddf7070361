"""The `xomni` command: verbs to functions, nothing else.

Heavy imports wait until a verb needs them, so that `--help` is instant.
"""

import argparse
import errno
import hashlib
import os
import pathlib
import platform
import sys

from xomni_jax import verbs
from xomni_jax.errors import InputError, RunError
from xomni_jax.inference.shipped import DEFAULT, NAMES

_NO_ROOM = {
  *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
  *(errno.EROFS, errno.EACCES, errno.EPERM),
}


class _Parser(argparse.ArgumentParser):
  """Errors on one line, exit status 2."""

  def error(self, message):
    self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
  """Runs one verb; returns the exit status.

  0, 1 for a run that can't go on, 2 for bad input, 130 for ^C, 143 for a
  training run that was told to stop and has saved its state.
  """
  argv = sys.argv[1:] if argv is None else argv
  _use_compile_cache()
  args, rest = _parser().parse_known_args(argv)
  try:
    if args.passes_rest:
      return args.run(rest)
    if rest:
      args.parser.error(f"unknown arguments: {' '.join(rest)}")
    return args.run(args) or 0
  except InputError as e:
    print(f"xomni {args.verb}: error: {e}", file=sys.stderr)
    return 2
  except OSError as e:
    # Of a disk and its rights, which anything that is written may meet.
    if e.errno not in _NO_ROOM:
      raise
    place = f"{e.filename} " if e.filename else ""
    print(
      f"xomni {args.verb}: error: {place}can't be written ({e.strerror}); make "
      "room there, or name another place",
      file=sys.stderr,
    )
    return 2
  except RunError as e:
    print(f"xomni {args.verb}: {e}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print(f"xomni {args.verb}: interrupted", file=sys.stderr)
    return 130


def _use_compile_cache():
  """Compiled programs are kept between runs, unless the user says where."""
  # One folder a kind of processor: what was compiled for one may crash another,
  # and home folders are shared.
  try:
    flags = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    flags = "".join(x for x in flags.split("\n") if x.startswith("flags"))
  except OSError:
    flags = ""
  kind = hashlib.sha256((platform.machine() + flags).encode()).hexdigest()[:8]
  home = os.environ.get("XDG_CACHE_HOME") or str(pathlib.Path.home() / ".cache")
  os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", f"{home}/xomni_jax/compiled-{kind}"
  )
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def _parser():
  parser = _Parser(
    prog="xomni",
    description="X-Omni in JAX: images from prompts, answers about images.",
  )
  known = parser.add_subparsers(
    dest="verb", required=True, metavar="VERB", parser_class=_Parser
  )

  def verb(name, run, text, *, passes_rest=False):
    sub = known.add_parser(
      name,
      help=text,
      description=text,
      add_help=not passes_rest,
      formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sub.set_defaults(run=run, passes_rest=passes_rest, parser=sub)
    return sub

  _generate_flags(verb("generate", verbs.generate, "Draw images for prompts."))
  _chat_flags(verb("chat", verbs.chat, "Answer a question about an image."))
  _tokenize_flags(
    verb("tokenize", verbs.tokenize, "Turn an image into codes, or codes back.")
  )
  _export_flags(
    verb("export", verbs.export, "Write a model in the PyTorch layout.")
  )
  for name, module, text in (
    ("train", "training.command", "Train a stage from a config."),
    (
      "tokenize-dataset",
      "inference.tokenize_dataset",
      "Turn a data set's images into code records.",
    ),
    ("recipe", "recipe", "Train the tiny model that ships, from nothing."),
    ("demo", "demo", "Run every part on a tiny model and write an HTML page."),
    (
      "eval",
      "evals.command",
      "Measure models: best-of-n, guidance; report of several seeds.",
    ),
    ("plan", "plan", "Compile for TPUs without one; print bytes per device."),
    (
      "bench",
      "bench",
      "Time prefill, decoding, denoising and training against PyTorch.",
    ),
  ):
    verb(name, _module(module), text, passes_rest=True)
  return parser


def _module(name):
  """`xomni_jax.NAME.main`, imported when it runs."""

  def run(rest):
    import importlib

    try:
      module = importlib.import_module(f"xomni_jax.{name}")
    except ModuleNotFoundError as e:
      if e.name is None or e.name.startswith("xomni_jax"):
        raise
      raise InputError(
        f"needs the package {e.name}, which is not installed; training and "
        "measuring need an extra: pip install -e '.[cpu]', '.[gpu]' or '.[tpu]'"
      ) from e
    return module.main(rest)

  return run


def _model_flags(parser, *, flux):
  parser.add_argument(
    "--model",
    "--model_name_or_path",
    default=DEFAULT,
    metavar="PATH_OR_ID",
    help="X-Omni folder in the released layout, its hub id, or a model that "
    f"comes with the package: {', '.join(NAMES)}",
  )
  parser.add_argument(
    "--flux",
    "--flux_model_name_or_path",
    metavar="PATH_OR_ID",
    help=flux,
  )
  parser.add_argument(
    "--dtype",
    choices=("float32", "bfloat16"),
    help="of parameters and matmuls; unset: float32 on CPU, else bfloat16",
  )
  parser.add_argument(
    "--mesh",
    metavar="AXES",
    help="devices to use, such as data=2,tensor=4; unset: the first one",
  )


def _sampling_flags(parser, *, cfg):
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--temperature", type=float, default=1.0)
  parser.add_argument(
    "--top-k",
    type=int,
    default=0,
    help="keep the k likeliest tokens, 0: all; the official script has no such "
    "flag and silently runs with its library's 50: --top-k 50 is its behaviour",
  )
  parser.add_argument("--top-p", type=float, default=1.0)
  parser.add_argument("--min-p", type=float, default=0.0)
  parser.add_argument(
    "--greedy", action="store_true", help="take the likeliest token"
  )
  if cfg:
    parser.add_argument(
      "--cfg-scale",
      type=float,
      default=1.0,
      help="guidance when sampling codes, 1: none",
    )


def _generate_flags(parser):
  _model_flags(
    parser,
    flux="FLUX.1-dev folder or hub id; models that come with the package bring "
    "their own, --codes-only needs none",
  )
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument("--prompt")
  what.add_argument(
    "--prompts-file",
    metavar="FILE",
    help="a prompt a line, or JSONL (.jsonl) with fields prompt and, if you "
    "like, id (names the images)",
  )
  parser.add_argument(
    "--image-size",
    type=int,
    nargs="+",
    metavar="PX",
    help="H [W]; unset: a square of the checkpoint's longest side, a sign by "
    "the models that come with the package, whose posters are 208 128",
  )
  parser.add_argument(
    "--downsample-size",
    type=int,
    metavar="PX",
    help="pixels a token, as the official script is told; the checkpoint says "
    "it, and another is refused",
  )
  parser.add_argument(
    "--num-images", type=int, default=1, help="images per prompt"
  )
  parser.add_argument(
    "--batch-size", type=int, default=8, help="sequences sampled at once"
  )
  _sampling_flags(parser, cfg=True)
  parser.add_argument(
    "--codes-only",
    action="store_true",
    help="write the codes as JSON and paint nothing",
  )
  parser.add_argument(
    "--output-path",
    default="output.png",
    metavar="PATH",
    help="the image; for several, a folder or a name that gets numbers",
  )


def _chat_flags(parser):
  _model_flags(parser, flux="accepted for the official script's sake; unused")
  parser.add_argument("--prompt", required=True, help="the question")
  parser.add_argument("--image-path", help="the image; unset: talk without one")
  parser.add_argument("--max-new-tokens", type=int, default=512)
  _sampling_flags(parser, cfg=False)
  parser.set_defaults(greedy=True)
  parser.add_argument(
    "--sample",
    dest="greedy",
    action="store_false",
    default=argparse.SUPPRESS,  # --greedy says it
    help="draw the answer by the settings above, not the likeliest tokens",
  )


def _tokenize_flags(parser):
  _model_flags(parser, flux="FLUX.1-dev folder or hub id; only with --codes")
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument("--image-path", help="image to turn into codes")
  what.add_argument(
    "--codes", metavar="FILE", help="JSON with height, width and codes to paint"
  )
  parser.add_argument(
    "--prompt", default="", help="text the painter sees beside the codes"
  )
  parser.add_argument("--steps", type=int, help="of denoising")
  parser.add_argument("--seed", type=int, default=0, help="of the noise")
  parser.add_argument(
    "--output-path",
    metavar="PATH",
    help="unset: JSON to standard output; an image needs a name",
  )


def _export_flags(parser):
  parser.add_argument("source", metavar="SOURCE", help="model folder or hub id")
  parser.add_argument("out", metavar="OUT", help="folder to make")
  parser.add_argument(
    "--dtype", choices=("float32", "bfloat16", "source"), default="source"
  )
  parser.add_argument(
    "--vit-format",
    choices=("pt", "safetensors"),
    default="pt",
    help="of the image tokenizer's two files; pt is the released one and "
    "needs torch",
  )
