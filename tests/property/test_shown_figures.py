"""Figures that are shown against their JSON, and JSON against its rows."""

import decimal
import itertools
import json
import shutil

import pytest

from tests.train_runs import ROOT
from xomni_jax import cli
from xomni_jax.inference import shipped

README = (ROOT / "README.md").read_text("utf-8")
CARD = (shipped.ROOT / "MODEL_CARD.md").read_text("utf-8")
RESULTS = ROOT / "launch" / "results"
DETAILS = (RESULTS / "README.md").read_text("utf-8")
FOLDERS = sorted(
  {
    p.parent.relative_to(RESULTS).as_posix()
    for p in RESULTS.rglob("*.rows.jsonl.gz")
  }
)
ENGINES = "rapidocr", "tesseract"
LINES = {
  "true drawings": "true drawings",
  "painted from the codes": "decoder on true codes",
  "`tiny-sft`, greedy": "sft greedy",
  "`tiny-sft`, temperature 0.7": "sft T=0.7",
  "`tiny-sft`, temperature 1": "sft best of 1",
  "control: ": "control T=1",
  "`tiny-sft` fine-tuned": "control T=1",
  "`tiny`, temperature 1": "rl T=1",
}
LEVELS = "signs", "posters"
MINUS = "sft best of 1", "control T=1", "sft best of 2"


def figures(path, name="best-of-n"):
  return json.loads((RESULTS / path / f"{name}.json").read_text())


def table(text, head):
  """{first cell: other cells} of the table whose first line begins so."""
  _, start, rest = text.partition(f"\n| {head}")
  assert start, head
  rows = itertools.takewhile(lambda x: x.startswith("|"), rest.split("\n")[2:])
  cells = [[c.strip() for c in row.strip("|").split("|")] for row in rows]
  return {first: others for first, *others in cells}


def rounded(x, digits):
  """Half up, as people do it, of the decimals that JSON has."""
  places = decimal.Decimal(1).scaleb(-digits)
  return decimal.Decimal(repr(round(x, 9))).quantize(
    places, decimal.ROUND_HALF_UP
  )


def points(estimate):
  mean, low, high = (rounded(100 * x, 1) for x in estimate[:3])
  return f"{mean:+} ({low} to {high})"


@pytest.mark.parametrize("text", [README, CARD], ids=["README", "card"])
def test_shares_read_exactly_are_those_of_the_measurement(text):
  shown = table(text, "images | ")
  assert len(shown) == 7
  of = {level: figures(f"{level}/tiny")["scores"] for level in LEVELS}
  for name, cells in shown.items():
    (line,) = [x for start, x in LINES.items() if name.startswith(start)]
    wanted = [
      of[level][engine]["exact"][line]["all"][0]
      for level in LEVELS
      for engine in ENGINES
    ]
    wanted.append(of["posters"]["rapidocr"]["characters"][line]["all"][0])
    assert cells == [str(rounded(x, 3)) for x in wanted[: len(cells)]], name


@pytest.mark.parametrize("level", LEVELS)
def test_differences_of_each_seed_are_those_of_the_measurement(level):
  shown = table(README, f"{level} | read exactly")
  shown = {k.strip("`").replace(" ", "-"): cells for k, cells in shown.items()}
  there = (RESULTS / level).glob("*/best-of-n.json")
  assert shown.keys() == {path.parent.name for path in there}
  for name, cells in shown.items():
    of = figures(f"{level}/{name}")
    exact = [of["scores"][e]["exact"]["rl T=1"]["all"][0] for e in ENGINES]
    wanted = ["; ".join(str(rounded(x, 3)) for x in exact)]
    wanted += [
      "; ".join(
        points(of["differences"][e]["exact"][line]["all"]) for e in ENGINES
      )
      for line in MINUS
    ]
    assert cells == wanted, name


def test_guidance_and_filters_are_those_of_the_measurement():
  of = figures("signs/tiny", "cfg")["validation"]
  shown = table(DETAILS, "guidance | ")
  for scale, cells in shown.items():
    start = f"CFG {'1' if scale == 'none' else scale}"
    wanted = []
    for model in ("sft", "rl"):
      exact = of[model]["rapidocr"]["exact"]
      for how in (
        ("T 1", "T 0.7", "greedy"),
        ("T 1, min-p 0.03", "T 0.7, min-p 0.03"),
      ):
        wanted.append(
          ", ".join(
            str(rounded(exact[f"{start}, {h}"]["all"][0], 3)) for h in how
          )
        )
    assert cells == wanted, scale


@pytest.mark.parametrize("level", LEVELS)
def test_gain_of_the_best_setting_is_that_of_the_measurement(level):
  shown = table(README, f"{level} | setting chosen")
  where = {"`tiny-sft`": "tiny", "`tiny`": "tiny"}
  for name, cells in shown.items():
    of = figures(f"{level}/{where.get(name, name.replace(' ', '-'))}", "cfg")
    model = "sft" if "sft" in name else "rl"
    wanted = []
    for engine in ENGINES:
      chosen = of["chosen"][model][engine].removeprefix("CFG 1, ")
      chosen = chosen.replace("CFG", "guidance").removeprefix("T 1, ")
      wanted.append(chosen.replace("T ", "temperature "))
      wanted.append(points(of["gain"][model][engine]["exact"]["all"]))
    assert cells == wanted, name


def test_aims_that_are_said_to_be_reached_are():
  shown = table(README, "aim | ")
  of = {level: figures(f"{level}/tiny")["scores"] for level in LEVELS}
  mean = lambda line, level="signs", metric="exact": [
    of[level][engine][metric][line]["all"][0] for engine in ENGINES
  ]
  painted, true = mean("decoder on true codes"), mean("true drawings")
  by_rl = [
    [
      figures(path)["scores"][engine]["exact"]["rl T=1"]["all"][0]
      for engine in ENGINES
    ]
    for path in ("signs/tiny", "signs/seed-0", "signs/seed-1", "signs/seed-2")
  ]
  rates = [[a / b for a, b in zip(x, painted, strict=True)] for x in by_rl]
  both = lambda found: "; ".join(str(rounded(x, 3)) for x in found)
  wanted = [
    both(a / b for a, b in zip(painted, true, strict=True)),
    both(mean("sft best of 1")),
    f"{both(rates[0])} (lowest of the seeds: {both(map(min, *rates))})",
    both(mean("rl T=1", "posters", "characters")),
  ]
  values = [x for (x,) in shown.values()]
  assert [*values[:3], values[4]] == wanted


@pytest.mark.parametrize("text", [README, CARD], ids=["README", "card"])
def test_colours_are_those_of_the_measurement(text):
  (said,) = (x for x in text.split("\n\n") if "sees no colours" in x)
  for level in LEVELS:
    of = figures(f"{level}/tiny", "colours")
    for line in ("sft T=1", "rl T=1"):
      assert str(rounded(of["right"][line]["all"]["all"][0], 3)) in said
    if text == README:
      _, lost, _, _ = of["differences"]["sft T=1"]["all"]["all"]
      assert str(rounded(-100 * lost, 1)) in said.replace("-", "")


@pytest.mark.parametrize(
  "folder",
  [
    pytest.param(x, marks=() if x == "posters/seed-0" else pytest.mark.slow)
    for x in FOLDERS
  ],
)
def test_figures_are_those_of_the_rows(folder, tmp_path):
  for path in (RESULTS / folder).glob("*.rows.jsonl.gz"):
    shutil.copy(path, tmp_path)
  shared = RESULTS / folder.split("/")[0] / "tiny"
  argv = ["eval", "score", str(tmp_path), "--reuse", str(shared)]
  assert cli.main(argv) == 0
  made = list(tmp_path.glob("*.json"))
  assert made
  for path in made:
    assert path.read_bytes() == (RESULTS / folder / path.name).read_bytes()


@pytest.mark.parametrize(
  "report", sorted(RESULTS.rglob("report.md")), ids=lambda p: p.parents[1].name
)
def test_report_is_that_of_the_figures(report, tmp_path):
  # One run of each seed: `tiny` is of the same as seed-0.
  runs = [str(report.parents[1] / x) for x in ("tiny", "seed-1", "seed-2")]
  assert cli.main(["eval", "report", *runs, "--out", str(tmp_path)]) == 0
  assert (tmp_path / "report.md").read_text() == report.read_text()
