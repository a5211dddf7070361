"""OCR accuracy as a reward: what engines read, scored against the targets."""

from collections.abc import Callable, Mapping, Sequence

from xomni_jax.errors import InputError
from xomni_jax.rewards import ocr_engines, text_scores, wire
from xomni_jax.rewards.ocr_engines import Engine
from xomni_jax.rewards.wire import Item, Score

ENGINES = ("rapidocr", "tesseract", "paddleocr", "got")
Scorer = Callable[[Sequence[Item]], list[Score]]


def open_engine(name: str, threads: int = 1, model: str = "") -> Engine:
  """Opens an engine by its name, one of ENGINES.

  Args:
    threads: of the CPU, for rapidocr and tesseract. One gives the same sums
      on every machine; processes scale better than threads here.
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


def make_scorer(engine: Engine, spaces: bool = True) -> Scorer:
  """A scorer of how well images show their targets, see text_scores.

  Items without targets are "absent". If the engine fails on a list, its items
  are read one by one, and only those that fail again are failures.

  Args:
    spaces: whether white space counts.
  """

  rev = f"{engine.rev},spaces={int(spaces)}"

  def score(items: Sequence[Item]) -> list[Score]:
    wanted = [i for i, item in enumerate(items) if _has_target(item)]
    found = _read(engine, [items[i] for i in wanted])
    readings = dict(zip(wanted, found, strict=True))
    return [
      _score(item, readings.get(i), rev, spaces) for i, item in enumerate(items)
    ]

  return score


def combine_engines(scorers: Mapping[str, Scorer], how: str) -> Scorer:
  """One scorer of several: each item's mean or min over them.

  Never the max: an image that fools one engine has to fool all. An item that
  one of them fails on has failed, for a mean over the others would be another
  reward. `raw` tells each one's score and how far they are apart.

  Raises:
    InputError: how is neither "mean" nor "min".
  """
  if how not in ("mean", "min"):
    raise InputError(f"engines combine by {how!r}, expected 'mean' or 'min'")

  def score(items: Sequence[Item]) -> list[Score]:
    columns = [scorer(items) for scorer in scorers.values()]
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
  values = [score.score for score in scores if score.score is not None]
  if not values:
    return wire.absent(scores[0].id, rev)
  raw = {
    "engines": {
      name: {"score": score.score, "raw": score.raw}
      for name, score in by_engine.items()
    },
    "apart": max(values) - min(values),
  }
  value = min(values) if how == "min" else sum(values) / len(values)
  return Score(scores[0].id, True, value, raw, None, rev)


def _has_target(item):
  return bool(text_scores.normalize(" ".join(item.targets), item.lang).strip())


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


def _score(item, reading, rev, spaces):
  if reading is None:
    return wire.absent(item.id, rev)
  if isinstance(reading, Exception):
    message = f"{type(reading).__name__}: {reading}"
    return wire.failed(item.id, "engine", message, rev)
  found = text_scores.text_reward(reading.text, item.targets, item.lang, spaces)
  raw = {
    "text": reading.text,
    "confidence": reading.confidence,
    "recall": round(found.recall, 6),
    "distance": found.distance,
    "looped": found.looped,
  }
  return Score(item.id, True, found.score, raw, None, rev)
