"""OCR accuracy as a reward: what engines read, scored against the targets."""

import concurrent.futures
import statistics
from collections.abc import Callable, Mapping, Sequence

from xomni_jax.errors import InputError
from xomni_jax.rewards import ocr_engines, text_lines, text_scores, wire
from xomni_jax.rewards.ocr_engines import Engine
from xomni_jax.rewards.wire import Item, Score

ENGINES = ("rapidocr", "tesseract", "paddleocr", "got")
Scorer = Callable[[Sequence[Item]], list[Score]]
Normalizer = Callable[[Sequence[str], Sequence[str]], list[str]]


def open_engine(name: str, threads: int = 1, model: str = "") -> Engine:
  """Opens an engine by its name, one of ENGINES.

  Args:
    threads: of the CPU, for rapidocr and tesseract.
    model: of got, a folder or hub id.
  Raises:
    InputError: no such engine, or it is not installed.
  """
  if name not in ENGINES:
    raise InputError(
      f"no OCR engine is called {name!r}, expected one of {', '.join(ENGINES)}"
    )
  if threads < 1:
    raise InputError(f"{name} got {threads} threads, expected 1 or more")
  if name == "rapidocr":
    return ocr_engines.open_rapidocr(threads)
  if name == "tesseract":
    return ocr_engines.open_tesseract(threads)
  if name == "paddleocr":
    return ocr_engines.open_paddleocr()
  return ocr_engines.open_got(model or ocr_engines.GOT_HUB)


def make_scorer(
  engine: Engine,
  spaces: bool = True,
  normalize_all: Normalizer = text_scores.normalize_all,
) -> Scorer:
  """A scorer of how well images show their targets, see text_scores.

  Items without targets are "absent". If the engine fails on a list, its items
  are read one by one, and only those that fail again are failures. Where the
  engine says where lines are, `raw["lines"]` has [score, top, bottom] of each
  target, see text_lines.

  Args:
    spaces: whether white space counts.
    normalize_all: all targets or readings of a call and their languages -> as
      they are compared.
  """

  rev = f"{engine.rev},spaces={int(spaces)}"

  def score(items: Sequence[Item]) -> list[Score]:
    langs = [item.lang for item in items]
    targets = normalize_all([" ".join(i.targets) for i in items], langs)
    wanted = [i for i, target in enumerate(targets) if target]
    found = _read(engine, [items[i] for i in wanted])
    texts = ["" if isinstance(r, Exception) else r.text for r in found]
    texts = normalize_all(texts, [langs[i] for i in wanted])
    scores = [wire.absent(item.id, rev) for item in items]
    for i, reading, text in zip(wanted, found, texts, strict=True):
      said = text_scores.forms_reward(text, targets[i], spaces)
      scores[i] = _score(items[i].id, reading, said, rev)
      # Where nothing was read no line was read well.
      if scores[i].ok and (reading.spans or not reading.text):
        lines = {text_lines.NAME: by_line(items[i], reading)}
        scores[i] = scores[i]._replace(raw={**scores[i].raw, **lines})
    return scores

  def by_line(item, reading):
    langs = [item.lang] * len(item.targets)
    read = reading.text.split("\n") if reading.spans else []
    return text_lines.line_scores(
      normalize_all(item.targets, langs),
      normalize_all(read, [item.lang] * len(read)),
      reading.spans,
      spaces,
    )

  return score


def combine_engines(scorers: Mapping[str, Scorer], how: str) -> Scorer:
  """One scorer of several, asked at once: each item's mean or min over them.

  Never the max: an image that fools one engine has to fool all. An item that
  one of them fails on has failed, for a mean over the others would be another
  reward. `raw` tells each one's score and how far they are apart, and of lines
  what they say together.

  Raises:
    InputError: how is neither "mean" nor "min".
  """
  if how not in ("mean", "min"):
    raise InputError(f"engines combine by {how!r}, expected 'mean' or 'min'")

  def score(items: Sequence[Item]) -> list[Score]:
    with concurrent.futures.ThreadPoolExecutor(len(scorers)) as pool:
      columns = list(pool.map(lambda scorer: scorer(items), scorers.values()))
    rows = zip(*columns, strict=True)
    return [
      _combined(dict(zip(scorers, row, strict=True)), how) for row in rows
    ]

  return score


def _combined(by_engine, how):
  scores = list(by_engine.values())
  rev = f"{how}({', '.join(score.model_rev for score in scores)})"
  for name, score in by_engine.items():
    if not score.ok:
      raw = {"engine": name, "raw": score.raw}
      return score._replace(raw=raw, model_rev=rev)
  there = [score for score in scores if score.score is not None]
  if not there:
    return wire.absent(scores[0].id, rev)
  values = [score.score for score in there]
  join = min if how == "min" else statistics.fmean
  raw = {
    "engines": {
      name: {"score": score.score, "raw": score.raw}
      for name, score in by_engine.items()
    },
    "apart": max(values) - min(values),
  }
  told = [text_lines.told(score.raw) for score in there]
  if lines := text_lines.combined(told, values, join):
    raw[text_lines.NAME] = lines
  return Score(scores[0].id, True, join(values), raw, None, rev)


def _read(engine, items):
  """A Reading or the exception of each item."""
  if not items:
    return []
  try:
    readings = list(engine.read(items))
    if len(readings) != len(items):
      raise ValueError(
        f"engine read {len(readings)} of {len(items)} images at once"
      )
    return readings
  except Exception as e:  # a scorer never raises, whatever its engine does
    if len(items) == 1:
      return [e]
    return [_read(engine, [item])[0] for item in items]


def _score(id, reading, said, rev):
  if isinstance(reading, Exception):
    message = f"{type(reading).__name__}: {reading}"
    return wire.failed(id, "engine", message, rev)
  raw = {
    "text": reading.text,
    "confidence": reading.confidence,
    "recall": round(said.recall, 6),
    "distance": said.distance,
    "looped": said.looped,
  }
  return Score(id, True, said.score, raw, None, rev)
