"""Images: what is read, what is refused, and with which words."""

import io
import struct
import zlib
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from xomni_jax.config import TransformConfig
from xomni_jax.data import images
from xomni_jax.errors import InputError


def transform(**changes):
  released = {
    "short_size": 384,
    "long_size": 1152,
    "patch_size": 16,
    "min_short_size": 128,
    "max_aspect_ratio": 3.0,
    "filtering": True,
  }
  return TransformConfig(**{**released, **changes})


def noise(height, width, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def png_header(width, height):
  """A PNG that says it is this large and holds almost nothing."""

  def chunk(kind, data):
    crc = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))
  return b"\x89PNG\r\n\x1a\n" + data + chunk(b"IEND", b"")


def refused(match, function, *args):
  """Asserts a one-line InputError with these words."""
  with pytest.raises(InputError, match=match) as error:
    function(*args)
  assert "\n" not in str(error.value)


def test_open_image_gives_same_pixels_from_all_sources(tmp_path):
  array = noise(5, 7)
  picture = Image.fromarray(array)
  picture.save(tmp_path / "a.png")
  sources = [array, picture, tmp_path / "a.png", str(tmp_path / "a.png")]
  for source in sources:
    image = images.open_image(source)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), array)


@pytest.mark.parametrize(
  "mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"]
)
def test_open_image_converts_as_the_reference(mode, recwarn):
  image = Image.fromarray(noise(4, 6)).convert("L" if mode in "I;16F" else mode)
  image = image.convert(mode) if image.mode != mode else image
  if mode == "P":
    image.info["transparency"] = bytes(range(256))  # Pillow would warn of it
  got = images.open_image(image)
  assert got.mode == "RGB" and not recwarn.list
  np.testing.assert_array_equal(
    np.asarray(got), np.asarray(image.convert("RGB"))
  )


def test_open_image_ignores_alpha_and_exif_rotation(tmp_path):
  array = noise(4, 6)
  image = Image.fromarray(np.dstack([array, np.zeros((4, 6), np.uint8)]))
  exif = Image.Exif()
  exif[0x0112] = 6  # rotated by 90 degrees
  image.save(tmp_path / "a.png", exif=exif)
  got = images.open_image(tmp_path / "a.png")
  np.testing.assert_array_equal(np.asarray(got), array)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_open_image_refuses_truncated_file(tmp_path, kind, share, recwarn):
  buffer = io.BytesIO()
  Image.fromarray(noise(64, 64)).save(buffer, kind)
  data = buffer.getvalue()
  path = tmp_path / f"cut.{kind.lower()}"
  path.write_bytes(data[: int(share * len(data))])
  refused("cut.*can't be read .*expected a complete", images.open_image, path)
  assert not recwarn.list


def test_open_image_puts_a_long_reason_on_one_line(tmp_path, monkeypatch):
  def fail(path):
    raise SyntaxError("first\nsecond " * 99)

  monkeypatch.setattr(Image, "open", fail)
  refused("SyntaxError: first second", images.open_image, tmp_path / "a.png")


@pytest.mark.parametrize("data", [b"", b"not an image\n" * 20])
def test_open_image_refuses_other_files(tmp_path, data):
  (tmp_path / "note.png").write_bytes(data)
  refused("note.png can't be read", images.open_image, tmp_path / "note.png")


def test_open_image_refuses_missing_file_and_folder(tmp_path):
  refused("no.png does not exist", images.open_image, tmp_path / "no.png")
  refused("can't be read .*irector", images.open_image, tmp_path)


@pytest.mark.parametrize("side", [10_000, 20_000, 60_000])
def test_open_image_refuses_huge_file_before_decoding(
  tmp_path, side, recwarn, monkeypatch
):
  def decode(self):
    raise AssertionError("decoded")

  monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
  (tmp_path / "bomb.png").write_bytes(png_header(side, side))
  refused(
    f"bomb.png has .*expected at most {images.MAX_PIXELS} pixels",
    images.open_image,
    tmp_path / "bomb.png",
  )
  assert not recwarn.list


def test_open_image_refuses_huge_picture_and_array(monkeypatch):
  monkeypatch.setattr(images, "MAX_PIXELS", 34)
  refused("5x7.*at most 34", images.open_image, Image.new("RGB", (5, 7)))
  refused("5x7.*at most 34", images.open_image, noise(7, 5))
  assert images.open_image(noise(2, 17)).size == (17, 2)


@pytest.mark.parametrize(
  "array",
  [
    np.zeros((4, 4, 3), np.float32),
    np.zeros((4, 4), np.uint8),
    np.zeros((4, 4, 4), np.uint8),
    None,
    7,
  ],
)
def test_open_image_refuses_other_arrays(array):
  refused("expected a path, a PIL", images.open_image, array)


def test_open_image_refuses_empty_images():
  refused("0x4 px", images.open_image, np.zeros((4, 0, 3), np.uint8))
  refused("0x4 px", images.open_image, Image.new("RGB", (0, 4)))


def test_target_size_states_the_limit_it_applied():
  refused("127x300 .*128", images.target_size, 127, 300, transform())
  refused("3001x1000 .*3.0", images.target_size, 3001, 1000, transform())
  free = transform(filtering=False)
  assert images.target_size(127, 300, free) == (384, 912)


def test_target_size_rounds_ties_to_even_patches():
  # 24.5 and 25.5 patches of 16.
  assert images.target_size(392, 408, transform()) == (384, 416)


def test_target_size_refuses_what_becomes_less_than_a_patch():
  free = transform(filtering=False)
  refused("4x1000 .*would become 0x1152", images.target_size, 4, 1000, free)


def test_target_size_rounds_only_once():
  # Exact fractions as the witness; ties are another test's.
  rng = np.random.default_rng(0)
  for size in rng.integers(300, 1500, (3000, 2)).tolist():
    free = transform(filtering=False, short_size=700)
    exact = [Fraction(side) for side in size]
    exact = [side * max(1, 700 / min(exact)) for side in exact]
    exact = [side * min(1, 1152 / max(exact)) / 16 for side in exact]
    expected = tuple(round(side) * 16 for side in exact)
    if all(expected) and all(side % 1 != Fraction(1, 2) for side in exact):
      assert images.target_size(*size, free) == expected


def test_target_size_stays_within_limits():
  rng = np.random.default_rng(0)
  for width, height in rng.integers(128, 4000, (500, 2)).tolist():
    if max(width, height) > 3 * min(width, height):
      continue
    w, h = images.target_size(width, height, transform())
    assert w % 16 == 0 and h % 16 == 0
    assert min(w, h) >= 384 and max(w, h) <= 1152
    assert abs(w / h * height / width - 1) < 0.05


def test_preprocess_maps_8_bit_ends_to_unit_range():
  for value, expected in [(0, -1.0), (255, 1.0)]:
    pixels = images.preprocess(
      np.full((384, 400, 3), value, np.uint8), transform()
    )
    assert pixels.shape == (384, 400, 3) and pixels.dtype == np.float32
    assert (pixels == expected).all()


def test_preprocess_keeps_fitting_image_bit_by_bit():
  array = noise(400, 384)
  pixels = images.preprocess(array, transform())
  np.testing.assert_array_equal(np.round((pixels + 1) * 127.5), array)


def test_codes_picture_shows_equal_codes_alike():
  codes = np.array([[3, 5, 3], [16383, 0, 5]])
  picture = images.codes_picture(codes, 16384, 4)
  assert picture.size == (12, 8) and picture.mode == "RGB"
  cells = np.asarray(picture).reshape(2, 4, 3, 4, 3)
  assert (cells == cells[:, :1, :, :1]).all()
  colours = cells[:, 0, :, 0].reshape(-1, 3)
  same = (colours[:, None] == colours).all(-1)
  np.testing.assert_array_equal(same, codes.ravel()[:, None] == codes.ravel())
  other = images.codes_picture(np.array([[3]]), 64, 1)
  assert (np.asarray(other)[0, 0] == colours[0]).all()


def test_codes_picture_keeps_the_first_codes_well_apart():
  picture = images.codes_picture(np.arange(64).reshape(8, 8), 64, 1)
  colours = np.asarray(picture, int).reshape(-1, 3)
  apart = np.abs(colours[:, None] - colours).sum(-1)
  assert apart[~np.eye(64, dtype=bool)].min() >= 20  # of 765


@pytest.mark.parametrize(
  "codes, match",
  [
    ([[0, 64]], r"0\.\.64, expected 0\.\.63"),
    ([[-1, 2]], r"lie in -1\.\."),
    ([1, 2], r"expected i32\[h, w\]"),
    ([[0.5]], r"expected i32\[h, w\]"),
    (np.zeros((0, 3), int), r"expected i32\[h, w\]"),
  ],
)
def test_codes_picture_refuses_what_is_no_grid_of_codes(codes, match):
  refused(match, images.codes_picture, codes, 64)


def test_levels_are_the_preprocessed_pixels_bit_by_bit():
  levels = np.arange(256, dtype=np.uint8)
  array = np.broadcast_to(levels.reshape(16, 16, 1), (16, 16, 3)).copy()
  small = transform(short_size=16, min_short_size=1)
  got = images.preprocess(array, small)
  np.testing.assert_array_equal(got, images.LEVELS[array])
  # The reference's order of operations, in float32.
  exact = np.float32(levels) / np.float32(255)
  exact = (exact - np.float32(0.5)) / np.float32(0.5)
  assert images.LEVELS.dtype == np.float32
  np.testing.assert_array_equal(images.LEVELS, exact)


def test_pixels_u8_are_preprocess_before_its_last_step():
  array = noise(200, 311)
  pixels = images.pixels_u8(array, transform())
  assert pixels.dtype == np.uint8 and pixels.shape == (384, 592, 3)
  np.testing.assert_array_equal(
    images.LEVELS[pixels], images.preprocess(array, transform())
  )


def test_open_image_reads_the_bytes_of_a_file():
  stream = io.BytesIO()
  Image.fromarray(noise(5, 7)).save(stream, "PNG")
  data = stream.getvalue()
  np.testing.assert_array_equal(images.open_image(data), noise(5, 7))
  refused("^image can't be read", images.open_image, data[:60])
