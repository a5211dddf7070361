"""What the verbs of `xomni` do that use a model: from arguments to files.

Heavy imports wait until a verb needs them, so that `--help` is instant.
"""

import json
import sys
import time

from xomni_jax.errors import InputError
from xomni_jax.inference.shipped import NAMES

# Parts of a model that a verb uses; no other is loaded.
_DRAW, _READ = ("ar",), ("siglip", "vq")
_PAINT = ("vq", "flux", "vae", "clip", "t5")


def _load(args, only, flux=None):
  """The model, and the seconds it took."""
  start = time.monotonic()
  import xomni_jax
  from xomni_jax.mesh import parse_mesh

  mesh = parse_mesh(args.mesh) if args.mesh else None
  model = xomni_jax.load(
    *(args.model, flux, args.dtype, mesh),
    progress=sys.stderr.isatty(),
    only=only,
  )
  return model, time.monotonic() - start


def _how(args, cfg_scale=1.0, instead="leave out --greedy"):
  from xomni_jax.inference.sampling import Sampling

  how = Sampling(
    args.temperature,
    args.top_k,
    args.top_p,
    args.min_p,
    args.greedy,
    cfg_scale,
  )
  if how.greedy and how != Sampling(greedy=True, cfg_scale=cfg_scale):
    raise InputError(
      "got --temperature, --top-k, --top-p or --min-p, which the likeliest "
      f"tokens do not depend on; {instead} to draw by them, or leave them out"
    )
  return how


def generate(args) -> None:
  """`xomni generate`."""
  from xomni_jax.inference import arguments, checkpoint, files

  if not (args.codes_only or args.flux or args.model in NAMES):
    raise InputError(
      "painting needs FLUX.1-dev's parts; name them with --flux, or ask for "
      "--codes-only"
    )
  if args.image_size and len(args.image_size) > 2:
    raise InputError(
      f"--image-size got {len(args.image_size)} numbers, expected H [W]"
    )
  prompts = (
    files.read_prompts(args.prompts_file)
    if args.prompts_file
    else [files.Prompt(args.prompt)]
  )
  how = _how(args, args.cfg_scale)
  # All that can be wrong is said before minutes of loading.
  texts = arguments.prompts_list([p.text for p in prompts])
  arguments.at_least_one(num_images=args.num_images, batch_size=args.batch_size)
  arguments.seed_number(args.seed)
  config = checkpoint.open_checkpoint(args.model).config
  px = config.decoder.upscale_factor
  if args.downsample_size not in (None, px):
    raise InputError(
      f"--downsample-size is {args.downsample_size}, but a token of "
      f"{args.model} is {px} px wide; leave it out"
    )
  size = args.image_size or config.image_size
  size = (size[0], size[-1])
  arguments.grid_of(size, px)
  kind = "json" if args.codes_only else "image"
  paths = files.output_paths(args.output_path, prompts, args.num_images, kind)
  model, seconds = (
    _load(args, _DRAW)
    if args.codes_only
    else _load(args, _DRAW + _PAINT, args.flux)
  )
  done, spent = 0, {}
  for part in model.stream(
    texts,
    size,
    how,
    seed=args.seed,
    num_images=args.num_images,
    decode=not args.codes_only,
    batch_size=args.batch_size,
  ):
    for i, codes in enumerate(part.codes):
      if args.codes_only:
        files.write_codes(paths[done], codes)
      else:
        files.write_image(paths[done], part.images[i])
      done += 1
    for name, s in part.seconds.items():
      spent[name] = spent.get(name, 0.0) + s
  tokens = done * size[0] * size[1] // px**2
  where = paths[0] if done == 1 else f"{paths[0]} .. {paths[-1].name}"
  print(
    f"{where}: {done} x {size[0]} x {size[1]} px; loading {seconds:.1f} s, "
    f"sampling {tokens} tokens {spent['sampling']:.1f} s "
    f"({tokens / spent['sampling']:.1f} tokens/s)"
    + (
      f", painting {spent['decoding']:.1f} s "
      f"({spent['decoding'] / done:.2f} s an image)"
      if "decoding" in spent
      else ""
    )
  )


def chat(args) -> None:
  """`xomni chat`."""
  from xomni_jax.data.images import open_image
  from xomni_jax.inference import arguments

  how = _how(args, instead="add --sample")
  arguments.question(args.prompt)
  arguments.at_least_one(max_new_tokens=args.max_new_tokens)
  arguments.seed_number(args.seed)
  image = open_image(args.image_path) if args.image_path else None
  model, seconds = _load(args, _DRAW + (_READ if image else ()))
  start = time.monotonic()
  answer = model.chat(
    image,
    args.prompt,
    max_new_tokens=args.max_new_tokens,
    greedy=how.greedy,
    seed=args.seed,
    temperature=how.temperature,
    top_k=how.top_k,
    top_p=how.top_p,
    min_p=how.min_p,
  )
  spent = time.monotonic() - start
  tokens = len(model.tokenizer.encode(answer))
  print(answer)
  print(
    f"loading {seconds:.1f} s, answering {tokens} tokens {spent:.1f} s "
    f"({tokens / spent:.1f} tokens/s)",
    file=sys.stderr,
  )


def tokenize(args) -> None:
  """`xomni tokenize`."""
  from xomni_jax.data.images import open_image
  from xomni_jax.inference import arguments, files

  if args.image_path:
    given = {
      "--prompt": args.prompt,
      "--steps": args.steps,
      "--seed": args.seed,
    }
    ignored = [
      flag for flag, value in given.items() if value not in (None, "", 0)
    ]
    if ignored:
      raise InputError(
        f"got {', '.join(ignored)}, which codes of an image do not depend on; "
        "leave them out, or paint with --codes"
      )
    image = open_image(args.image_path)
    out = (
      files.checked_path(args.output_path, "json") if args.output_path else None
    )
    model, _ = _load(args, _READ)
    codes = model.encode(image)
    if out is None:
      print(json.dumps(files.codes_json(codes)))
    else:
      files.write_codes(out, codes)
      print(f"{out}: {codes.shape[0]} x {codes.shape[1]} codes")
    return
  if not (args.flux or args.model in NAMES) or args.output_path is None:
    raise InputError(
      "painting codes needs FLUX.1-dev's parts and a name for the image; "
      "give --flux and --output-path"
    )
  arguments.at_least_one(steps=args.steps)
  arguments.seed_number(args.seed)
  codes = files.read_codes(args.codes)
  out = files.checked_path(args.output_path, "image")
  model, _ = _load(args, _PAINT, args.flux)
  from PIL import Image

  pixels = model.decode(codes, args.prompt, steps=args.steps, seed=args.seed)
  files.write_image(out, Image.fromarray(pixels))
  print(f"{out}: {pixels.shape[0]} x {pixels.shape[1]} px")


def export(args) -> None:
  """`xomni export`."""
  from tqdm import tqdm

  from xomni_jax.inference import checkpoint

  checkpoint.export(
    args.source,
    args.out,
    None if args.dtype == "source" else args.dtype,
    args.vit_format,
    progress=lambda name, tensors, total: tqdm(
      tensors,
      desc=f"writing {name}",
      unit="tensor",
      total=total,
      disable=not sys.stderr.isatty(),
    ),
  )
  print(f"{args.out}: written")
