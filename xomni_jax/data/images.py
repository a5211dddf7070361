"""Images on their way into the tokenizer, and codes as a picture."""

import io
import os
import warnings

import numpy as np
from PIL import Image

from xomni_jax.config import TransformConfig
from xomni_jax.data import boundary
from xomni_jax.data.boundary import codes_grid, unreadable
from xomni_jax.errors import InputError

# Where Pillow itself begins to warn of a decompression bomb: 256 MiB as RGB.
MAX_PIXELS = 89_478_485

# What `preprocess` makes of each of the 256 levels of a pixel, bit by bit: u8
# pixels become its f32 ones by `LEVELS[pixels]`, on the device as well, where
# another order of operations would round otherwise.
LEVELS = (
  np.arange(256, dtype=np.float32) / np.float32(255) - np.float32(0.5)
) / np.float32(0.5)
LEVELS.flags.writeable = False


def open_image(
  source: str | os.PathLike | bytes | Image.Image | np.ndarray,
) -> Image.Image:
  """A fully decoded RGB picture.

  Args:
    source: path, bytes of a file, PIL image, or u8[H, W, 3].
  Returns:
    PIL image of mode RGB.
  Raises:
    InputError: not an image, truncated, empty, or above MAX_PIXELS.
  """
  if isinstance(source, Image.Image):
    return _rgb(source, "image")
  if isinstance(source, bytes):
    return _rgb_file(io.BytesIO(source), "image")
  if isinstance(source, (str, os.PathLike)):
    return _rgb_file(source, f"image {os.fspath(source)}")
  array = boundary.array("image", source, "uint8[H, W, 3]")
  if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
    raise InputError(
      f"image is {array.dtype}{list(array.shape)}, expected a path, a PIL "
      "image or uint8[H, W, 3]"
    )
  height, width = array.shape[:2]
  _check_size(width, height, "image")
  return Image.fromarray(array)


def _rgb_file(path, name):
  try:
    with warnings.catch_warnings():
      # Of its doubts about size and metadata: _rgb checks both in its own way.
      warnings.simplefilter("ignore")
      image = Image.open(path)
  except FileNotFoundError:
    raise InputError(f"{name} does not exist; check the path") from None
  except Image.DecompressionBombError:
    raise _too_large(name, f"over {2 * MAX_PIXELS} pixels") from None
  except Exception as e:  # a broken header raises whatever its parser meets
    raise _unreadable(name, e) from None
  with image:
    return _rgb(image, name)


def _rgb(image, name):
  _check_size(*image.size, name)  # from the header: nothing is decoded yet
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      # Alpha is dropped, 16-bit grey clipped and EXIF rotation ignored, since
      # the reference does no more than this either.
      return image.convert("RGB")  # decodes the whole file
  except Exception as e:  # truncated data, too, raises whatever its codec meets
    raise _unreadable(name, e) from None


def _check_size(width, height, name):
  if not width * height:
    raise InputError(f"{name} is {width}x{height} px, expected at least 1x1")
  if width * height > MAX_PIXELS:
    raise _too_large(name, f"{width}x{height} px")


def _too_large(name, got):
  return InputError(
    f"{name} has {got}, expected at most {MAX_PIXELS} pixels; scale it down "
    "first"
  )


def _unreadable(name, error):
  advice = "a complete PNG, JPEG, WebP or the like; save it again"
  return unreadable(name, error, advice)


def target_size(
  width: int, height: int, transform: TransformConfig
) -> tuple[int, int]:
  """The size an image is resized to, a multiple of the patch size.

  Args:
    width, height: of the image, px.
    transform: limits and sizes.
  Returns:
    (width, height) in px.
  Raises:
    InputError: the image is too small or too elongated for the tokenizer.
  """
  t = transform
  short, long = min(width, height), max(width, height)
  if t.filtering and short < t.min_short_size:
    raise InputError(
      f"image is {width}x{height} px, expected a short side of at least "
      f"{t.min_short_size}; enlarge it first"
    )
  if t.filtering and long / short > t.max_aspect_ratio:
    raise InputError(
      f"image is {width}x{height} px, expected an aspect ratio (long / short "
      f"side) of at most {t.max_aspect_ratio}; crop it first"
    )
  # Sizes stay floats up to the rounding, with the reference's order of
  # operations: ties (halves go to even) would tip over otherwise.
  w, h = float(width), float(height)
  if short < t.short_size:
    w, h = w * (t.short_size / short), h * (t.short_size / short)
  long = max(w, h)
  if long > t.long_size:
    w, h = w * (t.long_size / long), h * (t.long_size / long)
  patch = t.patch_size
  w, h = round(w / patch) * patch, round(h / patch) * patch
  if not w * h:
    raise InputError(
      f"image is {width}x{height} px and would become {w}x{h}, expected at "
      f"least one patch of {patch}; crop it to a less extreme aspect ratio"
    )
  return w, h


def preprocess(source, transform: TransformConfig) -> np.ndarray:
  """An image as the tokenizer's ViT takes it.

  Args:
    source: anything `open_image` takes.
    transform: limits and sizes.
  Returns:
    f32[H, W, 3] in [-1, 1]; H and W are multiples of the patch size.
  Raises:
    InputError: an unreadable image, or one that the tokenizer does not take.
  """
  return LEVELS[pixels_u8(source, transform)]


def pixels_u8(source, transform: TransformConfig) -> np.ndarray:
  """`preprocess` before its last step, u8[H, W, 3]: a quarter of the bytes.

  `LEVELS[pixels_u8(...)]` is `preprocess(...)`. Raises as that does.
  """
  image = open_image(source)
  size = target_size(*image.size, transform)
  # Pillow's bicubic is the reference: a = -0.5, antialiased, two passes each
  # rounded to 8 bit. A resize in floats differs.
  return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def codes_picture(codes, codebook_size: int, scale: int = 8) -> Image.Image:
  """Codes as a grid of colours; a code has the same colour in every picture.

  Args:
    codes: i32[h, w] in [0, codebook_size).
    codebook_size: number of codes.
    scale: px per code.
  Returns:
    RGB PIL image of w*scale x h*scale px.
  Raises:
    InputError: codes are no grid, or outside the codebook.
  """
  codes = codes_grid(codes, codebook_size)
  rgb = _colours(codes).repeat(scale, axis=0).repeat(scale, axis=1)
  return Image.fromarray(rgb)


def _colours(codes):
  """u8[..., 3]: each index its own hue, saturation and value."""
  # Multiples of irrational numbers never cluster, so that colours stay well
  # spread for any number of codes: the golden ratio's for the hue, the
  # plastic ratio's for the other two.
  hue = codes * 0.6180339887 % 1
  saturation = 0.45 + 0.5 * (codes * 0.7548776662 % 1)
  value = 0.55 + 0.45 * (codes * 0.5698402910 % 1)
  k = (np.array([5, 3, 1]) + 6 * hue[..., None]) % 6  # HSV -> RGB
  drop = np.clip(np.minimum(k, 4 - k), 0, 1) * saturation[..., None]
  return np.uint8(np.round(255 * value[..., None] * (1 - drop)))
