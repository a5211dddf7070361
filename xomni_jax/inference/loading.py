"""A model out of a checkpoint's files."""

import pathlib
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from xomni_jax.checkpoints import released
from xomni_jax.config import Compute
from xomni_jax.data import protocol
from xomni_jax.errors import InputError
from xomni_jax.inference import checkpoint, shipped
from xomni_jax.inference.pipeline import Model
from xomni_jax.mesh import make_mesh


def load(
  path_or_hub_id: str | pathlib.Path,
  flux: str | pathlib.Path | None = None,
  dtype: Any = None,
  mesh: jax.sharding.Mesh | None = None,
  *,
  progress: bool = False,
  only: Collection[str] | None = None,
) -> Model:
  """Loads a checkpoint in the released layout.

  Args:
    path_or_hub_id: an X-Omni folder, its Hugging Face hub id, or "tiny" or
      "tiny-sft", which come with the package and bring their decoder.
    flux: a FLUX.1-dev folder or hub id; only needed to decode images.
    dtype: "float32" or "bfloat16", of parameters and matmuls; None: float32 on
      CPU, else bfloat16.
    mesh: where to put it (`xomni_jax.make_mesh`); None: the first device.
    progress: show progress bars on standard error, here and in later calls.
    only: parts to load, such as "siglip" and "vq" to encode images and nothing
      else; None: all.
  Raises:
    InputError: the files are incomplete, or do not fit each other.
  """
  mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  try:
    dtype = jnp.dtype(dtype or (jnp.float32 if on_cpu else jnp.bfloat16)).name
  except TypeError:
    raise InputError(
      f"dtype is {dtype!r}, expected 'float32' or 'bfloat16'"
    ) from None
  compute = Compute(dtype=dtype, scan_layers=not on_cpu)
  opened = checkpoint.open_checkpoint(path_or_hub_id)
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
  if flux is None and shipped.find(path_or_hub_id):
    flux = path_or_hub_id
  if flux is not None:
    decoder = checkpoint.open_decoder(opened, flux)
    parts |= decoder.parts
  if only is not None:
    if isinstance(only, str) or not parts.keys() >= set(only):
      raise InputError(
        f"only is {only!r}, expected a list of {', '.join(parts)} (those of "
        "the diffusion decoder with `flux`)"
      )
    parts = {name: parts[name] for name in only}
  if decoder and not parts.keys() >= {"vq", *decoder.parts}:
    decoder = None  # not all of it is wanted
  params = {}
  total = sum(part.tensors for part in parts.values())
  with tqdm(total=total, unit="tensor", disable=not progress) as bar:
    for name, part in parts.items():
      bar.set_description(f"loading {part.name}")
      params[name] = released.load(part, mesh, dtype, bar.update)
  return Model(opened, decoder, tokenizer, params, mesh, compute, progress)
