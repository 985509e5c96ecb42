"""A teacher's path, with nbgrader itself: full marks for the solutions, none for the stubs, and the same stubs as ours.

Run by `make test-grading`, which installs nbgrader; plain pytest leaves these tests out (marker `grading`).
"""

import os
import pathlib
import shutil
import subprocess
import sys

import nbformat
import pytest

from notebooks.maintain.learner import SOURCE, learner_edition

pytestmark = pytest.mark.grading

NAME = "04_gather"  # one notebook without Triton and one with it would cost twice as much and show the same
STUDENTS = ("solved", "unsolved", "half")


def nbgrader(course, *arguments):
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # nbgrader calls alembic by name
    command = [sys.executable, "-m", "nbgrader", *arguments]
    ran = subprocess.run(command, cwd=course, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course with one assignment, released by nbgrader, handed in by three students, and graded."""
    course = tmp_path_factory.mktemp("course")
    source = course / "source" / "dsa" / f"{NAME}.ipynb"
    source.parent.mkdir(parents=True)
    shutil.copy(SOURCE / source.name, source)
    nbgrader(course, "generate_assignment", "dsa", "--create")
    released = course / "release" / "dsa" / source.name
    for student in STUDENTS:
        handed_in = course / "submitted" / student / "dsa" / source.name
        handed_in.parent.mkdir(parents=True)
        shutil.copy(source if student == "solved" else released, handed_in)
    half = course / "submitted" / "half" / "dsa" / source.name
    nb, solved = read(half), {cell.id: cell for cell in read(source).cells}
    first = next(cell for cell in nb.cells if cell.metadata.get("nbgrader", {}).get("solution"))
    first.source = solved[first.id].source
    nbformat.write(nb, half)
    for student in STUDENTS:
        nbgrader(course, "autograde", "dsa", "--student", student)
    return course


def scores(course, student):
    """{check: points} as nbgrader's gradebook has them."""
    from nbgrader.api import Gradebook  # here and below: only who runs these tests has nbgrader

    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as gradebook:
        grades = gradebook.find_submission_notebook(NAME, "dsa", student).grades
        return {grade.name: grade.auto_score for grade in grades if grade.auto_score is not None}


def test_the_solutions_get_full_marks_and_the_stubs_none(course):
    points = {
        cell.metadata.nbgrader.grade_id: cell.metadata.nbgrader.points
        for cell in read(SOURCE / f"{NAME}.ipynb").cells
        if cell.metadata.get("nbgrader", {}).get("grade")
    }
    assert len(points) >= 3
    assert scores(course, "solved") == points
    assert scores(course, "unsolved") == dict.fromkeys(points, 0)
    first, *others = points
    assert scores(course, "half") == {first: points[first], **dict.fromkeys(others, 0)}


def test_the_release_shows_no_solution_and_has_our_stubs(course):
    released = read(course / "release" / "dsa" / f"{NAME}.ipynb")
    ours = learner_edition(read(SOURCE / f"{NAME}.ipynb"))
    for theirs, cell in zip(released.cells, ours.cells, strict=True):
        assert "END SOLUTION" not in theirs.source
        if cell.cell_type == "code":
            assert theirs.source == cell.source
        else:
            assert "```python" not in theirs.source or "```python" in cell.source


@pytest.mark.parametrize("path", sorted(pathlib.Path(SOURCE).glob("*.ipynb")), ids=lambda path: path.stem)
def test_nbgrader_makes_the_same_stubs_of_every_notebook(path):
    from nbgrader.preprocessors import ClearSolutions

    theirs, _ = ClearSolutions().preprocess(read(path), {})
    ours = learner_edition(read(path))
    for a, b in zip(theirs.cells, ours.cells, strict=True):
        if a.cell_type == "code":
            assert a.source == b.source


def test_nbgrader_finds_the_metadata_valid():
    from nbgrader.nbgraderformat import MetadataValidator

    for path in pathlib.Path(SOURCE).glob("*.ipynb"):
        MetadataValidator().validate_nb(read(path))
