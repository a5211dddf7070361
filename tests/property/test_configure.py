"""Settings of training runs: files, overrides, and what is refused."""

import pathlib

import jax
import pytest
from ml_collections import ConfigDict

from tests import helpers
from xomni_jax.data.prompts import open_prompts
from xomni_jax.errors import InputError
from xomni_jax.mesh import fill, make_mesh
from xomni_jax.params import flatten
from xomni_jax.reward_config import CombineConfig
from xomni_jax.stage_options import OPTIONS
from xomni_jax.training import build, configure, step
from xomni_jax.training.command import connect
from xomni_jax.training.layout import make_layout

CONFIGS = helpers.GOLDEN.parents[2] / "configs"
STAGES = ["vae", "tokenizer", "pretrain", "sft", "decoder", "grpo"]


def read(stage, size="tiny"):
  return configure.read(f"{CONFIGS / stage}.py:{size}")


@pytest.mark.parametrize("size", ["7b", "tiny"])
@pytest.mark.parametrize("stage", STAGES)
def test_config_builds_its_program_from_shapes_alone(stage, size):
  config = read(stage, size)
  cfg, arch = configure.parse(config, stage)
  program = build.program(cfg, arch, config)
  layout = make_layout(program.parts, cfg.phases, make_mesh(), cfg.frozen_dtype)
  rows = {x.shape[0] for x in program.batch.values()}
  assert rows == {cfg.global_batch}
  # A rollout has no records; its rows are numbered by what they are.
  assert ("id" in program.batch) == (stage != "grpo")
  assert program.flops > 0 and program.tokens > 0
  assert all(layout.active)
  if size == "7b" and stage in ("pretrain", "sft"):
    count = sum(x.size for x in flatten(program.parts["ar"].tree).values())
    assert 9e9 < count < 10e9


@pytest.mark.parametrize("stage", STAGES)
def test_batches_are_shared_out_over_all_devices_there_are(stage):
  assert read(stage).mesh.data == -1


def test_kernel_of_tpus_is_refused_elsewhere():
  config = read("pretrain")
  configure.override(config, ["compute.attention=splash"])
  cfg, _ = configure.parse(config, "config")
  with pytest.raises(
    InputError, match="a kernel for TPUs, and devices are cpu"
  ):
    step.check_devices(cfg, make_mesh())


def test_phases_of_pretraining_train_what_the_paper_says():
  config = read("pretrain", "7b")
  cfg, arch = configure.parse(config, "pretrain")
  program = build.program(cfg, arch, config)
  layout = make_layout(program.parts, cfg.phases, make_mesh(), "float32")
  first, second, third = layout.active
  assert {p.split("/")[1] for p in first} == {
    *("vision_in", "vision_out", "mm_embed_tokens", "mm_norm", "mm_head")
  }
  assert second == third == set(layout.rows)
  assert (cfg.phases[2].decay, cfg.phases[2].end_scale) == ("linear", 0)
  assert cfg.phases[2].data != cfg.data and layout.frozen == []
  assert set(layout.groups()) == {"0+1+2", "1+2"}


def test_overrides_change_what_is_there():
  config = read("pretrain")
  configure.override(
    config,
    [
      "optim.lr=3e-4",
      "global_batch=16",
      "init.model=/a=b",
      "phases.5_all.steps=70",
      "report.profile=(3, 5)",
      "optim.weight_decay=0",
    ],
  )
  cfg, _ = configure.parse(config, "pretrain")
  assert cfg.optim.lr == 3e-4 and cfg.global_batch == 16
  assert cfg.init.model == "/a=b" and cfg.phases[4].steps == 70
  assert cfg.report.profile == (3, 5) and cfg.optim.weight_decay == 0.0


def test_overrides_reach_what_a_section_leaves_at_its_default():
  config = read("tokenizer")
  assert "profile" not in config.report and "fsdp" not in config.mesh
  configure.override(
    config,
    [
      "report.profile=(3, 5)",
      "mesh.fsdp=-1",
      "optim.eps=1e-6",
      "phases.1_signs.lr_scale=2",
      "eval_data.max_bad_rate=0.5",
    ],
  )
  cfg, _ = configure.parse(config, "tokenizer")
  assert cfg.report.profile == (3, 5) and dict(cfg.mesh)["fsdp"] == -1
  assert cfg.optim.eps == 1e-6 and cfg.phases[0].lr_scale == 2.0
  assert cfg.eval_data.max_bad_rate == 0.5


def test_overrides_reach_a_section_that_is_left_out_as_a_whole():
  config = read("grpo")
  assert "combine" not in config.options
  configure.override(config, ["options.combine.max_failure_rate=0.6"])
  cfg, _ = configure.parse(config, "grpo")
  assert cfg.options.combine == CombineConfig(max_failure_rate=0.6)
  with pytest.raises(InputError, match="names no setting"):
    configure.override(read("grpo"), ["options.combine.rate=0.6"])


@pytest.mark.parametrize(
  ("setting", "says"),
  [
    ("mesh.rows=2", "names no setting"),
    ("optim.eps=small", "expected a float such as 1e-08"),
    ("optim.learning_rate=1", "names no setting"),
    ("optim.lr", "names no setting"),
    ("optim=1", "is a section, change one of"),
    ("global_batch=many", "expected a int such as 8"),
    ("global_batch=1.5", "expected a int"),
    ("phases.decay=linear", "names no setting"),
  ],
)
def test_bad_overrides_are_refused_on_one_line(setting, says):
  with pytest.raises(InputError, match=says) as e:
    configure.override(read("pretrain"), [setting, "seed=1"])
  assert "\n" not in str(e.value)


def change(path, value):
  """A changed copy of the tiny pretraining config."""
  config = read("pretrain").to_dict()
  *parents, last = path.split(".")
  node = config
  for name in parents:
    node = node[name]
  if value is None:
    del node[last]
  else:
    node[last] = value
  return ConfigDict(config)


@pytest.mark.parametrize(
  ("path", "value", "says"),
  [
    ("stage", "dance", "stage is 'dance', expected one of vae"),
    ("extra", {"a": 1}, "unknown sections extra"),
    ("optim.lr", None, "lr is missing"),
    ("optim.speed", 3, "speed is unknown"),
    ("optim.lr", -1.0, "lr is -1.0, expected above 0"),
    ("data.sources", (), "sources is empty"),
    ("phases.5_all.train", ("ar/(",), "no expression"),
    ("phases.5_all.decay", "slowly", "expected one of constant"),
    ("phases", {}, "phases is empty"),
    ("global_batch", 0, "global_batch is 0"),
    ("compute.remat", "some", "expected 'none', 'full' or 'dots'"),
    ("architecture", None, "no section 'architecture'"),
    ("architecture", 3, "architecture is 3; expected settings by name"),
    ("architecture.ar", 3, "architecture.ar is 3; expected settings by name"),
    ("stage", ("sft",), "stage is .'sft',., expected one of vae"),
    ("phases", ({"steps": 1},), "phases is .*; expected settings by name"),
    ("phases.5_all", 3, "phases.5_all is 3; expected settings by name"),
    ("mesh", "data=2", "mesh is 'data=2'; expected settings by name"),
  ],
)
def test_bad_settings_are_refused_on_one_line(path, value, says):
  with pytest.raises(InputError, match=says.replace("(", r"\(")) as e:
    configure.parse(change(path, value), "config")
  assert "\n" not in str(e.value)


@pytest.mark.parametrize(
  ("stage", "setting", "says"),
  [
    ("vae", "align=0", "align is 0, expected above 0"),
    ("vae", "crops=(64, 0)", r"crops is \(64, 0\), expected sides in px"),
    ("vae", "crops=()", r"crops is \(\), expected sides in px"),
    ("vae", "kl=-1", "kl: expected from 0"),
    ("decoder", "text_len=0", "text_len is 0, expected above 0"),
    ("tokenizer", "grids=((6, 6), (0, 8))", r"expected one or more \(rows"),
    ("decoder", "grids=()", r"grids is \(\), expected one or more \(rows"),
    ("grpo", "sizes=((96, 0),)", r"expected one or more \(height, width\)"),
    ("decoder", "preview_steps=0", "preview_steps is 0, expected above 0"),
    ("decoder", "text_len=768", "text_len is 768, above 512"),
  ],
)
def test_bad_options_are_refused_on_one_line(stage, setting, says):
  config = read(stage)
  configure.override(config, [f"options.{setting}"])
  with pytest.raises(InputError, match=says) as e:
    configure.parse(config, "config")
  assert "\n" not in str(e.value)


def test_expressions_that_match_nothing_are_refused():
  config = change("phases.5_all.train", ("ar/lmm/",))
  cfg, arch = configure.parse(config, "config")
  program = build.program(cfg, arch, config)
  with pytest.raises(InputError, match="'ar/lmm/' matches no parameter"):
    make_layout(program.parts, cfg.phases, make_mesh(), "float32")


def test_phase_of_a_step_is_known_from_the_config():
  cfg, _ = configure.parse(read("pretrain"), "config")
  first, *_, last = (p.steps for p in cfg.phases)
  assert cfg.steps == sum(p.steps for p in cfg.phases)
  assert cfg.phase_at(0) == (0, 0) and cfg.phase_at(first - 1) == (0, 0)
  assert cfg.phase_at(first) == (1, first)
  assert cfg.phase_at(cfg.steps - 1) == (len(cfg.phases) - 1, cfg.steps - last)


def test_one_mesh_axis_takes_what_is_left():
  assert fill({"data": -1, "fsdp": 4}, 8) == {"data": 2, "fsdp": 4}
  assert fill({"data": 2}, 8) == {"data": 2}
  for sizes in ({"data": -1, "fsdp": -1}, {"data": -1, "fsdp": 3}):
    with pytest.raises(InputError, match="does not fit 8 devices"):
      fill(sizes, 8)
  for sizes in ({"data": -1, "fsdp": 0}, {"data": -2}, {"model": 1}):
    with pytest.raises(InputError, match="expected some of the axes slice, "):
      fill(sizes, 8)


def test_mesh_of_several_processes_has_all_their_devices(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "devices", lambda: ["a", "b"])
  with pytest.raises(InputError, match="has 1 of 2 devices") as e:
    make_mesh(data=1)
  assert "\n" not in str(e.value)


_ADDRESSES = [
  *("localhost", "a:1,2", "a:1,2,x", "a,2,0"),
  *("a:1,2,5", "a:1,0,0", "a:1,\u00b2,0", "a:1,2,0,"),
]


@pytest.mark.parametrize("how", _ADDRESSES)
def test_bad_addresses_of_processes_are_refused(how):
  with pytest.raises(InputError, match="expected auto or HOST:PORT"):
    connect(how)


def test_missing_and_failing_config_files_are_refused(tmp_path):
  for name in ("nowhere.py", str(tmp_path)):
    with pytest.raises(InputError, match="no such Python file"):
      configure.read(name)
  bad = pathlib.Path(tmp_path, "bad.py")
  bad.write_text("def get_config():\n  raise ValueError('one\\ntwo')\n")
  with pytest.raises(InputError, match="ValueError: one two"):
    configure.read(str(bad))
  bad.write_text("def get_config():\n  return 1\n")
  with pytest.raises(InputError, match="gave a int"):
    configure.read(str(bad))
  with pytest.raises(InputError, match="expected one of 7b, tiny"):
    read("pretrain", "13b")


def test_options_of_every_stage_have_a_dataclass():
  assert set(OPTIONS) == set(STAGES)


# A model is trained, shown and exported with the tokenizer in its folder.


def test_tokenizer_can_not_be_another_than_the_models():
  with pytest.raises(InputError, match=r"'init\.tokenizer=x' names no setting"):
    configure.override(read("pretrain"), ["init.tokenizer=x"])


def test_qwen_is_not_joined_to_the_drawn_worlds_tokenizer(tmp_path):
  config = read("tokenizer", "7b")
  configure.override(config, ["init.qwen=Qwen/Qwen2.5-1.5B"])
  cfg, arch = configure.parse(config, "tokenizer")
  with pytest.raises(InputError, match=r"init\.model names no model") as error:
    build.stage(cfg, arch, config, tmp_path)
  assert "\n" not in str(error.value)
  assert not any(tmp_path.iterdir())


@pytest.fixture
def start(tmp_path, monkeypatch):
  """start(setting, ...): how many starts were made, this one included."""
  made = []

  def write(xomni, flux1, *_, **__):
    xomni.mkdir(parents=True)
    flux1.mkdir()
    made.append("made")

  def run(*settings):
    config = read("vae")
    configure.override(config, settings)
    cfg, arch = configure.parse(config, "vae")
    started = build._with_start(cfg, arch, config, tmp_path)
    assert started.init.flux == str(tmp_path / "start" / "flux1")
    return len(made)

  monkeypatch.setattr(build.fresh, "write_fresh", write)
  return run


def test_start_that_a_kill_left_half_made_is_made_again(tmp_path, start):
  (tmp_path / "start" / "xomni").mkdir(parents=True)
  assert start() == 1
  assert (tmp_path / "start" / "flux1").is_dir()
  assert start() == 1


def test_folder_of_that_name_which_no_run_made_is_kept(tmp_path, start):
  (tmp_path / "start").mkdir()
  mine = tmp_path / "start" / "mine.txt"
  mine.touch()
  with pytest.raises(InputError, match="which no run made, and what this one"):
    start()
  assert mine.exists()


@pytest.mark.parametrize("stage", ["grpo", "decoder"])
def test_one_of_two_models_is_not_joined_to_a_made_one(tmp_path, stage):
  for given, other in (("model", "flux"), ("flux", "model")):
    config = read(stage)
    configure.override(config, [f"init.{given}=somewhere"])
    cfg, arch = configure.parse(config, stage)
    with pytest.raises(InputError, match=f"give --config.init.{other}=FOLDER"):
      build.stage(cfg, arch, config, tmp_path)
  assert not any(tmp_path.iterdir())


def test_start_of_another_seed_or_size_is_made_anew(start):
  assert [start(), start("seed=1"), start("seed=1")] == [1, 2, 2]
  size = "architecture.ar.num_hidden_layers=6"
  assert [start(size), start(size), start("decoder.cfg_scale=3.0")] == [3, 3, 4]


def test_processes_meet_before_one_of_them_makes_a_start(
  tmp_path, start, monkeypatch
):
  """On CPUs none may be 30 s late when they meet for the first time."""
  there = []  # a start, whenever they meet
  meet = lambda name: there.append((tmp_path / "start").exists())
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(build.multihost_utils, "sync_global_devices", meet)
  start()
  assert there == [False, True]


def test_start_of_a_run_with_checkpoints_stays_and_says_so(
  tmp_path, start, capsys
):
  assert start() == 1
  checkpoint = tmp_path / "checkpoints" / "2"
  checkpoint.mkdir(parents=True)
  (checkpoint / "manifest.json").touch()
  assert start() == 1
  assert not capsys.readouterr().out
  assert start("seed=1") == 1
  (line,) = capsys.readouterr().out.splitlines()
  assert "made of another seed than the config has; it stays" in line


def test_processes_that_nothing_tells_of_are_one_line(monkeypatch):
  def fails(*args):
    raise ValueError("coordinator_address should be\ndefined.")

  monkeypatch.setattr(jax.distributed, "initialize", fails)
  with pytest.raises(InputError, match="coordinator_address should be def"):
    connect("auto")


def test_prompt_of_half_a_character_is_named_with_its_line(tmp_path):
  path = tmp_path / "prompts.jsonl"
  good = '{"prompt": "a", "targets": ["A"]}'
  for bad in (good.replace('"a"', '"\\ud800"'), good.replace("A", "\\udc00")):
    path.write_text(f"{good}\n{bad}\n")
    with pytest.raises(InputError, match=r"line 2: .* is no Unicode") as error:
      open_prompts(str(path))
    str(error.value).encode()


def test_prompts_that_are_no_text_are_one_line(tmp_path):
  path = tmp_path / "prompts.jsonl"
  path.write_bytes('{"prompt": "Schön"}'.encode("latin-1"))
  with pytest.raises(InputError, match="UTF-8") as error:
    open_prompts(str(path))
  assert "\n" not in str(error.value)


def test_language_of_a_prompt_is_a_tag_without_case_and_region(tmp_path):
  path = tmp_path / "prompts.jsonl"
  langs = ["zh-CN", "zh_Hans", "EN", "fil", "pt-BR "]
  lines = [f'{{"prompt": "a", "lang": "{lang}"}}' for lang in langs]
  path.write_text("\n".join(lines))
  found = [prompt.lang for prompt in open_prompts(str(path))]
  assert found == ["zh", "zh", "en", "fil", "pt"]
  for wrong in ("English", "e", "中文", "en-", "x-klingon"):
    path.write_text(lines[0] + f'\n{{"prompt": "a", "lang": "{wrong}"}}')
    with pytest.raises(InputError, match=f"line 2: lang is '{wrong}'") as error:
      open_prompts(str(path))
    assert "\n" not in str(error.value)
