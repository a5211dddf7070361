"""OCR as a reward: real engines where they are installed, recorded results."""

import os
import shutil
import stat
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from tests import sidecar_client
from xomni_jax.data.world import open_world
from xomni_jax.errors import InputError
from xomni_jax.rewards import ocr, ocr_engines
from xomni_jax.rewards.ocr_engines import Engine, Reading
from xomni_jax.rewards.wire import Item

# What PaddleOCR 3 gives for an image of two lines, the second in two parts,
# in the order of its detector.
PADDLE_RESULT = {
  "input_path": None,
  "page_index": None,
  "model_settings": {"use_doc_preprocessor": False},
  "dt_polys": [[[70, 60], [120, 62], [120, 80], [70, 78]]],
  "text_type": "general",
  "text_rec_score_thresh": 0.0,
  "rec_texts": ["LATE", "THE", "OPEN", "DAY"],
  "rec_scores": np.array([0.9, 0.8, 1.0, 0.7]),
  "rec_polys": [
    np.array([[70, 57], [120, 57], [120, 75], [70, 75]], np.int16),
    np.array([[10, 20], [60, 20], [60, 40], [10, 40]], np.int16),
    np.array([[10, 60], [60, 58], [60, 78], [10, 80]], np.int16),
    np.array([[70, 22], [120, 22], [120, 40], [70, 40]], np.int16),
  ],
  "rec_boxes": np.zeros((4, 4), np.int16),
}
TESSERACT_TABLE = (
  "level\tpage_num\tblock_num\tpar_num\tline_num\tword_num\tleft\ttop\t"
  "width\theight\tconf\ttext\n"
  "1\t1\t0\t0\t0\t0\t0\t0\t192\t192\t-1\t\n"
  "5\t1\t2\t1\t1\t1\t6\t128\t52\t30\t50\t71\n"
  "5\t1\t1\t1\t1\t1\t7\t64\t85\t30\t100\tEAR\n"
)


def _sign(i, split="train"):
  world = open_world("signs", split)
  return Item(str(i), np.asarray(world[i]["image"]), "", world.sign(i).words)


def _blank(targets=("OPEN",), id="blank"):
  return Item(id, np.full((96, 96, 3), 230, np.uint8), "", targets)


def _fake(read):
  return Engine(lambda items: [read(item) for item in items], "fake-1")


@pytest.fixture(scope="module")
def rapidocr():
  pytest.importorskip("rapidocr")
  return ocr.open_engine("rapidocr")


def test_rapidocr_reads_the_drawn_worlds_signs(rapidocr):
  items = [_sign(i, s) for s in ("validation", "test") for i in range(20)]
  scores = ocr.make_scorer(rapidocr, spaces=False)(items)
  # 39 of these 40, and 95 % of 300; the rest has 0 for O. Read at 96 px,
  # as they are, it is 36.
  assert np.sum([s.score == 1.0 for s in scores]) >= 38
  assert np.mean([s.score for s in scores]) >= 0.98
  # The same images with each other's words are worth little.
  swapped = [
    a._replace(targets=b.targets)
    for a, b in zip(items, items[1:] + items[:1], strict=True)
  ]
  wrong = ocr.make_scorer(rapidocr, spaces=False)(swapped)
  assert np.mean([s.score for s in wrong]) < 0.45


def test_rapidocr_gives_an_image_the_same_score_alone_and_among_others(
  rapidocr,
):
  scorer = ocr.make_scorer(rapidocr)
  items = [_sign(i) for i in range(4)]
  together = scorer(items)
  alone = [scorer([item])[0] for item in reversed(items)][::-1]
  assert together == alone


def test_rapidocr_reads_several_images_at_once_as_one_by_one(rapidocr):
  items = [_sign(i) for i in range(9)]
  assert ocr.open_engine("rapidocr", 3).read(items) == rapidocr.read(items)


def test_rapidocr_that_fails_on_an_image_reads_the_next():
  """A reader that was lost would be waited for."""
  pytest.importorskip("rapidocr")
  engine = ocr.open_engine("rapidocr", 2)
  no_image = _blank()._replace(image=np.zeros((96, 96), np.uint8))
  for _ in range(3):
    with pytest.raises(IndexError):
      engine.read([no_image])
  assert engine.read([_sign(2)])[0].text


def test_rapidocr_of_a_blank_image_is_a_score_of_0(rapidocr):
  score = ocr.make_scorer(rapidocr)([_blank()])[0]
  assert (score.ok, score.score, score.raw["text"]) == (True, 0.0, "")


def test_rapidocr_reads_a_cropped_line_without_detection():
  pytest.importorskip("rapidocr")
  engine = ocr_engines.open_rapidocr(detect=False)
  item = _sign(2)
  line = item._replace(image=item.image[30:50], targets=item.targets[:1])
  assert ocr.make_scorer(engine)([line])[0].score == 1.0


def test_scorer_leaves_items_without_targets_out():
  seen = []
  engine = _fake(lambda item: seen.append(item.id) or Reading("OPEN"))
  items = [_blank((), "a"), _blank(id="b"), _blank(("?!", " "), "c")]
  a, b, c = ocr.make_scorer(engine)(items)
  assert seen == ["b"]
  assert [s.error_kind for s in (a, b, c)] == ["absent", None, "absent"]
  assert (a.ok, a.score, b.score, c.score) == (True, None, 1.0, None)


def test_scorer_isolates_an_item_that_its_engine_fails_on():
  def read(item):
    if item.id == "1":
      raise RuntimeError("no memory\nfor this")
    return Reading("OPEN")

  scores = ocr.make_scorer(_fake(read))([_blank(id=c) for c in "0123"])
  assert [s.score for s in scores] == [1.0, None, 1.0, 1.0]
  assert (scores[1].ok, scores[1].error_kind) == (False, "engine")
  assert scores[1].raw == {"error": "RuntimeError: no memory for this"}


def test_scorer_refuses_an_engine_that_loses_images():
  engine = Engine(lambda items: [Reading("OPEN")] * (len(items) - 1), "fake")
  scores = ocr.make_scorer(engine)([_blank(id=c) for c in "01"])
  assert [s.error_kind for s in scores] == ["engine", "engine"]


def test_engines_combine_by_mean_or_min_and_tell_how_far_apart():
  good = ocr.make_scorer(_fake(lambda _: Reading("OPEN")))
  half = ocr.make_scorer(_fake(lambda _: Reading("OP")))
  items = [_blank(id="a"), _blank((), "b")]
  for how, expected in (("mean", 0.75), ("min", 0.5)):
    a, b = ocr.combine_engines({"good": good, "half": half}, how)(items)
    assert (a.score, a.raw["apart"]) == (pytest.approx(expected), 0.5)
    assert a.raw["engines"]["half"]["raw"]["text"] == "OP"
    assert b.error_kind == "absent"
  with pytest.raises(InputError, match="'max'"):
    ocr.combine_engines({"good": good}, "max")


def test_engines_combined_are_asked_at_once():
  """Each waits for the other: one after another, neither would answer."""
  both = threading.Barrier(2, timeout=10)

  def read(_):
    both.wait()
    return Reading("OPEN")

  scorers = {name: ocr.make_scorer(_fake(read)) for name in ("one", "other")}
  (found,) = ocr.combine_engines(scorers, "mean")([_blank()])
  assert found.ok and list(found.raw["engines"]) == ["one", "other"]


def test_engines_combined_fail_where_one_fails():
  def broken(item):
    raise OSError("gone")

  scorers = {
    "good": ocr.make_scorer(_fake(lambda _: Reading("OPEN"))),
    "bad": ocr.make_scorer(_fake(broken)),
  }
  score = ocr.combine_engines(scorers, "mean")([_blank()])[0]
  assert (score.ok, score.score, score.error_kind) == (False, None, "engine")
  assert score.raw["engine"] == "bad"


def test_paddle_result_is_read_line_by_line():
  reading = ocr_engines.paddle_reading(PADDLE_RESULT, 200)
  assert reading[:2] == ("THE DAY\nOPEN LATE", pytest.approx(0.85))
  assert reading.spans == ((0.1, 0.2), (pytest.approx(0.285), 0.4))
  assert ocr_engines.paddle_reading({"res": PADDLE_RESULT}, 200) == reading
  empty = {"rec_texts": [], "rec_scores": [], "rec_polys": []}
  assert ocr_engines.paddle_reading(empty, 200) == Reading("")
  with pytest.raises(ValueError, match="rec_polys"):
    ocr_engines.paddle_reading({"rec_texts": ["a"], "rec_scores": [1.0]}, 200)


def test_tesseract_table_is_read_line_by_line():
  reading = ocr_engines.tesseract_reading(TESSERACT_TABLE)
  spans = ((64 / 192, 94 / 192), (128 / 192, 158 / 192))
  assert reading == Reading("EAR\n71", 0.75, spans)
  with pytest.raises(ValueError, match="level"):
    ocr_engines.tesseract_reading("oops\n1\n")


def test_tesseract_is_called_with_the_items_language(tmp_path, monkeypatch):
  """The program is a script that writes down its arguments."""
  script = tmp_path / "tesseract"
  (tmp_path / "table").write_text(TESSERACT_TABLE)
  script.write_text(
    "#!/bin/sh\n"
    'if [ "$1" = --version ]; then echo tesseract 9.9; exit; fi\n'
    f'echo "$@" >> {tmp_path}/calls; cat > /dev/null\n'
    'if [ "$4" = xx ]; then echo no such language >&2; exit 1; fi\n'
    f"cat {tmp_path}/table\n"
  )
  script.chmod(script.stat().st_mode | stat.S_IEXEC)
  monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
  engine = ocr.open_engine("tesseract")
  items = [
    _blank(("EAR", "71"), "a"),
    _blank(("EAR", "71"), "b")._replace(lang="xx"),
    _blank(("EAR71",), "c")._replace(lang="zh"),
    _blank(("EAR", "71"), "d")._replace(lang="de"),
  ]
  a, b, c, d = ocr.make_scorer(engine)(items)
  assert (a.score, c.score, d.score) == (1.0, 1.0, 1.0)
  assert "no such language" in b.raw["error"]
  assert "tesseract-9.9" in a.model_rev
  calls = (tmp_path / "calls").read_text()
  assert {"-l eng", "-l xx", "-l chi_sim", "-l deu"} <= {
    " ".join(line.split()[2:4]) for line in calls.splitlines()
  }


def test_tesseract_pages_are_told_apart():
  head, first, *words = TESSERACT_TABLE.strip().split("\n")
  second = [line.replace("\t1", "\t2", 1) for line in (first, *words)]
  both = "\n".join([head, first, *second, ""])
  pages = ocr_engines.tesseract_pages(both, 2)
  found = [ocr_engines.tesseract_reading(page) for page in pages]
  assert [reading.text for reading in found] == ["", "EAR\n71"]
  with pytest.raises(ValueError, match="2 of 3"):
    ocr_engines.tesseract_pages(both, 3)


@pytest.mark.skipif(not shutil.which("tesseract"), reason="no tesseract")
def test_tesseract_reads_an_image_alone_as_among_others():
  engine = ocr.open_engine("tesseract")
  items = [_sign(i)._replace(image=_noisy(i)) for i in range(6)]
  together = engine.read(items)
  alone = [engine.read([item])[0] for item in items]
  assert together == alone
  assert sum(reading.text != "" for reading in together) >= 3


def _noisy(i):
  noise = np.random.default_rng(i).normal(0, 20, (96, 96, 3))
  return np.clip(_sign(i).image + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
  ("name", "says"),
  [("tesseract", "PATH"), ("paddleocr", "pip install"), ("abbyy", "rapidocr")],
)
def test_engine_that_is_missing_is_one_line(name, says, monkeypatch):
  monkeypatch.setenv("PATH", "/nowhere")
  monkeypatch.setitem(sys.modules, "paddleocr", None)
  with pytest.raises(InputError, match=says) as error:
    ocr.open_engine(name)
  assert "\n" not in str(error.value)


def test_got_that_is_no_model_is_one_line(tmp_path):
  pytest.importorskip("torch")
  with pytest.raises(InputError, match="GOT-OCR2") as error:
    ocr.open_engine("got", model=str(tmp_path))
  assert "\n" not in str(error.value)


def test_got_reads_as_its_model_generates(tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  _tiny_got(torch, transformers, tmp_path)
  engine = ocr.open_engine("got", model=str(tmp_path))
  items = [_sign(0)._replace(targets=()), _sign(1)._replace(targets=("",))]
  readings = engine.read(items)
  processor = transformers.AutoProcessor.from_pretrained(tmp_path)
  model = transformers.GotOcr2ForConditionalGeneration.from_pretrained(
    tmp_path
  ).eval()
  inputs = processor(Image.fromarray(items[1].image), return_tensors="pt")
  ids = inputs["input_ids"]
  with torch.no_grad():
    features = model.model.get_image_features(inputs["pixel_values"])
    features = getattr(features, "pooler_output", features)
    vectors = model.get_input_embeddings()(ids)
    vectors[ids == processor.image_token_id] = features.reshape(
      -1, vectors.shape[-1]
    )
    wanted = []
    for _ in range(12):  # greedy, without cache
      logits = model(inputs_embeds=vectors).logits[:, -1]
      wanted.append(int(logits.argmax()))
      new = model.get_input_embeddings()(logits.argmax(-1, keepdim=True))
      vectors = torch.cat([vectors, new], 1)
  text = processor.tokenizer.decode(wanted, skip_special_tokens=True).strip()
  assert len(set(text)) > 3
  assert readings[1].text.startswith(text)
  assert readings[0] != readings[1]


def test_got_reads_an_image_alone_as_beside_one_with_a_longer_target(tmp_path):
  torch = pytest.importorskip("torch")
  _tiny_got(torch, pytest.importorskip("transformers"), tmp_path)
  engine = ocr.open_engine("got", model=str(tmp_path))
  # The random model ends nowhere: its text is as long as it may be.
  short, long = (_sign(0)._replace(targets=(t,)) for t in ("", "x" * 60))
  together = engine.read([short, long])
  assert engine.read([short]) == together[:1]
  assert together[1].text.startswith(together[0].text)
  assert together[1].text != together[0].text


@pytest.mark.slow
def test_got_behind_a_sidecar_scores_as_in_this_process(tmp_path):
  pytest.importorskip("fastapi")
  pytest.importorskip("uvicorn")
  torch = pytest.importorskip("torch")
  _tiny_got(torch, pytest.importorskip("transformers"), tmp_path)
  items = [_sign(i) for i in range(3)]
  engine = ocr.open_engine("got", model=str(tmp_path))
  ours = ocr.make_scorer(engine)(items)
  command = ["xomni_jax.sidecar", "--config", "configs/sidecar.py:tiny"]
  more = ["--app", "got", "--no-ray", "--set", "port=0"]
  more += ["--set", f"settings.model={tmp_path}"]
  with sidecar_client.served([*command, *more], seconds=240) as url:
    theirs = sidecar_client.scores(url, items)
  assert all(s.ok and s.raw["text"] for s in ours)
  assert theirs == ours


def _tiny_got(torch, transformers, folder):
  """A random GOT-OCR2.0 of 100 kB, with a tokenizer of single bytes."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers
  from transformers.models.got_ocr2 import image_processing_pil_got_ocr2

  special = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"]
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {c: i for i, c in enumerate(alphabet)}
  rules = Tokenizer(models.BPE(vocab, []))
  rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  rules.decoder = decoders.ByteLevel()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=rules,
    eos_token="<|endoftext|>",
    pad_token="<|endoftext|>",
    additional_special_tokens=special,
  )
  images = image_processing_pil_got_ocr2.GotOcr2ImageProcessorPil(
    size={"height": 1024, "width": 1024}
  )
  transformers.GotOcr2Processor(images, tokenizer).save_pretrained(folder)
  config = transformers.GotOcr2Config(
    vision_config={
      "hidden_size": 16,
      "output_channels": 16,
      "num_hidden_layers": 1,
      "num_attention_heads": 2,
      "mlp_dim": 32,
      "global_attn_indexes": [],
    },
    text_config={
      "model_type": "qwen2",
      "vocab_size": len(tokenizer),
      "hidden_size": 32,
      "intermediate_size": 32,
      "num_hidden_layers": 1,
      "num_attention_heads": 2,
      "num_key_value_heads": 2,
      "tie_word_embeddings": False,
    },
    # A random model with tied embeddings repeats its last token for ever.
    tie_word_embeddings=False,
    image_token_index=tokenizer.convert_tokens_to_ids("<imgpad>"),
  )
  torch.manual_seed(0)
  model = transformers.GotOcr2ForConditionalGeneration(config)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "norm" not in name:
        parameter.normal_(0, 0.5)
  model.save_pretrained(folder)
