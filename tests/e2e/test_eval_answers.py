"""`xomni eval answers`: what a model says about drawn images."""

import json

import numpy as np
import pytest

import xomni_jax
from xomni_jax import cli
from xomni_jax.evals import answers, asked

pytest.importorskip("rapidocr")


def test_answers_are_exact_where_chat_gives_the_truth(
  tmp_path, capsys, monkeypatch
):
  """One pass over the truth, against an answer token by token. Of every other
  image the truth is another one: a letter less, another colour."""
  real = asked.true_records

  def altered(source, numbers):
    found = real(source, numbers)
    for number, record in zip(numbers, found, strict=True):
      if number % 2:
        says, colour = answers.QUESTIONS
        right = dict(record["qa"])
        other = {"red": "green"}.get(right[colour], "red")
        wrong = right | {says: right[says][:-1], colour: other}
        record["qa"] = [[q, wrong[q]] for q, _ in record["qa"]]
        record["text"] = record["text"][:-2]
    return found

  monkeypatch.setattr(asked, "true_records", altered)
  monkeypatch.setattr(answers, "true_records", altered)
  source, count = "world:signs:test", 8
  flags = ["--source", source, "--count", str(count), "--batch", "5"]
  assert cli.main(["eval", "answers", *flags, "--out", str(tmp_path)]) == 0
  figures = json.loads((tmp_path / "answers.json").read_text())
  model = xomni_jax.load("tiny")
  for name in answers.QUESTIONS:
    said = [
      model.chat(record["image"], name) == dict(record["qa"])[name]
      for record in asked.true_records(source, range(count))
    ]
    assert figures["exact"][name]["all"][0] == pytest.approx(np.mean(said))
    assert 0.2 < np.mean(said) <= 0.5
  assert 0.2 < figures["exact"][answers.CAPTION]["all"][0] <= 0.5
  assert "What colour is it?: " in capsys.readouterr().out


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--source", "prompts.jsonl"], "expected world:LEVEL:SPLIT"),
    (["--count", "0"], "expected 1 to"),
    (["--batch", "0"], "--batch is 0, expected 1 or more"),
    (["--source", "world:signs-zh:test"], "does not ask What does it say?"),
    (["--count", "1", "--out", __file__], "the folder can't be made"),
  ],
)
def test_answers_say_what_is_wrong(flags, words, capsys):
  assert cli.main(["eval", "answers", *flags]) == 2
  assert words in capsys.readouterr().err
