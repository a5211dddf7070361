"""Configs and meshes: what is read, what is refused, what is derived."""

import dataclasses
import json
import subprocess
import sys

import jax
import pytest
from jax.sharding import PartitionSpec as P

from configs.model import get_config
from tests.helpers import GOLDEN
from xomni_jax import config, config_files, mesh
from xomni_jax.checkpoints import released_config, released_json
from xomni_jax.errors import InputError


@pytest.fixture
def raw():
  return json.loads((GOLDEN / "xomni/config.json").read_text())


def test_released_config_is_read_as_it_stands(raw):
  cfg = released_config.xomni_config(raw, "config.json")
  assert (cfg.ar.head_dim, cfg.ar.num_lm_layers) == (16, 3)
  assert cfg.decoder == config.DecoderConfig(16, 6, 1.5)
  assert cfg.eos_token_ids == (378,)
  assert cfg.transform.max_aspect_ratio == 3.0


def test_sliding_window_number_without_its_switch_is_ignored(raw):
  raw["sliding_window"] = 128
  released_config.xomni_config(raw, "config.json")


def test_heads_of_a_released_vit_come_from_its_name(raw):
  raw["vision_config"]["encoder"]["siglip_name"] = "siglip2_giant_patch16_384"
  raw["vision_config"]["siglip_heads"] = 4  # ignored, as the reference does
  assert released_config.xomni_config(raw, "c").siglip_heads == 16


def test_all_problems_of_a_config_are_named_at_once(raw):
  del raw["hidden_size"]
  raw["rms_norm_eps"] = "small"
  raw["hidden_act"] = "gelu"
  with pytest.raises(InputError) as e:
    released_config.xomni_config(raw, "config.json")
  for word in (
    "hidden_size is missing",
    "rms_norm_eps",
    "hidden_act is 'gelu'",
  ):
    assert word in str(e.value)
  assert "\n" not in str(e.value)


def test_architecture_comes_from_a_config_dict():
  arch = config_files.architecture(get_config("7b"), "configs/model.py")
  assert arch.ar.num_lm_layers == 28
  assert arch.flux.axes_dims_rope == (16, 56, 56)
  assert hash(arch) == hash(config_files.architecture(get_config("7b"), "c"))


def test_architecture_refuses_what_it_does_not_know():
  cfg = get_config("tiny")
  cfg.ar.colour = "red"
  del cfg.t5
  with pytest.raises(InputError, match=r"missing sections \['t5'\].*ar.colour"):
    config_files.architecture(cfg, "c")


def test_tiny_config_is_the_golden_checkpoint(raw):
  tiny = config_files.architecture(get_config("tiny"), "c")
  assert tiny.ar == released_config.ar_config(raw, "c")
  flux = json.loads((GOLDEN / "xomni/flux/config.json").read_text())
  assert tiny.flux == released_config.flux_config(flux, "c")
  for name, folder in (
    ("vae", "vae"),
    ("clip", "text_encoder"),
    ("t5", "text_encoder_2"),
  ):
    read = getattr(released_config, f"{name}_config")
    file = GOLDEN / "flux1" / folder / "config.json"
    assert getattr(tiny, name) == read(json.loads(file.read_text()), "c")


def test_configs_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.Compute().dtype = "bfloat16"
  with pytest.raises(InputError, match="float16"):
    config.Compute(dtype="float16")


class _Mesh:
  """Only what `spec` looks at."""

  def __init__(self, **shape):
    self.shape = shape


def test_spec_replicates_what_does_not_divide():
  m = _Mesh(data=2, fsdp=2, tensor=2, context=1)
  assert mesh.spec(("embed", "heads", "head_dim"), (64, 4, 16), m) == P(
    ("fsdp",), ("tensor",), None
  )
  assert mesh.spec(("embed", "heads"), (64, 3), m) == P(("fsdp",), None)
  # The longest prefix of (data, fsdp) that divides the batch.
  assert mesh.spec(("batch",), (8,), m) == P(("data", "fsdp"))
  assert mesh.spec(("batch",), (6,), m) == P(("data",))
  assert mesh.spec(("batch",), (3,), m) == P(None)


def test_mesh_is_made_of_what_is_asked_for():
  assert mesh.parse_mesh("data=1,tensor=1").shape["tensor"] == 1
  with pytest.raises(InputError, match="needs 4096 devices"):
    mesh.make_mesh(data=4096)
  with pytest.raises(InputError, match="at least 1"):
    mesh.make_mesh(data=0)
  for bad in ("rows=2", "data", "data=x", "data=1,data=1"):
    with pytest.raises(InputError, match="is not one of"):
      mesh.parse_mesh(bad)


def test_constrain_without_a_mesh_is_the_identity():
  x = jax.numpy.ones((2, 2))
  assert mesh.constrain(x, "batch", None) is x


def test_no_module_imports_torch_or_tensorflow_on_its_own():
  """They are imported where they are used: cold they take 3 and 21 seconds."""
  code = (
    "import pkgutil, importlib, sys, xomni_jax\n"
    "for m in pkgutil.walk_packages(xomni_jax.__path__, 'xomni_jax.'):\n"
    "  if not m.name.startswith('xomni_jax.sidecar') and 'main' not in m.name:\n"
    "    importlib.import_module(m.name)\n"
    "print(*(m for m in ('torch', 'tensorflow', 'transformers', 'diffusers') if m in sys.modules))"
  )
  run = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True
  )
  assert run.stdout.strip() == "", run.stdout
  assert run.returncode == 0, run.stderr


def test_an_image_is_of_the_size_that_the_folder_says_or_square(raw):
  square = raw["vision_config"]["transform"]["long_size"]
  cfg = released_config.xomni_config(raw, "c")
  assert cfg.image_size == (square, square)
  assert "image_size" not in _decoder(cfg)
  raw["vision_config"]["decoder"]["image_size"] = [96, 48]
  cfg = released_config.xomni_config(raw, "c")
  assert cfg.image_size == (96, 48) == tuple(_decoder(cfg)["image_size"])
  raw["vision_config"]["decoder"]["image_size"] = [96]
  with pytest.raises(InputError, match="height and width"):
    released_config.xomni_config(raw, "c")


def test_answers_end_at_tokens_of_both_files(raw):
  ends = lambda *of: released_config.xomni_config(raw, "c", *of).eos_token_ids
  first = raw["eos_token_id"]
  assert ends() == (first,)
  assert ends({"eos_token_id": [first, 7]}) == (first, 7)
  del raw["eos_token_id"]
  assert ends({"eos_token_id": 7}) == (7,)


def _decoder(cfg):
  return released_json.xomni_json(cfg, "float32")["vision_config"]["decoder"]
