"""Token generation: prefill, filters, and the decoding loops.

Prompts are padded on the left, so that all rows of a batch write the same
cache slot at every step. The prompt's last token is not prefilled: each step
passes the newest token through the model and samples the next, so that an
image takes exactly h*w passes.

Shape letters: R rows (with guidance, the conditional ones first, then as many
unconditional), N sequences, T prompt length, S cache length, V vocabulary.
"""

import dataclasses
import numbers
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xomni_jax.config import ARConfig, Compute
from xomni_jax.errors import InputError
from xomni_jax.mesh import constrain
from xomni_jax.models import ar


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is drawn; filters apply in the order of the fields.

  Attributes:
    temperature: logits are divided by it.
    top_k: keep the k likeliest tokens; 0: all.
    top_p: keep the likeliest tokens until their sum reaches p.
    min_p: keep tokens at least this share of the likeliest one's probability.
    greedy: take the likeliest token; temperature and filters have no effect.
    cfg_scale: guidance on log-probabilities, uncond + s * (cond - uncond);
      1: none.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  greedy: bool = False
  cfg_scale: float = 1.0

  def __post_init__(self):
    for name in ("temperature", "top_p", "min_p", "cfg_scale"):
      value = getattr(self, name)
      if not isinstance(value, numbers.Real):
        raise InputError(f"sampling: {name} is {value!r}, expected a number")
    checks = (
      ("temperature", 1e-6 <= self.temperature < float("inf"), "above 0"),
      (
        "top_k",
        type(self.top_k) is int and self.top_k >= 0,
        "a whole number, 0 (off) or more",
      ),
      ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
      ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1"),
      ("cfg_scale", 1 <= self.cfg_scale < float("inf"), "at least 1"),
    )
    problems = [
      f"{name} is {getattr(self, name)}, expected {expected}"
      for name, ok, expected in checks
      if not ok
    ]
    if problems:
      raise InputError("sampling: " + "; ".join(problems))


def filter_logits(logits: jax.Array, s: Sampling) -> jax.Array:
  """Logits of the distribution that is sampled from.

  Args:
    logits: f32[..., V].
    s: temperature and filters (not guidance, not greedy).
  Returns:
    f32[..., V]: divided by the temperature, -inf where filtered out.
  Source: the logits processors of transformers, in its order.
  """
  logits = logits / s.temperature
  drop = lambda gone: jnp.where(gone, -jnp.inf, logits)
  if 0 < s.top_k < logits.shape[-1]:
    kth = jax.lax.top_k(logits, s.top_k)[0][..., -1:]
    logits = drop(logits < kth)
  if s.top_p < 1:
    order = jnp.argsort(-logits, axis=-1)
    ranked = jax.nn.softmax(jnp.take_along_axis(logits, order, -1), axis=-1)
    # A token goes if the likelier ones alone already reach p.
    gone = jnp.cumsum(ranked, axis=-1) - ranked >= s.top_p
    gone = jnp.take_along_axis(gone, jnp.argsort(order, axis=-1), -1)
    logits = drop(gone)
  if s.min_p > 0:
    probs = jax.nn.softmax(logits, axis=-1)
    logits = drop(probs < s.min_p * probs.max(axis=-1, keepdims=True))
  return logits


def guide(cond: jax.Array, uncond: jax.Array, scale: float) -> jax.Array:
  """Guided scores f32[..., V] from the logits of both branches."""
  cond, uncond = (jax.nn.log_softmax(x, axis=-1) for x in (cond, uncond))
  return uncond + scale * (cond - uncond)


class Drawn(NamedTuple):
  """Tokens [...] and the log-probs they had.

  Attributes:
    token: i32, index within the mode's vocabulary.
    logprob: f32, under the distribution it was drawn from; if greedy, under
      the guided one at temperature 1, whose maximum it is.
    raw_logprob: f32, under the softmax of the unguided, unfiltered logits.
    support: u8[..., ceil(V / 8)], a bit for each token that the filters kept,
      most significant first; None where it was not asked for.
  """

  token: jax.Array
  logprob: jax.Array
  raw_logprob: jax.Array
  support: jax.Array | None = None


def draw(
  keys: jax.Array,
  logits_RV: jax.Array,
  s: Sampling,
  keep_support: bool = False,
) -> Drawn:
  """One token a sequence.

  Args:
    keys: [N] keys, so that a row's draw does not depend on the others'.
    logits_RV: f32; R = N, or 2 N with guidance.
    keep_support: also return which tokens could have been drawn.
  """
  cond = scores = logits_RV
  if s.cfg_scale != 1:
    cond, uncond = jnp.split(logits_RV, 2)
    scores = guide(cond, uncond, s.cfg_scale)
  if s.greedy:
    token = jnp.argmax(scores, axis=-1)
  else:
    scores = filter_logits(scores, s)
    token = jax.vmap(jax.random.categorical)(keys, scores)
  of_token = lambda x: jnp.take_along_axis(
    jax.nn.log_softmax(x, axis=-1), token[:, None], -1
  )[:, 0]
  support = jnp.packbits(scores > -jnp.inf, axis=-1) if keep_support else None
  return Drawn(
    token.astype(jnp.int32), of_token(scores), of_token(cond), support
  )


class State(NamedTuple):
  """What one decoding step hands to the next.

  Attributes:
    cache: keys and values of every stack.
    token: i32[R], the newest token (joint id), not yet in the cache.
    position: i32[R], its position.
    slot: i32[], the cache slot it will take.
    valid: bool[R, S], False at padding.
    keys: [N] keys of the sequences.
    done: bool[N], text only: an end token was drawn.
  """

  cache: Any
  token: jax.Array
  position: jax.Array
  slot: jax.Array
  valid: jax.Array
  keys: jax.Array
  done: jax.Array

  def axes(self) -> "State":
    """The logical axes of every array, in the same tree."""
    rows = lambda x: ("batch", None)[: x.ndim]
    cache = jax.tree.map(lambda x: ar.cache_axes(x.ndim), self.cache)
    return State(cache, *map(rows, self[1:]))


def _constrain(state):
  """Every step hands on what it was handed: else the next is a new program."""
  axes = state.axes()
  return jax.tree.map(lambda x, names: constrain(x, *names), state, axes)


@partial(jax.jit, static_argnames=("cfg", "compute", "steps", "copies"))
def prefill(
  params: dict,
  tokens: jax.Array,
  valid: jax.Array,
  keys: jax.Array,
  *,
  cfg: ARConfig,
  compute: Compute,
  steps: int,
  copies: tuple[int, ...],
) -> State:
  """Runs the prompts once and lays out the cache of all sequences.

  Args:
    params: of the AR transformer.
    tokens: i32[P, T], padded on the left.
    valid: bool[P, T], False at padding.
    keys: [N] keys of the sequences.
    cfg, compute: the model.
    steps: how many tokens will be generated.
    copies: how often each prompt row is repeated, in order; R in all.
  """
  model = ar.XOmniAR(cfg, compute, keep_kv=True)
  positions = ar.positions_of(valid)
  T, R = tokens.shape[1], sum(copies)
  repeat = lambda x, axis=0: jnp.repeat(
    x, jnp.array(copies), axis=axis, total_repeat_length=R
  )
  cache = ar.init_cache(cfg, compute, R, T - 1 + steps)
  if T > 1:
    _, fresh = model.apply(
      {"params": params}, tokens[:, :-1], positions[:, :-1], valid[:, :-1]
    )
    rows = -4  # of [..., rows, K, S, H]
    cache = jax.tree.map(
      lambda empty, new: jax.lax.dynamic_update_slice(
        empty, repeat(new, rows).astype(empty.dtype), (0,) * empty.ndim
      ),
      cache,
      fresh,
    )
  future = jnp.ones((R, steps), bool)
  return _constrain(
    State(
      cache=cache,
      token=repeat(tokens[:, -1]),
      position=repeat(positions[:, -1]),
      slot=jnp.int32(T - 1),
      valid=jnp.concatenate([repeat(valid[:, :-1]), future], axis=1),
      keys=keys,
      done=jnp.zeros(keys.shape, bool),
    )
  )


def _hidden(params, state, cfg, compute):
  """The newest token through the model: hidden [R, D] and the new cache."""
  hidden, cache = ar.XOmniAR(cfg, compute).apply(
    {"params": params},
    state.token[:, None],
    state.position[:, None],
    state.valid,
    state.slot,
    state.cache,
  )
  return hidden[:, 0], cache


def _advance(state, cache, drawn, first, sampling, done=None):
  """The state after a draw; `first` is the joint id of index 0."""
  token = drawn.token + first
  if sampling.cfg_scale != 1:
    token = jnp.concatenate([token, token])
  return _constrain(
    state._replace(
      cache=cache,
      token=token,
      position=state.position + 1,
      slot=state.slot + 1,
      done=state.done if done is None else done,
    )
  )


def image_step(
  params: dict,
  state: State,
  *,
  cfg: ARConfig,
  compute: Compute,
  sampling: Sampling,
  keep_support: bool = False,
) -> tuple[State, Drawn]:
  """One image token a sequence; only the image head is computed."""
  hidden, cache = _hidden(params, state, cfg, compute)
  logits = ar.image_logits(params, hidden, cfg)
  logits = constrain(logits, "batch", "vocab")
  drawn = draw(_step_keys(state), logits, sampling, keep_support)
  return _advance(state, cache, drawn, cfg.vocab_size, sampling), drawn


def _step_keys(state):
  # Positions count a sequence's own tokens; slots count padding too, which
  # depends on the longest prompt of the batch.
  own = state.position[: state.keys.shape[0]]
  return jax.vmap(jax.random.fold_in)(state.keys, own)


@partial(
  jax.jit,
  static_argnames=("cfg", "compute", "sampling", "steps", "keep_support"),
  donate_argnames=("state",),
)
def image_steps(
  params: dict,
  state: State,
  *,
  cfg: ARConfig,
  compute: Compute,
  sampling: Sampling,
  steps: int,
  keep_support: bool = False,
) -> tuple[State, Drawn]:
  """`steps` image tokens a sequence; fields of Drawn are [N, steps, ...]."""

  def body(state, _):
    return image_step(
      params,
      state,
      cfg=cfg,
      compute=compute,
      sampling=sampling,
      keep_support=keep_support,
    )

  state, drawn = jax.lax.scan(body, state, length=steps)
  return state, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), drawn)


@partial(
  jax.jit,
  static_argnames=("cfg", "compute", "sampling", "steps", "ends"),
  donate_argnames=("state",),
)
def text_steps(
  params: dict,
  state: State,
  *,
  cfg: ARConfig,
  compute: Compute,
  sampling: Sampling,
  steps: int,
  ends: tuple[int, ...],
) -> tuple[State, jax.Array, jax.Array]:
  """Up to `steps` text tokens; stops when every sequence has ended.

  Args:
    ends: ids that end a sequence.
  Returns:
    the state, tokens i32[N, steps] (the first end token repeated behind a
    sequence's end), and how many steps were made.
  """
  n = state.keys.shape[0]

  def running(carry):
    state, _, i = carry
    return (i < steps) & ~state.done.all()

  def body(carry):
    state, tokens, i = carry
    hidden, cache = _hidden(params, state, cfg, compute)
    logits = constrain(ar.text_logits(params, hidden), "batch", "vocab")
    drawn = draw(_step_keys(state), logits, sampling)
    if ends:
      token = jnp.where(state.done, ends[0], drawn.token)
      done = state.done | jnp.isin(token, jnp.array(ends))
      drawn = drawn._replace(token=token)
    else:
      done = state.done
    state = _advance(state, cache, drawn, 0, sampling, done)
    return state, tokens.at[:, i].set(drawn.token), i + 1

  fill = ends[0] if ends else 0
  tokens = jnp.full((n, steps), fill, jnp.int32)
  return jax.lax.while_loop(running, body, (state, tokens, jnp.int32(0)))


def sequence_keys(seed: int, count: int) -> jax.Array:
  """A key a sequence; sequence i has the same in every batch."""
  return jax.vmap(jax.random.fold_in, (None, 0))(
    jax.random.key(seed), jnp.arange(count)
  )
