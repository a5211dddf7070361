"""Batches of images: two sizes, and some that can't be read."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.property.test_data_pipeline import config, joined, same
from xomni_jax.data import pipeline, records
from xomni_jax.errors import InputError
from xomni_jax.train_config import DataConfig, SourceConfig


def png(n, size):
  stream = io.BytesIO()
  pixels = np.random.default_rng(n).integers(0, 256, (*size, 3), np.uint8)
  Image.fromarray(pixels).save(stream, "PNG")
  return stream.getvalue()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """20 images: 14 of 8x8 px, 6 of 4x6; 3 of the first are damaged."""
  out = tmp_path_factory.mktemp("images")
  for n in range(20):
    data = png(n, (4, 6) if n % 3 == 2 else (8, 8))
    if n in (4, 7):  # the header is read, the rest can't be
      data = data[: len(data) // 2]
    if n == 9:
      data = b"nothing"
    (out / f"{n:02d}.png").write_bytes(data)
  return out


def prepare(record, rng, bucket):
  image = np.asarray(records.image_of(record))
  if bucket is None:
    image = image[:4, :6]
  return {"pixels": image, "draw": np.float32(rng.random())}


def blank(bucket):
  size = (4, 6) if bucket is None else bucket
  return {"pixels": np.zeros((*size, 3), np.uint8), "draw": np.float32(0)}


def bucket_of(width, height):
  return height, width


def images(data, process=(0, 1), **changes):
  settings = {"seed": 3, "global_batch": 4, "prepare": prepare, "blank": blank}
  return pipeline.images(data, process=process, **settings | changes)


def number(rows, b, pictures):
  """Which picture a row shows."""
  pixels = rows.arrays["pixels"][b]
  for n in range(20):
    size = (4, 6) if n % 3 == 2 else (8, 8)
    whole = np.random.default_rng(n).integers(0, 256, (*size, 3), np.uint8)
    if np.array_equal(whole[: len(pixels), : pixels.shape[1]], pixels):
      return n
  return None


def test_image_rows_go_through_an_epoch(pictures):
  batches = images(config(pictures, "image"))
  seen, bad = [], []
  for step in range(5):
    rows = batches[step]
    bad += rows.bad
    for b, real in enumerate(rows.arrays["real"]):
      shown = number(rows, b, pictures)
      assert real == (shown is not None)
      if not real:  # a masked row, but it keeps its place
        assert not rows.arrays["pixels"][b].any()
      seen.append(shown)
    np.testing.assert_array_equal(rows.arrays["id"], step * 4 + np.arange(4))
    assert rows.good == rows.arrays["real"].sum()
  assert sorted(n for n in seen if n is not None) == sorted(
    {*range(20)} - {4, 7, 9}
  )
  assert len(bad) == 3 and all(".png)" in line for line in bad)


def test_image_draws_depend_on_epoch_and_record_only(pictures):
  data = config(pictures, "image", shuffle=False)
  a, b = images(data), images(data, global_batch=5)
  draws = lambda batches, steps: np.concatenate(
    [batches[s].arrays["draw"] for s in steps]
  )
  np.testing.assert_array_equal(draws(a, range(5)), draws(b, range(4)))
  assert (draws(a, range(5)) != draws(a, range(5, 10))).sum() == 17


def test_image_draws_do_not_depend_on_the_order(pictures):
  found = []
  for shuffle in (True, False):
    batches, draws = images(config(pictures, "image", shuffle=shuffle)), {}
    for step in range(5):
      rows = batches[step]
      for b in range(4):
        draws[number(rows, b, pictures)] = float(rows.arrays["draw"][b])
    found.append(draws)
  assert found[0] == found[1] and len(set(found[0].values())) == 18


@pytest.mark.parametrize("bucket", [None, bucket_of])
def test_image_processes_share_the_same_global_batch(pictures, bucket):
  data = config(pictures, "image", window=20)
  whole = images(data, bucket_of=bucket)
  parts = [images(data, (p, 2), bucket_of=bucket) for p in range(2)]
  for step in range(4):
    got, expected = joined([p[step] for p in parts]), whole[step]
    assert sorted(got.bad) == sorted(expected.bad)
    same(got._replace(bad=[]), expected._replace(bad=[]))


def test_buckets_make_whole_batches_of_one_size(pictures):
  data = config(pictures, "image", window=20)
  batches = images(data, bucket_of=bucket_of)
  sizes, seen, bad = [], [], []
  for step in range(4):  # 14 - 1 of 8x8 give 3, 6 of 4x6 give 1
    rows = batches[step]
    sizes.append(rows.arrays["pixels"].shape[1:3])
    bad += rows.bad
    seen += [
      number(rows, b, pictures) for b in range(4) if rows.arrays["real"][b]
    ]
  assert sorted(sizes) == [(4, 6), (8, 8), (8, 8), (8, 8)]
  assert len(set(seen)) == len(seen) >= 13
  assert batches.dropped(3) == 20 - 1 - 16
  assert any("09.png: " in line or "09.png)" in line for line in bad)
  assert {4, 7, 9}.isdisjoint(seen)
  assert len(bad) == 16 - len(seen) + 1
  with pytest.raises(InputError, match=r"raise data\.window"):
    images(data, bucket_of=bucket_of, global_batch=16)[0]


def test_weights_of_a_mixture_are_followed(pictures, tmp_path):
  (tmp_path / "one.png").write_bytes(png(99, (4, 6)))
  sources = (
    SourceConfig(str(pictures), "image", weight=1, first=10),
    SourceConfig(str(tmp_path), "image", weight=3),
  )
  rows = images(DataConfig(sources), global_batch=400)[0]
  shown = [number(rows, b, pictures) for b in range(400)]
  assert shown.count(None) == 300
  assert set(shown) - {None} == set(range(10, 20))


def test_other_tasks_than_images_are_refused(pictures):
  with pytest.raises(InputError, match="has the tasks text, expected image"):
    images(config(pictures, "text"))
