"""Frozen settings of rewards: where each is asked and how they combine."""

import dataclasses
import math
import re
from typing import NamedTuple

from xomni_jax.checks import positive, validate
from xomni_jax.errors import InputError

OCR_ENGINES = ("rapidocr", "tesseract", "paddleocr", "got")
NORMALISATIONS = ("none", "range", "group")
_URL = re.compile(r"https?://[^/\s,@?#]+(/[^\s,?#]*)?")
# Not the metrics that combine.py makes besides.
_NAME = re.compile(
  r"(?!(total|masked|spread|groups_dropped|lines_found|seconds)$)"
  r"(?!.*_(failed|absent|apart)$)[a-z][a-z0-9_]*"
)
_SOURCES = (
  '"local:ocr", "local:ocr:ENGINE", "http://HOST:PORT/ROUTE" (several '
  'endpoints with "," between them) or "replay:FILE"'
)


class Source(NamedTuple):
  """A place where a reward comes from.

  Attributes:
    kind: "ocr" (an engine in this process), "http" or "replay".
    where: the engine's name; the endpoints' addresses; the file.
  """

  kind: str
  where: tuple[str, ...]


def parse_source(text: str) -> tuple[Source, ...]:
  """The places that `RewardConfig.source` names, one per engine.

  Raises:
    InputError: it is none of the known forms.
  """
  return tuple(_parse_part(part.strip()) for part in text.split(" + "))


def _parse_part(text):
  kind, _, rest = text.partition(":")
  if kind == "replay" and rest:
    return Source("replay", (rest,))
  if kind == "local":
    what, _, engine = rest.partition(":")
    if what == "ocr" and (engine or "rapidocr") in OCR_ENGINES:
      return Source("ocr", (engine or "rapidocr",))
  addresses = tuple(address.strip() for address in text.split(","))
  if all(_URL.fullmatch(address) for address in addresses):
    return Source("http", addresses)
  raise InputError(
    f"source of a reward is {text!r}, expected {_SOURCES}; OCR engines are "
    f"{', '.join(OCR_ENGINES)}"
  )


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """One named reward.

  Attributes:
    name: in metrics and records, such as "ocr".
    source: "local:ocr" or "local:ocr:ENGINE", in this process;
      "http://HOST:PORT/ROUTE", a server's `POST /v1/score` below that route,
      several endpoints of one reward with "," between them; "replay:FILE",
      replies that were recorded. Several engines of one reward are joined by
      " + ", and combined by `engines`.
    weight: share in the sum; 0: a shadow, logged and never optimised.
    engines: "mean" or "min" over several engines.
    normalise: before the sum: "none"; "range" maps low..high to 0..1 and cuts
      off; "group" standardises within a prompt's samples.
    low, high: the range of its scores: what "range" maps, and what drifts
      are measured in.
    floor: least deviation that "group" divides by: where all samples are
      nearly alike, their noise is not blown up.
    deadline: seconds that a call may take, retries and waiting included.
    try_seconds: of one request; 0: half the deadline, so that one endpoint
      that hangs leaves time for another.
    retries: of a request, at most 3.
    concurrency: requests at once.
    batch_items, batch_bytes: the most that one request holds.
    token_env: environment variable with the bearer token; "": none is sent.
    spaces: whether white space counts, for a local engine; a server has a
      setting of its own.
    threads: of a local engine.
    model: of the local engine got, folder or hub id; "": the released one.
    record: file that every reply is appended to; "": none. Of several processes
      each has one of its own, "FILE-0.jsonl" and so on, to be joined by `cat`.
  """

  name: str
  source: str
  weight: float = 1.0
  engines: str = "mean"
  normalise: str = "none"
  low: float = 0.0
  high: float = 1.0
  floor: float = 0.05
  deadline: float = 120.0
  try_seconds: float = 0.0
  retries: int = 3
  concurrency: int = 8
  batch_items: int = 16
  batch_bytes: int = 32 * 2**20
  token_env: str = ""
  spaces: bool = True
  threads: int = 1
  model: str = ""
  record: str = ""

  def __post_init__(self):
    try:
      parse_source(self.source)
      source_problem = ""
    except InputError as e:
      source_problem = str(e)
    validate(
      self,
      (
        bool(_NAME.fullmatch(self.name)),
        f"name is {self.name!r}, expected lower-case letters, digits and _, "
        "and none that a metric has already",
      ),
      (not source_problem, source_problem),
      (
        0 <= self.weight < math.inf,
        f"weight is {self.weight}, expected from 0",
      ),
      (
        self.engines in ("mean", "min"),
        f"engines is {self.engines!r}, expected 'mean' or 'min'",
      ),
      (
        self.normalise in NORMALISATIONS,
        f"normalise is {self.normalise!r}, expected one of "
        f"{', '.join(NORMALISATIONS)}",
      ),
      (
        -math.inf < self.low < self.high < math.inf,
        f"low {self.low} is not below high {self.high}",
      ),
      *positive(
        self,
        "floor",
        "deadline",
        "concurrency",
        "batch_items",
        "batch_bytes",
        "threads",
      ),
      (
        0 <= self.try_seconds <= self.deadline,
        f"try_seconds is {self.try_seconds}, expected 0 to the deadline, "
        f"{self.deadline}",
      ),
      (
        0 <= self.retries <= 3,
        f"retries is {self.retries}, expected 0 to 3",
      ),
      (
        bool(re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)?", self.token_env)),
        "token_env is no name of an environment variable; the token itself "
        "does not belong into a config",
      ),
    )


@dataclasses.dataclass(frozen=True)
class CombineConfig:
  """How the scores of a rollout become rewards, and when that is stopped.

  Attributes:
    quorum: a prompt's group is dropped if a smaller share of its samples, or
      fewer than two, has a reward.
    max_failure_rate: the run stops if more than this share of the optimised
      scores failed,
    window: over this many rollouts; a window that is not full does not count,
      unless it can't get below the rate any more.
    drift_window: rollouts; the alarm compares the last so many with as many
      before; 0: no alarm.
    drift_rise, drift_fall: it warns where an optimised reward rose by at
      least the former, and a shadow fell by at least the latter; shares of the
      reward's range, high - low.
  """

  quorum: float = 0.5
  max_failure_rate: float = 0.2
  window: int = 20
  drift_window: int = 50
  drift_rise: float = 0.02
  drift_fall: float = 0.02

  def __post_init__(self):
    validate(
      self,
      (
        0 < self.quorum <= 1,
        f"quorum is {self.quorum}, expected above 0, at most 1",
      ),
      (
        0 <= self.max_failure_rate <= 1,
        f"max_failure_rate is {self.max_failure_rate}, expected 0 to 1",
      ),
      *positive(self, "window", "drift_rise", "drift_fall"),
      (
        self.drift_window >= 0,
        f"drift_window is {self.drift_window}, expected from 0",
      ),
    )


def about(reward: RewardConfig) -> str:
  """What its scores depend on; where servers are is no part of it."""
  parts = parse_source(reward.source)
  here = [part for part in parts if part.kind != "http"]
  settings = (reward.spaces, reward.model) if here else ()
  return repr((here, len(parts), reward.engines, settings))


def check_rewards(rewards: tuple[RewardConfig, ...]) -> None:
  """Raises InputError if names repeat, or none of the rewards is optimised."""
  names = [reward.name for reward in rewards]
  if len(set(names)) < len(names):
    raise InputError(
      f"rewards are called {', '.join(names)}, expected each name once"
    )
  if not any(reward.weight for reward in rewards):
    raise InputError(
      f"no reward has a weight above 0 ({', '.join(names) or 'none given'}), "
      "expected one that is optimised"
    )
