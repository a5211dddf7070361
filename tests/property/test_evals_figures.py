"""Figures and reports of measurements whose rows are made up."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from xomni_jax.errors import InputError
from xomni_jax.evals import best_of_n, cfg, command, files, plots, report
from xomni_jax.evals.asked import Asked, prompts_hash
from xomni_jax.evals.rows import Key, Rows, write_prompts
from xomni_jax.rewards import text_scores

COUNT, NUMBERS = 300, [1, 2, 4]
KINDS = ("one word", "two words", "with digits")
ENGINES = {"rapidocr": "rapidocr-1", "tesseract": "tesseract-1"}
BOTH = {"test": [COUNT, "aa"]}


def _asked(count=COUNT):
  return [
    Asked(f"a sign {i}", ("WORD",), "en", (96, 96), KINDS[i % 3])
    for i in range(count)
  ]


def _read(rng, right, engines=tuple(ENGINES)):
  """What each engine reads: a judge of its own errors, one time in ten."""
  seen = {
    name: right ^ (name == "tesseract" and rng.random() < 0.1)
    for name in engines
  }
  return {
    name: {"text": "WORD" if ok else "WQRD", "score": 1.0 if ok else 0.75}
    for name, ok in seen.items()
  }


def _identity(**more):
  return {
    "measures": best_of_n.NAME,
    "folders": {},
    "models": {"sft": "a", "rl": "b", "control": "c"},
    "source": "world:signs:test",
    "prompts": BOTH,
    "seed": 0,
    "steps": 8,
    "samples": 1,
    "batch": 64,
    "engines": ENGINES,
    "n": NUMBERS,
  } | more


def _best_of_n_rows(identity, rates, seed=0):
  """Rows of {setting: rate of images that are right}."""
  rng = np.random.default_rng(seed)
  return {
    Key(s.name, prompt, sample): _read(
      rng, rng.random() < rates[s.name], identity["engines"]
    )
    for s in best_of_n.settings(identity)
    for prompt in range(COUNT)
    for sample in range(s.samples)
  }


RATES = {
  "true drawings": 1.0,
  "decoder on true codes": 0.97,
  "sft greedy": 0.9,
  "sft T=0.7": 0.8,
  "sft T=1": 0.5,
  "control T=1": 0.6,
  "rl T=1": 0.85,
}


@pytest.fixture(scope="module")
def figures():
  identity = _identity()
  made = best_of_n.summary(identity, _best_of_n_rows(identity, RATES), _asked())
  return json.loads(json.dumps(made))  # as it is read back


def test_figures_of_best_of_n_are_those_of_the_rates(figures):
  exact = {
    k: v["all"] for k, v in figures["scores"]["rapidocr"]["exact"].items()
  }
  for n in NUMBERS:
    mean, low, high, prompts = exact[best_of_n.best_name(n)]
    assert mean == pytest.approx(1 - 0.5**n, abs=0.05)
    assert low < mean < high and prompts == COUNT
  for name in ("rl T=1", "control T=1", "sft greedy", "sft T=0.7"):
    assert exact[name][0] == pytest.approx(RATES[name], abs=0.05)
  assert exact["true drawings"][:3] == [1, pytest.approx(0.9878, abs=1e-4), 1]
  # The judge errs in a tenth of what the reward calls right, and of the rest.
  judged = figures["scores"]["tesseract"]["exact"]["sft best of 4"]["all"][0]
  right = 1 - 0.5**4
  assert judged == pytest.approx(0.9 * right + 0.1 * (1 - right), abs=0.04)
  gain = figures["differences"]["rapidocr"]["exact"]["control T=1"]["all"]
  assert gain[0] == pytest.approx(0.25, abs=0.05) and gain[1] > 0
  # 0.85 is above 0.5 and 0.75, and not above 0.94.
  assert figures["beaten"] == {
    name: dict.fromkeys(("exact", "characters", "reward"), 2)
    for name in ENGINES
  }
  kinds = figures["scores"]["rapidocr"]["exact"]["rl T=1"]
  assert [*kinds] == ["all", *KINDS] and kinds["one word"][3] == COUNT / 3
  # A wrong letter of four: what the metrics say of it.
  one = text_scores.text_reward("WQRD", ("WORD",), "en", spaces=False)
  reward = figures["scores"]["rapidocr"]["reward"]["rl T=1"]["all"][0]
  rate = exact["rl T=1"][0]
  assert reward == pytest.approx(rate + (1 - rate) * one.score, abs=1e-5)


def test_best_is_chosen_by_the_reward_even_where_none_is_exact(figures):
  """Of images that are all wrong the one that is least so."""
  identity = _identity()
  found = _best_of_n_rows(identity, RATES)
  for (setting, prompt, sample), readings in found.items():
    if setting == "sft T=1":
      text = "WQRD" if sample == 1 else "ZZZZ"
      found[Key(setting, prompt, sample)] = {
        engine: {"text": text, "score": 0.0} for engine in readings
      }
  scores = best_of_n.summary(identity, found, _asked())["scores"]
  for engine in ENGINES:
    lines = scores[engine]["characters"]
    means = [lines[best_of_n.best_name(n)]["all"].mean for n in NUMBERS]
    assert means == pytest.approx([0.75 / 4, 0.75 / 2, 0.75])
    assert scores[engine]["exact"]["sft best of 4"]["all"].mean == 0


def test_settings_without_a_control_or_images_are_fewer():
  names = lambda **more: [s.name for s in best_of_n.settings(_identity(**more))]
  assert set(names()) == set(RATES)
  assert set(names(models={"sft": "a", "rl": "b"})) == set(RATES) - {
    "control T=1"
  }
  assert set(names(source="p.jsonl")) == set(RATES) - set(best_of_n.CEILINGS)
  for wrong in ([], [2, 4], [1, 4, 2], [1, 1], [0, 1]):
    with pytest.raises(InputError, match="rising numbers"):
      best_of_n.check_numbers(wrong)


def test_report_has_every_seed_their_mean_and_the_largest_n(tmp_path, figures):
  other = _identity(seed=0, models={"sft": "d", "rl": "e", "control": "f"})
  rates = RATES | {"rl T=1": 0.7}
  second = best_of_n.summary(other, _best_of_n_rows(other, rates, 1), _asked())
  for name, made in (("seed0", figures), ("seed1", second)):
    (tmp_path / name).mkdir()
    files.write_json(tmp_path / name / "best-of-n.json", made)
  folders = [str(tmp_path / name) for name in ("seed0", "seed1")]
  command.main(["report", *folders, "--out", str(tmp_path / "out")])
  text = (tmp_path / "out" / "report.md").read_text()
  assert "Largest N that RL at N = 1 beats: 2 (seed0), 1 (seed1)." in text
  a, b = (
    m["scores"]["rapidocr"]["exact"]["rl T=1"]["all"]
    for m in (figures, json.loads(json.dumps(second)))
  )
  line = next(x for x in text.splitlines() if x.startswith("| rl T=1"))
  cells = [
    f"{100 * m:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    for m, low, high, _ in (a, b)
  ]
  assert (
    line == f"| rl T=1 | {cells[0]} | {cells[1]} | {50 * (a[0] + b[0]):.1f} |"
  )
  assert "exact, rl T=1 / decoder on true codes: 0.8" in text
  with Image.open(tmp_path / "out" / "best-of-n.png") as picture:
    assert picture.width > 1000 and len(np.unique(np.asarray(picture))) > 50


def test_mean_over_seeds_that_lies_half_way_is_rounded_up():
  # Three floats of 0.7705 add up to less than 2.3115.
  mean = report.mean_over([[0.7705]] * 3)
  assert report._percent([mean]) == "77.1"


@pytest.mark.parametrize("numbers", [[1], NUMBERS])
def test_plot_shows_what_best_of_n_is_held_against(figures, numbers):
  made = figures | {"identity": _identity(n=numbers)}
  with Image.open(io.BytesIO(plots.best_of_n({"seed0": made}))) as picture:
    pixels = np.asarray(picture.convert("RGB"))
  panels = pixels[: len(pixels) * 3 // 4]  # the legend is below
  for colour in ((214, 39, 40), (44, 160, 44), (31, 119, 180)):
    assert np.all(panels == colour, -1).sum() > 500


def test_engine_that_is_not_installed_is_said_to_be_absent(tmp_path):
  identity = _identity(engines={"rapidocr": "rapidocr-1"})
  made = best_of_n.summary(identity, _best_of_n_rows(identity, RATES), _asked())
  made = json.loads(json.dumps(made))
  assert [*made["scores"]] == ["rapidocr"]
  report.write(tmp_path, {best_of_n.NAME: {"seed0": made}})
  text = (tmp_path / "report.md").read_text()
  assert "## Read by tesseract, the independent judge\n\nabsent" in text
  assert "rapidocr-1, the reward" in text


def test_runs_that_do_not_compare_are_refused(tmp_path, figures):
  other = json.loads(json.dumps(figures))
  other["identity"]["steps"] = 4
  with pytest.raises(InputError, match="steps is 8 and 4") as error:
    report.write(tmp_path, {best_of_n.NAME: {"a": figures, "b": other}})
  assert "\n" not in str(error.value)
  other["identity"] |= {"steps": 8, "seed": 1}
  with pytest.raises(InputError, match="seed is 0 and 1"):
    report.write(tmp_path, {best_of_n.NAME: {"a": figures, "b": other}})
  alone = json.loads(json.dumps(figures))
  del alone["identity"]["models"]["control"]
  for one, two in ((figures, alone), (alone, figures)):
    with pytest.raises(InputError, match=r"models is .*control"):
      report.write(tmp_path, {best_of_n.NAME: {"a": one, "b": two}})


def test_report_speaks_of_keys_only_where_all_runs_had_the_same(figures):
  new, old = (json.loads(json.dumps(figures)) for _ in range(2))
  new["identity"]["drawing"], old["identity"]["drawing"] = [1], [0]
  says = lambda *runs: (
    "the same random keys"
    in report.best_of_n_text(dict(zip("ab", runs, strict=True)))
  )
  assert says(new, new)
  assert not says(new, old) and not says(old, new)


def test_report_leaves_no_seed_out(tmp_path, figures):
  for name in ("a/seed0", "b/seed0", "seed1"):
    (tmp_path / name).mkdir(parents=True)
    if name != "seed1":
      files.write_json(tmp_path / name / "best-of-n.json", figures)
  out = ["--out", str(tmp_path / "out")]
  folders = lambda *names: [str(tmp_path / name) for name in names]
  with pytest.raises(InputError, match="a name of its own"):
    command.main(["report", *folders("a/seed0", "b/seed0"), *out])
  with pytest.raises(InputError, match="seed1 has no figures"):
    command.main(["report", *folders("a/seed0", "seed1"), *out])
  for text in ("{}", "[1]", "nope"):
    (tmp_path / "seed1" / "best-of-n.json").write_text(text)
    with pytest.raises(InputError, match="can't be read") as error:
      command.main(["report", *folders("a/seed0", "seed1"), *out])
    assert "\n" not in str(error.value)


# -- guidance

SAMPLES = 3


def _cfg_identity():
  identity = _identity(measures=cfg.NAME, validation="world:signs:validation")
  del identity["n"]
  asked = [COUNT, prompts_hash(_asked())]
  identity |= {
    "models": {"sft": "a", "rl": "b"},
    "samples": SAMPLES,
    "prompts": {"validation": asked, "test": asked},
  }
  return identity


def _cfg_rows(identity, best, rates):
  """Rows in which setting `best` is right as `rates` say, and others less."""
  rng = np.random.default_rng(5)
  found = {}
  settings = cfg.validation_settings(identity)
  settings += cfg.test_settings(
    identity, {m: dict.fromkeys(ENGINES, best) for m in identity["models"]}
  )
  for s in settings:
    _, model, name = s.name.split(" ", 2)
    plain, top = rates[model]
    rate = {cfg.BASE: plain, best: top}.get(name, plain - 0.2)
    for prompt in range(COUNT):
      for sample in range(s.samples):
        found[Key(s.name, prompt, sample)] = _read(rng, rng.random() < rate)
  return found


@pytest.fixture(scope="module")
def guidance():
  identity, best = _cfg_identity(), "CFG 1.5, T 0.7, min-p 0.03"
  found = _cfg_rows(identity, best, {"sft": (0.5, 0.8), "rl": (0.9, 0.9)})
  return identity, best, found, cfg.summary(identity, found, _asked(), _asked())


def test_best_setting_is_chosen_on_validation_and_its_gain_is_on_test(guidance):
  _, best, found, made = guidance
  assert len(cfg.grid()) == 15 and next(iter(cfg.grid())) == cfg.BASE
  assert made["chosen"]["sft"] == dict.fromkeys(ENGINES, best)
  assert made["chosen"]["rl"] == dict.fromkeys(ENGINES, best)
  gain = made["gain"]["sft"]["rapidocr"]["exact"]["all"]
  at = lambda name: np.array([
    [found[Key(f"test sft {name}", p, s)]["rapidocr"]["text"] == "WORD" for s in range(SAMPLES)]
    for p in range(COUNT)
  ]).mean(1)  # fmt: skip
  difference = at(best) - at(cfg.BASE)
  half = 1.96 * difference.std(ddof=1) / COUNT**0.5
  assert gain.mean == pytest.approx(difference.mean(), abs=1e-6)
  assert gain.high == pytest.approx(difference.mean() + half, abs=0.1 * half)
  test = made["test"]["sft"]["rapidocr"]["exact"]
  assert [*test] == [cfg.BASE, best]
  assert len(made["validation"]["rl"]["tesseract"]["reward"]) == 15


def test_choice_is_by_exact_images_not_by_characters(guidance):
  """Nearly right everywhere is not as good as right here and there."""
  identity, best, found, made = guidance
  near = {name: {"text": "WQRD", "score": 0.75} for name in ENGINES}
  far = {name: {"text": "ZZZZ", "score": 0.0} for name in ENGINES}
  changed = {}
  for key, read in found.items():
    wrong = {e for e, r in read.items() if r["text"] != "WORD"}
    other = far if key.setting.endswith(best) else near
    changed[key] = read | {e: other[e] for e in wrong}
    if key.setting.startswith("validation sft") and other is near:
      changed[key] = near
  scores = cfg.summary(identity, changed, _asked(), _asked())
  by = scores["validation"]["sft"]["rapidocr"]["characters"]
  assert by[best]["all"].mean > by["CFG 3, greedy"]["all"].mean
  assert scores["chosen"]["sft"] == made["chosen"]["sft"]


def test_choice_ignores_test_prompts(guidance):
  """Test rows that are all wrong change no choice, only the gain."""
  identity, _, found, made = guidance
  spoiled = {
    key: {name: {"text": "", "score": 0.0} for name in read}
    if key.setting.startswith("test")
    else read
    for key, read in found.items()
  }
  other = cfg.summary(identity, spoiled, _asked(), _asked())
  assert other["chosen"] == made["chosen"]
  assert other["gain"]["sft"]["rapidocr"]["exact"]["all"].mean == 0


def test_plain_setting_that_is_best_is_held_against_the_best_of_the_others():
  """It is not chosen itself: the gain has an interval, and is no 0 by name."""
  identity, best = _cfg_identity(), "CFG 1, T 0.7"
  found = _cfg_rows(identity, best, {"sft": (0.9, 0.85), "rl": (0.9, 0.85)})
  made = cfg.summary(identity, found, _asked(), _asked())
  scores = made["validation"]["rl"]["rapidocr"]["exact"]
  assert max(scores, key=lambda k: scores[k]["all"].mean) == cfg.BASE
  assert made["chosen"]["rl"]["rapidocr"] == best
  gain = made["gain"]["rl"]["rapidocr"]["exact"]["all"]
  assert gain.mean == pytest.approx(-0.05, abs=0.04)
  assert gain.low < gain.mean < gain.high


def test_figures_are_made_anew_from_rows_alone(tmp_path, guidance, figures):
  identity, best, found, made = guidance
  file = Rows(tmp_path / "cfg.rows.jsonl", identity)
  file.add(found.items())
  file.close()
  for split in ("validation", "test"):
    write_prompts(tmp_path / f"cfg.{split}.prompts.jsonl", _asked())
  command.main(["score", str(tmp_path)])
  path = tmp_path / "cfg.json"
  assert json.loads(path.read_text()) == json.loads(json.dumps(made))
  # An estimate takes one line.
  assert (
    f'"all": {json.dumps(made["gain"]["rl"]["tesseract"]["exact"]["all"])}'
    in path.read_text()
  )
  found = {
    best_of_n.NAME: {"seed0": figures, "seed1": figures},
    cfg.NAME: {"seed0": json.loads(path.read_text())},
  }
  report.write(tmp_path / "out", found)
  text = (tmp_path / "out" / "report.md").read_text()
  assert text.rstrip().endswith("Not measured: seed1.")
  assert f"| sft | seed0 | {best} | " in text
  assert (tmp_path / "out" / "cfg.png").stat().st_size > 5000
  (tmp_path / "out" / "cfg.rows.jsonl").touch()
  with pytest.raises(InputError, match="has no rows yet"):
    command.main(["score", str(tmp_path / "out")])
  (tmp_path / "out" / "cfg.rows.jsonl").unlink()
  with pytest.raises(InputError, match="no rows"):
    command.main(["score", str(tmp_path / "out")])
