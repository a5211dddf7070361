"""Training steps on eight fake devices and on one: what comes out.

  python -m tests.multidevice.train_eight OUT

writes OUT/facts.json, which test_train_eight.py judges. A process of its own,
since the count of devices is fixed when JAX starts.
"""

import itertools
import json
import pathlib
import sys

import jax
import numpy as np

from tests import helpers, train_configs
from xomni_jax import mesh as mesh_lib
from xomni_jax.config import Compute
from xomni_jax.config_files import load_architecture
from xomni_jax.reward_config import RewardConfig
from xomni_jax.stage_options import ARTrainOptions, GRPOOptions
from xomni_jax.train_config import OptimConfig
from xomni_jax.training import layout as layout_lib
from xomni_jax.training import step as step_lib
from xomni_jax.training.stages import ar, grpo_program

ROWS, LENGTH, STEPS = 8, 48, 2
# {name: (mesh, settings)}: every combination of axes that the configs use, and
# each axis of the mesh at least once.
MUON = (r"ar/.*/kernel",)
RUNS = {
  "one": ({}, {}),
  "fsdp": ({"fsdp": 8}, {"remat": "full"}),
  "data_fsdp": ({"data": 2, "fsdp": 4}, {"accumulate": 1}),
  "fsdp_tensor": ({"data": 2, "fsdp": 2, "tensor": 2}, {"accumulate": 2}),
  "context": ({"data": 2, "context": 4}, {"chunk": 8}),
  "slices": ({"slice": 2, "fsdp": 2, "context": 2}, {"remat": "dots"}),
  "muon_one": ({}, {"muon": MUON}),
  "muon": ({"data": 2, "fsdp": 2, "tensor": 2}, {"muon": MUON}),
  "grpo_one": ({}, {"stage": "grpo"}),
  "grpo": ({"data": 2, "fsdp": 2, "tensor": 2}, {"stage": "grpo"}),
  "grpo_remat": ({"data": 2, "fsdp": 4}, {"stage": "grpo", "remat": "full"}),
}


def compared(name):
  """The run that another one has to equal."""
  kind = name.split("_")[0]
  return f"{kind}_one" if kind in ("grpo", "muon") else "one"


GRPO = GRPOOptions(
  sizes=((48, 64),),
  rewards=(RewardConfig("x", "local:ocr"),),
  prompt_len=20,
  top_k=8,
  beta=0.1,
  loss_chunk=5,
)


def config(
  mesh, accumulate=1, remat="none", chunk=16, stage="pretrain", muon=()
):
  return train_configs.train_config(
    STEPS,
    "ar/",
    stage=stage,
    global_batch=ROWS,
    data=train_configs.data(LENGTH),
    optim=OptimConfig(
      lr=1e-2, weight_decay=0.1, accumulate=accumulate, muon=muon
    ),
    compute=Compute(scan_layers=True, remat=remat, query_chunk=chunk),
    mesh=tuple(mesh.items()),
    options=GRPO if stage == "grpo" else ARTrainOptions(loss_chunk=12),
  )


def batch(vocabulary):
  """Packed rows of random tokens; rows differ in what they count."""
  rng = np.random.default_rng(0)
  segments = np.zeros((ROWS, LENGTH), np.int32)
  positions = np.zeros_like(segments)
  for row in range(ROWS):
    cuts = [0, *sorted(rng.choice(np.arange(4, 40), 3, replace=False))]
    for i, (a, b) in enumerate(itertools.pairwise(cuts)):
      segments[row, a:b] = i + 1
      positions[row, a:b] = np.arange(b - a)
  return {
    "tokens": rng.integers(0, vocabulary, segments.shape).astype(np.int32),
    "segments": segments,
    "positions": positions,
    "weights": ((segments > 0) & (positions > 0)).astype(np.float32),
    "id": np.arange(ROWS, dtype=np.int32),
  }


def rollout(program, vocabulary, codes):
  """Images of random codes, on both sides of the clip; one has no reward."""
  rng = np.random.default_rng(0)
  rows = {k: np.zeros(x.shape, x.dtype) for k, x in program.batch.items()}
  P = GRPO.prompt_len
  rows["codes"] = rng.integers(0, codes, rows["codes"].shape).astype(np.int32)
  rows["tokens"][:, :P] = rng.integers(0, vocabulary, (ROWS, P))
  rows["tokens"][:, P:] = rows["codes"][:, :-1] + vocabulary
  rows["valid"][:] = np.arange(rows["tokens"].shape[1]) >= rng.integers(
    0, P - 4, (ROWS, 1)
  )
  rows["mask"][:] = np.arange(ROWS)[:, None] != 3
  rows["advantage"][:] = rng.normal(0, 1, rows["advantage"].shape)
  for name in ("logp_old", "logp_ref", "logp_sampler"):
    rows[name][:] = -4 + rng.normal(0, 0.5, rows[name].shape)
  kept = rng.random((*rows["codes"].shape, codes)) < 0.2
  np.put_along_axis(kept, rows["codes"][..., None], True, axis=-1)
  rows["support"] = np.packbits(kept, axis=-1)
  return rows


def run(mesh_sizes, settings):
  """(metrics of every step, parameters after the last)."""
  cfg = config(mesh_sizes, **settings)
  arch = load_architecture(
    f"{helpers.GOLDEN.parents[2] / 'configs' / 'model.py'}:tiny"
  )
  mesh = mesh_lib.make_mesh(**mesh_sizes)
  if cfg.stage == "grpo":
    program = grpo_program.program(cfg, arch)
    rows = rollout(program, arch.ar.vocab_size, arch.ar.image_vocab_size)
  else:
    program = ar.program(cfg, arch)
    rows = batch(arch.ar.vocab_size + arch.ar.image_vocab_size + 3)
  layout = layout_lib.make_layout(program.parts, cfg.phases, mesh, "float32")
  with jax.set_mesh(mesh):
    drawn = layout_lib.flatten(jax.jit(program.init)(jax.random.key(0)))
    placed = {
      path: jax.device_put(x, layout.sharding(path))
      for path, x in drawn.items()
    }
    params = {path: placed[path] for path in layout.trained}
    frozen = {path: placed[path] for path in layout.frozen}
    shardings = jax.tree.map(
      lambda x: x.sharding, step_lib.abstract_state(cfg, program, layout)
    )
    state = jax.jit(
      lambda params: step_lib.init_state(cfg, program, layout, params),
      out_shardings=shardings,
    )(params)
    rows = step_lib.place_batch(rows, mesh)
    step = step_lib.train_step(cfg, program, layout, 0)
    metrics = []
    for _ in range(STEPS):
      state, made = step(
        state, frozen, rows, jax.random.key(1), np.float32(cfg.optim.lr)
      )
      metrics.append({k: float(v) for k, v in made.items()})
  facts = {
    "metrics": metrics,
    "programs": step._cache_size(),
    "shard": {
      path: list(x.addressable_shards[0].data.shape)
      for path, x in state["params"].items()
      if "q_proj/kernel" in path or "lm_head" in path
    },
  }
  return facts, {k: np.asarray(v) for k, v in state["params"].items()}


def main(out):
  facts, kept = {}, {}
  for name, (mesh_sizes, settings) in RUNS.items():
    facts[name], params = run(mesh_sizes, settings)
    base = kept.setdefault(compared(name), params)
    facts[name]["params"] = max(
      float(np.abs(params[path] - base[path]).max()) for path in base
    )
  (out / "facts.json").write_text(json.dumps(facts, indent=2))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
