"""Two editions from one source: the learner edition is what the generator makes, and fails exactly at its checks.

That its stored outputs are true, among them each check's NotWritten, is what strict nbval shows (`make test`).
Here: that nbval would notice, that nothing was edited by hand, and that every exercise stands as the course promises.
"""

import io
import re
import subprocess
import sys

import nbformat
import numpy as np
import PIL.Image
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from dsa_course import checks
from notebooks.maintain.learner import LEARNER, SOURCE, learner_edition
from notebooks.maintain.pictures import FIGURES, PICTURES, selection, stored

NAMES = sorted(path.name for path in SOURCE.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("name", NAMES)


def read(path):
    return nbformat.read(path, as_version=4)


def kinds(nb):
    """(kind, exercise, cell) for each exercise's cells, in order."""
    for cell in nb.cells:
        meta = cell.metadata.get("nbgrader", {})
        if meta.get("solution"):
            yield "solution", meta["grade_id"], cell
        elif meta.get("grade"):
            yield "check", meta["grade_id"].removeprefix("check_"), cell


def test_both_editions_have_the_same_notebooks():
    assert NAMES == sorted(path.name for path in LEARNER.glob("*.ipynb"))
    assert len(NAMES) >= 13


@every_notebook
def test_the_learner_edition_is_the_generated_one(name):
    assert (LEARNER / name).read_text(encoding="utf-8") == nbformat.writes(learner_edition(read(SOURCE / name))) + "\n"


@every_notebook
def test_the_learner_edition_fails_exactly_at_its_checks(name):
    """The stored errors, which nbval compares with what happens."""
    nb = read(LEARNER / name)
    failing = {cell.id: output.ename for cell in nb.cells for output in cell.get("outputs", []) if "ename" in output}
    assert failing == {cell.id: "NotWritten" for kind, _, cell in kinds(nb) if kind == "check"}
    assert {cell.id for cell in nb.cells if "raises-exception" in cell.metadata.get("tags", [])} == set(failing)


def test_no_source_cell_fails_or_may_fail():
    for name in NAMES:
        for cell in read(SOURCE / name).cells:
            assert "raises-exception" not in cell.metadata.get("tags", [])
            assert not any("ename" in output for output in cell.get("outputs", []))


@every_notebook
def test_no_solution_is_left_in_the_learner_edition(name):
    for kind, exercise, cell in kinds(read(LEARNER / name)):
        if kind == "solution":
            assert "SOLUTION" not in cell.source
            assert cell.source.count("raise NotImplementedError()") >= 1, exercise


def test_every_check_has_one_exercise_and_its_card_and_folds():
    """Card, stub, check, folds: in this order, everywhere. And no check without an exercise."""
    exercises = []
    for name in NAMES:
        cells = read(SOURCE / name).cells
        found = list(kinds(read(SOURCE / name)))
        assert found, f"{name} has no exercise"
        for (kind, exercise, cell), (next_kind, next_exercise, check) in zip(found[::2], found[1::2], strict=True):
            assert (kind, next_kind, next_exercise) == ("solution", "check", exercise), (name, exercise)
            place = next(i for i, c in enumerate(cells) if c.id == cell.id)
            card, below, folds = cells[place - 1], cells[place + 1], cells[place + 2]
            assert below.id == check.id, f"{name}: the check of {exercise} must stand directly below it"
            assert f"checks.{exercise}(my_" in check.source and check.metadata.nbgrader.points >= 1
            assert re.search(r"### Exercise \d+b?\.\d+ · ", card.source), (name, exercise)
            for word in ("**Difficulty** ", "**Matters** ", " minutes**"):
                assert word in card.source, (name, exercise, word)
            assert folds.source.count("<details>") >= 2 and f"<!-- solution: {exercise} -->" in folds.source
            words = " ".join(folds.source.split())
            assert "**Why.**" in words and "**Common wrong answers.**" in words, (name, exercise)
            exercises.append(exercise)
    assert sorted(exercises) == sorted(checks.ALL)  # each once
    assert len(exercises) >= 35


@every_notebook
def test_no_other_cell_uses_what_the_learner_wrote(name):
    nb = read(SOURCE / name)
    own = {
        match for kind, _, cell in kinds(nb) if kind == "solution" for match in re.findall(r"def (\w+)", cell.source)
    }
    for cell in nb.cells:
        if cell.cell_type == "code" and "nbgrader" not in cell.metadata:
            assert not own & set(re.findall(r"\w+", cell.source)), f"{name}: {cell.source}"


@every_notebook
def test_first_and_last_cell(name):
    cells = read(SOURCE / name).cells
    for word in ("**The claim.** ", "**Time** ", "**Needs** "):
        assert word in cells[0].source, word
    last = cells[-1].source
    assert last.startswith("## What to remember") and last.count("<details>") == 6  # five to recall, and what Try shows
    assert "**Try.**" in last and "**Not shown here.**" in last


def test_the_map_of_the_course_is_true():
    """Minutes, exercises and points of notebooks/README.md are those of the notebooks."""
    row = re.compile(r"^\| \**(\d\d\w?)\** \[(.+)\]\((\S+)\) \| (\d+) \| [\d, ]*\| .+ \| (\d+) \| (\d+) \|$", re.M)
    text = (LEARNER / "README.md").read_text(encoding="utf-8")
    rows = {
        file: (number, title, int(minutes), int(n), int(p)) for number, title, file, minutes, n, p in row.findall(text)
    }
    assert sorted(rows) == NAMES
    for name, (nn, title, minutes, exercises, points) in rows.items():
        nb = read(SOURCE / name)
        found = [cell.metadata.nbgrader.points for kind, _, cell in kinds(nb) if kind == "check"]
        assert nb.cells[0].source.startswith(f"# {nn} · {title}\n")
        assert f"**Time** {minutes} minutes" in nb.cells[0].source
        assert (exercises, points) == (len(found), sum(found)), name
    core = sum(minutes for nn, _, minutes, *_ in rows.values() if f"**{nn}** [" in text)
    assert f"core path: {core} minutes" in text
    count = {15: "Fifteen", 16: "Sixteen", 17: "Seventeen", 18: "Eighteen", 19: "Nineteen", 20: "Twenty"}[len(NAMES)]
    for page in (LEARNER / "README.md", LEARNER.parent / "README.md"):
        assert re.findall(r"(\w+)\s+notebooks[,\s]+(?:from|lead)", page.read_text(encoding="utf-8")) == [count], page


def pixels(png):
    return np.asarray(PIL.Image.open(io.BytesIO(png)).convert("L")).astype(float)


def test_the_readmes_pictures_are_the_courses():
    """One is a copy, to the byte. The other is drawn anew, and fonts may differ by a shade from machine to machine."""
    assert (FIGURES / "selection.png").read_bytes() == selection()
    for file, make in PICTURES.items():
        shown, made = pixels((FIGURES / file).read_bytes()), pixels(make())
        assert shown.shape == made.shape and abs(shown - made).mean() < 0.2, (
            file
        )  # a curve that moves by 0.03 makes 0.8
        readme = (FIGURES.parent / "README.md").read_text(encoding="utf-8")
        assert f"](figures/{file})" in readme or f'src="figures/{file}"' in readme
    with pytest.raises(ValueError, match="text must begin one output of 00_start_here, got 0"):
        stored("00_start_here", "LiveFigure('nothing'")


def notebook(*cells):
    return new_notebook(cells=list(cells), metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})


MY_SUM = """from dsa_course.checking import Check, expect
my_sums = Check("my_sum")
my_sums.property("one")(lambda my_sum: expect(my_sum(1) == 2, "not 2", "1 was not added"))
my_sums(my_sum)"""


def exercise(source="def my_sum(x):\n    ### BEGIN SOLUTION\n    return x + 1\n    ### END SOLUTION"):
    meta = {"schema_version": 3, "task": False}
    stub = {**meta, "solution": True, "grade": False, "grade_id": "my_sum", "locked": False}
    check = {**meta, "solution": False, "grade": True, "grade_id": "check_my_sum", "locked": True, "points": 1}
    return [
        new_code_cell(source, metadata={"nbgrader": stub}),
        new_code_cell(
            MY_SUM,
            metadata={"nbgrader": check},
            execution_count=2,
            outputs=[new_output("stream", name="stdout", text="✓ my_sum: one\n")],
        ),
        new_markdown_cell("<!-- solution: my_sum -->"),
    ]


def test_what_the_generator_makes():
    source = notebook(*exercise())
    before = nbformat.writes(source)
    stub, check, fold = learner_edition(source).cells
    assert nbformat.writes(source) == before
    assert stub.source == "def my_sum(x):\n    # YOUR CODE HERE\n    raise NotImplementedError()"
    assert [output.ename for output in check.outputs] == ["NotWritten"]
    assert check.source == source.cells[1].source and check.metadata.tags == ["raises-exception"]
    assert fold.source == "```python\ndef my_sum(x):\n    return x + 1\n```"


def test_a_region_inside_a_function_keeps_what_surrounds_it():
    text = "x = 1\ndef f():\n    y = 2\n    ### BEGIN SOLUTION\n    a\n\n    b\n    ### END SOLUTION\n    return y"
    stub = learner_edition(notebook(*exercise(text))).cells[0].source
    wanted = "x = 1\ndef f():\n    y = 2\n    # YOUR CODE HERE\n    raise NotImplementedError()\n    return y"
    assert stub == wanted


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (exercise("def my_sum(x):\n    return x"), "must mark its solution"),
        (exercise()[1:], "below its solution cell, which is missing"),
        (exercise()[:2], "must be folded in"),
        ([*exercise(), new_markdown_cell("<!-- solution: other -->")], "fold for 'other'"),
    ],
    ids=["no marks", "no solution", "no fold", "unknown fold"],
)
def test_what_the_generator_refuses(cells, message):
    with pytest.raises(ValueError, match=message):
        learner_edition(notebook(*cells))


@pytest.mark.parametrize(
    ("fault", "passes"),
    [
        (None, True),
        (("raise NotImplementedError()", "return x + 1"), False),  # a check that passes unsolved
        (("raise NotImplementedError()", "return x"), False),  # another error than the stored one
        (("def my_sum", "1 / 0\ndef my_sum"), False),  # another cell that fails
    ],
    ids=["as generated", "check passes", "wrong error", "other cell fails"],
)
def test_nbval_notices_a_false_learner_edition(tmp_path, fault, passes):
    nb = learner_edition(notebook(*exercise()))
    nb.cells[0].execution_count = 1
    if fault:
        nb.cells[0].source = nb.cells[0].source.replace(*fault)
    nbformat.write(nb, tmp_path / "x.ipynb")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--nbval",
        "--nbval-current-env",
        "x.ipynb",
    ]
    ran = subprocess.run([*command, "x.ipynb"], cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode == 0) == passes, ran.stdout
    assert ran.returncode in (0, 1), ran.stdout
