"""Two processes train as one does, and either goes on where the other left."""

import numpy as np
import pytest

from tests import train_runs as runs
from tests.helpers import GOLDEN, read_folder
from xomni_jax.data import pipeline, protocol
from xomni_jax.train_config import DataConfig, SourceConfig

# Losses of random codes are about 5; sums over rows come in another order.
TOLERANCE = 1e-5
QUICK = "--config.report.eval_every=0"  # one program less to compile


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Data, a config, and a run straight through."""
  folder = tmp_path_factory.mktemp("processes")
  config = runs.write_config(folder, runs.write_data(folder / "data"))
  status, _, err = runs.run(config, folder / "straight", QUICK)
  assert status == 0, err[-3000:]
  return folder


def assert_close(ours, theirs):
  assert [x.keys() for x in ours] == [x.keys() for x in theirs]
  for a, b in zip(ours, theirs, strict=True):
    for name, value in a.items():
      # One token of about 100 more or less is right where two are as likely.
      near = 0.02 if "accuracy" in name else TOLERANCE * max(1, abs(value))
      assert abs(value - b[name]) <= near, (a["step"], name, value, b[name])


def test_processes_share_out_the_same_global_batches(tmp_path):
  data = runs.write_data(tmp_path / "data")
  tokenizer = protocol.load_tokenizer(GOLDEN / "xomni", 448, 64)
  cfg = DataConfig(
    (SourceConfig(str(data), "text_to_image"),), runs.LENGTH, window=16
  )
  make = lambda *process: pipeline.packed(
    cfg, tokenizer, seed=3, global_batch=runs.ROWS, process=process
  )
  whole, parts = make(0, 1), [make(0, 2), make(1, 2)]
  for step in (0, 1, 7, 30):
    for name, x in whole[step].arrays.items():
      ours = np.concatenate([part[step].arrays[name] for part in parts])
      assert ours.tobytes() == x.tobytes(), (step, name)


@pytest.mark.slow  # connected processes wait for one another: minutes
@pytest.mark.parametrize("counts", [(1, 2), (2, 1, 2)])
def test_runs_go_on_with_other_numbers_of_processes(folder, counts):
  workdir = folder / f"by-{counts}"
  # Pictures are due at the end, when there are two processes.
  given = (folder / "run.py", workdir, QUICK, "--config.report.preview_every=9")
  for i, count in enumerate(counts):
    last = i + 1 == len(counts)
    if last:
      results = runs.together(*given, count=count)
    else:
      done = runs.checkpoints(workdir)[-1] if i else 0
      results = runs.stopped(*given, step=done + 1, count=count)
    assert {r[0] for r in results} == {0 if last else 143}, results[0][2][
      -3000:
    ]
    # Process 0 alone speaks.
    assert runs.says(results[0][1])
    assert not any(runs.says(out) for _, out, _ in results[1:])
  assert "no pictures: they are made by a single process" in results[0][1]
  assert_close(runs.metrics(workdir), runs.metrics(folder / "straight"))
  ours = read_folder(workdir / "model")
  theirs = read_folder(folder / "straight" / "model")
  assert ours.keys() == theirs.keys()
  for name, x in theirs.items():
    # Adam's first steps are of the size of the learning rate (0.01) whatever
    # the gradient's: where it is next to nothing, its sign is rounding.
    assert np.abs(ours[name] - x).max() < 0.02, name
    assert np.abs(ours[name] - x).mean() < 1e-4, name
