"""Images in text, the checkpoint's tokenizer, and padding."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xomni_jax.data import protocol
from xomni_jax.errors import InputError

TINY = Path(__file__).parents[1] / "golden" / "tiny-a"
PROTOCOL = json.loads((TINY / "golden.json").read_text("utf-8"))["protocol"]
LEGACY = ["vocab.json", "merges.txt", "added_tokens.json"]


def shipped(folder, *names):
  """A folder with these tokenizer files only."""
  folder.mkdir(exist_ok=True)
  for name in names:
    shutil.copyfile(TINY / "xomni" / name, folder / name)
  return folder


def edit(path, change):
  content = json.loads(path.read_text("utf-8"))
  change(content)
  path.write_text(json.dumps(content), "utf-8")


def refused(match, function, *args):
  """Asserts a one-line InputError with these words."""
  with pytest.raises(InputError, match=match) as error:
    function(*args)
  assert "\n" not in str(error.value)


def parse(text):
  return protocol.parse_document(text, "<pad>", 64)


def mm(*codes):
  return "".join(f"<MM-Token-{code}>" for code in codes)


def test_parse_document_undoes_image_string():
  rng = np.random.default_rng(0)
  for h, w in [(1, 1), (2, 5), (7, 3)]:
    codes = rng.integers(0, 64, (h, w), np.int32)
    texts, images = parse("a" + protocol.image_string(codes) + "b")
    assert texts == ["a", "b"]
    assert images[0].codes.dtype == np.int32 and images[0].prompt == "a"
    np.testing.assert_array_equal(images[0].codes, codes)


def test_parse_document_drops_padding_and_separators():
  image = f"<SOM>1 2<IMAGE>{mm(7, 8)}<EOM>"
  document = parse(f"<pad><pad>one<SEP>{image} two<pad>{image}")
  assert document.texts == ["one", " two", ""]
  assert [image.prompt for image in document.images] == ["one", " two"]


def test_parse_document_ignores_codes_past_the_last_and_a_missing_end():
  (image,) = parse(f"x<SOM>1 2<IMAGE>{mm(7, 8, 9)}").images
  np.testing.assert_array_equal(image.codes, [[7, 8]])


@pytest.mark.parametrize(
  "text, match",
  [
    (f"<SOM>2 2<IMAGE>{mm(1, 2, 3)}<EOM>", "3 codes, expected 2x2 = 4"),
    (f"<SOM>2 x<IMAGE>{mm(1, 2)}<EOM>", "expected '<SOM>height width<IMAGE>'"),
    (f"<SOM>2.0 1<IMAGE>{mm(1, 2)}<EOM>", "begins '<SOM>2.0 1"),
    (f"<SOM>-1 -2<IMAGE>{mm(1, 2)}<EOM>", "begins"),
    (f"<SOM>2\n1<IMAGE>{mm(1, 2)}<EOM>", "begins"),
    (f"<SOM>0 2<IMAGE>{mm(1, 2)}<EOM>", "begins"),
    (f"<SOM>2<IMAGE>{mm(1, 2)}<EOM>", "begins"),
    (f"<SOM>1 {'9' * 5000}<IMAGE>{mm(1)}<EOM>", "begins"),
    ("<SOM>999999999 999999999<IMAGE><EOM>", "0 codes"),
    ("<SOM>1 2<EOM>", "begins '<SOM>1 2'"),
    (f"<SOM>1 1<IMAGE><IMAGE>{mm(1)}<EOM>", "begins"),
    (f"<SOM><SOM>1 1<IMAGE>{mm(1)}<EOM>", "begins"),
    (f"<SOM>1 1<IMAGE>{mm(1)}<EOM><SOM>1<EOM>", "image string 1 begins"),
    (f"<SOM>1 2<IMAGE>{mm(63, 64)}<EOM>", "code 64, expected 0 to 63"),
    (f"<SOM>1 1<IMAGE>{mm(999_999_999)}<EOM>", "code 999999999"),
  ],
)
def test_parse_document_refuses_malformed_images(text, match):
  refused(match, parse, text)


@pytest.mark.parametrize("codes", [[[-1]], [[0.0]], [1, 2], [[]]])
def test_image_string_refuses_what_is_no_grid(codes):
  refused("expected", protocol.image_string, codes)


@pytest.mark.parametrize(
  "names",
  [
    ["tokenizer.json", "tokenizer_config.json"],
    ["tokenizer.json"],
    [*LEGACY, "tokenizer_config.json"],
    [*LEGACY, "tokenizer_config.json", "special_tokens_map.json"],
    [*LEGACY, "special_tokens_map.json"],
    LEGACY,
  ],
)
def test_load_tokenizer_gives_the_same_ids_from_every_form(tmp_path, names):
  tokenizer = protocol.load_tokenizer(shipped(tmp_path, *names), 448, 64)
  for case in PROTOCOL["encode"]:
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["text"]
  if "tokenizer_config.json" in names:
    assert tokenizer.chat_prompt("Hello") == PROTOCOL["chat"]["text"]
  else:
    refused("no chat template", tokenizer.chat_prompt, "Hello")


def test_load_tokenizer_reads_added_tokens_of_an_older_config(tmp_path):
  names = [*LEGACY, "tokenizer_config.json", "special_tokens_map.json"]
  folder = shipped(tmp_path, *names)

  def older(config):
    del config["added_tokens_decoder"], config["additional_special_tokens"]

  edit(folder / "tokenizer_config.json", older)
  tokenizer = protocol.load_tokenizer(folder, 448, 64)
  for case in PROTOCOL["encode"]:
    assert tokenizer.encode(case["text"]) == case["ids"]


def test_load_tokenizer_runs_quietly_without_torch_or_remote_code(tmp_path):
  folder = shipped(
    tmp_path / "model", "tokenizer.json", "tokenizer_config.json", "config.json"
  )
  (folder / "evil.py").write_text("raise SystemExit('remote code ran')")
  remote = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
  for name in ("config.json", "tokenizer_config.json"):
    edit(folder / name, lambda config: config.update(remote))
  program = f"""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda n, *a: None if n == "torch" else find(n, *a)
sys.modules["torch"] = None  # importing it is an ImportError
from xomni_jax.data import encoder_ids, images, protocol
loaded = {{"jax", "transformers", "tokenizers", "tensorflow"}} & {{*sys.modules}}
assert not loaded, loaded
tokenizer = protocol.load_tokenizer({str(folder)!r}, 448, 64)
encoder_ids.load_clip_tokenizer({str(TINY / "flux1/tokenizer")!r})(["a"])
encoder_ids.load_t5_tokenizer({str(TINY / "flux1/tokenizer_2")!r})(["a"])
tokenizer.decode(tokenizer.encode(tokenizer.chat_prompt("a")))
assert not {{"jax", "tensorflow"}} & {{*sys.modules}}
"""
  result = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True
  )
  assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_load_tokenizer_refuses_folder_without_one(tmp_path):
  for names in ([], ["tokenizer_config.json"], ["vocab.json"]):
    folder = shipped(tmp_path, *names)
    refused("has no tokenizer", protocol.load_tokenizer, folder, 448, 64)
  missing = tmp_path / "missing"
  refused("has no tokenizer", protocol.load_tokenizer, missing, 448, 64)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_load_tokenizer_refuses_truncated_file(tmp_path, name):
  folder = shipped(tmp_path, "tokenizer.json", "tokenizer_config.json")
  (folder / name).write_bytes((folder / name).read_bytes()[:1000])
  refused("can't be read", protocol.load_tokenizer, folder, 448, 64)


def test_load_tokenizer_lists_all_misplaced_tokens(tmp_path):
  folder = shipped(tmp_path, *LEGACY)
  swap = {"<MM-Token-0>": 511, "<MM-Token-63>": 448}
  edit(folder / "added_tokens.json", lambda added: added.update(swap))
  refused(
    "<MM-Token-0> has id 511, expected 448; <MM-Token-63> has id 448, "
    "expected 511$",
    protocol.load_tokenizer,
    folder,
    448,
    64,
  )
  refused(
    "endoftext\\|> has id 376, expected below 376; <SOM> has id 512, expected "
    "at least 576; <EOM> .*576; <IMAGE> .*576; <MM-Token-0> has id 511, "
    "expected 376; <MM-Token-199> has id None, expected 575; and 198 image",
    protocol.load_tokenizer,
    folder,
    376,
    200,
  )


def test_load_tokenizer_lists_all_missing_tokens(tmp_path):
  folder = shipped(tmp_path, *LEGACY)

  def remove(added):
    for token in ("<EOM>", "<IMAGE>", "<MM-Token-7>"):
      del added[token]
    added["<SOM>"] = 600

  edit(folder / "added_tokens.json", remove)
  refused(
    "<EOM> is missing; <IMAGE> is missing; .*<MM-Token-7> has id None",
    protocol.load_tokenizer,
    folder,
    448,
    64,
  )


def test_encode_refuses_text_that_is_not_unicode(tmp_path):
  folder = shipped(tmp_path, "tokenizer.json")
  tokenizer = protocol.load_tokenizer(folder, 448, 64)
  refused(r"'\\udcff' at character 1", tokenizer.encode, "a\udcff")


def test_left_pad_aligns_ends_and_rounds_up():
  tokens, mask = protocol.left_pad([[1, 2, 3], [4]], 9, multiple_of=4)
  np.testing.assert_array_equal(tokens, [[9, 1, 2, 3], [9, 9, 9, 4]])
  np.testing.assert_array_equal(mask, [[0, 1, 1, 1], [0, 0, 0, 1]])
  assert tokens.dtype == np.int32 and mask.dtype == bool
  assert protocol.left_pad([[1, 2]], 9)[0].shape == (1, 2)
  assert protocol.left_pad([[1] * 8], 9, multiple_of=8)[0].shape == (1, 8)


def test_left_pad_refuses_nothing_to_pad():
  refused("no ids", protocol.left_pad, [], 0)
  refused("sequence 1 is empty", protocol.left_pad, [[1], []], 0)
