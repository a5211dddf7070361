"""The quantiser's training against PyTorch's autograd in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import max_difference
from xomni_jax.config import VQConfig
from xomni_jax.models import vq

torch = pytest.importorskip("torch")

B, N, E, K = 3, 7, 6, 11
TEMPERATURE, COMMITMENT = 0.3, 0.25
# Squared distances of order 4 in float32 over the temperature: logits, and by
# them gradients of order 1, are good to about 4 * 6e-8 / 0.3 * 10 sums.
TOLERANCE = 1e-5


def arrays(seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape)
  # Neither has unit length: the code has to normalise.
  return normal(B, N, E) * 2, normal(K, E) * 1.5, normal(B, N, E), normal(B, N)


def witness(z, codebook, out, own, entropy):
  """IBQ as its paper writes it; what it gives and the gradients of a sum."""
  z0 = torch.tensor(z, requires_grad=True)
  raw = torch.tensor(codebook, requires_grad=True)
  unit = torch.nn.functional.normalize
  z = unit(z0, dim=-1)
  distance = (z[..., None, :] - unit(raw, dim=-1)).square().sum(-1)
  logits = -distance / TEMPERATURE
  soft = logits.softmax(-1)
  codes = logits.argmax(-1)
  hard = torch.nn.functional.one_hot(codes, K).double()
  one_hot = hard - soft.detach() + soft
  z_q, z_hard = one_hot @ raw, hard @ raw
  error = lambda a, b: (a - b).square().mean(-1)
  loss = (
    error(z_q, z)
    + error(z_hard.detach(), z)
    + COMMITMENT * error(z_hard, z.detach())
  )
  entropies = -(soft * soft.log()).sum(-1)
  total = (z_q * torch.tensor(out)).sum() + (loss * torch.tensor(own)).sum()
  total = total + entropy * (entropies * torch.tensor(own)).sum()
  grads = torch.autograd.grad(total, (z0, raw))
  values = codes, z_q, loss, entropies, soft.sum(1)
  return [x.detach().numpy() for x in (*values, *grads)]


def ours(z, codebook, out, own, entropy, chunk=4096):
  def total(z, codebook):
    made = vq.quantise(
      vq.normalise(z), codebook, TEMPERATURE, COMMITMENT, chunk
    )
    value = jnp.sum(made.z_q * out) + jnp.sum(made.loss * own)
    return value + entropy * jnp.sum(made.entropy * own), made

  args = [jnp.asarray(x, jnp.float32) for x in (z, codebook)]
  grad = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
  grads, made = grad(*args)
  return [np.asarray(x) for x in (*made, *grads)]


NAMES = ("codes", "z_q", "loss", "entropy", "soft", "dz", "dcodebook")


@pytest.mark.parametrize("entropy", (0.0, 0.7))
@pytest.mark.parametrize("chunk", (4096, 4))
def test_quantise_matches_float64(entropy, chunk):
  inputs = arrays()
  expected = witness(*inputs, entropy)
  got = ours(*inputs, entropy, chunk)
  for name, a, b in zip(NAMES, got, expected, strict=True):
    scale = max(1.0, np.abs(b).max())
    assert max_difference(a, b) <= TOLERANCE * scale, name


def test_z_q_is_the_raw_codebook_exactly():
  """The straight-through term is 0 forward, not a rounding error."""
  z, codebook, out, own = arrays(1)
  codes, z_q = ours(z, codebook, out, own, 0.0)[:2]
  assert (z_q == codebook.astype(np.float32)[codes]).all()


def test_gradient_reaches_z_through_the_index():
  """Without the softmax's mixture only the loss would reach z."""
  z, codebook, out, own = arrays(2)
  assert np.abs(ours(z, codebook, out, 0 * own, 0.0)[5]).max() > 0.1


CFG = VQConfig(codebook_size=16, codebook_dim=8, z_channels=32)


@pytest.fixture(scope="module")
def model():
  features = np.random.default_rng(0).standard_normal((2, 3, 4, 32), np.float32)
  params = vq.VQ(CFG).init(jax.random.key(0), features)
  return params, features


def train_codes(params, features, bypass):
  return vq.VQ(CFG).apply(
    params, features, np.array(bypass), 0.1, 0.25, method="train_codes"
  )


def test_training_forward_is_inference(model):
  """What the language model learns to read is what it will be given."""
  params, features = model
  out, _, made = train_codes(params, features, [False, False])
  codes = vq.VQ(CFG).apply(params, features, method="encode")
  assert (np.asarray(made.codes) == np.asarray(codes)).all()
  decoded = vq.VQ(CFG).apply(params, codes, method="decode")
  assert max_difference(out, decoded) == 0


def test_bypass_passes_normalised_z_of_its_sample_only(model):
  params, features = model
  out, z, made = train_codes(params, features, [True, False])
  lift = lambda x: vq.VQ(CFG).apply(params, x, method="lift")
  assert max_difference(out[0], lift(z)[0]) == 0
  assert max_difference(out[1], lift(made.z_q)[1]) == 0
  assert np.allclose(np.linalg.norm(z, axis=-1), 1, atol=1e-6)
  changed = jax.tree.map(lambda x: x, params)
  changed["params"]["codebook"] = params["params"]["codebook"] + 1
  again = train_codes(changed, features, [True, False])[0]
  assert max_difference(out[0], again[0]) == 0
  assert max_difference(out[1], again[1]) > 0.01


def test_logits_never_exist_for_all_tokens():
  """At full size they would take 1 GiB for 16,384 tokens of one device."""
  z = jax.ShapeDtypeStruct((16, 1024, 8), jnp.float32)
  codebook = jax.ShapeDtypeStruct((4096, 8), jnp.float32)

  def total(z, codebook):
    made = vq.quantise(vq.normalise(z), codebook, 0.1)
    return jnp.sum(made.z_q) + jnp.sum(made.entropy)

  compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(z, codebook)
  used = compiled.compile().memory_analysis().temp_size_in_bytes
  assert used < 16 * 1024 * 4096 * 4
