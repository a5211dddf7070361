"""A loaded model: it draws, reads and talks about images."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from xomni_jax.config import Architecture, Compute
from xomni_jax.data import images, protocol
from xomni_jax.data.boundary import codes_grid
from xomni_jax.errors import InputError
from xomni_jax.inference import arguments, programs, sampling
from xomni_jax.inference import checkpoint as checkpoint_lib
from xomni_jax.inference.painter import Painter
from xomni_jax.inference.sampling import Drawn, Sampling
from xomni_jax.mesh import describe, to_host


@dataclasses.dataclass(frozen=True)
class Generated:
  """What `Model.generate` made, prompt-major: N = prompts x images.

  Attributes:
    codes: i32[N, h, w], indices into the codebook.
    logprobs: f32[N, h*w], of each code under the distribution it was drawn
      from: temperature, filters and guidance applied. If greedy: under the
      guided distribution at temperature 1.
    raw_logprobs: f32[N, h*w], under the model's own distribution over codes.
    images: N PIL images; empty if they were not decoded.
    seconds: spent on "sampling" and on "decoding", compilation included.
  """

  codes: np.ndarray
  logprobs: np.ndarray
  raw_logprobs: np.ndarray
  images: list[Image.Image]
  seconds: dict[str, float]


class Model:
  """A loaded X-Omni; `xomni_jax.load` makes one."""

  def __init__(
    self,
    opened: checkpoint_lib.Checkpoint,
    decoder: checkpoint_lib.Decoder | None,
    tokenizer: protocol.Tokenizer,
    params: dict[str, Any],
    mesh: jax.sharding.Mesh,
    compute: Compute,
    progress: bool,
  ):
    self.config = opened.config
    self.tokenizer = tokenizer
    self.params = params
    self.mesh = mesh
    self.compute = compute
    self._vit = opened.siglip
    self._painter = decoder and Painter(decoder, params, compute, progress)
    self._progress = progress

  def __repr__(self) -> str:
    parts = ", ".join(self.params)
    return f"Model({parts}; {self.compute.dtype} on {describe(self.mesh)})"

  def _part(self, name):
    """Parameters of a part; InputError if it was not loaded."""
    if name not in self.params:
      raise InputError(
        f"this needs the part {name!r}, loaded were "
        f"{', '.join(self.params) or 'none'}; name it in `only` of "
        "xomni_jax.load too"
      )
    return self.params[name]

  @property
  def pixels_per_token(self) -> int:
    """Side of the square of pixels that one generated code stands for."""
    return self.config.decoder.upscale_factor

  @property
  def painter(self) -> Painter:
    """The diffusion decoder; InputError if the model has none."""
    if self._painter is None:
      raise InputError(
        "decoding needs the FLUX.1-dev parts, none were loaded; "
        "name their folder as `flux` (--flux), or ask for codes only"
      )
    return self._painter

  @property
  def architecture(self) -> Architecture:
    """Sizes of all parts, the diffusion decoder's too."""
    cfg, decoder = self.config, self.painter.cfg
    return Architecture(
      ar=cfg.ar,
      siglip=self._vit,
      vq=cfg.vq,
      flux=decoder.flux,
      vae=decoder.vae,
      clip=decoder.clip,
      t5=decoder.t5,
    )

  def encode(self, image) -> np.ndarray:
    """The codes of an image.

    Args:
      image: PIL image, path, or u8[H, W, 3].
    Returns:
      i32[h, w]; the image is resized as the checkpoint's transform says.
    Raises:
      InputError: unreadable, too small or too elongated.
    """
    pixels = images.preprocess(image, self.config.transform)
    return self.encode_pixels(pixels[None])[0]

  def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
    """Codes i32[B, h, w] of preprocessed images, f32[B, H, W, 3] in [-1, 1]."""
    with jax.set_mesh(self.mesh):
      codes = programs.encode(
        self._part("siglip"),
        self._part("vq"),
        pixels,
        vit=self._vit,
        quantiser=self.config.vq,
        compute=self.compute,
      )
    return to_host(codes)

  def decode(
    self,
    codes,
    prompt: str = "",
    *,
    steps: int | None = None,
    cfg_scale: float | None = None,
    seed: int = 0,
    noise=None,
  ) -> np.ndarray:
    """Paints codes with the diffusion decoder.

    Args:
      codes: i32[h, w].
      prompt: text that the decoder sees beside the codes.
      steps: of denoising; None: as the checkpoint says.
      cfg_scale: guidance towards codes and prompt, at least 1; None: as the
        checkpoint says.
      seed: of the noise.
      noise: f32[1, 16, 2h, 2w] to start from instead.
    Returns:
      u8[H, W, 3], `pixels_per_token` px a code.
    Raises:
      InputError: bad arguments, or the model was loaded without `flux`.
    """
    painter = self.painter
    arguments.text(prompt=prompt)
    arguments.seed_number(seed)
    codes = codes_grid(codes, self.config.vq.codebook_size)
    default = self.config.decoder
    with jax.set_mesh(self.mesh):
      features = programs.features(
        self._part("vq"),
        codes[None],
        quantiser=self.config.vq,
        compute=self.compute,
      )
      return painter.paint(
        features,
        codes.shape,
        prompt,
        steps=default.num_inference_steps if steps is None else steps,
        cfg_scale=default.cfg_scale if cfg_scale is None else cfg_scale,
        seed=seed,
        noise=noise,
      )

  def generate(
    self,
    prompts: str | Sequence[str],
    size: tuple[int, int],
    *,
    seed: int = 0,
    num_images: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    cfg_scale: float = 1.0,
    greedy: bool = False,
    decode: bool = True,
    batch_size: int | None = None,
  ) -> Generated:
    """Draws images for prompts.

    Args:
      prompts: one or several texts.
      size: (height, width) in px, multiples of `pixels_per_token`.
      seed: of codes and noise; sequence i has the same in every batch.
      num_images: images per prompt; they share one prefill.
      temperature, top_k, top_p, min_p, cfg_scale, greedy: see `Sampling`;
        guidance contrasts with the same image without its prompt.
      decode: paint the images; else codes only.
      batch_size: sequences generated at once, in whole prompts; None: all.
    Raises:
      InputError: bad arguments, an empty prompt, or `decode` without `flux`.
    """
    how = Sampling(temperature, top_k, top_p, min_p, greedy, cfg_scale)
    parts = list(
      self.stream(
        prompts,
        size,
        how,
        seed=seed,
        num_images=num_images,
        decode=decode,
        batch_size=batch_size,
      )
    )
    join = lambda name: np.concatenate([getattr(p, name) for p in parts])
    seconds = {
      name: sum(p.seconds[name] for p in parts) for name in parts[0].seconds
    }
    return Generated(
      join("codes"),
      join("logprobs"),
      join("raw_logprobs"),
      [image for p in parts for image in p.images],
      seconds,
    )

  def stream(
    self,
    prompts: str | Sequence[str],
    size: tuple[int, int],
    how: Sampling,
    *,
    seed: int = 0,
    num_images: int = 1,
    decode: bool = True,
    batch_size: int | None = None,
  ) -> Iterator[Generated]:
    """`generate` batch by batch, for work that is stored as it is made."""
    if decode:
      _ = self.painter  # an error now, and not after all was drawn
    prompts = arguments.prompts_list(prompts)
    arguments.at_least_one(num_images=num_images, batch_size=batch_size)
    arguments.seed_number(seed)
    h, w = arguments.grid_of(size, self.pixels_per_token)
    prefix = self.tokenizer.encode(protocol.image_prefix(h, w))
    ids = [self.tokenizer.encode(p) for p in prompts]
    longest = max(map(len, ids)) + len(prefix) + h * w
    arguments.fits_positions(longest, self.config.ar)

    keys = sampling.sequence_keys(seed, len(ids) * num_images)
    parts = _parts(len(ids), num_images, batch_size or len(keys))
    with self._bar(None, "sampling", "token", len(keys) * h * w) as bar:
      for first, end in parts:
        batch = ids[first // num_images : -(-end // num_images)]
        mine = keys[first:end]
        start = time.monotonic()
        drawn = self.draw_codes(batch, (h, w), how, mine, bar)
        seconds = {"sampling": time.monotonic() - start}
        codes = drawn.token.reshape(-1, h, w)
        pictures = []
        if decode:
          start = time.monotonic()
          pictures = self._paint_all(codes, batch, mine)
          seconds["decoding"] = time.monotonic() - start
        yield Generated(
          codes, drawn.logprob, drawn.raw_logprob, pictures, seconds
        )

  def chat(
    self,
    image,
    question: str,
    *,
    max_new_tokens: int = 512,
    greedy: bool = True,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
  ) -> str:
    """Answers a question about an image.

    Args:
      image: PIL image, path, u8[H, W, 3]; or None to talk without one.
      question: the user's message.
      max_new_tokens: length limit of the answer.
      greedy: take the likeliest token; else draw, by the rest (see `Sampling`).
    Returns:
      the answer, without the token that ends the turn.
    Raises:
      InputError: bad arguments, or an image that `encode` refuses.
    """
    arguments.question(question)
    arguments.at_least_one(max_new_tokens=max_new_tokens)
    arguments.seed_number(seed)
    how = Sampling(temperature, top_k, top_p, min_p, greedy)
    content = question
    if image is not None:
      content = f"{protocol.image_string(self.encode(image))}\n{question}"
    ids = self.tokenizer.encode(self.tokenizer.chat_prompt(content))
    answer = self.continue_text(ids, how, max_new_tokens, seed=seed)
    return self.tokenizer.text(answer)

  def continue_text(
    self,
    ids: Sequence[int],
    how: Sampling,
    max_new_tokens: int,
    *,
    seed: int = 0,
    document: bool = False,
  ) -> list[int]:
    """Text tokens that follow, up to the one that ends the text.

    Args:
      ids: joint ids, of images too.
      how: tokens are drawn.
      max_new_tokens: length limit.
      seed: of the draws.
      document: the end of a document ends it too, not only that of a turn.
    Raises:
      InputError: more tokens than the model has positions.
    """
    arguments.fits_positions(len(ids) + max_new_tokens, self.config.ar)
    ends = self.config.eos_token_ids
    if document:
      ends = (*ends, self.tokenizer.pad_id)
    with (
      jax.set_mesh(self.mesh),
      self._bar(None, "answering", "token", max_new_tokens) as bar,
    ):
      return programs.continue_text(
        self._part("ar"),
        list(ids),
        sampling.sequence_keys(seed, 1),
        cfg=self.config.ar,
        compute=self.compute,
        how=how,
        limit=max_new_tokens,
        ends=ends,
        pad_id=self.tokenizer.pad_id,
        made=bar.update,
      )

  def logits(self, tokens, mode: str = "text", mask=None) -> np.ndarray:
    """Next-token logits at every position.

    Args:
      tokens: i32[B, T], joint ids.
      mode: "text" fills the text vocabulary, "image" the codes; the rest is
        float32 min.
      mask: bool[B, T], False at padding; None: no padding.
    Returns:
      f32[B, T, vocab_size + mm_vocab_size].
    Raises:
      InputError: bad arguments.
    """
    cfg = self.config.ar
    tokens, mask = arguments.tokens_and_mask(tokens, mask, cfg)
    if mode not in ("text", "image"):
      raise InputError(f"mode is {mode!r}, expected 'text' or 'image'")
    with jax.set_mesh(self.mesh):
      return to_host(
        programs.logits(
          self._part("ar"),
          tokens,
          mask,
          cfg=cfg,
          compute=self.compute,
          mode=mode,
        )
      )

  def draw_codes(
    self,
    prompts: Sequence[Sequence[int]],
    grid: tuple[int, int],
    how: Sampling,
    keys: jax.Array,
    bar: tqdm | None = None,
  ) -> Drawn:
    """Codes [N, h*w] of one batch of prompts, with their log-probs.

    Args:
      prompts: their ids.
      grid: (h, w) of codes.
      how: codes are drawn.
      keys: [N], one a sequence, those of a prompt adjacent; N is a multiple of
        the number of prompts.
      bar: counts the codes.
    """
    h, w = grid
    prefix = self.tokenizer.encode(protocol.image_prefix(h, w))
    copies = (len(keys) // len(prompts),) * len(prompts)
    rows = [[*ids, *prefix] for ids in prompts]
    if how.cfg_scale != 1:
      # One negative row serves all: it sees no prompt.
      rows, copies = [*rows, prefix], (*copies, len(keys))
    with jax.set_mesh(self.mesh):
      return programs.draw_codes(
        self._part("ar"),
        rows,
        copies,
        keys,
        grid,
        cfg=self.config.ar,
        compute=self.compute,
        how=how,
        pad_id=self.tokenizer.pad_id,
        made=bar.update if bar is not None and self._progress else None,
      )

  def _paint_all(self, codes, batch, keys) -> list[Image.Image]:
    """An image for each of codes [n, h, w], the rows of a batch of prompts."""
    # The decoder reads a prompt as the vocabulary spells it.
    texts = [self.tokenizer.text(ids) for ids in batch]
    seeds = to_host(jax.vmap(jax.random.bits)(keys))
    each = len(codes) // len(batch)
    return [
      Image.fromarray(self.decode(c, texts[i // each], seed=int(seeds[i])))
      for i, c in enumerate(codes)
    ]

  def _bar(self, items, what, unit, total=None):
    return tqdm(
      items, desc=what, unit=unit, total=total, disable=not self._progress
    )


def _parts(prompts: int, each: int, most: int) -> Iterator[tuple[int, int]]:
  """First and end of the sequences that are drawn at once, at most `most`.

  They are of whole prompts, of `each` sequences, or all of one prompt.
  """
  step = most // each * each or most
  span = prompts * each if most >= each else each
  for start in range(0, prompts * each, span):
    for first in range(start, start + span, step):
      yield first, min(first + step, start + span)
