"""Sequences of records against the strings that they stand for."""

import numpy as np
import pytest

from tests.helpers import GOLDEN
from xomni_jax.data import protocol, sequences
from xomni_jax.errors import InputError

CODES = np.array([[3, 63, 0], [7, 7, 12]], np.int32)
IMAGE = protocol.image_string(CODES)
END = protocol.PAD
TEXTS = {
  "text": "A caption: 一只猫, 2 x 3",
  "prompt": " Draw a  cat 12",
  "qa": [["How many?", "12 of them"], ["", "No"], ["What 猫?", ""]],
}
RECORD = {"key": "k", "codes": CODES, **TEXTS}


@pytest.fixture(scope="module")
def tokenizer():
  return protocol.load_tokenizer(GOLDEN / "xomni", 448, 64)


def sample(tokenizer, task, record=RECORD, seed=0, **options):
  rng = np.random.default_rng(seed)
  return sequences.sample(record, task, tokenizer, rng, **options)


def check(tokenizer, got, before, after):
  """The sequence is these strings, and only the second is predicted."""
  assert got.tokens.dtype == np.int32 and got.weights.dtype == np.float32
  assert got.tokens.tolist() == tokenizer.encode(before + after)
  first = max(1, len(tokenizer.encode(before)))
  np.testing.assert_array_equal(
    got.weights, np.arange(len(got.tokens)) >= first
  )


def test_documents_end_and_are_all_predicted(tokenizer):
  check(tokenizer, sample(tokenizer, "text"), "", TEXTS["text"] + END)


def test_text_to_image_is_prompt_and_image(tokenizer):
  got = sample(tokenizer, "text_to_image")
  check(tokenizer, got, "", TEXTS["prompt"] + IMAGE + END)


def test_image_to_text_is_image_and_caption(tokenizer):
  got = sample(tokenizer, "image_to_text")
  check(tokenizer, got, "", IMAGE + TEXTS["text"] + END)


def test_generate_predicts_codes_and_their_end(tokenizer):
  prefix = protocol.image_prefix(2, 3)
  rest = IMAGE.removeprefix(prefix)
  got = sample(tokenizer, "generate")
  check(tokenizer, got, TEXTS["prompt"] + prefix, rest)
  assert got.weights.sum() == 2 * 3 + 1


def test_generate_asks_with_the_caption_where_there_is_no_prompt(tokenizer):
  record = {k: v for k, v in RECORD.items() if k != "prompt"}
  got = sample(tokenizer, "generate", record)
  prompt = tokenizer.encode(TEXTS["text"])
  assert got.tokens[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("task", ["generate", "text_to_image"])
def test_prompts_are_dropped_at_their_rate(tokenizer, task):
  """Then the sequence is what guidance's unconditional branch sees."""
  lengths = [
    len(sample(tokenizer, task, seed=seed, prompt_dropout=0.3).tokens)
    for seed in range(300)
  ]
  short = len(tokenizer.encode(IMAGE)) + (task == "text_to_image")
  assert set(lengths) == {
    short,
    short + len(tokenizer.encode(TEXTS["prompt"])),
  }
  # Binomial: deviation 0.026.
  assert abs(lengths.count(short) / 300 - 0.3) < 0.1
  dropped = sample(tokenizer, task, prompt_dropout=1.0)
  assert dropped.tokens[0] == tokenizer.som_id
  assert (
    sample(tokenizer, task, prompt_dropout=0.0).tokens[0] != tokenizer.som_id
  )


def test_chat_is_the_template_and_predicts_the_answer(tokenizer):
  for n, (question, answer) in enumerate(TEXTS["qa"]):
    record = RECORD | {"qa": [TEXTS["qa"][n]]}
    got = sample(tokenizer, "chat", record)
    prompt = tokenizer.chat_prompt(f"{IMAGE}\n{question}")
    check(tokenizer, got, prompt, answer + "<|im_end|>")


def test_chat_of_several_turns_is_the_template_and_predicts_each_answer(
  tokenizer,
):
  pairs = {tokens_of(tokenizer, a): (q, a) for q, a in TEXTS["qa"]}
  orders = set()
  for seed in range(20):
    got = sample(tokenizer, "chat", seed=seed, turns=5)
    # Every turn once: the runs of predicted tokens are the answers.
    starts = np.flatnonzero(np.diff(got.weights) == 1) + 1
    ends = [*(np.flatnonzero(np.diff(got.weights) == -1) + 1), None]
    answers = [
      tuple(got.tokens[a:b]) for a, b in zip(starts, ends, strict=True)
    ]
    assert sorted(answers) == sorted(pairs)
    messages = []
    for question, answer in map(pairs.__getitem__, answers):
      messages.append({"role": "user", "content": question})
      messages.append({"role": "assistant", "content": answer})
    messages[0]["content"] = f"{IMAGE}\n{messages[0]['content']}"
    text = tokenizer.backend.apply_chat_template(messages, tokenize=False)
    assert got.tokens.tolist() == tokenizer.encode(text.removesuffix("\n"))
    orders.add(tuple(answers))
  assert len(orders) == 6
  two = sample(tokenizer, "chat", turns=2)
  assert (np.diff(two.weights) == 1).sum() == 2


def test_chat_of_several_turns_has_those_that_fit(tokenizer):
  turns = lambda chat: int((np.diff(chat.weights) == 1).sum())
  for seed in range(20):
    whole = sample(tokenizer, "chat", seed=seed, turns=3)
    least = sample(tokenizer, "chat", seed=seed, turns=3, room=1)
    assert turns(whole) == 3 and turns(least) == 1
    for room in range(len(least.tokens), len(whole.tokens) + 1):
      got = sample(tokenizer, "chat", seed=seed, turns=3, room=room).tokens
      assert len(got) <= room
      assert got.tolist() == whole.tokens[: len(got)].tolist()
    assert len(got) == len(whole.tokens)


def tokens_of(tokenizer, answer):
  return tuple(tokenizer.encode(answer + "<|im_end|>"))


def test_chat_of_several_turns_needs_a_template_that_only_adds(tokenizer):
  class Rewrites:
    def __getattr__(self, name):
      return getattr(tokenizer, name)

    def chat_prompt(self, *messages):
      return f"{len(messages)}{tokenizer.chat_prompt(*messages)}"

  with pytest.raises(InputError, match="ask for one turn"):
    sample(Rewrites(), "chat", turns=2)


def test_chat_takes_all_questions_alike(tokenizer):
  seen = [
    tuple(sample(tokenizer, "chat", seed=seed).tokens.tolist())
    for seed in range(300)
  ]
  counts = [seen.count(each) for each in sorted(set(seen))]
  # Binomial: 100 each, deviation 8.
  assert len(counts) == 3 and min(counts) > 60


def test_lengths_are_the_longest_that_a_record_can_be(tokenizer):
  got = sequences.lengths(RECORD, tokenizer)
  assert got.keys() == set(sequences.TASKS)
  for task in sequences.TASKS:
    all_ = [len(sample(tokenizer, task, seed=s).tokens) for s in range(40)]
    assert got[task] == max(all_), task


def test_lengths_are_of_the_tasks_that_a_record_can_be(tokenizer):
  lengths = lambda **record: set(sequences.lengths(record, tokenizer))
  assert lengths(text="a") == {"text"}
  assert lengths(codes=CODES) == set()
  assert lengths(codes=CODES, prompt="a") == {"generate", "text_to_image"}
  assert lengths(codes=CODES, qa=[["a", "b"]]) == {"chat"}
  assert lengths(codes=CODES, qa=[]) == set()


@pytest.mark.parametrize(
  ("task", "field"),
  [
    ("text", "text"),
    ("image_to_text", "text"),
    ("image_to_text", "codes"),
    ("generate", "codes"),
    ("chat", "qa"),
  ],
)
def test_missing_fields_are_named(tokenizer, task, field):
  record = {k: v for k, v in RECORD.items() if k != field}
  with pytest.raises(InputError, match=f"no field '{field}', got"):
    sample(tokenizer, task, record)


def test_codes_of_another_codebook_are_refused(tokenizer):
  record = RECORD | {"codes": CODES + 1}
  with pytest.raises(InputError, match="code 64, expected 0 to 63"):
    sample(tokenizer, "generate", record)


def test_image_ids_equal_the_golden_image_string(
  tokenizer, golden, golden_json
):
  codes = golden["tok/wide/indices"]
  record = {"key": "k", "codes": codes, "prompt": ""}
  got = sample(tokenizer, "text_to_image", record)
  string = golden_json["protocol"]["tokenize_image"]["wide"]
  assert got.tokens.tolist() == tokenizer.encode(string + END)
