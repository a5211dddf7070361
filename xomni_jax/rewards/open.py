"""From a reward's config to its scorer."""

import threading
from collections.abc import Callable, Sequence

from xomni_jax.errors import InputError
from xomni_jax.reward_config import RewardConfig, parse_source
from xomni_jax.rewards import client, ocr, replay, text_batches, text_scores
from xomni_jax.rewards.wire import Item, Score, secret

Scorer = Callable[[Sequence[Item]], list[Score]]


def open_scorer(
  cfg: RewardConfig,
  text_backend: str = "tokenizers",
  stop: threading.Event | None = None,
) -> Scorer:
  """The scorer of a reward; engines are loaded and files read here.

  Servers are not asked yet: one that starts later than the run is no error.

  Args:
    text_backend: of a local engine, "tensorflow_text" normalises what it read
      in batches; with any other each text is plain Python's work.
    stop: once it is set, servers are not waited for any more.
  Raises:
    InputError: an engine is missing, a file can't be read or written, or the
      token's environment variable is not set or no token.
  """
  sources = parse_source(cfg.source)
  scorers = {
    "+".join(source.where): _open_source(cfg, source, text_backend, stop)
    for source in sources
  }
  if len(scorers) < len(sources):
    raise InputError(
      f"reward {cfg.name} names a source twice ({cfg.source}), expected "
      "different engines"
    )
  if len(scorers) == 1:
    (scorer,) = scorers.values()
  else:
    scorer = ocr.combine_engines(scorers, cfg.engines)
  return replay.record(scorer, cfg.record, cfg.name) if cfg.record else scorer


def _open_source(cfg, source, text_backend, stop):
  if source.kind == "replay":
    return replay.open_replay(source.where[0], cfg.name)
  if source.kind == "ocr":
    engine = ocr.open_engine(source.where[0], cfg.threads, cfg.model)
    normalize_all = text_scores.normalize_all
    if text_backend == "tensorflow_text":
      normalize_all = text_batches.open_normalizer()
    return ocr.make_scorer(engine, cfg.spaces, normalize_all)
  settings = client.Settings(
    **{name: getattr(cfg, name) for name in client.Settings._fields}
  )
  return client.open_client(source.where, settings, _token(cfg), stop=stop)


def _token(cfg):
  if not cfg.token_env:
    return ""
  token = secret(cfg.token_env)
  if not token:
    raise InputError(
      f"reward {cfg.name} takes its token from {cfg.token_env}, which is not "
      f"set; export {cfg.token_env}=... on every machine of the run"
    )
  return token
