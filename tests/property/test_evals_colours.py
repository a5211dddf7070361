"""What `xomni eval colours` sees in images."""

import numpy as np
import pytest

from xomni_jax.data import world, world_posters, world_signs
from xomni_jax.evals import colours

LEVELS = {"signs": world_signs, "posters": world_posters}


@pytest.mark.parametrize("level", LEVELS)
def test_true_drawings_have_the_colours_that_they_are_painted_with(level):
  source = world.open_world(level, "test")
  for i in range(40):
    record, shown = source[i], source.sign(i)
    # As a decoder paints: not quite the colours.
    noise = np.random.default_rng(i).normal(0, 12, (*record["image"].size, 3))
    image = np.asarray(record["image"]) + noise.transpose(1, 0, 2)
    image = np.clip(image, 0, 255).astype(np.uint8)
    boxes = [box for _, *box in record["boxes"]]
    seen = colours.read(image, boxes)
    assert seen == [shown.board, *world.colours(shown)], record["prompt"]


def test_nothing_on_the_board_has_no_colour():
  image = np.full((96, 96, 3), (200, 30, 40), np.uint8)
  assert colours.read(image, [(0, 0, 96, 16)]) == ["red", ""]
  assert colours.read(np.full_like(image, 128), [(0, 0, 96, 16)]) == ["", ""]


POSTER = world_posters.Poster(
  ("OPEN", "AT", "TEN", "RED"), "white", "blue", "yellow", "", ""
)
WHOLE = (
  'A blue poster with the lines "OPEN", "AT", "TEN", "RED" in white and the '
  "first line in yellow."
)


def of(poster, prompt):
  record = {"prompt": prompt, "boxes": world_posters.boxes(poster)}
  return colours.wanted(record, poster.board, world.colours(poster))


@pytest.mark.parametrize(
  ("changed", "wrong", "words"),
  [
    ({}, (), ""),
    ({"board": "green"}, ("board",), "board: green, not blue"),
    ({"title": "white"}, ("first line",), "first line: white, not yellow"),
    ({"colour": "yellow"}, ("text",), "text: yellow, yellow, yellow, not whi"),
  ],
)
def test_each_colour_that_a_prompt_names_is_looked_at(changed, wrong, words):
  image = np.asarray(world_posters.paint(POSTER._replace(**changed)))
  found, said = colours.right(image, of(POSTER, WHOLE))
  expected = dict.fromkeys(("board", "text", "first line"), 1.0)
  expected |= dict.fromkeys(wrong, 0.0)
  assert found == {"all": min(expected.values()), **expected}
  assert said.startswith(words) and bool(said) == bool(wrong)


def test_one_line_of_another_colour_is_wrong():
  image = np.asarray(world_posters.paint(POSTER)).copy()
  other = np.asarray(world_posters.paint(POSTER._replace(colour="yellow")))
  (_, *box) = world_posters.boxes(POSTER)[2]
  rows = slice(box[1], box[3])
  image[rows] = other[rows]
  found, said = colours.right(image, of(POSTER, WHOLE))
  assert (found["text"], found["all"]) == (0.0, 0.0)
  assert said == "text: white, yellow, white, not white"


def test_colours_that_a_prompt_leaves_out_are_free():
  # "RED" is what a line says, and not a colour.
  wanted = of(POSTER, 'A blue poster with the lines "OPEN", "AT", "RED".')
  assert wanted.colours == {"board": "blue"}
  free = np.asarray(world_posters.paint(POSTER._replace(colour="yellow")))
  found, said = colours.right(free, wanted)
  assert (found["all"], found["board"], said) == (1.0, 1.0, "")
  assert np.isnan([found["text"], found["first line"]]).all()
  found, said = colours.right(free, of(POSTER, "A poster."))
  assert np.isnan(list(found.values())).all() and not said


def test_differences_are_paired_and_of_what_is_asked():
  nan = np.nan
  one = lambda *x: (
    {role: np.array(x) for role in ("all", "board", "text")}
    | {"first line": np.full(3, nan)}
  )
  found = {"sft T=1": one(1.0, 1.0, nan), "rl T=1": one(1.0, 0.0, nan)}
  made = colours.summary({}, found, ["", "", ""])
  assert made["right"]["sft T=1"]["all"]["all"].mean == 1.0
  assert made["right"]["rl T=1"]["all"]["all"][::3] == (0.5, 2)
  gain = made["differences"]["sft T=1"]["board"]["all"]
  assert (gain.mean, gain.prompts) == (-0.5, 2)
  assert "first line" not in made["right"]["rl T=1"]  # signs have none
