"""Preprocessing, text protocol and ids against the golden checkpoint.

Everything is exact: text and ids by nature, pixels since the same 8-bit resize
is followed by the same float32 operations.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from xomni_jax.config import TransformConfig
from xomni_jax.data import encoder_ids, images, protocol
from xomni_jax.errors import InputError

TINY = Path(__file__).parents[1] / "golden" / "tiny-a"
GOLDEN = json.loads((TINY / "golden.json").read_text("utf-8"))
ARRAYS = np.load(TINY / "golden.npz")
PROTOCOL = GOLDEN["protocol"]
TABLES = [k for k in GOLDEN["resize_table"] if k != "comment"]
TRANSFORM = TransformConfig(
  **GOLDEN["resize_table"]["this_checkpoint"]["transform"]
)


@pytest.fixture(scope="module")
def tokenizer():
  return protocol.load_tokenizer(TINY / "xomni", 448, 64)


def codes_of(name):
  return ARRAYS[f"tok/{name}/indices"]


@pytest.mark.parametrize("table", TABLES)
def test_target_size_matches_resize_table(table):
  transform = TransformConfig(**GOLDEN["resize_table"][table]["transform"])
  for size, expected in GOLDEN["resize_table"][table]["cases"]:
    try:
      got = list(images.target_size(*size, transform))
    except InputError:
      got = None
    assert got == expected, size


@pytest.mark.parametrize("name", ["square", "wide"])
def test_preprocess_matches_golden_bit_by_bit(name):
  pixels = images.preprocess(TINY / "images" / f"{name}.png", TRANSFORM)
  expected = ARRAYS[f"tok/{name}/preprocessed"].transpose(1, 2, 0)
  assert pixels.dtype == np.float32
  np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("name", ["square", "wide"])
def test_image_string_matches_golden(name):
  expected = PROTOCOL["tokenize_image"][name]
  assert protocol.image_string(codes_of(name)) == expected


def test_image_prefix_matches_golden():
  gen = GOLDEN["gen"]
  prefix = protocol.image_prefix(gen["token_h"], gen["token_w"])
  assert prefix == gen["image_prefix"]


def test_mmencode_matches_golden(tokenizer):
  case = PROTOCOL["mmencode"]
  document = "".join(
    text + protocol.image_string(codes_of(name))
    for text, name in zip(case["texts"], case["images"], strict=True)
  )
  assert tokenizer.encode(document) == case["ids"]


def test_encode_matches_golden_and_decodes_back(tokenizer):
  for case in PROTOCOL["encode"]:
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["text"]


def test_documents_of_golden_arrays_encode_to_their_ids(tokenizer):
  ids = tokenizer.encode(GOLDEN["ar_mixed_doc"])
  np.testing.assert_array_equal(ids, ARRAYS["ar/mixed/input_ids"])


def test_left_pad_matches_golden_batch(tokenizer):
  tokens, mask = protocol.left_pad(
    [tokenizer.encode(text) for text in GOLDEN["ar_batch_docs"]],
    tokenizer.pad_id,
  )
  np.testing.assert_array_equal(tokens, ARRAYS["ar/batch/input_ids"])
  np.testing.assert_array_equal(mask, ARRAYS["ar/batch/attention_mask"])


def test_chat_prompt_matches_golden(tokenizer):
  for name in ("chat", "chat_square", "chat_wide"):
    (message,) = PROTOCOL[name]["messages"]
    prompt = tokenizer.chat_prompt(message["content"])
    if name == "chat":
      assert prompt == PROTOCOL["chat"]["text"]
    else:
      ids = ARRAYS[name.replace("_", "/") + "/input_ids"][0]
      assert tokenizer.encode(prompt) == ids.tolist()


def test_chat_response_matches_golden(tokenizer):
  for name in ("chat_square", "chat_wide"):
    case = PROTOCOL[name]
    assert tokenizer.decode(case["new_ids"][:-1]) == case["response"]


@pytest.mark.parametrize(
  "name", ["mmdecode_generated", "mmdecode_mixed", "mmdecode_text_only"]
)
def test_parse_matches_golden(tokenizer, name):
  case = PROTOCOL[name]
  texts, spans = tokenizer.parse(case["ids"])
  assert texts == case["texts"]
  # Images are width x height px, of 16 px a code; codes are rows x columns.
  sizes = [[16 * n for n in span.codes.shape[::-1]] for span in spans]
  assert sizes == case["image_sizes"]
  expected = [case["decoder_prompt"]] * case["n_images"]
  assert [span.prompt for span in spans] == expected


def test_parsed_codes_are_the_golden_ones(tokenizer):
  (span,) = tokenizer.parse(PROTOCOL["mmdecode_mixed"]["ids"]).images
  np.testing.assert_array_equal(span.codes, codes_of("square"))
  (span,) = tokenizer.parse(PROTOCOL["mmdecode_generated"]["ids"]).images
  np.testing.assert_array_equal(span.codes, ARRAYS["pipe/generated/tokens"])


def test_special_ids_are_those_of_the_checkpoint(tokenizer):
  special = [tokenizer.som_id, tokenizer.eom_id, tokenizer.image_id]
  assert special == GOLDEN["gen"]["suppress_tokens"]
  assert tokenizer.pad_id == 376


def test_clip_ids_match_golden():
  ids = encoder_ids.load_clip_tokenizer(TINY / "flux1" / "tokenizer")
  got = ids(GOLDEN["flux_prompts"])
  assert got.dtype == np.int32
  np.testing.assert_array_equal(got, ARRAYS["text/clip_ids"])


def test_t5_ids_match_golden():
  ids = encoder_ids.load_t5_tokenizer(TINY / "flux1" / "tokenizer_2")
  got = ids(GOLDEN["flux_prompts"])
  assert got.dtype == np.int32
  np.testing.assert_array_equal(got, ARRAYS["text/t5_ids"])
