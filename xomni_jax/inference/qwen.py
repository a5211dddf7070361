"""Qwen2.5 checkpoints in Hugging Face layout: in, out, and into the AR model.

Tied checkpoints (0.5B to 3B) use the text embedding as the head. Such a file
may hold `lm_head.weight` besides, which is then not read, as in transformers.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from xomni_jax.checkpoints import released
from xomni_jax.checkpoints.released import Part
from xomni_jax.checkpoints.released_config import read_json
from xomni_jax.checkpoints.tensor_files import TensorFile, folder_files
from xomni_jax.config import ARConfig, LMConfig
from xomni_jax.config_files import from_mapping
from xomni_jax.errors import InputError
from xomni_jax.inference.checkpoint import resolve
from xomni_jax.models import ar, lm
from xomni_jax.params import Row, matched, to_torch

_STEM = "model"
_PATTERNS = ["*.json", "*.safetensors", "*.txt"]
_TIED_HEAD = r"lm_head\.weight"


@dataclasses.dataclass(frozen=True)
class Qwen:
  """A Qwen2.5 folder, opened.

  Attributes:
    folder: where it is.
    config: what its `config.json` says.
    part: its weights as those of `models.lm`.
  """

  folder: pathlib.Path
  config: LMConfig
  part: Part

  @property
  def files(self) -> tuple[TensorFile, ...]:
    return tuple(self.part.files)

  @property
  def ignore(self) -> str:
    """Of tensors that may be there unused, as in `Part`."""
    return _TIED_HEAD if self.config.tie_word_embeddings else ""


def open_qwen(path_or_id: str | pathlib.Path) -> Qwen:
  """Opens a Qwen2.5 folder or hub id; InputError where it does not fit."""
  folder = resolve(path_or_id, _PATTERNS)
  where = folder / "config.json"
  config = lm_config(read_json(where), str(where))
  ignore = _TIED_HEAD if config.tie_word_embeddings else ""
  files = folder_files(folder, _STEM)
  part = Part(
    "language model", lm.rows(config), lm.abstract(config), files, ignore
  )
  return Qwen(folder, config, part)


def lm_config(config: Mapping[str, Any], where: str) -> LMConfig:
  """A Qwen2 language model's config out of its `config.json`.

  Raises:
    InputError: it is of another model type, or a setting is missing or of a
      kind that is not implemented.
  """
  if config.get("model_type") != "qwen2":
    raise InputError(
      f"{where}: model_type is {config.get('model_type')!r}, expected 'qwen2'; "
      "name the folder of a Qwen2.5 checkpoint"
    )
  # transformers 5 keeps what it once had as rope_theta and rope_scaling here.
  rope = config.get("rope_parameters") or {}
  kinds = set(config.get("layer_types") or ()) - {"full_attention"}
  if rope.get("rope_type", "default") != "default" or kinds:
    raise InputError(
      f"{where}: rope_parameters {rope}, layer types {sorted(kinds)}: only "
      "plain RoPE and full attention are known"
    )
  return from_mapping(
    LMConfig,
    {"tie_word_embeddings": False, **rope, **config},
    where,
    hidden_act="silu",
    rope_scaling=None,
    use_sliding_window=False,
  )


def check_same(qwen: Qwen, cfg: LMConfig) -> None:
  """Raises InputError where a language model's config is not the folder's."""
  theirs = dataclasses.asdict(qwen.config)
  ours = dataclasses.asdict(cfg)
  _check_sizes(
    qwen.folder,
    "lm",
    {
      name: (ours[name], theirs[name])
      for name in theirs
      if name != "max_position_embeddings"
    },
  )


def _check_sizes(folder, what, pairs):
  wrong = [
    f"{name} {have} (the checkpoint has {got})"
    for name, (have, got) in pairs.items()
    if have != got
  ]
  if wrong:
    raise InputError(
      f"{folder}: {what} of the config has {', '.join(wrong)}; expected them "
      "equal, change the config or name another Qwen2.5"
    )


def ar_part(qwen: Qwen, cfg: ARConfig) -> Part:
  """What an AR model takes from a Qwen2.5 checkpoint, to be loaded.

  The `lm` stack, text embedding and norm, and the head unless it is tied.

  Raises:
    InputError: sizes or constants differ; all of them in one line.
  """
  theirs = qwen.config
  pairs = {
    f.name: (getattr(cfg, f.name, None), getattr(theirs, f.name))
    for f in dataclasses.fields(LMConfig)
    if f.name not in ("tie_word_embeddings", "max_position_embeddings")
  }
  pairs["num_hidden_layers"] = cfg.num_lm_layers, theirs.num_hidden_layers
  _check_sizes(qwen.folder, "the language stack", pairs)
  table = [
    *(
      dataclasses.replace(row, first=0)
      for row in ar.rows(cfg)
      if row.path.startswith("lm/")
    ),
    Row(
      "lm_embed_tokens",
      "model.embed_tokens.weight",
      "vocab embed -> vocab embed",
    ),
    Row("lm_norm/scale", "model.norm.weight", "norm -> norm"),
  ]
  if not theirs.tie_word_embeddings:
    table.append(Row("lm_head", "lm_head.weight", "vocab embed -> vocab embed"))
  whole = ar.abstract(cfg)
  names = {row.path.split("/")[0] for row in table}
  tree = {name: x for name, x in whole.items() if name in names}
  return Part("language model", table, tree, qwen.files, qwen.ignore)


def load_ar(
  qwen: Qwen, cfg: ARConfig, mesh: jax.sharding.Mesh, dtype: str | None
) -> dict[str, Any]:
  """The AR model's parameters that come from Qwen2.5, placed on a mesh.

  Args:
    qwen: the checkpoint.
    cfg: of the AR model.
    mesh, dtype: as in `checkpoints.released.load`.
  Returns:
    {"lm", "lm_embed_tokens", "lm_norm", "lm_head"} of the AR model's tree; the
    other entries are for the caller to initialise.
  Raises:
    InputError: as `ar_part`.
  """
  params = released.load(ar_part(qwen, cfg), mesh, dtype)
  if qwen.config.tie_word_embeddings:
    # A buffer of its own: the two train apart, and the step donates both.
    params["lm_head"] = jnp.copy(params["lm_embed_tokens"])
  return params


def write_qwen(
  out: pathlib.Path,
  cfg: LMConfig,
  params: dict[str, Any],
  eos_token_id: int | None = None,
) -> None:
  """Writes a language model in Hugging Face layout; all of it or nothing.

  Args:
    out: a new folder.
    cfg, params: of `models.lm`.
    eos_token_id: where generation stops.
  Raises:
    InputError: `out` exists or can't be made.
  """
  leaf = next(leaf for _, leaf in matched(lm.rows(cfg), params))
  config = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    **dataclasses.asdict(cfg),
    "hidden_act": "silu",
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "eos_token_id": eos_token_id,
    "torch_dtype": jnp.dtype(leaf.dtype).name,
  }
  with released.staged(pathlib.Path(out)) as folder:
    released.write_json(folder / "config.json", config)
    released.write_safetensors(folder, _STEM, to_torch(lm.rows(cfg), params))
