"""The public API: a loaded model that draws, reads and talks about images."""

import dataclasses
import pathlib
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from xomni_jax.checkpoints import released
from xomni_jax.config import Compute
from xomni_jax.data import encoder_ids, images, protocol
from xomni_jax.errors import InputError
from xomni_jax.inference import checkpoint as checkpoint_lib
from xomni_jax.inference import flow, sampling
from xomni_jax.inference.sampling import Drawn, Sampling
from xomni_jax.mesh import describe, make_mesh
from xomni_jax.models import ar, siglip, text_encoders, vae, vq

# Prompts are padded to a multiple of this, so that a new length seldom means a
# new program.
_PROMPT_BUCKET = 32
# Tokens of an answer made by one call, between two looks at the progress bar.
_TEXT_RUN = 32


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


def load(
  path_or_hub_id: str | pathlib.Path,
  flux: str | pathlib.Path | None = None,
  dtype: str | None = None,
  mesh: jax.sharding.Mesh | None = None,
  *,
  progress: bool = False,
) -> "Model":
  """Loads a checkpoint in the released layout.

  Args:
    path_or_hub_id: an X-Omni folder, or its Hugging Face hub id.
    flux: a FLUX.1-dev folder or hub id; only needed to decode images.
    dtype: "float32" or "bfloat16", of parameters and matmuls; None: float32 on
      CPU, else bfloat16.
    mesh: where to put it (`xomni_jax.make_mesh`); None: the first device.
    progress: show progress bars on standard error, here and in later calls.
  Raises:
    InputError: the files are incomplete, or do not fit each other.
  """
  mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  dtype = dtype or ("float32" if on_cpu else "bfloat16")
  compute = Compute(dtype=dtype, scan_layers=not on_cpu)
  opened = checkpoint_lib.open_checkpoint(path_or_hub_id)
  cfg = opened.config.ar
  tokenizer = protocol.load_tokenizer(
    opened.folder, cfg.vocab_size, cfg.image_vocab_size
  )
  total = cfg.vocab_size + cfg.mm_vocab_size
  if (
    last := max(tokenizer.som_id, tokenizer.eom_id, tokenizer.image_id)
  ) >= total:
    raise InputError(
      f"{opened.folder}: the tokenizer's image tokens reach id {last}, the "
      f"model's vocabulary ends at {total - 1}"
    )
  parts = dict(opened.parts)
  decoder = None
  if flux is not None:
    decoder = checkpoint_lib.open_decoder(opened, flux)
    parts |= decoder.parts
  params = {}
  total = sum(part.tensors for part in parts.values())
  with tqdm(total=total, unit="tensor", disable=not progress) as bar:
    for name, part in parts.items():
      bar.set_description(f"loading {part.name}")
      params[name] = released.load(part, mesh, dtype, bar.update)
  return Model(opened, decoder, tokenizer, params, mesh, compute, progress)


class Model:
  """A loaded X-Omni; `load` makes one."""

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
    self._opened = opened
    self._decoder = decoder
    self._progress = progress
    self._embedded: dict[tuple[str, ...], tuple[jax.Array, jax.Array]] = {}
    if decoder:
      self._clip_ids = encoder_ids.load_clip_tokenizer(
        decoder.folder / "tokenizer", decoder.clip.max_position_embeddings
      )
      self._t5_ids = encoder_ids.load_t5_tokenizer(
        decoder.folder / "tokenizer_2"
      )

  def __repr__(self) -> str:
    parts = ", ".join(self.params)
    return f"Model({parts}; {self.compute.dtype} on {describe(self.mesh)})"

  @property
  def pixels_per_token(self) -> int:
    """Side of the square of pixels that one generated code stands for."""
    return self.config.decoder.upscale_factor

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
    with jax.set_mesh(self.mesh):
      codes = _encode(
        self.params["siglip"],
        self.params["vq"],
        pixels[None],
        vit=self._opened.siglip,
        quantiser=self.config.vq,
        compute=self.compute,
      )
    return np.asarray(codes[0])

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
    decoder = self._need_decoder()
    codes = self._check_codes(codes)
    steps = self.config.decoder.num_inference_steps if steps is None else steps
    scale = self.config.decoder.cfg_scale if cfg_scale is None else cfg_scale
    if not isinstance(steps, int) or steps < 1:
      raise InputError(f"steps is {steps!r}, expected a whole number from 1")
    if not 1 <= scale < float("inf"):
      raise InputError(f"cfg_scale is {scale}, expected at least 1")
    h, w = grid = codes.shape
    shape = (1, decoder.vae.latent_channels, 2 * h, 2 * w)
    if noise is None:
      # On the host: the same noise on every kind of device.
      noise = np.random.default_rng(seed).standard_normal(shape, np.float32)
    elif np.shape(noise) != shape:
      raise InputError(
        f"noise is {list(np.shape(noise))}, expected {list(shape)} for "
        f"{h} x {w} codes"
      )
    prompts = (prompt,) if scale == 1 else (prompt, "")
    with jax.set_mesh(self.mesh):
      text, pooled = self._embed(prompts)
      features = _features(
        self.params["vq"],
        codes[None],
        quantiser=self.config.vq,
        compute=self.compute,
      )
      latents = flow.pack(jnp.asarray(noise, jnp.float32))
      levels = flow.sigmas(decoder.scheduler, h * w, steps)
      for i in self._bar(range(steps), "denoising", "step"):
        latents = flow.euler_step(
          self.params["flux"],
          latents,
          levels[i],
          levels[i + 1],
          text,
          pooled,
          features,
          cfg=decoder.flux,
          compute=self.compute,
          grid=grid,
          cfg_scale=float(scale),
        )
        if self._progress:
          latents.block_until_ready()
      image = _paint(
        self.params["vae"],
        latents,
        grid=grid,
        cfg=decoder.vae,
        compute=self.compute,
      )
    return np.asarray(image[0])

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
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if decode:
      self._need_decoder()
    self._check_request(prompts, num_images, batch_size)
    h, w = self._grid(size)
    prefix = self.tokenizer.encode(protocol.image_prefix(h, w))
    ids = [self.tokenizer.encode(p) for p in prompts]
    self._check_length(max(map(len, ids)) + len(prefix) + h * w)

    keys = sampling.sequence_keys(seed, len(ids) * num_images)
    each = max(1, (batch_size or len(keys)) // num_images)
    with self._bar(None, "sampling", "token", len(keys) * h * w) as bar:
      for first in range(0, len(ids), each):
        batch = ids[first : first + each]
        mine = keys[first * num_images : (first + each) * num_images]
        start = time.monotonic()
        drawn = self._draw_codes(batch, prefix, mine, (h, w), how, bar)
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
    if not question.strip():
      raise InputError("question is empty; say what to answer")
    if max_new_tokens < 1:
      raise InputError(
        f"max_new_tokens is {max_new_tokens}, expected at least 1"
      )
    how = Sampling(temperature, top_k, top_p, min_p, greedy)
    content = question
    if image is not None:
      content = f"{protocol.image_string(self.encode(image))}\n{question}"
    ids = self.tokenizer.encode(self.tokenizer.chat_prompt(content))
    self._check_length(len(ids) + max_new_tokens)
    # Rounded up to whole runs, so that another limit is no other program.
    runs = -(-max_new_tokens // _TEXT_RUN)
    tokens: list[int] = []
    with (
      jax.set_mesh(self.mesh),
      self._bar(None, "answering", "token", max_new_tokens) as bar,
    ):
      state = self._prefill(
        [ids], sampling.sequence_keys(seed, 1), runs * _TEXT_RUN, (1,)
      )
      for _ in range(runs):
        state, new, made = sampling.text_steps(
          self.params["ar"],
          state,
          cfg=self.config.ar,
          compute=self.compute,
          sampling=how,
          steps=_TEXT_RUN,
          ends=self.config.eos_token_ids,
        )
        tokens += np.asarray(new[0, : int(made)]).tolist()
        bar.update(int(made))
        if state.done.all():
          break
    tokens = tokens[:max_new_tokens]
    if tokens[-1] in self.config.eos_token_ids:
      tokens.pop()
    return self.tokenizer.parse(tokens).texts[0]

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
    tokens = np.asarray(tokens)
    total = cfg.vocab_size + cfg.mm_vocab_size
    if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
      raise InputError(
        f"tokens are {tokens.dtype}{list(tokens.shape)}, expected i32[B, T]"
      )
    if tokens.min() < 0 or tokens.max() >= total:
      raise InputError(
        f"tokens lie in {tokens.min()}..{tokens.max()}, expected 0..{total - 1}"
      )
    if mode not in ("text", "image"):
      raise InputError(f"mode is {mode!r}, expected 'text' or 'image'")
    mask = (
      np.ones(tokens.shape, bool) if mask is None else np.asarray(mask, bool)
    )
    if mask.shape != tokens.shape:
      raise InputError(
        f"mask is {list(mask.shape)}, expected {list(tokens.shape)} as tokens"
      )
    with jax.set_mesh(self.mesh):
      return np.asarray(
        _logits(
          self.params["ar"],
          tokens.astype(np.int32),
          mask,
          cfg=cfg,
          compute=self.compute,
          mode=mode,
        )
      )

  def _draw_codes(self, batch, prefix, keys, grid, how, bar) -> Drawn:
    """Codes [n, h*w] of one batch of prompts, with their log-probs."""
    h, w = grid
    copies = (len(keys) // len(batch),) * len(batch)
    rows = [ids + prefix for ids in batch]
    if how.cfg_scale != 1:
      # One negative row serves all: it sees no prompt.
      rows, copies = [*rows, prefix], (*copies, len(keys))
    drawn = []
    with jax.set_mesh(self.mesh):
      state = self._prefill(rows, keys, h * w, copies)
      for _ in range(h):
        state, new = sampling.image_steps(
          self.params["ar"],
          state,
          cfg=self.config.ar,
          compute=self.compute,
          sampling=how,
          steps=w,
        )
        drawn.append(new)
        if self._progress:
          new.token.block_until_ready()  # the bar shows work done, not queued
          bar.update(new.token.size)
      return Drawn(
        *(np.concatenate(x, axis=1) for x in zip(*drawn, strict=True))
      )

  def _paint_all(self, codes, batch, keys) -> list[Image.Image]:
    """An image for each of codes [n, h, w], the rows of a batch of prompts."""
    # The decoder reads a prompt as the vocabulary spells it.
    texts = [self.tokenizer.parse(ids).texts[0] for ids in batch]
    seeds = np.asarray(jax.vmap(jax.random.bits)(keys))
    each = len(codes) // len(batch)
    return [
      Image.fromarray(self.decode(c, texts[i // each], seed=int(seeds[i])))
      for i, c in enumerate(codes)
    ]

  def _prefill(self, sequences, keys, steps, copies):
    tokens, mask = protocol.left_pad(
      sequences, self.tokenizer.pad_id, _PROMPT_BUCKET
    )
    return sampling.prefill(
      self.params["ar"],
      tokens,
      mask,
      keys,
      cfg=self.config.ar,
      compute=self.compute,
      steps=steps,
      copies=copies,
    )

  def _embed(self, prompts: tuple[str, ...]):
    """T5 features [n, T, E] and pooled CLIP vectors [n, P] of prompts."""
    if prompts not in self._embedded:
      decoder = self._decoder
      # Only the last prompts are kept: one prompt's images are decoded in turn.
      self._embedded = {
        prompts: _embed(
          self.params["t5"],
          self.params["clip"],
          self._t5_ids(list(prompts)),
          self._clip_ids(list(prompts)),
          t5=decoder.t5,
          clip=decoder.clip,
          compute=self.compute,
        )
      }
    return self._embedded[prompts]

  def _bar(self, items, what, unit, total=None):
    return tqdm(
      items, desc=what, unit=unit, total=total, disable=not self._progress
    )

  def _need_decoder(self):
    if self._decoder is None:
      raise InputError(
        "decoding needs the FLUX.1-dev parts, none were loaded; "
        "name their folder as `flux` (--flux), or ask for codes only"
      )
    return self._decoder

  def _grid(self, size) -> tuple[int, int]:
    """(h, w) in codes of (height, width) in px."""
    px = self.pixels_per_token
    if len(size) != 2 or any(s < px or s % px for s in size):
      raise InputError(
        f"size is {' x '.join(map(str, size))} px, expected height and width "
        f"as multiples of the {px} px of a token; try "
        + " x ".join(str(max(px, round(s / px) * px)) for s in size)
      )
    return size[0] // px, size[1] // px

  def _check_codes(self, codes) -> np.ndarray:
    codes = np.asarray(codes)
    if codes.ndim != 2 or not codes.size or codes.dtype.kind not in "iu":
      raise InputError(
        f"codes are {codes.dtype}{list(codes.shape)}, expected i32[h, w]"
      )
    size = self.config.vq.codebook_size
    if codes.min() < 0 or codes.max() >= size:
      raise InputError(
        f"codes lie in {codes.min()}..{codes.max()}, expected 0..{size - 1}, "
        "the codebook's"
      )
    return codes.astype(np.int32)

  def _check_request(self, prompts, num_images, batch_size):
    empty = [i for i, p in enumerate(prompts) if not p.strip()]
    if empty or not prompts:
      raise InputError(
        f"prompt {empty[0] + 1 if empty else 1} of {max(1, len(prompts))} is "
        "empty; say what to draw"
      )
    if num_images < 1 or (batch_size is not None and batch_size < 1):
      raise InputError(
        f"num_images is {num_images} and batch_size {batch_size}, expected at "
        "least 1"
      )

  def _check_length(self, tokens):
    limit = self.config.ar.max_position_embeddings
    if tokens > limit:
      raise InputError(
        f"{tokens} tokens with the prompt, the model has {limit} positions; "
        "shorten the prompt or lower the size"
      )


@partial(jax.jit, static_argnames=("vit", "quantiser", "compute"))
def _encode(vit_params, vq_params, pixels, *, vit, quantiser, compute):
  """Codes i32[B, h, w] of pixels f32[B, H, W, 3]."""
  features = siglip.Siglip(vit, compute).apply({"params": vit_params}, pixels)
  return vq.VQ(quantiser, compute).apply(
    {"params": vq_params}, features, method="encode"
  )


@partial(jax.jit, static_argnames=("quantiser", "compute"))
def _features(vq_params, codes, *, quantiser, compute):
  """Semantic features [B, h*w, Z] of codes i32[B, h, w]."""
  x = vq.VQ(quantiser, compute).apply(
    {"params": vq_params}, codes, method="decode"
  )
  return x.reshape(x.shape[0], -1, x.shape[-1])


@partial(jax.jit, static_argnames=("t5", "clip", "compute"))
def _embed(t5_params, clip_params, t5_ids, clip_ids, *, t5, clip, compute):
  """T5 features [B, T, E] and pooled CLIP vectors [B, P]."""
  text = text_encoders.T5Encoder(t5, compute).apply(
    {"params": t5_params}, t5_ids
  )
  _, pooled = text_encoders.CLIPText(clip, compute).apply(
    {"params": clip_params}, clip_ids
  )
  return text, pooled


@partial(jax.jit, static_argnames=("grid", "cfg", "compute"))
def _paint(vae_params, latents, *, grid, cfg, compute):
  """u8[B, H, W, 3] of packed latents."""
  latents = vae.from_model_space(flow.unpack(latents, grid), cfg)
  image = vae.decode(vae_params, latents, cfg, compute).astype(jnp.float32)
  image = jnp.clip(image / 2 + 0.5, 0, 1)
  return jnp.round(image * 255).astype(jnp.uint8)


@partial(jax.jit, static_argnames=("cfg", "compute", "mode"))
def _logits(params, tokens, mask, *, cfg, compute, mode):
  hidden, _ = ar.XOmniAR(cfg, compute).apply(
    {"params": params}, tokens, ar.positions_of(mask), mask
  )
  return ar.joint_logits(params, hidden, cfg, mode)
