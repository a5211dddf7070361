"""What a reward is asked and what it says, as values and as JSON.

A scorer is a callable `(items: Sequence[Item]) -> list[Score]`: same order,
same length, and it never raises; what went wrong with an item is its Score.
Over HTTP this is `POST /v1/score`. Images travel as PNG at their own size,
because JPEG and resizing ruin small text. A client says in WAITS_HEADER how
many seconds it waits; a server answers before, with the scores that it has.
"""

import base64
import binascii
import hashlib
import io
import json
import numbers
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from xomni_jax.errors import InputError

WAITS_HEADER = "X-Waits-Seconds"
ABSENT = "absent"
FAILURES = (
  "timeout",
  "http",  # no connection, or a status that refuses
  "bad_reply",
  "parse_failed",  # a judge's words
  "bad_image",
  "bad_request",
  "too_large",
  "engine",
  "circuit_open",
  "not_recorded",
  "client",  # a fault on the side that asks
)


class Item(NamedTuple):
  """One image to score.

  Attributes:
    id: unique among the items of a call.
    image: u8[H, W, 3].
    prompt: what the image was made from.
    targets: the texts that it should show, line by line; (): none.
    lang: "en", "zh", ...
  """

  id: str
  image: np.ndarray
  prompt: str
  targets: tuple[str, ...] = ()
  lang: str = "en"


class Score(NamedTuple):
  """What a reward says about one item.

  Attributes:
    id: the item's.
    ok: whether the reward did its work.
    score: in [0, 1] as a rule; None where not ok or absent.
    raw: JSON, what the engine said, such as {"text": "OPEN"}.
    error_kind: None; ABSENT where ok but the reward does not apply (OCR
      without targets); else the failure, one of FAILURES.
    model_rev: which model, and which settings of it.
  """

  id: str
  ok: bool
  score: float | None
  raw: object = None
  error_kind: str | None = None
  model_rev: str = ""


class Limits(NamedTuple):
  """The most that a request may hold.

  Attributes:
    items: images of a request.
    bytes: of its JSON.
    pixels: of one image; checked before it is unpacked.
  """

  items: int = 64
  bytes: int = 64 * 2**20
  pixels: int = 2048 * 2048


LIMITS = Limits()
_LARGEST = float(np.finfo(np.float32).max)


class TooLargeError(InputError):
  """A request above the limits as a whole (HTTP status 413)."""


def secret(name: str) -> str:
  """The token in an environment variable; "": none is set.

  Raises:
    InputError: an HTTP header can't bear it; the message does not show it.
  """
  token = os.environ.get(name, "").strip()
  if not (token.isascii() and token.isprintable()):
    raise InputError(
      f"the token in {name} has characters beyond printable ASCII, expected "
      f"what an HTTP header can bear; set {name} again"
    )
  return token


def failed(id: str, kind: str, message: str, model_rev: str = "") -> Score:
  """The Score of an item that could not be scored; message: one line."""
  raw = {"error": " ".join(message.split())[:300]}
  return Score(id, False, None, raw, kind, model_rev)


def absent(id: str, model_rev: str = "") -> Score:
  """The Score of an item that the reward does not apply to."""
  return Score(id, True, None, None, ABSENT, model_rev)


def image_hash(image: np.ndarray) -> str:
  """32 hex digits that depend on every pixel of u8[H, W, 3] and its shape."""
  digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
  digest.update(np.ascontiguousarray(image).tobytes())
  return digest.hexdigest()


def to_json(items: Sequence[Item], request_id: str = "") -> bytes:
  """The body of a request for these items.

  Raises:
    ValueError: an image is not u8[H, W, 3], or a text not Unicode.
  """
  return request_json([entry_json(item) for item in items], request_id)


def entry_json(item: Item) -> bytes:
  """One item's part of a request; raises as `to_json` does."""
  entry = {
    "id": item.id,
    "image_png_b64": base64.b64encode(_png(item.image)).decode("ascii"),
    "prompt": item.prompt,
    "targets": list(item.targets),
    "lang": item.lang,
  }
  return json.dumps(entry, ensure_ascii=False).encode()


def request_json(entries: Sequence[bytes], request_id: str) -> bytes:
  """The body of a request from the parts of its items."""
  head = b'{"request_id": ' + json.dumps(request_id).encode()
  return head + b', "items": [' + b", ".join(entries) + b"]}"


def items_from_json(
  body: bytes, limits: Limits = LIMITS
) -> tuple[str, list[Item | Score]]:
  """The request's id and its items; a Score where one item can't be read.

  A server answers such a Score as it is and scores the others, so that a
  broken image does not cost its neighbours.

  Raises:
    TooLargeError: more bytes or items than the limits.
    InputError: not a request: broken JSON, wrong types, an id twice.
  """
  if len(body) > limits.bytes:
    raise TooLargeError(
      f"request has {len(body)} bytes, expected at most {limits.bytes}; send "
      "fewer images at once"
    )
  request = _object(_parsed(body, "request"), "request")
  entries = request.get("items")
  request_id = request.get("request_id", "")
  if not isinstance(entries, list) or not isinstance(request_id, str):
    raise InputError(
      'request lacks a list "items" or its "request_id" is no string, '
      'expected {"request_id": "...", "items": [...]}'
    )
  if len(entries) > limits.items:
    raise TooLargeError(
      f"request has {len(entries)} items, expected at most {limits.items}; "
      "send fewer images at once"
    )
  ids = [_object(entry, "an item").get("id") for entry in entries]
  _check_ids(ids)
  return request_id, [
    _item(id, entry, limits) for id, entry in zip(ids, entries, strict=True)
  ]


def checked(score: Score) -> Score:
  """The Score itself, its score a float; "engine" if it is no proper one."""
  if problem := _problem(score._asdict()):
    message = f"engine gave {problem}"
    return failed(score.id, "engine", message, str(score.model_rev))
  if score.score is None:
    return score
  return score._replace(score=float(score.score))


def scores_to_json(scores: Sequence[Score], latency_ms: float) -> bytes:
  """The body of a reply; scores as `checked`."""
  entries = [checked(score)._asdict() for score in scores]
  return json.dumps({"items": entries, "latency_ms": latency_ms}).encode()


def scores_from_json(body: bytes, ids: Sequence[str]) -> list[Score]:
  """One Score for each id of the request, in its order; never raises.

  A reply that is no JSON, or not about exactly these ids, is a failure
  ("bad_reply") of all of them; a bad entry is one of its own item.
  """
  try:
    reply = _object(_parsed(body, "reply"), "reply")
    entries = reply.get("items")
    if not isinstance(entries, list):
      raise InputError('reply lacks a list "items"')
    by_id = {_object(e, "an entry").get("id"): e for e in entries}
    if len(entries) != len(ids) or set(by_id) != set(ids):
      raise InputError(
        f"reply has {len(entries)} items, {len(set(by_id) & set(ids))} of "
        f"them asked for, expected the {len(ids)} of the request"
      )
  except (InputError, TypeError) as e:  # TypeError: an id that can't be a key
    return [failed(id, "bad_reply", str(e)) for id in ids]
  return [_score(id, by_id[id]) for id in ids]


def score_from_dict(entry: dict) -> Score:
  """A Score from its entry of a reply; "bad_reply" if something is wrong."""
  return _score(entry.get("id"), entry)


def _score(id, entry):
  if problem := _problem(entry):
    return failed(id, "bad_reply", f"reply gave {problem}")
  score = entry["score"]
  return Score(
    id,
    entry["ok"],
    None if score is None else float(score),
    entry.get("raw"),
    entry.get("error_kind"),
    entry.get("model_rev", ""),
  )


def _problem(entry):
  """Why a dict is no Score, or "" if it is one."""
  ok, score = entry.get("ok"), entry.get("score")
  kind = entry.get("error_kind")
  if not isinstance(entry.get("model_rev", ""), str):
    return "a model_rev that is no string"
  if not isinstance(ok, bool) or "score" not in entry:
    return "no ok or no score"
  try:
    json.dumps(entry.get("raw"), allow_nan=False)
  except (TypeError, ValueError, RecursionError):
    return "a raw that is no JSON"
  if not ok:
    good = score is None and isinstance(kind, str) and kind not in ("", ABSENT)
    return "" if good else "a failure without error_kind, or with a score"
  if kind == ABSENT:
    return "" if score is None else "a score that is absent"
  if kind is not None:
    return f"ok together with error_kind {str(kind)[:40]!r}"
  if not is_finite_number(score):
    return f"score {str(score)[:40]}, expected a finite number"
  return ""


def is_finite_number(value) -> bool:
  """Whether it is an int or float (no bool) that a float32 can hold.

  Scores become float32 on their way to the devices and between hosts.
  """
  try:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and abs(float(value)) <= _LARGEST
  except OverflowError:
    return False


def _parsed(body, what):
  try:
    return json.loads(body)
  except (ValueError, RecursionError) as e:
    reason = " ".join(str(e).split())[:120]
    raise InputError(f"{what} is no JSON ({reason})") from None


def _object(value, what):
  if not isinstance(value, dict):
    raise InputError(f"{what} is a {type(value).__name__}, expected an object")
  return value


def _check_ids(ids):
  for id in ids:
    if not isinstance(id, str) or not 0 < len(id) <= 200 or not _encodes(id):
      raise InputError(
        f"item id is {str(id)[:40]!r}, expected a string of 1 to 200 characters"
      )
  if len(set(ids)) < len(ids):
    raise InputError("an item id occurs twice, expected each once")


def _item(id, entry, limits):
  prompt, lang = entry.get("prompt", ""), entry.get("lang", "en")
  targets = entry.get("targets", [])
  texts = [prompt, lang, *(targets if isinstance(targets, list) else [None])]
  if not all(isinstance(text, str) and _encodes(text) for text in texts):
    return failed(
      id, "bad_request", "prompt, lang and targets are not all Unicode strings"
    )
  try:
    png = base64.b64decode(entry["image_png_b64"], validate=True)
  except (KeyError, TypeError, ValueError, binascii.Error):
    return failed(id, "bad_request", "image_png_b64 is no base64")
  image = _pixels(id, png, limits)
  if isinstance(image, Score):
    return image
  return Item(id, image, prompt, tuple(targets), lang)


def _pixels(id, png, limits):
  """u8[H, W, 3], or the Score that says why not."""
  try:
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
      if image.width * image.height > limits.pixels:
        return failed(
          id,
          "too_large",
          f"image of {image.width} x {image.height} px, expected at most "
          f"{limits.pixels} px",
        )
      if image.mode != "RGB":
        return failed(
          id, "bad_image", f"PNG of mode {image.mode}, expected RGB"
        )
      return np.array(image)
  # Pillow raises OSError, SyntaxError, zlib.error, struct.error and others.
  except Exception as e:
    return failed(id, "bad_image", f"no PNG ({type(e).__name__}: {e})")


def _png(image):
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
    raise ValueError(
      f"image is {image.dtype}{list(image.shape)}, expected u8[H, W, 3]"
    )
  out = io.BytesIO()
  Image.fromarray(image).save(out, "PNG", compress_level=1)
  return out.getvalue()


def _encodes(text):
  try:
    text.encode()
  except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
    return False
  return True
