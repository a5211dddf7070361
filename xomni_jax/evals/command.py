"""`xomni eval`: measurements of models.

`best-of-n` and `cfg` keep a row for every image in OUT as it is made, and at
the end write their figures as JSON; started again, they go on where they were.
`score` makes the figures anew from the rows and draws nothing; `report` puts
the figures of several training seeds side by side. `answers` asks one model
about images of the drawn world; `colours` looks whether what models draw has
the colours that were asked for.
"""

import argparse
import os
import pathlib

import jax

from xomni_jax import cpu
from xomni_jax.checks import make_folder
from xomni_jax.errors import ArgumentParser, InputError
from xomni_jax.evals import (
  answers,
  asked,
  best_of_n,
  cfg,
  colours,
  drawing,
  files,
  measure,
  report,
  rows,
  workbench,
)
from xomni_jax.inference import loading, sheets
from xomni_jax.inference.fingerprint import fingerprint


def main(argv: list[str]) -> int:
  """Runs one measurement; returns the exit status.

  Raises:
    InputError: bad arguments, or files that do not fit them.
    RunError: an engine fails too often.
  """
  args = _parse(argv)
  if jax.config.jax_platforms == "cpu":  # by name: no device is looked for yet
    cpu.keep_memory()
  args.run(args)
  return 0


def _parse(argv):
  parser = ArgumentParser(prog="xomni eval", description=__doc__.split("\n")[0])
  verbs = parser.add_subparsers(
    required=True, metavar="WHAT", parser_class=ArgumentParser
  )

  def verb(name, run, text):
    sub = verbs.add_parser(
      name,
      help=text,
      description=text,
      formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sub.set_defaults(run=run)
    return sub

  sub = verb("best-of-n", _best_of_n, "SFT's best of N against RL at N = 1.")
  _measure_flags(sub)
  sub.add_argument("--control", help="SFT model of the same compute as RL")
  sub.add_argument(
    "--n", type=_numbers, default="1,2,4,8,16", help="images to choose from"
  )
  sub = verb("cfg", _cfg, "Guidance and filters before and after RL.")
  _measure_flags(sub)
  sub.add_argument(
    "--validation",
    metavar="SOURCE",
    help="prompts that the best setting is chosen on; unset: the validation "
    "split of --source, a test split of the drawn world",
  )
  sub.add_argument(
    "--validation-count", type=int, default=500, help="of these prompts"
  )
  sub = verb("answers", _answers, "What a model answers about drawn images.")
  sub.add_argument(
    "--model", default="tiny", help="X-Omni folder or hub id that is asked"
  )
  sub.add_argument(
    "--source",
    default="world:signs:test",
    help="images and questions: world:LEVEL:SPLIT",
  )
  sub.add_argument("--count", type=int, default=2000, help="of images")
  sub.add_argument("--batch", type=int, default=50, help="images at once")
  sub.add_argument("--out", help="folder of the figures as JSON; unset: none")
  sub = verb(
    "colours", _colours, "Whether images have the colours of their prompts."
  )
  _drawing_flags(sub)
  sub = verb("score", _score, "Make the figures of a folder from its rows.")
  sub.add_argument("out", help="folder of measurements")
  _reuse_flag(sub)
  sub = verb("report", _report, "Tables and plots of several training seeds.")
  sub.add_argument(
    "folders", nargs="+", metavar="RUN", help="folders, one a training seed"
  )
  sub.add_argument("--out", required=True, help="folder of the report")
  return parser.parse_args(argv)


def _drawing_flags(parser):
  add = parser.add_argument
  add("--sft", required=True, help="X-Omni folder or hub id, fine-tuned")
  add("--rl", required=True, help="the same, after reinforcement learning")
  add("--flux", help="FLUX.1-dev folder or hub id of all models")
  add(
    "--source",
    default="world:signs:test",
    help="prompts: world:LEVEL:SPLIT, or JSONL with targets and sizes",
  )
  add("--count", type=int, default=2000, help="prompts")
  add("--seed", type=int, default=0, help="of codes and noise")
  add("--steps", type=int, default=8, help="of denoising")
  add("--batch", type=int, default=64, help="images drawn at once")
  add("--out", required=True, metavar="DIR", help="rows, sheets and figures")


def _measure_flags(parser):
  _drawing_flags(parser)
  _reuse_flag(parser)
  add = parser.add_argument
  add("--samples", type=int, default=1, help="images a prompt, where not N")
  add(
    "--readers",
    type=int,
    default=os.cpu_count(),
    help="processes that read images",
  )


def _reuse_flag(parser):
  parser.add_argument(
    "--reuse",
    metavar="DIR",
    type=pathlib.Path,
    help="an earlier --out, whose rows may be packed by gzip: those of the "
    "same models are taken from it, such as SFT's where only RL is another",
  )


def _numbers(text):
  try:
    return [int(part) for part in text.split(",")]
  except ValueError:
    raise argparse.ArgumentTypeError(
      f"{text!r} is no list of numbers such as 1,2,4"
    ) from None


def _best_of_n(args):
  best_of_n.check_numbers(args.n)
  with workbench.Workbench(args, best_of_n.NAME) as bench:
    prompts = bench.ask(best_of_n.TEST, args.source, args.count)
    bench.open({"n": args.n})
    bench.measure(best_of_n.settings(bench.identity), prompts)
    bench.write(best_of_n.summary(bench.identity, bench.rows.found, prompts))


def _cfg(args):
  with workbench.Workbench(args, cfg.NAME) as bench:
    validation = args.validation or _validation_of(args.source)
    first = bench.ask(cfg.VALIDATION, validation, args.validation_count)
    second = bench.ask(cfg.TEST, args.source, args.count)
    both = {a.text for a in first} & {a.text for a in second}
    if both:
      raise InputError(
        f"{len(both)} prompts of --validation {validation} are prompts of "
        f"--source {args.source} too; expected others: a setting that is "
        "measured where it was chosen looks better than it is"
      )
    bench.open({"validation": validation})
    identity, found = bench.identity, bench.rows.found
    bench.measure(cfg.validation_settings(identity), first)
    chosen = cfg.choose(identity, found, first)
    bench.measure(cfg.test_settings(identity, chosen), second)
    bench.write(cfg.summary(identity, found, first, second))


def _validation_of(source):
  if not (asked.has_images(source) and source.endswith(":test")):
    raise InputError(
      f"--source is {source}, which has no validation split of its own; name "
      "other prompts with --validation"
    )
  return source.removesuffix("test") + "validation"


def _answers(args):
  if args.batch < 1:
    raise InputError(f"--batch is {args.batch}, expected 1 or more")
  if not asked.has_images(args.source):
    raise InputError(
      f"--source is {args.source}, expected world:LEVEL:SPLIT, whose images "
      "have questions and answers"
    )
  some = asked.open_asked(args.source, args.count)
  answers.check_asks(args.source)
  out = make_folder(args.out) if args.out else None
  which = fingerprint(args.model)
  model = loading.load(args.model)
  with measure.progress(args.count) as bar:
    found = answers.measure(model, args.source, args.count, args.batch, bar)
  identity = {
    "measures": answers.NAME,
    "models": {"model": which},
    "source": args.source,
    "prompts": {"test": [len(some), asked.prompts_hash(some)]},
  }
  figures = answers.summary(identity, found, [a.kind for a in some])
  for name, of in figures["exact"].items():
    mean, low, high, _ = of["all"]
    print(f"{name}: {mean:.3f} exact ({low:.3f} to {high:.3f})")
  if out:
    path = out / f"{answers.NAME}.json"
    files.write_json(path, figures)
    print(path)


def _colours(args):
  colours.check_names(args.source)
  workbench.check_flags(args, ("steps", "batch"))
  some = asked.open_asked(args.source, args.count)
  models = {best_of_n.SFT: args.sft, best_of_n.RL: args.rl}
  identity = {
    "measures": colours.NAME,
    "models": {m: asked.model_hash(p, args.flux) for m, p in models.items()},
    "source": args.source,
    "prompts": {best_of_n.TEST: [len(some), asked.prompts_hash(some)]},
    "seed": args.seed,
    "steps": args.steps,
  }
  out = make_folder(args.out)

  loaded: dict[str, drawing.Drawer] = {}

  def drawer(name):
    if name not in loaded:
      loaded.clear()  # one model is in memory at a time
      model = loading.load(models[name], args.flux)
      loaded[name] = drawing.Drawer(model, args.seed, args.steps)
    return loaded[name]

  wanted = colours.settings(args.source, list(models))
  with measure.progress(len(wanted) * len(some)) as bar:
    found, wrong = colours.look(wanted, some, drawer, args.batch, bar)
  figures = colours.summary(identity, found, [a.kind for a in some])
  for name, of in figures["right"].items():
    mean, low, high, _ = of[colours.ALL]["all"]
    print(f"{name}: {mean:.3f} right ({low:.3f} to {high:.3f})")
    if wrong[name]:
      path = measure.sheet_path(out / "sheets" / colours.NAME, name)
      sheets.save(path, sheets.grid(wrong[name], columns=8))
      print(path)
  path = files.figures_path(out, colours.NAME)
  files.write_json(path, figures)
  print(path)


def _score(args):
  out, made = pathlib.Path(args.out), {}
  for name in (best_of_n.NAME, cfg.NAME):
    path = files.kept_rows(out, name)
    if not path.exists():
      continue
    identity, found = rows.read_rows(path)
    if not identity:
      raise InputError(
        f"{path} has no rows yet; let the command that makes them run to its "
        "end"
      )
    prompts = {
      split: _prompts(identity, files.prompts_path(out, name, split), split)
      for split in identity["prompts"]
    }
    there = rows.Reusable({}, frozenset(), rows.drawings(identity))
    if args.reuse:
      there = rows.reusable(files.kept_rows(args.reuse, name), identity)
    if there.drawings != rows.drawings(identity):
      both = {*there.drawings, *rows.drawings(identity)}
      identity["drawing"] = sorted(both)
    made[name] = _FIGURES[name](identity, found, prompts, there)
  if not made:
    raise InputError(
      f"{out} has no rows, expected a folder that `xomni eval best-of-n` or "
      "`xomni eval cfg` wrote"
    )
  for name, figures in made.items():
    files.write_json(files.figures_path(out, name), figures)
  paths = [str(files.figures_path(out, name)) for name in made]
  print(f"{', '.join(paths)}: scored anew")


def _best_of_n_figures(identity, found, prompts, there):
  found = measure.reused(there, best_of_n.settings(identity)) | found
  return best_of_n.summary(identity, found, prompts[best_of_n.TEST])


def _cfg_figures(identity, found, prompts, there):
  first, second = prompts[cfg.VALIDATION], prompts[cfg.TEST]
  found = measure.reused(there, cfg.validation_settings(identity)) | found
  chosen = cfg.choose(identity, found, first)
  found = measure.reused(there, cfg.test_settings(identity, chosen)) | found
  return cfg.summary(identity, found, first, second)


_FIGURES = {best_of_n.NAME: _best_of_n_figures, cfg.NAME: _cfg_figures}


def _prompts(identity, path, split):
  """What was asked: kept beside the rows, or drawn anew from its source."""
  count, digest = identity["prompts"][split]
  source = identity["validation" if split == cfg.VALIDATION else "source"]
  some = (
    rows.read_prompts(path)
    if path.exists()
    else asked.open_asked(source, count)
  )
  if asked.prompts_hash(some) != digest:
    raise InputError(
      f"{path if path.exists() else source} has other prompts than the rows "
      f"are of (hash {asked.prompts_hash(some)}, expected {digest}); bring "
      f"back the {path.name} that was written with them"
    )
  return some


def _report(args):
  folders = [pathlib.Path(folder) for folder in args.folders]
  names = [folder.resolve().name for folder in folders]
  if len(set(names)) < len(names):
    raise InputError(
      f"folders are called {', '.join(names)}, expected a name of its own for "
      "each: it is what the report calls the seed"
    )
  found: dict[str, dict] = {}
  for seed, folder in zip(names, folders, strict=True):
    paths = {
      n: files.figures_path(folder, n) for n in (best_of_n.NAME, cfg.NAME)
    }
    paths = {name: path for name, path in paths.items() if path.exists()}
    if not paths:
      raise InputError(
        f"{folder} has no figures, expected best-of-n.json or cfg.json; let "
        "`xomni eval best-of-n` or `xomni eval cfg` run to its end"
      )
    for name, path in paths.items():
      found.setdefault(name, {})[seed] = files.read_json(path)
  for path in report.write(pathlib.Path(args.out), found):
    print(path)
