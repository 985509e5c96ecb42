"""Predict, then see: where a text asks for a guess, the answer below it is folded, and it is there."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from notebooks.maintain.learner import LEARNER, SOURCE, guessed, learner_edition

FOLDED = {"collapsed": True, "jupyter": {"outputs_hidden": True}, "tags": ["hide-output"]}
every_notebook = pytest.mark.parametrize("path", sorted(LEARNER.glob("*.ipynb")), ids=lambda path: path.stem)


def shows_a_value(cell):
    """Whether an output of the cell has a number, or says of something that it holds or does not: text or alt text."""
    text = ""
    for output in cell.outputs:
        text += output.get("text", "") + output.get("metadata", {}).get("image/png", {}).get("alt", "")
        text += "".join(value for kind, value in output.get("data", {}).items() if kind.startswith("text/"))
    return any(character.isdigit() or character in "✓✗" for character in text)


@every_notebook
def test_what_is_to_be_guessed_is_folded_and_nothing_else(path):
    asked = {cell.id for cell in guessed(nbformat.read(SOURCE / path.name, as_version=4))}
    for cell in nbformat.read(path, as_version=4).cells:
        kept = {key: cell.metadata.get(key) for key in FOLDED}
        if cell.id in asked:
            assert kept == FOLDED and shows_a_value(cell), cell.source
        else:
            assert "hide-output" not in (kept["tags"] or []) and not kept["collapsed"] and not kept["jupyter"]


def test_the_course_asks():
    asking = [len(list(guessed(nbformat.read(path, as_version=4)))) for path in LEARNER.glob("*.ipynb")]
    assert sum(asking) >= 60 and sum(count > 0 for count in asking) >= 12


def made(*cells):
    return [(cell.source, cell.metadata) for cell in learner_edition(new_notebook(cells=list(cells))).cells]


def prints(source, text="3\n", **metadata):
    return new_code_cell(source, outputs=[new_output("stream", text=text)], metadata=metadata)


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("**Predict:** how many?", True),
        ("Now **predict** how many.", True),
        ("How many? Guess before you run.", True),
        ("Before you look: how many?", True),
        ("The predicted time was right.", False),
        ("How good are these predictions? A guess must be verified.", False),
        ("<details><summary>Predict</summary></details>", False),
    ],
)
def test_the_words_that_ask(text, folded):
    (_, first), (_, second) = made(new_markdown_cell(text), prints("f()"), prints("g()"))[1:]
    assert first == (FOLDED if folded else {}) and second == {}


def test_the_answer_is_the_first_output_below():
    """A definition in between prints nothing; another text ends the question; a cell may say so itself."""
    question, other = new_markdown_cell("**Predict:** what?"), new_markdown_cell("More.")
    again = new_markdown_cell(question.source)
    cells = made(question, new_code_cell("def f(): pass"), prints("f()"), again, other, prints("g()"))
    assert {source: bool(metadata) for source, metadata in cells} == {
        question.source: False, "def f(): pass": False, "f()": True, other.source: False, "g()": False
    }  # fmt: skip
    assert made(prints("h()", jupyter={"outputs_hidden": True})) == [("h()", FOLDED)]


@pytest.mark.parametrize(("text", "value"), [("17 times\n", True), ("✗ no\n", True), ("fewer than half\n", False)])
def test_a_sentence_is_no_value(text, value):
    assert shows_a_value(prints("f()", text)) == value
    alt = new_output("display_data", data={"image/png": ""}, metadata={"image/png": {"alt": text}})
    assert shows_a_value(new_code_cell("f()", outputs=[alt])) == value
