"""The benchmark runs through, and what it counts is right; nothing is timed."""

import dataclasses
import json
import math

import jax
import pytest

from xomni_jax import bench
from xomni_jax.bench import compare, measure, part, roofline, torch_work, work
from xomni_jax.config import Compute
from xomni_jax.config_files import load_architecture
from xomni_jax.errors import InputError
from xomni_jax.models import flux

AR = dataclasses.replace(
  compare.AR_100M,
  hidden_size=32,
  intermediate_size=48,
  image_vocab_size=60,
  mm_vocab_size=64,
  num_hidden_layers=2,
  num_attention_heads=4,
)
FLUX = dataclasses.replace(
  compare.FLUX_100M,
  num_layers=1,
  num_single_layers=2,
  num_attention_heads=3,
  attention_head_dim=16,
  axes_dims_rope=(4, 6, 6),
  joint_attention_dim=24,
  pooled_projection_dim=20,
)
CONFIGS = {"ar": AR, "flux": FLUX}
LOAD = work.LOADS["tiny"]
FIGURES = [f for figures in LOAD.figures().values() for f in figures]


def positive(*values):
  return all(math.isfinite(v) and v > 0 for v in values)


def test_compare_gives_every_figure_of_equal_results():
  report = compare.compare(CONFIGS, LOAD, Compute(), repeats=1)
  figures = report["figures"]
  # Float32 sums in another order: 1e-6 was seen, a wrong weight gives 1e-1.
  assert all(entry["difference"] < 1e-4 for entry in figures.values())
  assert set(figures) == {"logits", *FIGURES}
  for figure in FIGURES:
    entry = figures[figure]
    assert positive(entry["jax"], entry["torch"], entry["ratio"])
    assert figure in bench.small_table(report)


def test_compare_refuses_unequal_results(monkeypatch):
  make = torch_work.flux_calls

  def other(cfg, model, load):
    model.proj_out.bias += 0.1
    return make(cfg, model, load)

  monkeypatch.setattr(torch_work, "flux_calls", other)
  with pytest.raises(RuntimeError, match=r"denoising.*differ"):
    compare.compare({"flux": FLUX}, LOAD, Compute(), repeats=1)


def test_full_size_path_gives_every_figure_in_small(
  monkeypatch, tmp_path, capsys
):
  """In this process, as four new ones would take most of their time to start.

  How they are started is seen in the test without a GPU.
  """

  def run_here(args, model, framework):
    task = part.Task(
      model=model,
      framework=framework,
      config=args.config,
      size=args.size,
      gpu=False,
      scan=args.scan,
      repeats=args.repeats,
      out=str(tmp_path / "part.json"),
    )
    part.main(json.dumps(dataclasses.asdict(task)))
    return json.loads((tmp_path / "part.json").read_text())

  monkeypatch.setattr(bench, "_run_part", run_here)
  out = tmp_path / "report.json"
  peaks = ["--bandwidth", "0.01", "--flops", "0.1"]
  args = ["--size", "tiny", "--repeats", "1", *peaks, "--json", str(out)]
  assert bench.main(args) == 0
  parts = json.loads(out.read_text())["parts"]
  assert not [p for p in parts.values() if "failed" in p]
  for model, figures in LOAD.figures().items():
    for framework in ("jax", "torch"):
      found = parts[f"{model} {framework}"]
      assert set(found["figures"]) == set(figures)
      assert positive(found["parameters"], *found["figures"].values())
    assert positive(*parts[f"{model} jax"]["needs"].values())
  lines = capsys.readouterr().out.splitlines()
  for figure in FIGURES:
    line = next(x for x in lines if x.startswith(figure))
    # Prefill has no share of a peak.
    assert line.count("%") == (0 if figure == LOAD.prefill else 2)


def test_full_size_without_a_gpu_is_an_input_error(monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  with pytest.raises(InputError, match="size 7b needs a GPU, jax sees only"):
    bench.main(["--size", "7b"])


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--size", "9b"], "9b"),
    (["--repeats", "0"], "repeats is 0, expected"),
    (["--bandwidth", "-1"], "bandwidth is -1"),
    (["--json", "/no/such/folder/x.json"], "folder does not exist"),
    (["--json", "/tmp"], "is a folder, expected the name of a file"),
    (["--size", "7b", "--config", "no.py"], r"no\.py: no such Python file"),
  ],
)
def test_bad_arguments_are_input_errors(args, message):
  with pytest.raises(InputError, match=message):
    bench.main(args)


def test_absent_packages_leave_their_column_empty(monkeypatch):
  found = measure.absent
  without = lambda *names: [n for n in names if n != "numpy"] or found(*names)
  monkeypatch.setattr(measure, "absent", without)
  report = compare.compare(CONFIGS, LOAD, Compute(), repeats=1)
  assert report["absent"] == ["torch", "transformers", "diffusers"]
  for figure in FIGURES:
    assert positive(report["figures"][figure]["jax"])
    assert report["figures"][figure]["torch"] is None
  assert "not installed: torch" in bench.small_table(report)


def test_step_flops_are_what_the_compiler_counts():
  cfg, load = FLUX, dataclasses.replace(LOAD, grid=(6, 8), text=32)
  latents, text, pooled = work.denoising_inputs(cfg, load)
  features = jax.ShapeDtypeStruct((2, 48, cfg.siglip_channels), "float32")
  two = jax.ShapeDtypeStruct((2,), "float32")
  rows = jax.ShapeDtypeStruct((2, *latents.shape[1:]), "float32")
  apply = jax.jit(flux.Flux(cfg).apply, static_argnums=6)
  params = {"params": flux.abstract(cfg)}
  lowered = apply.lower(params, rows, text, pooled, two, two, (6, 8), features)
  compiled = lowered.compile().cost_analysis()["flops"]
  counted = roofline.step_flops(cfg, text=32, image=48, rows=2)
  # The compiler adds norms, softmax and activations, a few % at this width.
  assert 0.85 * compiled < counted < compiled


def test_decode_bytes_are_weights_and_cache():
  cfg = load_architecture(bench._parse([]).config + ":7b").ar
  attention = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3584 + 2 * 512
  block = attention + 3 * 3584 * 18944 + 2 * 3584
  weights = 36 * block + 16384 * 3584
  assert roofline.decode_bytes(cfg, 1, 0, 2) == 2 * weights
  cache = roofline.decode_bytes(cfg, 64, 1000, 2) - 2 * weights
  assert cache == 2 * 64 * 1000 * 36 * 2 * 4 * 128


@pytest.mark.parametrize(
  ("device", "bandwidth", "flops"),
  [
    ("NVIDIA H100 80GB HBM3", 3.35e12, 989e12),
    ("NVIDIA H100 PCIe", 2.0e12, 756e12),
    ("NVIDIA H200", 4.8e12, 989e12),
    ("NVIDIA A100-SXM4-80GB", 2.039e12, 312e12),
    ("NVIDIA L40S", 0.864e12, 362e12),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
    ("cpu", None, None),
  ],
)
def test_peak_is_found_by_device_name(device, bandwidth, flops):
  peak = roofline.peak(device)
  assert (peak.bandwidth, peak.flops) == (
    bandwidth and pytest.approx(bandwidth),
    flops and pytest.approx(flops),
  )
  assert roofline.peak(device, bandwidth=1.5).bandwidth == 1.5e12
