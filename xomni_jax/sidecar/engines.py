"""Rewards that a server can serve: a function each, from its settings."""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from xomni_jax.errors import InputError
from xomni_jax.rewards import wire
from xomni_jax.rewards.wire import Item, Score

Scorer = Callable[[Sequence[Item]], list[Score]]


class Reward(NamedTuple):
  """An open reward.

  Attributes:
    score: items -> one Score each, in order; never raises.
    model_rev: which model.
    preprocessing: JSON, all that happens to an item before the model.
    check: raises, with one line, if the reward can't work now.
  """

  score: Scorer
  model_rev: str
  preprocessing: Mapping[str, Any]
  check: Callable[[], None] = lambda: None

  def preprocessing_hash(self) -> str:
    """16 hex digits; scores of different ones do not compare."""
    text = json.dumps(self.preprocessing, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_reward(name: str, settings: Mapping[str, Any]) -> Reward:
  """Opens a reward; loads its model.

  Raises:
    InputError: no such reward or setting, or its model can't be had.
  """
  rewards = {
    "ocr": ocr,
    "hps": hps,
    "unified_reward": unified_reward,
    "qwen_alignment": qwen_alignment,
  }
  if name not in rewards:
    raise InputError(
      f"reward is {name!r}, expected one of {', '.join(rewards)}"
    )
  code = rewards[name].__code__
  known = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
  if unknown := sorted(set(settings) - set(known)):
    raise InputError(
      f"reward {name} has no setting {', '.join(unknown)}, expected "
      f"{', '.join(known)}"
    )
  try:
    return rewards[name](**settings)
  except InputError:
    raise
  except Exception as e:  # packages fail as they like, say without a network
    reason = " ".join(f"{type(e).__name__}: {e}".split())[:300]
    raise InputError(f"reward {name} can't be opened ({reason})") from e


def ocr(
  engine: str = "rapidocr",
  threads: int = 1,
  spaces: bool = True,
  model: str = "",
) -> Reward:
  """How well an engine reads the targets in the image; see rewards/ocr.py.

  Args:
    engine: "rapidocr", "tesseract", "paddleocr" or "got".
    threads: of the CPU.
    spaces: whether white space counts.
    model: of got, a folder or hub id.
  """
  from xomni_jax.rewards import ocr as ocr_lib

  opened = ocr_lib.open_engine(engine, threads, model)
  return Reward(
    ocr_lib.make_scorer(opened, spaces),
    opened.rev,
    {"engine": opened.rev, "spaces": spaces},
  )


def hps(
  checkpoint: str,
  version: str = "2.1",
  arch: str = "ViT-H-14",
  device: str = "",
) -> Reward:
  """Human preference score v2: the cosine of an image and its prompt.

  Args:
    checkpoint: path of HPS_v2_compressed.pt or HPS_v2.1_compressed.pt.
    version: "2.0" or "2.1", the checkpoint's.
    arch: of open_clip, or the path of one of its configs (.json).
    device: of torch; "": the GPU if there is one.
  """
  from xomni_jax.sidecar import hps as hps_lib

  model = hps_lib.open_hps(checkpoint, version, arch, device)
  return Reward(
    isolated(model.score, model.rev), model.rev, model.preprocessing
  )


def unified_reward(
  url: str,
  model: str = "CodeGoat24/UnifiedReward-qwen-7b",
  template: str = "",
  max_tokens: int = 512,
  extra: Mapping[str, Any] | None = None,
  concurrency: int = 8,
  timeout_s: float = 60.0,
  key_env: str = "XOMNI_JUDGE_KEY",
) -> Reward:
  """Quality by UnifiedReward, asked for a score of 1 to 5; (s - 1) / 4.

  Args:
    url: of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1.
    model: as that server calls it.
    template: path of a text with "{prompt}" in it; "": `judges.UNIFIED`.
    max_tokens: of the reply.
    extra: further fields of the request.
    concurrency: requests at once.
    timeout_s: of one request.
    key_env: the environment variable that holds the server's key, if any.
  """
  from xomni_jax.sidecar import judges

  server = judges.Server(url, model, concurrency, timeout_s, key_env)
  question = judges.template(template, judges.UNIFIED)
  return judges.unified_reward(server, question, max_tokens, extra or {})


def qwen_alignment(
  url: str,
  model: str = "Qwen/Qwen2.5-VL-32B-Instruct",
  questions: Sequence[str] = (),
  extra: Mapping[str, Any] | None = None,
  concurrency: int = 8,
  timeout_s: float = 60.0,
  key_env: str = "XOMNI_JUDGE_KEY",
) -> Reward:
  """Whether image and prompt fit: the mean probability of "yes".

  Args:
    questions: each with "{prompt}", or with "{sentence}": then it is asked
      about every sentence of the prompt; (): `judges.ALIGNED` alone.
    url, model, extra, concurrency, timeout_s, key_env: as `unified_reward`.
  """
  from xomni_jax.sidecar import judges

  server = judges.Server(url, model, concurrency, timeout_s, key_env)
  asked = tuple(questions) or (judges.ALIGNED,)
  return judges.alignment(server, asked, extra or {})


def isolated(score: Scorer, model_rev: str) -> Scorer:
  """A scorer that never raises, out of one that may.

  If a batch fails, its items are scored one by one, and only those that fail
  again are failures ("engine").
  """

  def safe(items):
    if not items:
      return []
    try:
      scores = list(score(items))
      if [s.id for s in scores] != [item.id for item in items]:
        raise ValueError(f"{len(scores)} scores for {len(items)} items")
      return scores
    except Exception as e:  # whatever a model does
      if len(items) == 1:
        message = f"{type(e).__name__}: {e}"
        return [wire.failed(items[0].id, "engine", message, model_rev)]
    return [safe([item])[0] for item in items]

  return safe


def watched(reward: Reward, seconds: float) -> Reward:
  """A reward whose check also fails while a batch runs for longer than that.

  An engine that hangs raises nothing, and its own check may find all well.
  """
  began: dict[int, float] = {}  # of the batches that run now
  numbers = itertools.count()

  def score(items):
    number = next(numbers)
    began[number] = time.monotonic()
    try:
      return reward.score(items)
    finally:
      del began[number]

  def check():
    now = time.monotonic()
    age = max((now - start for start in list(began.values())), default=0.0)
    if age > seconds:
      raise RuntimeError(
        f"a batch has been running for {age:.0f} s, expected at most "
        f"{seconds:g} s"
      )
    reward.check()

  return reward._replace(score=score, check=check)
