"""What rewards are asked and answer, as JSON on the wire."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.reward_items import items as _items
from xomni_jax.errors import InputError
from xomni_jax.rewards import wire
from xomni_jax.rewards.wire import Item, Score


def test_wire_carries_items_unchanged():
  items = _items(3)
  items[1] = items[1]._replace(prompt='"\n\u2028𝄞', targets=(), lang="zh")
  name, back = wire.items_from_json(wire.to_json(items, "request 7"))
  assert name == "request 7"
  for ours, theirs in zip(items, back, strict=True):
    assert np.array_equal(ours.image, theirs.image)
    assert ours._replace(image=None) == theirs._replace(image=None)


def _png(mode="RGB", size=(4, 4), format="PNG"):
  out = io.BytesIO()
  Image.new(mode, size).save(out, format)
  return base64.b64encode(out.getvalue()).decode()


@pytest.mark.parametrize(
  ("change", "kind"),
  [
    ({"image_png_b64": "%%%"}, "bad_request"),
    ({"image_png_b64": 3}, "bad_request"),
    ({"image_png_b64": ""}, "bad_image"),
    ({"image_png_b64": _png()[:-40]}, "bad_image"),
    ({"image_png_b64": _png(format="JPEG")}, "bad_image"),
    ({"image_png_b64": _png("RGBA")}, "bad_image"),
    ({"image_png_b64": _png(size=(400, 400))}, "too_large"),
    ({"prompt": None}, "bad_request"),
    ({"prompt": "\ud800"}, "bad_request"),
    ({"targets": "OPEN"}, "bad_request"),
    ({"targets": ["OPEN", 3]}, "bad_request"),
  ],
)
def test_wire_isolates_a_bad_item(change, kind):
  body = json.loads(wire.to_json(_items(3)))
  body["items"][1] |= change
  limits = wire.Limits(pixels=10000)
  _, items = wire.items_from_json(json.dumps(body).encode(), limits)
  assert [isinstance(i, Item) for i in items] == [True, False, True]
  assert (items[1].id, items[1].error_kind) == ("i1", kind)


@pytest.mark.parametrize(
  "body",
  [
    b"",
    b"[]",
    b"{}",
    b'{"items": {}}',
    b'{"items": [3]}',
    b'{"items": [{"id": ""}]}',
    b'{"items": [{"id": 3}]}',
    b'{"items": [{"id": "a"}, {"id": "a"}]}',
    b'{"items": [], "request_id": 3}',
    b"[" * 100000,
    b"\xff\xfe",
  ],
)
def test_wire_refuses_what_is_no_request(body):
  with pytest.raises(InputError) as error:
    wire.items_from_json(body)
  assert "\n" not in str(error.value)
  assert not isinstance(error.value, wire.TooLargeError)


def test_wire_refuses_too_much():
  body = wire.to_json(_items(3))
  for limits in (wire.Limits(items=2), wire.Limits(bytes=len(body) - 1)):
    with pytest.raises(wire.TooLargeError):
      wire.items_from_json(body, limits)


def test_wire_makes_a_failure_of_a_score_that_is_none():
  bad = [
    Score("a", True, float("nan")),
    Score("b", True, 0.5, {"x": float("inf")}),
    Score("c", False, 0.5, None, "engine"),
    Score("d", True, 1e39),  # none of float32, which rewards are gathered as
    Score("e", True, 10**400),
    Score("f", True, "0.5"),
    Score("g", True, np.float32(0.5)),
  ]
  back = wire.scores_from_json(wire.scores_to_json(bad, 1.0), list("abcdefg"))
  assert [s.error_kind for s in back] == ["engine"] * 6 + [None]
  assert back[6].score == 0.5


def test_image_hash_sees_every_pixel_and_the_shape():
  image = _items(1)[0].image
  other = image.copy()
  other[-1, -1, -1] ^= 1
  hashes = {
    wire.image_hash(i)
    for i in (
      image,
      other,
      image.transpose(1, 0, 2).copy().reshape(6, 5, 3),
      image.reshape(5, 6, 3),
    )
  }
  assert len(hashes) == 4
  assert wire.image_hash(image[:, ::-1]) == wire.image_hash(
    image[:, ::-1].copy()
  )
