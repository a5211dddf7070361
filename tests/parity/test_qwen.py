"""Qwen2.5 checkpoints against transformers: read, written, inside the AR model.

Weights are random, of order one in the output, norms and biases included.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import agree, randomise
from xomni_jax.checkpoints import released
from xomni_jax.config import ARConfig
from xomni_jax.errors import InputError
from xomni_jax.inference import qwen
from xomni_jax.mesh import make_mesh
from xomni_jax.models import ar, lm

torch = pytest.importorskip("torch")

# The issue's; logits reach 10, and float32 sums differ by about 1e-5 of that.
LOGITS = 2e-4
KINDS = ("tied", "untied", "tied, with its head")


@functools.cache
def reference(tied):
  """transformers' model with random weights."""
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  model = transformers.Qwen2ForCausalLM(
    transformers.Qwen2Config(
      vocab_size=50,
      hidden_size=48,
      intermediate_size=80,
      num_hidden_layers=3,
      num_attention_heads=6,
      num_key_value_heads=2,
      max_position_embeddings=64,
      rms_norm_eps=1e-6,
      rope_parameters={"rope_type": "default", "rope_theta": 1e6},
      tie_word_embeddings=tied,
      attn_implementation="eager",
    )
  )
  return randomise(model)


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory):
  """transformers' model and the folder it was saved to."""
  model = reference(request.param != "untied")
  folder = tmp_path_factory.mktemp("qwen")
  model.save_pretrained(folder)
  if request.param == "tied, with its head":
    # Some released files hold a head that transformers does not look at.
    path = folder / "model.safetensors"
    state = load_file(path)
    other = np.ones_like(state["model.embed_tokens.weight"])
    save_file({**state, "lm_head.weight": other}, path, {"format": "pt"})
  return model, folder


def tokens_and_logits(model):
  tokens = np.random.default_rng(1).integers(0, 50, (2, 11))
  return tokens, model(torch.from_numpy(tokens)).logits.numpy()


def one_device():
  return make_mesh(devices=jax.devices()[:1])


def our_logits(cfg, params, tokens):
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden = lm.CausalLM(cfg).apply(
    {"params": params}, tokens, positions, np.ones(tokens.shape, bool)
  )
  return lm.logits(params, hidden, cfg)


def test_lm_logits_match_transformers(checkpoint):
  model, folder = checkpoint
  opened = qwen.open_qwen(folder)
  params = released.load(opened.part, one_device(), None)
  tokens, theirs = tokens_and_logits(model)
  ours = our_logits(opened.config, params, tokens)
  agree("Qwen2.5", "transformers", "logits", ours, theirs, LOGITS)


def test_lm_prefix_stands_for_embeddings(checkpoint):
  """Embeddings before the tokens act as the tokens they are of."""
  model, folder = checkpoint
  opened = qwen.open_qwen(folder)
  params = released.load(opened.part, one_device(), None)
  tokens, theirs = tokens_and_logits(model)
  shape = tokens.shape
  hidden = lm.CausalLM(opened.config).apply(
    {"params": params},
    tokens[:, 4:],
    jnp.broadcast_to(jnp.arange(shape[1]), shape),
    np.ones(shape, bool),
    params["embed_tokens"][tokens[:, :4]],
  )
  ours = lm.logits(params, hidden, opened.config)
  agree(
    "Qwen2.5", "transformers", "logits after a prefix", ours, theirs, LOGITS
  )


# One and two vision-only blocks around the three of the language model.
AR = ARConfig(50, 16, 20, 48, 80, 6, 1, 2, 6, 2, 1e6, 1e-6, 64)


def random_ar(seed):
  """Random parameters of order one, those of Qwen2.5 among them."""
  leaves, treedef = jax.tree.flatten(ar.abstract(AR))
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(
    treedef, [rng.standard_normal(x.shape, np.float32) for x in leaves]
  )


@pytest.mark.parametrize("seed", (0, 1))
def test_ar_text_logits_are_those_of_qwen(checkpoint, seed):
  """Text alone does not depend on the image side, whatever it holds."""
  model, folder = checkpoint
  loaded = qwen.load_ar(qwen.open_qwen(folder), AR, one_device(), None)
  params = {**random_ar(seed), **loaded}
  tokens, theirs = tokens_and_logits(model)
  valid = np.ones(tokens.shape, bool)
  hidden, _ = ar.XOmniAR(AR).apply(
    {"params": params}, tokens, ar.positions_of(valid), valid
  )
  ours = ar.text_logits(params, hidden)
  agree("AR from Qwen2.5", "transformers", "text logits", ours, theirs, LOGITS)


def test_ar_takes_lm_and_text_tensors_only(checkpoint):
  _, folder = checkpoint
  loaded = qwen.load_ar(qwen.open_qwen(folder), AR, one_device(), "bfloat16")
  assert set(loaded) == {"lm", "lm_embed_tokens", "lm_norm", "lm_head"}
  whole = {k: v for k, v in ar.abstract(AR).items() if k in loaded}
  assert jax.tree.map(lambda x: x.shape, loaded) == jax.tree.map(
    lambda x: x.shape, whole
  )
  assert {x.dtype.name for x in jax.tree.leaves(loaded)} == {"bfloat16"}
  # A step donates both; donating one buffer twice is an error.
  head, table = loaded["lm_head"], loaded["lm_embed_tokens"]
  assert head.unsafe_buffer_pointer() != table.unsafe_buffer_pointer()


def test_ar_parameters_are_born_sharded(checkpoint):
  _, folder = checkpoint
  mesh = one_device()
  loaded = qwen.load_ar(qwen.open_qwen(folder), AR, mesh, None)
  assert all(x.sharding.mesh == mesh for x in jax.tree.leaves(loaded))


@pytest.mark.parametrize(
  "change",
  (
    dict(vocab_size=64),
    dict(vocab_size=40),
    dict(num_hidden_layers=7),
    dict(rope_theta=1e4, intermediate_size=96),
  ),
)
def test_ar_of_other_sizes_is_refused_in_one_line(checkpoint, change):
  _, folder = checkpoint
  opened = qwen.open_qwen(folder)
  with pytest.raises(InputError) as error:
    qwen.ar_part(opened, dataclasses.replace(AR, **change))
  text = str(error.value)
  assert "\n" not in text and str(folder) in text
  assert all(name in text for name in change)


def test_written_folder_is_read_by_transformers_and_us(checkpoint, tmp_path):
  transformers = pytest.importorskip("transformers")
  model, folder = checkpoint
  opened = qwen.open_qwen(folder)
  params = released.load(opened.part, one_device(), None)
  qwen.write_qwen(tmp_path / "lm", opened.config, params, eos_token_id=7)
  again, notes = transformers.Qwen2ForCausalLM.from_pretrained(
    tmp_path / "lm", output_loading_info=True, attn_implementation="eager"
  )
  assert not any(notes[k] for k in ("missing_keys", "unexpected_keys"))
  assert again.config.eos_token_id == 7
  tokens, theirs = tokens_and_logits(model)
  with torch.no_grad():
    written = again.eval()(torch.from_numpy(tokens)).logits.numpy()
  agree("Qwen2.5", "transformers", "logits, written", written, theirs, 0)
  reopened = qwen.open_qwen(tmp_path / "lm")
  assert reopened.config == opened.config
  reloaded = released.load(reopened.part, one_device(), None)
  assert jax.tree.all(
    jax.tree.map(lambda a, b: bool((a == b).all()), params, reloaded)
  )


@pytest.mark.parametrize(
  ("change", "says"),
  (
    ({"model_type": "llama"}, "'qwen2'"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "yarn"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
    ({"hidden_size": 60}, "misshapen"),
    ({"tie_word_embeddings": False}, "lm_head.weight"),
  ),
)
def test_other_checkpoints_are_refused(tmp_path, change, says):
  folder = tmp_path / "qwen"
  reference(True).save_pretrained(folder)
  path = folder / "config.json"
  config = json.loads(path.read_text())
  path.write_text(json.dumps({**config, **change}))
  with pytest.raises(InputError, match=says) as error:
    qwen.open_qwen(folder)
  assert "\n" not in str(error.value)


def test_config_of_older_files_is_read():
  """Released Qwen2.5 files have rope_theta at the top, and no rope_parameters."""
  config = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "max_position_embeddings": 32768,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
  }
  read = qwen.lm_config(config, "config.json")
  assert (read.rope_theta, read.tie_word_embeddings) == (1e6, True)
