"""Engines that read text in images: rapidocr, Tesseract, PaddleOCR, GOT.

Each is opened once and then reads lists of items. The packages and weights
that it needs are loaded when it is opened, so that a server has to install
only its own engine's.
"""

import collections
import concurrent.futures
import importlib.metadata
import math
import os
import pathlib
import queue
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from xomni_jax.errors import InputError
from xomni_jax.rewards.wire import Item

GOT_HUB = "stepfun-ai/GOT-OCR-2.0-hf"
# Of those that are not here, a prompt names Tesseract's own code.
_TESSERACT_LANGUAGES = {
  "ar": "ara", "bg": "bul", "cs": "ces", "da": "dan", "de": "deu", "el": "ell",
  "en": "eng", "es": "spa", "fi": "fin", "fr": "fra", "he": "heb", "hi": "hin",
  "hu": "hun", "id": "ind", "it": "ita", "ja": "jpn", "ko": "kor", "nl": "nld",
  "no": "nor", "pl": "pol", "pt": "por", "ro": "ron", "ru": "rus", "sv": "swe",
  "th": "tha", "tr": "tur", "uk": "ukr", "vi": "vie", "zh": "chi_sim",
}  # fmt: skip
_TESSERACT_SECONDS = 30


class Reading(NamedTuple):
  """What an engine saw in one image.

  Attributes:
    text: lines from top to bottom, "\\n" between them; "": nothing.
    confidence: mean over the lines, in [0, 1]; None: the engine has none.
    spans: (top, bottom) of each line, as shares of the image's height; (): the
      engine does not say where lines are.
  """

  text: str
  confidence: float | None = None
  spans: tuple[tuple[float, float], ...] = ()


class Engine(NamedTuple):
  """An open engine.

  Attributes:
    read: items -> one Reading each; raises if it can't read one of them.
    rev: its name, version and settings.
  """

  read: Callable[[Sequence[Item]], list[Reading]]
  rev: str


def open_rapidocr(
  threads: int = 1,
  min_side: int = 192,
  min_line: int = 160,
  detect: bool = True,
) -> Engine:
  """PaddleOCR's models in ONNX on the CPU; weights are in the wheel.

  Args:
    threads: images read at once, each by a reader of one thread, so that a
      reading does not depend on how many there are.
    min_side: images whose short side is smaller, in px, are enlarged by a
      whole number. Signs of 96 px were read best and fastest at 192.
    min_line: lines that are shorter, in px at a height of 48, are padded. At
      the package's 320 signs were read worse, and take 1.4 times as long.
    detect: find lines first; False: each image is one line, cropped.
  Raises:
    InputError: rapidocr is not installed.
  """
  try:
    from rapidocr import RapidOCR
  except ImportError as e:
    raise _not_installed("rapidocr", e, "rapidocr onnxruntime") from None
  onnx = "EngineConfig.onnxruntime"
  params = {
    "Global.log_level": "error",
    "Global.use_det": detect,
    "Global.use_cls": False,  # text upside down is no text
    "Det.limit_side_len": min_side,
    "Det.limit_type": "min",
    "Rec.rec_img_shape": [3, 48, min_line],
    f"{onnx}.intra_op_num_threads": 1,
    f"{onnx}.inter_op_num_threads": 1,
  }
  # A call writes attributes of its reader.
  readers: queue.SimpleQueue = queue.SimpleQueue()
  for _ in range(threads):
    readers.put(RapidOCR(params=params))
  pool = concurrent.futures.ThreadPoolExecutor(threads)

  def read_one(image):
    factor = max(1, math.ceil(min_side / min(image.shape[:2]))) if detect else 1
    reader = readers.get()
    try:
      # A call takes BGR. One image a call: a batch pads its lines to the
      # longest, and a score must not depend on its neighbours.
      image = np.ascontiguousarray(_enlarged(image, factor)[:, :, ::-1])
      found = reader(image)
    finally:
      readers.put(reader)
    if not found.txts:
      return Reading("")
    if not detect:
      return Reading("\n".join(found.txts), _mean(found.scores))
    return lines_reading(found.txts, found.scores, found.boxes, len(image))

  version = importlib.metadata.version("rapidocr")
  settings = f"side={min_side},line={min_line},detect={int(detect)}"
  return Engine(
    lambda items: list(pool.map(read_one, [item.image for item in items])),
    f"rapidocr-{version}({settings})",
  )


def open_tesseract(threads: int = 1, min_side: int = 192) -> Engine:
  """Tesseract, as the program `tesseract`; images as in `open_rapidocr`.

  Raises:
    InputError: there is no such program.
  """
  program = shutil.which("tesseract")
  if not program:
    raise InputError(
      "tesseract is not on the PATH, expected the program of that name; "
      "install it (apt install tesseract-ocr) or choose rapidocr"
    )
  # The program has no option for its threads.
  env = os.environ | {"OMP_THREAD_LIMIT": str(threads)}

  def call(*args, seconds=_TESSERACT_SECONDS):
    done = subprocess.run(
      [program, *args],
      stdin=subprocess.DEVNULL,
      env=env,
      capture_output=True,
      timeout=seconds,
    )
    if done.returncode:
      said = done.stderr.decode(errors="replace").strip()
      raise RuntimeError(f"tesseract left with {done.returncode}: {said}")
    return done.stdout.decode(errors="replace")

  def read_all(images, lang):
    # One call for all: to start takes ten times as long as to read a sign.
    with tempfile.TemporaryDirectory(prefix="xomni-ocr-") as folder:
      paths = [pathlib.Path(folder, f"{i}.png") for i in range(len(images))]
      for path, image in zip(paths, images, strict=True):
        factor = max(1, math.ceil(min_side / min(image.shape[:2])))
        Image.fromarray(_enlarged(image, factor)).save(path)
      names = pathlib.Path(folder, "names.txt")
      names.write_text("".join(f"{path}\n" for path in paths))
      # Mode 11 looks for text anywhere; others take a sign for a page.
      args = "stdout", "-l", lang, "--psm", "11", "tsv"
      table = call(str(names), *args, seconds=_TESSERACT_SECONDS * len(images))
    return [tesseract_reading(t) for t in tesseract_pages(table, len(images))]

  def read(items):
    by_lang = collections.defaultdict(list)
    for i, item in enumerate(items):
      by_lang[_TESSERACT_LANGUAGES.get(item.lang, item.lang)].append(i)
    found = {}
    for lang, indices in by_lang.items():
      readings = read_all([items[i].image for i in indices], lang)
      found |= zip(indices, readings, strict=True)
    return [found[i] for i in range(len(items))]

  version = (call("--version").split() or ["", ""])[1]
  return Engine(read, f"tesseract-{version}(side={min_side},psm=11)")


def tesseract_pages(table: str, count: int) -> list[str]:
  """The table that `tesseract ... tsv` prints of `count` images, one each.

  Raises:
    ValueError: it has other pages than these.
  """
  head, *lines = table.split("\n")
  names = head.split("\t")
  if "page_num" not in names:
    return [table] * count  # no table; `tesseract_reading` says so
  place = names.index("page_num")
  pages = collections.defaultdict(list)
  for line in filter(None, lines):
    pages[int(line.split("\t")[place])].append(line)
  if sorted(pages) != list(range(1, count + 1)):
    raise ValueError(f"tesseract read {len(pages)} of {count} images")
  return ["\n".join([head, *pages[i + 1]]) for i in range(count)]


def tesseract_reading(table: str) -> Reading:
  """The Reading of the table that `tesseract ... tsv` prints.

  Raises:
    ValueError: it is no such table.
  """
  head, *lines = table.split("\n")
  names = head.split("\t")
  rows = [
    dict(zip(names, line.split("\t"), strict=False)) for line in lines if line
  ]
  try:
    heights = [int(r["height"]) for r in rows if r["level"] == "1"]
    words = [r for r in rows if r["level"] == "5" and r["text"].strip()]
    boxes = [
      [int(row[name]) for name in ("left", "top", "width", "height")]
      for row in words
    ]
    confidences = [float(row["conf"]) / 100 for row in words]
  except KeyError as e:
    raise ValueError(f"tesseract's table has no column {e}") from None
  corners = [
    [(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for x, y, w, h in boxes
  ]
  return lines_reading(
    [row["text"] for row in words], confidences, corners, *heights[:1]
  )


def open_paddleocr() -> Engine:
  """PaddleOCR 3.x with its PP-OCRv5 models, Chinese and English.

  Raises:
    InputError: paddleocr is not installed.
  """
  try:
    from paddleocr import PaddleOCR
  except ImportError as e:
    raise _not_installed("paddleocr", e, "paddlepaddle paddleocr") from None
  reader = PaddleOCR(
    ocr_version="PP-OCRv5",  # without it, a newer release picks other models
    lang="ch",
    use_doc_orientation_classify=False,
    use_doc_unwarping=False,
    use_textline_orientation=False,
  )

  def read(items):
    images = [np.ascontiguousarray(i.image[:, :, ::-1]) for i in items]  # BGR
    return [
      paddle_reading(result, len(image))
      for result, image in zip(reader.predict(images), images, strict=True)
    ]

  version = importlib.metadata.version("paddleocr")
  return Engine(read, f"paddleocr-{version}(PP-OCRv5)")


def paddle_reading(result: Mapping, height: int) -> Reading:
  """The Reading of one image's result of PaddleOCR 3.x; height: of it, in px.

  Raises:
    ValueError: it has not the fields of that version.
  """
  result = result.get("res", result)
  try:
    texts, scores = result["rec_texts"], result["rec_scores"]
    boxes = result["rec_polys"]
  except KeyError as e:
    raise ValueError(
      f"result of PaddleOCR lacks {e}, expected rec_texts, rec_scores and "
      "rec_polys, as version 3 gives them"
    ) from None
  return lines_reading(texts, scores, boxes, height)


def open_got(
  model: str = GOT_HUB, device: str = "", revision: str = "main"
) -> Engine:
  """GOT-OCR2.0 by transformers, plain text, greedy.

  Args:
    model: folder or hub id.
    device: of torch; "": the GPU if there is one.
    revision: of the hub.
  Raises:
    InputError: torch or transformers is missing, or the model can't be read.
  """
  try:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor
  except ImportError as e:
    raise _not_installed("got", e, "torch torchvision transformers") from None
  device = device or ("cuda" if torch.cuda.is_available() else "cpu")
  dtype = torch.float32 if device == "cpu" else torch.bfloat16
  try:
    processor = AutoProcessor.from_pretrained(model, revision=revision)
    net = AutoModelForImageTextToText.from_pretrained(
      model, revision=revision, dtype=dtype
    )
  except (OSError, ValueError, ImportError) as e:
    reason = " ".join(str(e).split())[:200]
    raise InputError(
      f"GOT-OCR2.0 in {model!r} can't be opened ({reason}), expected a folder "
      f"or hub id such as {GOT_HUB}"
    ) from None
  net = net.eval().to(device)

  @torch.inference_mode()
  def read(items):
    images = [Image.fromarray(item.image) for item in items]
    inputs = processor(images, return_tensors="pt").to(device)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    # Half as much again as its own target: a loop ends there, whatever the
    # neighbours' targets are.
    limits = [int(1.5 * len(" ".join(item.targets))) + 64 for item in items]
    tokens = net.generate(
      **inputs,
      do_sample=False,
      tokenizer=processor.tokenizer,
      stop_strings="<|im_end|>",
      max_new_tokens=max(limits),
    )[:, inputs["input_ids"].shape[1] :]
    rows = [row[:limit] for row, limit in zip(tokens, limits, strict=True)]
    texts = processor.batch_decode(rows, skip_special_tokens=True)
    return [Reading(text.removesuffix("<|im_end|>").strip()) for text in texts]

  commit = getattr(net.config, "_commit_hash", None) or revision
  return Engine(read, f"got({model}@{commit})")


def lines_reading(texts, confidences, boxes, height: int = 0) -> Reading:
  """A Reading of lines, in reading order.

  Args:
    boxes: [n, 4, 2], corners in px.
    height: of the image, in px; 0: not known.
  """
  boxes = np.asarray(boxes, np.float64).reshape(-1, 4, 2)
  order = reading_order(boxes)
  if not order:
    return Reading("")
  rows = (" ".join(texts[i] for i in row) for row in order)
  y = boxes[:, :, 1]
  spans = tuple(
    (float(y[row].min() / height), float(y[row].max() / height))
    for row in order
    if height
  )
  return Reading("\n".join(rows), _mean(confidences), spans)


def reading_order(boxes: np.ndarray) -> list[list[int]]:
  """Indices of boxes f[n, 4, 2] by row, rows from the top, each from the left.

  A box belongs to a row if its middle is no lower than that of the row's first
  box by more than a quarter of the taller one: engines give lines in no certain
  order, and cut some into parts.
  """
  top, bottom = boxes[:, :, 1].min(1), boxes[:, :, 1].max(1)
  middle, left = (top + bottom) / 2, boxes[:, :, 0].min(1)
  rows: list[list[int]] = []
  for i in np.lexsort((left, middle)).tolist():
    first = rows[-1][0] if rows else None
    if (
      first is not None
      and middle[i] - middle[first]
      <= max(bottom[first] - top[first], bottom[i] - top[i]) / 4
    ):
      rows[-1].append(i)
    else:
      rows.append([i])
  return [sorted(row, key=lambda i: left[i]) for row in rows]


def _mean(values):
  return round(float(np.mean(values)), 6) if len(values) else None


def _enlarged(image, factor):
  if factor == 1:
    return image
  height, width = image.shape[:2]
  size = (width * factor, height * factor)
  return np.asarray(Image.fromarray(image).resize(size, Image.BICUBIC))


def _not_installed(engine, error, packages):
  reason = " ".join(str(error).split())[:200]
  return InputError(
    f"OCR engine {engine} can't be loaded ({reason}); install it: "
    f"pip install {packages}"
  )
