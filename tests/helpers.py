"""What tests of several parts share."""

import functools
import pathlib

import numpy as np
from safetensors.numpy import load_file

from xomni_jax import params
from xomni_jax.config import ARConfig
from xomni_jax.models import ar

GOLDEN = pathlib.Path(__file__).parent / "golden" / "tiny-a"


@functools.cache
def golden():
  """The golden arrays by name; each is read when it is asked for."""
  return np.load(GOLDEN / "golden.npz")


def read_folder(folder):
  """{key: array} of all safetensors files in a folder."""
  state = {}
  for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
    state |= load_file(path)
  return state


def params_from_torch(table, tree, state):
  """Our parameters out of {PyTorch key: tensor}; the keys fit exactly."""
  state = {k: np.asarray(v) for k, v in state.items()}
  shapes = {k: v.shape for k, v in state.items()}
  params.check(table, tree, shapes, "state dict")
  flat = {}
  for row, leaf in params.matched(table, tree):
    layers = [
      row.from_torch(state[key], leaf.shape) for key in row.keys(leaf.shape)
    ]
    flat[row.path] = np.stack(layers) if row.stacked else layers[0]
  return params.unflatten(flat)


def random_state(table, tree, seed=0):
  """{PyTorch key: array} of random weights that fit a parameter tree.

  Of order one in the output, as `randomise` has them.
  """
  rng = np.random.default_rng(seed)
  state = {}
  for key, shape in params.torch_shapes(table, tree).items():
    x = rng.standard_normal(shape, np.float32)
    if len(shape) > 1:
      x *= 1.5 / np.prod(shape[1:]) ** 0.5
    else:  # norms' scales around 1, biases around 0
      x = 0.3 * x + key.endswith("weight")
    state[key] = x.astype(np.float32)
  return state


# Both vision stacks, two blocks of the language model, and grouped heads.
SMALL_AR = ARConfig(24, 16, 20, 32, 48, 4, 1, 1, 4, 2, 1e4, 1e-6, 64)


@functools.cache
def small_ar_params():
  """Random parameters of SMALL_AR."""
  table, tree = ar.rows(SMALL_AR), ar.abstract(SMALL_AR)
  return params_from_torch(table, tree, random_state(table, tree))


def randomise(model, seed=0):
  """Random weights of order one for a torch model, norms and biases too.

  Fresh modules have unit scales, zero biases and nearly uniform attention, so
  that swapped or forgotten ones would not show.
  """
  import torch

  generator = torch.Generator().manual_seed(seed)
  for weight in model.state_dict().values():
    noise = torch.randn(weight.shape, generator=generator)
    if weight.ndim > 1:
      weight.copy_(noise * (1.5 / weight[0].numel() ** 0.5))
    else:  # around 1 or 0; a fresh bias is no constant, but rounds to 0
      weight.copy_(weight.round() + 0.3 * noise)
  return model.eval().requires_grad_(False)


def max_difference(ours, theirs):
  """Largest absolute difference, of arrays of the same shape."""
  ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
  assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
  return np.abs(ours - theirs).max()


_worst: dict[tuple[str, str, str], tuple[float, float]] = {}


def agree(part, witness, quantity, ours, theirs, tolerance):
  """Asserts that two arrays differ by at most `tolerance`; 0: not at all.

  Part, witness ("golden values", "diffusers", ...) and quantity name the row
  of the parity table in which the worst error is kept.
  """
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape, (quantity, ours.shape, theirs.shape)
  error = float(np.abs(ours.astype(np.float64) - theirs).max())
  row = (part, witness, quantity)
  worst = _worst.get(row, (0.0, tolerance))[0]
  _worst[row] = (max(worst, error), tolerance)
  assert error <= tolerance, f"{row}: {error}"


def parity_table():
  """Markdown: the worst error of every row `agree` has seen."""
  lines = [
    "| part | witness | quantity | worst error | tolerance |",
    "| --- | --- | --- | --- | --- |",
  ]
  for (part, witness, quantity), (error, tolerance) in _worst.items():
    size = f"{error:.1e} | {tolerance:g}" if tolerance else "0 | exact"
    lines.append(f"| {part} | {witness} | {quantity} | {size} |")
  return "\n".join(lines)


def recorded(module_type, run):
  """What `run()` returns, and every call of modules of a type within it.

  The calls are (name, arguments, result), in order; name is None for blocks of
  a stack. Under `jit` they have to be returned from the traced function.
  """
  import flax.linen as nn

  calls = []

  def spy(function, args, kwargs, context):
    result = function(*args, **kwargs)
    module = context.module
    # `apply` also traces initialisers, to check the shapes of parameters.
    if (
      isinstance(module, module_type)
      and context.method_name == "__call__"
      and not module.is_initializing()
    ):
      calls.append((module.name, args, result))
    return result

  with nn.intercept_methods(spy):
    return run(), calls


def layer(stack, i):
  """The parameters of one layer of a stack."""
  import jax

  return jax.tree.map(lambda leaf: leaf[i], stack)
