"""The benchmark of the training step runs through; nothing is timed."""

import dataclasses
import json
import math

import numpy as np
import pytest

from xomni_jax import bench
from xomni_jax.bench import grpo, measure, training
from xomni_jax.data import text_ops
from xomni_jax.errors import InputError
from xomni_jax.training import configure
from xomni_jax.training.stages import grpo as grpo_stage


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
  """On busy cores PyTorch's threads wait for one another, minutes in all."""
  monkeypatch.setattr(measure, "cores", lambda: 1)


@pytest.fixture(scope="module")
def small():
  """The benchmark's config with 3 narrow blocks and 2 rows of 192 tokens."""
  spec = f"{bench._ROOT / 'configs' / 'pretrain.py'}:tiny"
  cfg, arch = configure.parse(configure.read(spec), spec)
  data = dataclasses.replace(cfg.data, seq_len=192, window=16)
  sizes = dataclasses.replace(
    arch.ar, hidden_size=32, intermediate_size=48, num_hidden_layers=3
  )
  return (
    dataclasses.replace(cfg, global_batch=2, data=data),
    dataclasses.replace(arch, ar=sizes),
  )


def test_training_benchmark_gives_every_figure_of_equal_losses(
  small, monkeypatch, tmp_path, capsys
):
  monkeypatch.setattr(configure, "parse", lambda *_: small)
  out = tmp_path / "report.json"
  assert bench.main(["--train", "--repeats", "1", "--json", str(out)]) == 0
  report = json.loads(out.read_text())
  figures = report["figures"]
  assert set(figures) == {training.PACKED, training.PADDED, training.SCANNED}
  for figure, entry in figures.items():
    numbers = [entry["jax"]]
    if figure != training.SCANNED:
      numbers += [entry["torch"], entry["ratio"]]
    assert all(math.isfinite(x) and x > 0 for x in numbers)
    # Of a loss near 6, float32 sums in another order: 1e-6 was seen.
    assert entry["first"] < 1e-4
  assert min(report["packing"].values()) > 0
  shown = capsys.readouterr().out
  assert all(line in shown for line in (*figures, "packed / padded"))


def test_packed_and_padded_rows_hold_the_same_samples(small):
  cfg, arch = small
  packed, padded, count, tokens = training.packed_and_padded(cfg, arch.ar)

  def found(batches):
    return sorted(
      tuple(row["tokens"][row["segments"] == i].tolist())
      for batch in batches
      for row in (
        {k: batch[k][b] for k in ("tokens", "segments")}
        for b in range(cfg.global_batch)
      )
      for i in range(1, row["segments"].max() + 1)
    )

  assert found(packed) == found(padded)
  assert len(found(packed)) == count > cfg.global_batch
  assert sum(map(len, found(packed))) == tokens
  assert sum(np.sum(b["segments"] > 0) for b in padded) == tokens


def instead_of_jax(*_):
  """Has the interface of `training.jax_trainer`, without compiling."""
  return lambda batches: lambda: np.full(len(batches), 3.0)


def test_training_benchmark_refuses_unequal_losses(small, monkeypatch):
  monkeypatch.setattr(training, "jax_trainer", instead_of_jax)
  with pytest.raises(RuntimeError, match=r"packed.*losses differ"):
    training.compare(*small, repeats=1)


def test_training_benchmark_without_torch_leaves_its_column_empty(
  small, monkeypatch
):
  monkeypatch.setattr(training, "jax_trainer", instead_of_jax)
  monkeypatch.setattr(measure, "absent", lambda *names: list(names))
  report = training.compare(*small, repeats=1)
  assert report["packing"]["jax"] > 0
  assert report["packing"]["torch"] is None
  assert all(e["torch"] is None for e in report["figures"].values())
  assert "not installed: torch" in training.table(report)


@pytest.mark.parametrize(
  "more", [["--size", "tiny"], ["--model", "ar"], ["--scan"]]
)
def test_training_benchmark_refuses_what_it_does_not_take(more):
  with pytest.raises(InputError, match="have sizes of their own"):
    bench.main(["--train", *more])


@pytest.mark.slow
def test_grpo_benchmark_gives_seconds_of_every_part(monkeypatch, capsys):
  spec = f"{bench._ROOT / 'configs' / 'grpo.py'}:tiny"
  config = configure.read(spec)
  sizes = configure.read(f"{bench._ROOT / 'configs' / 'model.py'}:tiny")
  config.architecture = {k: sizes[k] for k in config.architecture}
  configure.override(
    config,
    [
      *("global_batch=4", "options.group_size=2", "options.paint_rows=4"),
      *("options.paint_steps=1", "options.sizes=((32, 32),)"),
    ],
  )
  read = configure.read
  monkeypatch.setattr(
    configure, "read", lambda s: config if "grpo" in s else read(s)
  )
  lengths = []

  def t5_ids(folder, length, backend):
    lengths.append(length)
    return text_ops.T5Ids(folder, length, backend)

  monkeypatch.setattr(grpo_stage, "T5Ids", t5_ids)
  assert bench.main(["--grpo", "--repeats", "1"]) == 0
  decoder = read(f"{bench._ROOT / 'configs' / 'decoder.py'}:tiny")
  assert lengths == [decoder.options.text_len] * 2  # as people paint
  out = capsys.readouterr().out
  assert "4 images a step; overlap hides" in out
  for part in (*grpo.PARTS, grpo.UPDATE, grpo.STEP):
    (line,) = (x for x in out.splitlines() if x.startswith(part))
    assert len(line.split()) >= 5, line
