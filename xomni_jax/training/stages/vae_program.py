"""What stage `vae` compiles: an autoencoder that rebuilds images.

Shape letters: B images, H and W rows and columns (h, w: of latents), C
channels.
Source: the autoencoder of latent diffusion (arXiv:2112.10752), section 3.1,
with no adversarial and no perceptual term: both need a second network.
"""

import jax
import jax.numpy as jnp

from xomni_jax.config import Architecture
from xomni_jax.models import vae
from xomni_jax.train_config import TrainConfig
from xomni_jax.training import flops, pixels
from xomni_jax.training.stage import Batch, Context, Part, Program, row_keys


def program(cfg: TrainConfig, arch: Architecture) -> Program:
  """The autoencoder's training.

  Rows are `pixels` u8[B, side, side, 3], `id` i32[B] and `real` f32[B].
  """
  opts, model = cfg.options, arch.vae

  def loss(params, batch: Batch, ctx: Context):
    target_BHWC = pixels.to_float(batch["pixels"])
    mean, logvar = vae.encode(params["vae"], target_BHWC, model, cfg.compute)
    latents = sample(mean, logvar, row_keys(ctx.noise_key, batch["id"]))
    image_BHWC = vae.decode(params["vae"], latents, model, cfg.compute)
    terms = row_terms(image_BHWC, target_BHWC, mean, logvar)
    # Rows that are not real count as nothing, the others alike.
    share_B = batch["real"] / jnp.maximum(ctx.totals["rows"], 1)
    terms = {name: jnp.sum(x_B * share_B) for name, x_B in terms.items()}
    value = (
      opts.l1 * terms["l1"]
      + opts.l2 * terms["l2"]
      + opts.edges * terms["edges"]
      + opts.kl * terms["kl"]
    )
    return value, {f"vae/{name}": x for name, x in terms.items()}

  side, rows = opts.crops[0], cfg.global_batch
  shape = jax.ShapeDtypeStruct
  return Program(
    parts={"vae": Part(vae.rows(model), vae.abstract(model))},
    init=lambda key: {"vae": vae.init(key, model)},
    totals=lambda batch: {"rows": jnp.sum(batch["real"])},
    loss=loss,
    batch={
      "pixels": shape((rows, side, side, 3), jnp.uint8),
      "id": shape((rows,), jnp.int32),
      "real": shape((rows,), jnp.float32),
    },
    tokens=rows * (side // model.factor) ** 2,
    flops=3.0 * rows * flops.vae(model, side, side),
    summarise=_with_psnr,
  )


def sample(mean: jax.Array, logvar: jax.Array, keys: jax.Array) -> jax.Array:
  """Latents drawn from their distribution, each row by its own key.

  Args:
    mean, logvar: f32[B, h, w, C], of `models.vae.encode`.
    keys: [B].
  """
  draw = lambda key: jax.random.normal(key, mean.shape[1:])
  return mean + jnp.exp(0.5 * logvar) * jax.vmap(draw)(keys)


def row_terms(
  image_BHWC: jax.Array,
  target_BHWC: jax.Array,
  mean_BhwC: jax.Array,
  logvar_BhwC: jax.Array,
) -> dict[str, jax.Array]:
  """Every term of the loss for each row, f32[B], unweighted.

  Returns:
    l1, l2: mean absolute and squared error of a pixel's channel.
    edges: mean absolute error of the difference of two neighbours, over rows
      and columns; it sees a stroke that is blurred, not one that is pale.
    kl: nats a latent value, from a unit Gaussian.
  """
  error = image_BHWC - target_BHWC
  row_mean = lambda x: jnp.mean(x.reshape(x.shape[0], -1), axis=1)
  steps = (jnp.abs(jnp.diff(error, axis=axis)) for axis in (1, 2))
  kl = jnp.square(mean_BhwC) + jnp.exp(logvar_BhwC) - 1.0 - logvar_BhwC
  return {
    "l1": row_mean(jnp.abs(error)),
    "l2": row_mean(jnp.square(error)),
    "edges": 0.5 * sum(row_mean(x) for x in steps),
    "kl": 0.5 * row_mean(kl),
  }


def _with_psnr(metrics):
  """The metrics, and the peak signal-to-noise ratio of all pixels in dB."""
  # Pixels span 2, from -1 to 1.
  psnr = 10 * jnp.log10(4 / jnp.maximum(metrics["vae/l2"], 1e-12))
  return metrics | {"vae/psnr_db": psnr}
