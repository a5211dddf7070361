"""`xomni tokenize-dataset`: codes as Model.encode gives them, restartable."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.helpers import GOLDEN
from xomni_jax import cli
from xomni_jax.data import records, sequences
from xomni_jax.errors import InputError
from xomni_jax.inference import tokenize_dataset
from xomni_jax.train_config import SourceConfig

MODEL = str(GOLDEN / "xomni")


def job(source, **changes):
  settings = {"first": 0, "count": 0, "shard_size": 4, "model": MODEL}
  return tokenize_dataset.Job(str(source), **settings | changes)


def opened(path):
  return records.open_source(SourceConfig(str(path), "text"))


@pytest.fixture
def folder(tmp_path):
  """9 images of two sizes; number 5 is damaged."""
  out = tmp_path / "images"
  out.mkdir()
  for n in range(9):
    rng = np.random.default_rng(n)
    size = (70, 100) if n % 3 == 1 else (64, 64)
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(out / f"{n}.png")
    (out / f"{n}.txt").write_text(f"cafe\u0301 {n}")
  data = (out / "5.png").read_bytes()
  (out / "5.png").write_bytes(data[: len(data) // 2])
  return out


def test_codes_texts_and_lengths_are_stored(folder, tmp_path, tiny):
  out = tmp_path / "out"
  paths = tokenize_dataset.run(
    job(folder), tiny, out, batch=2, max_bad_rate=0.2
  )
  assert [p.name for p in paths] == [
    f"codes-0000{k}-of-00003.array_record" for k in range(3)
  ]
  got = opened(out)
  kept = [n for n in range(9) if n != 5]
  assert [got[i]["key"] for i in range(len(got))] == [f"{n}.png" for n in kept]
  for i, n in enumerate(kept):
    path = folder / f"{n}.png"
    np.testing.assert_array_equal(got[i]["codes"], tiny.encode(path))
    assert got[i]["text"] == f"caf\u00e9 {n}"  # composed
    assert got.size(i) == Image.open(path).size
    for task, length in sequences.lengths(got[i], tiny.tokenizer).items():
      assert got.lengths(task)[i] == length
    assert "image" not in got[i]
  (bad,) = out.glob("*.bad.txt")
  assert bad.name.startswith("codes-00001") and "5.png" in bad.read_text()


def test_a_run_goes_on_and_processes_share(folder, tmp_path, tiny, monkeypatch):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  settings = {"batch": 2, "max_bad_rate": 0.5}
  paths = tokenize_dataset.run(job(folder), tiny, whole, **settings)
  for p in range(2):
    tokenize_dataset.run(job(folder), tiny, parts, part=(p, 2), **settings)
  for path in paths:
    assert path.read_bytes() == (parts / path.name).read_bytes()
  before = {p: p.stat().st_mtime_ns for p in paths}
  (lost := paths[1]).unlink()
  # Stopped in the middle of that shard, which leaves nothing.
  real = tokenize_dataset.records.write_records

  def stops(path, made, lengths):
    def some():
      yield made[0]
      raise KeyboardInterrupt

    return real(path, some(), lengths)

  monkeypatch.setattr(tokenize_dataset.records, "write_records", stops)
  with pytest.raises(KeyboardInterrupt):
    tokenize_dataset.run(job(folder), tiny, whole, **settings)
  assert not lost.exists() and not list(whole.glob(".*"))
  monkeypatch.undo()
  tokenize_dataset.run(job(folder), tiny, whole, **settings)
  assert lost.read_bytes() == (parts / lost.name).read_bytes()
  after = {p: p.stat().st_mtime_ns for p in paths}
  assert [p for p in paths if after[p] != before[p]] == [lost]


def test_another_job_in_the_same_folder_is_refused(folder, tmp_path, tiny):
  out = tmp_path / "out"
  tokenize_dataset.run(job(folder, count=2), tiny, out)
  with pytest.raises(InputError, match=r"another job .*shard_size 4 -> 5"):
    tokenize_dataset.run(job(folder, count=2, shard_size=5), tiny, out)
  (out / "dataset.json").write_text("{")
  with pytest.raises(InputError, match=r"dataset.json can't be read"):
    tokenize_dataset.run(job(folder, count=2), tiny, out)


def test_model_trained_anew_at_the_same_path_is_another_job(
  folder, tmp_path, tiny
):
  model, out = tmp_path / "model", tmp_path / "out"
  shutil.copytree(MODEL, model)
  same = job(folder, count=2, model=str(model))
  tokenize_dataset.run(same, tiny, out)
  (path,) = (model / "vit").glob("projector.*")
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  with pytest.raises(InputError, match=r"another job \(weights '\w+' -> "):
    tokenize_dataset.run(same, tiny, out)


def test_too_many_bad_records_are_an_error(folder, tmp_path, tiny):
  for _ in range(2):  # what is made already counts as well
    with pytest.raises(InputError, match="1 of 9 records are bad"):
      tokenize_dataset.run(job(folder), tiny, tmp_path / "out")


def test_shard_that_a_kill_kept_away_is_missing(
  folder, tmp_path, tiny, monkeypatch
):
  def killed(*args):
    raise KeyboardInterrupt

  out, settings = tmp_path / "out", {"batch": 2, "max_bad_rate": 0.2}
  tokenize_dataset.run(job(folder), tiny, out, **settings)
  (shard,) = out.glob("codes-00001-*.array_record")  # that of the bad one
  shard.unlink()
  with monkeypatch.context() as m:
    m.setattr(tokenize_dataset.records, "write_records", killed)
    with pytest.raises(KeyboardInterrupt):
      tokenize_dataset.run(job(folder), tiny, out, **settings)
  with pytest.raises(InputError, match=r"codes-00001.* is missing"):
    opened(out)
  tokenize_dataset.run(job(folder), tiny, out, **settings)
  assert len(opened(out)) == 8
  # Killed between a shard and its list's name.
  (listed,) = out.glob("*.bad.txt")
  listed.rename(tokenize_dataset._pending(shard))
  tokenize_dataset.run(job(folder), tiny, out, **settings)
  assert listed.exists()


def test_records_that_are_mended_are_bad_no_more(tmp_path, tiny):
  source, out = tmp_path / "source", tmp_path / "out"
  source.mkdir()
  for n in range(4):
    Image.new("RGB", (64, 64)).save(source / f"{n}.png")
  good = (source / "3.png").read_bytes()
  for n in (2, 3):  # a shard
    (source / f"{n}.png").write_bytes(b"")
  wanted = job(source, shard_size=2)
  with pytest.raises(InputError, match="2 of 4 records are bad"):
    tokenize_dataset.run(wanted, tiny, out, batch=2)
  for n in (2, 3):
    (source / f"{n}.png").write_bytes(good)
  # What a kill left while the shard was written.
  left = out / "codes-00001-of-00002.array_record.bad.part"
  left.write_text("bad\n")
  tokenize_dataset.run(wanted, tiny, out, batch=2)
  tokenize_dataset.run(wanted, tiny, out, batch=2)
  assert len(opened(out)) == 4 and not list(out.glob("*.bad.*"))


@pytest.mark.parametrize("rate", ["5", "-1", "nan"])
def test_rate_of_bad_records_is_a_share(tmp_path, capsys, rate):
  flags = ["--model=none", "--source=world:signs", f"--out={tmp_path / 'out'}"]
  argv = ["tokenize-dataset", *flags, f"--max-bad-rate={rate}"]
  assert cli.main(argv) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "expected a share from 0 to 1, such as 0.05" in line


def test_images_are_kept_and_documents_have_none(folder, tmp_path, tiny):
  kept = job(folder, count=2, keep_images=True)
  tokenize_dataset.run(kept, tiny, tmp_path / "kept")
  got = opened(tmp_path / "kept")
  np.testing.assert_array_equal(
    records.image_of(got[1]), Image.open(folder / "1.png")
  )
  (tmp_path / "x.jsonl").write_text(
    "\n".join(json.dumps({"text": f"document {n}"}) for n in range(6))
  )
  texts = job(tmp_path / "x.jsonl", documents=True)
  tokenize_dataset.run(texts, tiny, tmp_path / "texts")
  got = opened(tmp_path / "texts")
  assert got.lengths("text").tolist() == [
    len(tiny.tokenizer.encode(f"document {n}")) + 1 for n in range(6)
  ]
  with pytest.raises(InputError, match=r"6 of 6 records|3 of the last 3"):
    tokenize_dataset.run(job(tmp_path / "x.jsonl"), tiny, tmp_path / "none")


def test_command_tokenizes_the_drawn_world(tmp_path, tiny, capsys):
  argv = ["--model", MODEL, "--source", "world:signs", "--first", "3"]
  argv += ["--shard-size", "2", "--out", str(tmp_path / "out"), "--batch", "2"]
  with pytest.raises(InputError, match="no end, give --count"):
    tokenize_dataset.main(argv)
  assert tokenize_dataset.main([*argv, "--count", "3"]) == 0
  assert "2 shards complete" in capsys.readouterr().out
  got, world = opened(tmp_path / "out"), opened("world:signs")
  assert len(got) == 3
  for i in range(3):
    expected = world[3 + i]
    codes = tiny.encode(records.image_of(expected))
    np.testing.assert_array_equal(got[i]["codes"], codes)
    for name in ("key", "text", "prompt", "qa", "boxes", "width", "height"):
      assert got[i][name] == expected[name], name
  with pytest.raises(InputError, match="shard-index is 1"):
    tokenize_dataset.main([*argv, "--shard-index", "1"])
