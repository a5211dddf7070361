"""Sources of records: every kind gives its records, or says what is wrong."""

import concurrent.futures
import contextlib
import io
import json
import os
import pathlib
import pickle
import resource

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from xomni_jax.data import records, shards, tables
from xomni_jax.errors import InputError, RunError
from xomni_jax.train_config import SourceConfig


def source(path):
  return records.open_source(SourceConfig(str(path), "text"))


def refused(match, function, *args):
  """Asserts a one-line InputError with these words."""
  with pytest.raises(InputError, match=match) as error:
    function(*args)
  assert "\n" not in str(error.value)


def picture(n, height=5, width=7):
  rng = np.random.default_rng(n)
  return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(n, *size):
  stream = io.BytesIO()
  Image.fromarray(picture(n, *size)).save(stream, "PNG")
  return stream.getvalue()


def full_record(n):
  return {
    "key": f"k{n}",
    "image": png(n),
    "codes": np.arange(n, n + 6, dtype=np.int32).reshape(2, 3) * 20000,
    "text": f"caption {n} 猫",
    "prompt": f"draw {n}",
    "qa": [["what?", f"it {n}"], ["where?", ""]],
    "boxes": [["猫", 0.0, 1.0, 2.5, 3.0]],
  }


def same(got, expected):
  assert got.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(got[name], value)


def shard(folder, name, numbers, lengths=()):
  path = folder / f"{name}.array_record"
  records.write_records(path, [full_record(n) for n in numbers], lengths)
  return path


def test_shards_give_back_what_was_written(tmp_path):
  shard(tmp_path, "a", range(3))
  shard(tmp_path, "b", range(3, 8))
  got = source(tmp_path)
  assert len(got) == 8
  for i in (6, 0, 7, 3, 2):  # at random
    same(got[i], full_record(i) | {"width": 7, "height": 5})
    np.testing.assert_array_equal(
      np.asarray(records.image_of(got[i])), picture(i)
    )
    assert got.size(i) == (7, 5)
  assert got[1]["codes"].dtype == np.int32
  assert got.name(6).endswith("b.array_record record 3")
  assert len(source(tmp_path / "b.array_record")) == 5
  assert len(source(tmp_path / "[a]*")) == 3


def test_shards_hold_one_record_a_chunk(tmp_path):
  path = shard(tmp_path, "a", range(2))
  reader = shards._open_reader(path)
  assert "group_size:1," in reader.writer_options_string()


def test_shards_without_their_table_are_read_all_the_same(tmp_path):
  path = shard(tmp_path, "a", range(3), [{"text": 4}] * 3)
  assert records.known_lengths(source(tmp_path), "text").tolist() == [4] * 3
  (tmp_path / f"{path.name}.lengths.npz").unlink()
  got = source(tmp_path)
  assert len(got) == 3 and got.size(2) == (7, 5)
  assert records.known_lengths(got, "text") is None


def test_shards_know_lengths_by_task(tmp_path):
  shard(tmp_path, "a", range(2), [{"text": 5, "chat": 9}, {"text": 6}])
  shard(tmp_path, "b", range(1), [{"text": 7, "chat": 3}])
  got = source(tmp_path)
  assert records.known_lengths(got, "text").tolist() == [5, 6, 7]
  assert records.known_lengths(got, "chat").tolist() == [9, 0, 3]
  assert records.known_lengths(got, "generate") is None


def test_shard_is_written_whole_or_not_at_all(tmp_path):
  def stops():
    yield full_record(0)
    raise KeyboardInterrupt

  path = tmp_path / "a.array_record"
  with pytest.raises(KeyboardInterrupt):
    records.write_records(path, stops())
  refused("no records", records.write_records, path, [])
  refused("1 lengths for 2", shard, tmp_path, "a", range(2), [{}])
  refused("ends in", records.write_records, tmp_path / "a.txt", [])
  assert list(tmp_path.iterdir()) == []


def test_shards_written_at_the_same_time_are_whole(tmp_path):
  """By one process number, as on hosts that share a disk."""
  path = tmp_path / "a.array_record"

  def slowly():
    yield full_record(0)
    records.write_records(path, [full_record(5)])
    yield full_record(1)

  records.write_records(path, slowly())
  got = source(path)
  assert [got[i]["key"] for i in range(len(got))] == ["k0", "k1"]
  assert len([*tmp_path.iterdir()]) == 2  # and the table


class Lossy:
  """A writer that loses all but the first record, and says nothing."""

  def __init__(self, real):
    self.real, self.close = real, real.close

  def write(self, data):
    self.real.write(data)
    self.write = lambda data: None


def test_shard_on_a_full_disk_is_an_error(tmp_path, monkeypatch):
  module = shards.array_record_module
  real = module.ArrayRecordWriter
  monkeypatch.setattr(module, "ArrayRecordWriter", lambda *a: Lossy(real(*a)))
  refused("full", shard, tmp_path, "a", range(3))
  assert list(tmp_path.iterdir()) == []


def test_damaged_shards_are_refused_by_name(tmp_path):
  path = shard(tmp_path, "a", range(3))
  intact = path.read_bytes()
  at = intact.index(b"MSG") if b"MSG" in intact else 100
  path.write_bytes(intact[:at] + bytes([intact[at] ^ 255]) + intact[at + 1 :])
  got = source(tmp_path)
  refused("the record can't be read .*intact record", got.__getitem__, 0)
  assert got[2]["key"] == "k2"  # the others are not lost
  path.write_bytes(intact[: len(intact) // 2])
  refused("has 0 records, expected 3", source(tmp_path).__getitem__, 1)
  table = tmp_path / f"{path.name}.lengths.npz"
  table.write_bytes(table.read_bytes()[:50])
  refused("a.array_record.lengths.npz can't be read", source, tmp_path)
  table.unlink()
  refused("a.array_record holds no record", source, tmp_path)
  path.write_bytes(b"")
  refused("a.array_record", source, tmp_path)


def test_parquet_gives_rows_at_random_across_row_groups(tmp_path):
  rows = [
    {k: v for k, v in full_record(n).items() if k != "codes"}
    | {"width": 7, "height": 5, "unknown": n}
    for n in range(10)
  ]
  for row in rows:
    row["boxes"] = None
  table = pa.Table.from_pylist(rows)
  parquet.write_table(table, tmp_path / "x.parquet", row_group_size=2)
  got = source(tmp_path)
  assert len(got) == 10
  for i in (9, 0, 5, 4, 8, 1):  # more groups than are kept
    expected = {k: v for k, v in rows[i].items() if v is not None}
    del expected["unknown"]
    same(got[i], expected)
    assert got.size(i) == (7, 5)
  assert got.name(5).endswith("x.parquet row group 2 row 1")


def test_parquet_reads_hugging_face_images_and_question_structs(tmp_path):
  rows = [
    {
      "image": {"bytes": png(1), "path": None},
      "qa": [{"question": "q", "answer": "a"}],
    },
    {"image": {"bytes": None, "path": "b.png"}, "qa": None},
  ]
  (tmp_path / "b.png").write_bytes(png(2, 3, 4))
  parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
  got = source(tmp_path / "x.parquet")
  assert got[0]["qa"] == [["q", "a"]] and got.size(0) == (7, 5)
  assert records.image_of(got[1]).size == (4, 3) == got.size(1)


def test_damaged_parquet_is_refused_by_name(tmp_path):
  path = tmp_path / "x.parquet"
  parquet.write_table(
    pa.Table.from_pylist([{"text": "a" * 500}] * 9),
    path,
    compression="gzip",
  )
  intact = path.read_bytes()
  got = source(path)
  path.write_bytes(intact[:20] + b"\xff" * 20 + intact[40:])
  refused("the row group can't be read", got.__getitem__, 3)
  path.write_bytes(intact[:-30])
  refused("x.parquet can't be read", source, path)


def test_jsonl_gives_images_beside_it_and_names_broken_lines(tmp_path):
  (tmp_path / "images").mkdir()
  (tmp_path / "images" / "1.png").write_bytes(png(1))
  lines = [
    json.dumps({"image": "images/1.png", "text": "eins", "key": "one"}),
    "",
    json.dumps({"codes": [[1, 2]], "prompt": "zwei", "qa": [["q", "a"]]}),
    "{broken",
    json.dumps(["no", "object"]),
    json.dumps({"text": 5, "qa": [["q"]], "codes": [1, 2]}),
    json.dumps({"text": "\ud800"}),
  ]
  (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n")
  got = source(tmp_path)
  assert len(got) == 6  # as its images lie in it, they are no source
  assert got[0]["key"] == "one" and got.size(0) == (7, 5)
  np.testing.assert_array_equal(records.image_of(got[0]), picture(1))
  assert got[1]["codes"].tolist() == [[1, 2]] and got[1]["prompt"] == "zwei"
  assert got.name(2).endswith("x.jsonl line 3")
  refused("JSONDecodeError", got.__getitem__, 2)
  refused("a list", got.__getitem__, 3)
  refused("codes is .*; text is no good: 5; qa is", got.__getitem__, 4)
  refused("expected Unicode", got.__getitem__, 5)
  endless = {"width": float("inf"), "boxes": [["a", 0, 1, 2, float("nan")]]}
  (tmp_path / "x.jsonl").write_text(json.dumps(endless))
  refused(
    "boxes is no good: .*; width is no good: inf",
    source(tmp_path).__getitem__,
    0,
  )
  got = source(tmp_path)
  (tmp_path / "x.jsonl").unlink()
  refused("FileNotFoundError", got.__getitem__, 0)


def test_folder_without_some_of_its_shards_is_refused(tmp_path):
  """More of them later would be other records to a run that is resumed."""
  name = "codes-{:05d}-of-00003"
  for i in (0, 2):
    shard(tmp_path, name.format(i), range(2))
  missing = name.format(1) + ".array_record"
  refused(f"has 2 of 00003 shards, {missing} is missing", source, tmp_path)
  assert len(source(tmp_path / "codes-*")) == 4  # asked for as they are
  # One whose records are all bad is not written.
  (tmp_path / f"{missing}.bad.txt").write_text("a bad one\n")
  assert len(source(tmp_path)) == 4


def test_record_that_can_not_be_stored_is_refused(tmp_path):
  for record in ({"width": np.int64(5), "height": 5}, {"text": "\ud800"}):
    refused(
      "can't be written",
      records.write_records,
      tmp_path / "x.array_record",
      [record],
    )
    assert not list(tmp_path.iterdir())


def test_folder_gives_images_with_captions_beside_them(tmp_path):
  (tmp_path / "deep").mkdir()
  (tmp_path / "b.png").write_bytes(png(1))
  (tmp_path / "b.txt").write_text("\ufeffa caption\n")  # as Windows marks it
  (tmp_path / "deep" / "a.JPG").write_bytes(png(2, 3, 4))
  (tmp_path / ".hidden.png").write_bytes(b"")
  elsewhere = tmp_path / ".elsewhere"
  elsewhere.mkdir()
  (elsewhere / "c.png").write_bytes(png(3))
  link = tmp_path / "deep" / "link"
  link.symlink_to(elsewhere)
  assert [p.name for p in source(tmp_path)._paths] == [
    "b.png",
    "a.JPG",
    "c.png",
  ]
  link.unlink()
  link.symlink_to(tmp_path)  # round and round
  got = source(tmp_path)
  assert len(got) == 2
  assert got[0]["text"] == "a caption" and got[0]["key"] == "b.png"
  assert got[1]["key"] == "deep/a.JPG" and got.size(1) == (4, 3)
  refused("no field 'text', got image", records.need, got[1], "text")
  (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
  refused("b.txt can't be read", got.__getitem__, 0)
  (tmp_path / "b.png").write_bytes(png(1)[:60])
  refused(
    "b.png can't be read",
    lambda: records.image_of({"image": tmp_path / "b.png"}),
  )
  (tmp_path / "b.png").write_bytes(b"nothing")
  refused("b.png can't be read", got.size, 0)


@pytest.mark.parametrize("name", ["signs", "posters", "posters:held-out"])
def test_world_is_a_source(name):
  got = source(f"world:{name}")
  assert got.size(3) == records.image_of(got[3]).size
  assert {"key", "text", "prompt", "qa"} <= got[3].keys()


def test_sources_that_are_not_there_are_refused(tmp_path):
  refused("does not exist, expected a file", source, tmp_path / "none")
  refused("holds nothing to read", source, tmp_path)
  refused("holds nothing to read", source, tmp_path / "*.png")
  refused("is no glob", source, tmp_path / "a**b" / "*.jsonl")
  refused("expected a file", source, "~nobody-of-this-name/x")
  (tmp_path / "x.jsonl").write_text("\n")
  refused("holds no record", source, tmp_path)
  with pytest.raises(InputError):
    source("world:nowhere")


def test_sources_read_the_same_from_threads_and_after_pickling(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "b").mkdir()
  shard(tmp_path / "a", "a", range(20))
  rows = [{"text": f"row {n}"} for n in range(20)]
  table = pa.Table.from_pylist(rows)
  parquet.write_table(table, tmp_path / "b" / "x.parquet", row_group_size=3)
  for folder in ("a", "b"):
    got = source(tmp_path / folder)
    expected = [got[i]["text"] for i in range(20)]
    read = lambda _, got=got: [got[i]["text"] for i in reversed(range(20))]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
      for found in pool.map(read, range(6)):  # raises what a read raises
        assert found == expected[::-1]
    again = pickle.loads(pickle.dumps(got))
    assert [again[i]["text"] for i in range(20)] == expected


def many(folder, kind, count):
  """A source of as many files of a record each."""
  folder.mkdir()
  for n in range(count):
    if kind == "shards":
      records.write_records(folder / f"{n}.array_record", [{"text": f"{n}"}])
    else:
      table = pa.Table.from_pylist([{"text": f"{n}"}])
      parquet.write_table(table, folder / f"{n}.parquet")
  return source(folder)


def open_files():
  return len([*pathlib.Path("/proc/self/fd").iterdir()])


@pytest.mark.parametrize("kind", ["shards", "parquet"])
def test_few_files_stay_open_while_threads_read_many(
  tmp_path, kind, monkeypatch
):
  module = {"shards": shards, "parquet": tables}[kind]
  monkeypatch.setattr(module, "OPEN_FILES", 3)
  got, before = many(tmp_path / kind, kind, 12), open_files()
  expected = sorted(str(n) for n in range(12))
  read = lambda _: [got[i]["text"] for _ in range(9) for i in range(12)]
  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    for found in pool.map(read, range(6)):
      assert sorted(found) == sorted(expected * 9)
  assert open_files() - before <= 3
  again = pickle.loads(pickle.dumps(got))
  assert [again[i]["text"] for i in range(12)] == read(0)[:12]


@pytest.fixture
def no_more_files():
  """To call: from then on no file can be opened."""
  limits, held = resource.getrlimit(resource.RLIMIT_NOFILE), []

  def hold():
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files() + 8, limits[1]))
    with contextlib.suppress(OSError):
      while True:
        held.append(os.open(os.devnull, os.O_RDONLY))

  yield hold
  for file in held:
    os.close(file)
  resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("kind", ["shards", "parquet", "images"])
def test_too_many_open_files_are_no_damaged_data(tmp_path, kind, no_more_files):
  if kind == "images":
    (tmp_path / "a.png").write_bytes(png(1))
    got = source(tmp_path)
    read = lambda: records.image_of(got[0])
  else:
    got = many(tmp_path / kind, kind, 2)
    read = lambda: got[0]
  no_more_files()
  # As an InputError it would count as a bad record.
  with pytest.raises(RunError, match=r"too many open files.*ulimit -n"):
    read()
