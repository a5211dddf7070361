"""Sampling, greedy decoding, chat and the diffusion decoder's loop against the
golden values.

Tokens and text are exact: the smallest gap between a best and a second-best
score is 0.0148. Tolerances of numbers are those of `test_golden_models.py`;
guided scores are 3 conditional log-probs less 2 unconditional ones, and carry
up to 5 times the error of a logit.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.helpers import GOLDEN, agree, recorded
from xomni_jax.checkpoints.released_config import read_json, scheduler_config
from xomni_jax.config import Compute
from xomni_jax.data import protocol
from xomni_jax.inference import flow, sampling
from xomni_jax.inference.sampling import Sampling
from xomni_jax.models import flux, vae

TOLERANCE = 1e-4
LOGITS = 2e-4
SCORES = 3e-4
WITNESS = "golden values"

SCANNED = Compute(scan_layers=True)
SIZE = (64, 80)  # px, of the 4 x 5 codes of the golden runs
RUNS = {  # name: (which prompts, guidance)
  "g1": (("prompt_en",), 1.0),
  "g3": (("prompt_zh",), 3.0),
  "g1_batch": (("prompt_en", "prompt_zh"), 1.0),
  "g3_batch": (("prompt_en", "prompt_zh"), 3.0),
}
CHATS = ("square", "wide")
QUESTION = "Describe this image in detail."

softmax = functools.partial(jax.nn.softmax, axis=-1)
log_softmax = functools.partial(jax.nn.log_softmax, axis=-1)


def of_tokens(logprobs, tokens):
  return np.take_along_axis(np.asarray(logprobs), tokens[..., None], -1)[..., 0]


# Filters and schedule


def test_filters_match_golden_probabilities(golden, golden_json):
  logits = golden["sample/logits"]
  for case in golden_json["sample_cases"]:
    settings = {k: v for k, v in case.items() if k != "array"}
    ours = softmax(sampling.filter_logits(logits, Sampling(**settings)))
    theirs = golden[case["array"]]
    np.testing.assert_array_equal(ours > 0, theirs > 0, case["array"])
    agree("sampling", WITNESS, "filtered probabilities", ours, theirs, 1e-6)


def test_sigmas_match_golden_schedules(golden, golden_json):
  path = GOLDEN / "flux1" / "scheduler" / "scheduler_config.json"
  cfg = scheduler_config(read_json(path), "scheduler")
  assert len(golden_json["scheduler_cases"]) == 12
  for case in golden_json["scheduler_cases"]:
    tokens, steps = case["seq_len"], case["steps"]
    ours = flow.sigmas(cfg, tokens, steps)
    name = f"sched/L{tokens}_n{steps}"
    agree("schedule", WITNESS, "sigmas", ours, golden[f"{name}/sigmas"], 1e-6)
    theirs = golden[f"{name}/timesteps"] / 1000
    agree("schedule", WITNESS, "sigmas", ours[:-1], theirs, 1e-6)


# Greedy images


@pytest.fixture(scope="module")
def generated(tiny, golden_json):
  """What `generate` makes of a golden run, by name; each is made once."""

  @functools.cache
  def run(name):
    prompts, scale = RUNS[name]
    return tiny.generate(
      [golden_json["gen"][p] for p in prompts],
      SIZE,
      greedy=True,
      cfg_scale=scale,
      decode=False,
    )

  return run


@pytest.mark.parametrize("run", RUNS)
def test_greedy_codes_and_logprobs_match_golden(
  tiny, golden, golden_json, generated, run
):
  prompts, scale = RUNS[run]
  out = generated(run)
  theirs = golden[f"gen/{run}/new_tokens"] - tiny.config.ar.vocab_size
  codes = theirs.reshape(len(prompts), 4, 5)
  agree("greedy images", WITNESS, "codes", out.codes, codes, 0)
  agree(
    "greedy images",
    WITNESS,
    "log-probs, unguided",
    out.raw_logprobs,
    golden[f"gen/{run}/logprobs"],
    LOGITS,
  )
  scores = log_softmax(golden[f"gen/{run}/scores"])
  guided = of_tokens(scores, theirs)
  quantity = "log-probs, as drawn"
  tolerance = LOGITS if scale == 1 else SCORES
  agree(f"greedy images, guidance {scale:g}", WITNESS, quantity, out.logprobs,
        guided, tolerance)  # fmt: skip


def test_teacher_forced_logits_match_golden_at_every_step(tiny, golden):
  rows, spans = [], []
  for run in RUNS:
    new = golden[f"gen/{run}/new_tokens"]
    ids, mask = (
      golden[f"gen/{run}/{name}"] for name in ("input_ids", "attention_mask")
    )
    spans.append((run, len(new)))
    for prompt, real, drawn in zip(ids, mask, new, strict=True):
      rows.append([*prompt[real == 1], *drawn])
  tokens, mask = protocol.left_pad(rows, tiny.tokenizer.pad_id)
  # A position's logits are of the token behind it.
  ours = tiny.logits(tokens, "image", mask=mask)[:, -21:-1, 448:512]
  first = 0
  for run, count in spans:
    theirs = golden[f"gen/{run}/logits"]
    agree("greedy images", WITNESS, "logits of every step",
          ours[first : first + count], theirs, LOGITS)  # fmt: skip
    first += count


@functools.partial(jax.jit, static_argnames=("cfg", "how"))
def scores_of_steps(params, state, cfg, how):
  """Tokens, logits and guided scores [20, N, ...] of the image loop."""
  real, seen = sampling.draw, []

  def draw(keys, logits, *rest):
    seen.append(logits)
    return real(keys, logits, *rest)

  def step(state, _):
    state, drawn = sampling.image_step(
      params, state, cfg=cfg, compute=SCANNED, sampling=how
    )
    cond, uncond = jnp.split(seen[-1], 2)
    return state, (drawn.token, cond, sampling.guide(cond, uncond, 3.0))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sampling, "draw", draw)
    return jax.lax.scan(step, state, length=20)[1]


def test_cached_steps_match_golden_logits_and_guided_scores(tiny, golden):
  cfg = tiny.config.ar
  mask = golden["gen/g3_batch/attention_mask"] == 1
  ids = [
    row[real]
    for row, real in zip(golden["gen/g3_batch/input_ids"], mask, strict=True)
  ]
  tokens, valid = protocol.left_pad(
    [*ids, golden["gen/negative_ids"]], tiny.tokenizer.pad_id
  )
  state = sampling.prefill(
    tiny.params["ar"],
    tokens,
    valid,
    sampling.sequence_keys(0, 2),
    cfg=cfg,
    compute=SCANNED,
    steps=20,
    copies=(1, 1, 2),
  )
  drawn, logits, scores = scores_of_steps(
    tiny.params["ar"], state, cfg, Sampling(greedy=True, cfg_scale=3.0)
  )
  turn = lambda x: np.moveaxis(np.asarray(x), 0, 1)
  theirs = golden["gen/g3_batch/new_tokens"] - cfg.vocab_size
  agree("greedy images", WITNESS, "codes", turn(drawn), theirs, 0)
  for ours, name, tolerance in (
    (logits, "logits", LOGITS),
    (scores, "scores", SCORES),
  ):
    theirs = golden[f"gen/g3_batch/{name}"]
    quantity = f"{name} of every cached step"
    agree("greedy images", WITNESS, quantity, turn(ours), theirs, tolerance)


# Text


def test_strings_of_the_public_api_match_golden(tiny, golden_json, generated):
  strings = golden_json["protocol"]
  for name in CHATS:
    image = protocol.image_string(tiny.encode(GOLDEN / f"images/{name}.png"))
    assert image == strings["tokenize_image"][name]
    (message,) = strings[f"chat_{name}"]["messages"]
    assert f"{image}\n{QUESTION}" == message["content"]
  # The greedy image behind its prompt is the golden document.
  case = strings["mmdecode_generated"]
  codes = generated("g3").codes[0]
  document = golden_json["gen"]["prompt_zh"] + protocol.image_string(codes)
  assert tiny.tokenizer.encode(document) == case["ids"]
  texts, ((parsed, prompt),) = tiny.tokenizer.parse(case["ids"])
  assert (texts, prompt) == (case["texts"], case["decoder_prompt"])
  np.testing.assert_array_equal(parsed, codes)


@pytest.mark.parametrize("name", CHATS)
def test_chat_matches_golden_answer(tiny, golden, golden_json, name):
  case = golden_json["protocol"][f"chat_{name}"]
  path = GOLDEN / "images" / f"{name}.png"
  assert case["new_ids"] == golden[f"chat/{name}/new_tokens"][0].tolist()
  # 16 tokens and no end of turn among them; the reference drops the last one
  # unseen, which is only right where it ends the turn.
  answer = tiny.chat(path, QUESTION, max_new_tokens=16)
  assert answer == tiny.tokenizer.decode(case["new_ids"])
  assert tiny.chat(path, QUESTION, max_new_tokens=15) == case["response"]


def test_chat_logits_match_golden_at_every_step(tiny, golden):
  rows = [
    [*golden[f"chat/{n}/input_ids"][0], *golden[f"chat/{n}/new_tokens"][0]]
    for n in CHATS
  ]
  tokens, mask = protocol.left_pad(rows, tiny.tokenizer.pad_id)
  ours = tiny.logits(tokens, "text", mask=mask)[:, -17:-1, :448]
  theirs = np.concatenate([golden[f"chat/{n}/logits"] for n in CHATS])
  agree("chat", WITNESS, "logits of every step", ours, theirs, LOGITS)
  np.testing.assert_array_equal(ours.argmax(-1), tokens[:, -16:])


# Diffusion decoder


@pytest.fixture(scope="module")
def square(tiny, golden, golden_json):
  """`decode` of the golden codes: its image and every step of the loop."""
  steps, real = [], flow.euler_step

  def spy(params, latents, level, next_level, text, pooled, features, **kw):
    before = np.array(latents)  # a copy, for the step takes the buffer
    after = real(
      params, latents, level, next_level, text, pooled, features, **kw
    )
    steps.append(
      types.SimpleNamespace(
        before=before,
        after=np.array(after),
        levels=(level, next_level),
        inputs=(text, pooled, features),
        settings=kw,
      )
    )
    return after

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(flow, "euler_step", spy)
    image = tiny.decode(
      golden["pipe/square/tokens"],
      golden_json["gen"]["prompt_en"],
      noise=golden["pipe/square/latents_init"],
    )
  return types.SimpleNamespace(image=image, steps=steps)


def test_decoding_loop_matches_golden_at_every_step(golden, square):
  mine = lambda name: golden[f"pipe/square/{name}"]
  part = "decoding loop"
  first = square.steps[0]
  theirs = mine("latents_init_packed")
  agree(part, WITNESS, "packed noise", first.before, theirs, 0)
  theirs = mine("siglip")
  agree(part, WITNESS, "features", first.inputs[2], theirs, TOLERANCE)
  levels = [s.levels[0] for s in square.steps] + [square.steps[-1].levels[1]]
  agree(part, WITNESS, "sigmas", levels, golden["sched/L36_n6/sigmas"], 1e-6)
  after = np.stack([s.after[0] for s in square.steps])
  theirs = mine("latents_steps")
  agree(part, WITNESS, "latents of every step", after, theirs, TOLERANCE)
  final = square.steps[-1].after
  agree(part, WITNESS, "last latents", final, mine("latents_final"), TOLERANCE)


def test_both_branches_of_the_first_step_match_golden(tiny, golden, square):
  first = square.steps[0]
  settings = first.settings | {"compute": SCANNED}
  scale = settings["cfg_scale"]
  assert scale == 1.5

  @jax.jit
  def both(params, latents, level, *inputs):
    guided, calls = recorded(
      flux.Flux,
      lambda: flow.velocity(params, latents, level, *inputs, **settings),
    )
    return guided, calls[0][2]

  guided, branches = both(
    tiny.params["flux"], first.before, first.levels[0], *first.inputs
  )
  theirs = golden["pipe/square/pred_step0"]
  quantity = "velocity, both branches"
  agree("decoding loop", WITNESS, quantity, branches, theirs, TOLERANCE)
  mixed = theirs[1] + scale * (theirs[0] - theirs[1])
  quantity = "guided velocity"
  agree("decoding loop", WITNESS, quantity, guided[0], mixed, TOLERANCE)


def test_autoencoder_of_the_last_latents_matches_golden(tiny, golden, square):
  cfg = tiny._painter.cfg.vae

  @jax.jit
  def paint(params, latents):
    inputs = vae.from_model_space(flow.unpack(latents, (6, 6)), cfg)
    return inputs, vae.decode(params, inputs, cfg, Compute())

  ours = paint(tiny.params["vae"], square.steps[-1].after)
  for x, name in zip(ours, ("vae_in", "vae_out"), strict=True):
    theirs = golden[f"pipe/square/{name}"].transpose(0, 2, 3, 1)
    agree("decoding loop", WITNESS, name, x, theirs, TOLERANCE)


def check_image(ours, theirs, file):
  """8-bit images within one level, which rounding alone may cost."""
  assert ours.dtype == theirs.dtype == np.uint8
  np.testing.assert_array_equal(theirs, Image.open(GOLDEN / "images" / file))
  agree("decoding loop", WITNESS, "8-bit image", ours, theirs, 1)


def test_decoded_image_matches_golden(golden, square):
  theirs = golden["pipe/square/image_u8"]
  check_image(square.image, theirs, "decoded_square.png")


def test_decoded_image_of_generated_codes_matches_golden(
  tiny, golden, golden_json, generated
):
  codes = golden["pipe/generated/tokens"]
  np.testing.assert_array_equal(generated("g3").codes[0], codes)
  ours = tiny.decode(
    generated("g3").codes[0],
    golden_json["gen"]["prompt_zh"],
    steps=6,
    cfg_scale=1.5,
    noise=golden["pipe/generated/latents_init"],
  )
  theirs = golden["pipe/generated/image_u8"]
  check_image(ours, theirs, "decoded_generated.png")
