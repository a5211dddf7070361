"""Batches: the same at every process count, resumed or not, bad records or not.

Witness is the tokenizer's own view of the strings, and what the records say.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.helpers import GOLDEN
from xomni_jax.data import pipeline, protocol, records, sequences
from xomni_jax.errors import InputError
from xomni_jax.train_config import DataConfig, SourceConfig

WIDTH = 128


@pytest.fixture(scope="module")
def tokenizer():
  return protocol.load_tokenizer(GOLDEN / "xomni", 448, 64)


def code_record(n):
  rng = np.random.default_rng(n)
  shape = (int(rng.integers(1, 5)), int(rng.integers(1, 6)))
  return {
    "key": f"r{n}",
    "codes": rng.integers(0, 64, shape, np.int32),
    "text": f"caption {n} " + "word " * int(rng.integers(0, 12)),
    "prompt": f"draw {n}",
    "qa": [[f"what {n}?", f"it {n}"], ["no?", "yes, it is the answer"]],
    "width": 7,
    "height": 5,
  }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
  """40 code records in two shards, with lengths."""
  out = tmp_path_factory.mktemp("codes")
  for name, numbers in (("a", range(25)), ("b", range(25, 40))):
    made = [code_record(n) for n in numbers]
    lengths = [sequences.lengths(r, tokenizer) for r in made]
    records.write_records(out / f"{name}.array_record", made, lengths)
  return out


def config(folder, *tasks, **changes):
  tasks = tasks or ("generate", "chat", "text")
  sources = tuple(
    SourceConfig(str(folder), task, weight=1.0 + n)
    for n, task in enumerate(tasks)
  )
  settings = {"seq_len": WIDTH, "window": 32, "prompt_dropout": 0.2} | changes
  return DataConfig(sources, **settings)


def packed(data, tokenizer, process=(0, 1), **changes):
  settings = {"seed": 5, "global_batch": 4} | changes
  return pipeline.packed(data, tokenizer, process=process, **settings)


def same(a, b):
  assert a.bad == b.bad and a.arrays.keys() == b.arrays.keys()
  for name, array in a.arrays.items():
    assert array.dtype == b.arrays[name].dtype
    np.testing.assert_array_equal(array, b.arrays[name])


def joined(parts):
  arrays = {
    k: np.concatenate([p.arrays[k] for p in parts]) for k in parts[0].arrays
  }
  return pipeline.Rows(arrays, [line for p in parts for line in p.bad])


def samples_of(rows):
  """(tokens, positions, weights) of every record of some rows."""
  a = rows.arrays
  for b in range(len(a["tokens"])):
    for segment in range(1, a["segments"][b].max() + 1):
      mine = a["segments"][b] == segment
      yield tuple(a[k][b][mine] for k in ("tokens", "positions", "weights"))


def test_packed_rows_hold_whole_records_with_positions_from_0(
  folder, tokenizer
):
  data = config(folder)
  expected = {
    sequences.sample(
      code_record(n), task, tokenizer, Rng(drop, n_qa), 0.5
    ).tokens.tobytes(): task
    for n in range(40)
    for task in ("generate", "chat", "text")
    for drop in (0.0, 1.0)
    for n_qa in (0, 1)
  }
  batches, seen = packed(data, tokenizer), []
  for step in range(6):
    rows = batches[step]
    a = rows.arrays
    assert a["tokens"].shape == (4, WIDTH) and not rows.bad
    padding = a["segments"] == 0
    assert (a["tokens"][padding] == tokenizer.pad_id).all()
    assert not a["weights"][padding].any() and not a["positions"][padding].any()
    # Segments lie one after the other, and padding behind them.
    assert (np.diff(np.where(padding, 10**6, a["segments"])) >= 0).all()
    for tokens, positions, weights in samples_of(rows):
      task = expected[tokens.tobytes()]
      assert weights[0] == 0 and weights[-1] == 1
      if task == "text":
        assert weights[1:].all()
      np.testing.assert_array_equal(positions, np.arange(len(tokens)))
      seen.append(task)
    assert rows.good == a["segments"].max(axis=1).sum()
    assert (a["segments"] > 0).mean() > 0.6  # worth packing
  counts = [seen.count(task) for task in ("generate", "chat", "text")]
  np.testing.assert_allclose(
    np.array(counts) / len(seen), [1 / 6, 2 / 6, 3 / 6], atol=0.08
  )


class Rng:
  """A generator that drops the prompt or not, and takes one question."""

  def __init__(self, value, n):
    self.random, self.permutation = lambda: value, lambda _: [n]


def test_chats_of_several_turns_are_packed_by_their_own_lengths(
  folder, tokenizer
):
  """Those stored are of one turn."""
  batches = packed(config(folder, "chat", turns=2), tokenizer)
  for step in range(6):
    rows = batches[step]
    assert not rows.bad
    for _, _, weights in samples_of(rows):
      assert (np.diff(weights) == 1).sum() == 2


def test_an_epoch_of_packed_rows_has_every_record_once(folder, tokenizer):
  data = config(folder, "text", window=20)
  batches, found = packed(data, tokenizer, global_batch=1), []
  step = 0
  while len(found) < 80:
    found += [t.tobytes() for t, _, _ in samples_of(batches[step])]
    step += 1
  expected = sorted(
    np.array(
      [*tokenizer.encode(code_record(n)["text"]), tokenizer.pad_id], np.int32
    ).tobytes()
    for n in range(40)
  )
  # Windows of 20 divide an epoch of 40, and rows hold records of one window.
  assert sorted(found[:40]) == sorted(found[40:80]) == expected
  assert found[:40] != found[40:80]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_same_global_batch(folder, tokenizer, count):
  data = config(folder)
  whole = packed(data, tokenizer)
  parts = [packed(data, tokenizer, (p, count)) for p in range(count)]
  for step in (0, 3):
    same(joined([part[step] for part in parts]), whole[step])


def test_batches_depend_on_seed_and_step_only(folder, tokenizer):
  data = config(folder)
  a, b = packed(data, tokenizer), packed(data, tokenizer)
  late = b[7]
  for step in range(8):
    rows = a[step]
  same(rows, late)
  other = packed(data, tokenizer, seed=6)[7]
  assert (other.arrays["tokens"] != late.arrays["tokens"]).any()


def test_lengths_that_are_not_stored_give_the_same_rows(
  folder, tokenizer, tmp_path
):
  lines = []
  for n in range(40):
    record = code_record(n)
    lines.append(json.dumps(record | {"codes": record["codes"].tolist()}))
  (tmp_path / "x.jsonl").write_text("\n".join(lines))
  for step in (0, 2):
    same(
      packed(config(tmp_path), tokenizer)[step],
      packed(config(folder), tokenizer)[step],
    )


def bad_lines():
  texts = [f"text number {n}" for n in range(12)]
  lines = [json.dumps({"key": f"t{n}", "text": t}) for n, t in enumerate(texts)]
  lines[3] = "{broken"
  lines[5] = json.dumps({"key": "long", "text": "long " * WIDTH})
  lines[8] = json.dumps({"key": "none", "prompt": "no text"})
  return lines


def test_bad_records_leave_packed_rows_where_they_are(tmp_path, tokenizer):
  (tmp_path / "x.jsonl").write_text("\n".join(bad_lines()))
  data = config(tmp_path, "text", window=12)
  batches = packed(data, tokenizer, global_batch=1)
  lines, texts = [], []
  while len(texts) < 9:
    rows = batches[len(lines)]
    lines.append(rows.bad)
    texts += [t for t, _, _ in samples_of(rows)]
  assert len(texts) == 9
  told = sorted(line for bad in lines for line in bad)
  assert len(told) == 3 and all("\n" not in line for line in told)
  assert "x.jsonl line 4: the line can't be read" in told[0]
  assert "x.jsonl line 6 (long): too long: " in told[1]
  assert "x.jsonl line 9 (none): no field 'text', got prompt" in told[2]


def test_a_record_that_fails_later_leaves_a_gap(folder, tokenizer, monkeypatch):
  data = config(folder, "text")
  whole = packed(data, tokenizer)[0]
  real = sequences.sample

  def fails(record, *args, **options):
    if record["key"] in ("r7", "r30"):
      raise InputError("broken meanwhile")
    return real(record, *args, **options)

  monkeypatch.setattr(sequences, "sample", fails)
  rows = packed(data, tokenizer)[0]
  kept = {t.tobytes() for t, _, _ in samples_of(rows)}
  before = {t.tobytes() for t, _, _ in samples_of(whole)}
  assert kept < before and len(before - kept) == len(rows.bad) > 0
  assert all("array_record record" in line for line in rows.bad)
  np.testing.assert_array_equal(rows.arrays["id"], whole.arrays["id"])


def test_settings_that_do_not_fit_are_refused(folder, tokenizer):
  with pytest.raises(InputError, match="not a multiple of 3 processes; try 3"):
    packed(config(folder), tokenizer, (0, 3))
  with pytest.raises(InputError, match="tasks image"):
    packed(config(folder, "image"), tokenizer)
  with pytest.raises(InputError, match="seq_len 0"):
    packed(config(folder, seq_len=0), tokenizer)
  with pytest.raises(InputError, match="has 40 records, expected more than"):
    source = SourceConfig(str(folder), "text", first=39, count=2)
    packed(DataConfig((source,), seq_len=WIDTH), tokenizer)
  with pytest.raises(InputError, match="64 windows"):
    packed(config(folder, seq_len=4), tokenizer)[0]


# Prepared ahead


@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_from_any_step_equals_asking_for_it(
  folder, tokenizer, workers
):
  batches = packed(config(folder, workers=workers), tokenizer)
  iterator = batches.iterate(3)
  for step in range(3, 9):
    same(next(iterator), batches[step])
  iterator.close()
  if workers:
    import multiprocessing

    assert not multiprocessing.active_children()


RUN = """
import multiprocessing, os, sys, time
from tests.property import test_data_pipeline as t
from xomni_jax.data import protocol
if __name__ == "__main__":
  tokenizer = protocol.load_tokenizer(t.GOLDEN / "xomni", 448, 64)
  batches = t.packed(t.config(sys.argv[1], workers=1), tokenizer)
  iterator = batches.iterate()
  next(iterator)
  print(*[p.pid for p in multiprocessing.active_children()], flush=True)
  if sys.argv[2] == "end":
    sys.exit(0)
  sys.stdin.readline()
  for _ in range(20):  # more than were made before
    next(iterator)
  print("still", flush=True)
  time.sleep(60)
"""


@pytest.fixture
def started(folder, tmp_path):
  def start(how):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    return subprocess.Popen(
      [sys.executable, str(script), str(folder), how],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
      env=os.environ | {"PYTHONPATH": str(GOLDEN.parents[2])},
    )

  return start


def alive(pids):
  """Those that run; a zombie, which nobody waits for here, does not."""
  out = []
  for pid in pids:
    try:
      stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
      if stat.rpartition(")")[2].split()[0] != "Z":
        out.append(pid)
    except OSError:
      pass
  return out


def wait_for_end(pids):
  deadline = time.monotonic() + 20
  while alive(pids) and time.monotonic() < deadline:
    time.sleep(0.1)
  assert not alive(pids)


@pytest.mark.slow
def test_workers_end_with_a_program_that_does_not_close_them(started):
  process = started("end")
  out, err = process.communicate(timeout=60)
  pids = list(map(int, out.split()))
  assert process.returncode == 0 and len(pids) == 1, err
  wait_for_end(pids)
  assert "Traceback" not in err, err


def test_workers_outlive_a_signal_to_the_group_but_not_a_killed_parent(started):
  process = started("stay")
  pids = list(map(int, process.stdout.readline().split()))
  for pid in pids:
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
  process.stdin.write("\n")
  process.stdin.flush()
  assert process.stdout.readline() == "still\n"
  assert alive(pids) == pids
  process.kill()
  process.wait()
  wait_for_end(pids)
  for stream in (process.stdin, process.stdout, process.stderr):
    stream.close()


# The rate of bad records


def test_bad_records_are_logged_and_stop_a_run_at_too_many():
  lines = []
  watch = pipeline.BadRecords(0.02, lines.append)
  for step in range(100):
    watch.add([f"bad {step}"] if step % 10 == 0 else [], 7)
  assert (watch.bad, watch.total) == (10, 710)  # 1.4 %
  assert lines[1] == "bad record, passed over: bad 10"
  with pytest.raises(
    InputError, match=r"5 of the last 2.. .*at most 2\.00%.*: w"
  ):
    watch.add(["x", "y", "w"], 5)


def test_bad_records_stop_a_run_of_nothing_else_at_once():
  watch = pipeline.BadRecords(0.01, print)
  watch.add(["a", "b"], 0)
  with pytest.raises(InputError, match="3 of the last 3 records"):
    watch.add(["c"], 0)
  none = pipeline.BadRecords(0.0, print)
  none.add([], 10)
  with pytest.raises(InputError, match="1 of the last 21 "):
    none.add(["a"], 10)
  for _ in range(50):
    pipeline.BadRecords(1.0, print).add(["a"] * 10, 0)


def test_a_world_is_prepared_by_workers_too(tokenizer):
  data = DataConfig((SourceConfig("world:signs", "image"),), workers=1)
  make = lambda record, rng, bucket: {
    "pixels": np.asarray(records.image_of(record))
  }
  batches = pipeline.images(
    data,
    seed=0,
    global_batch=2,
    prepare=make,  # a closure, which plain pickle would refuse
    blank=lambda bucket: {"pixels": np.zeros((96, 96, 3), np.uint8)},
  )
  iterator = batches.iterate(2)
  same(next(iterator), dataclasses.replace(batches, workers=0)[2])
  iterator.close()
