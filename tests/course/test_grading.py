"""A teacher's path, with nbgrader itself: hand out, fetch, work, hand in, grade; and what was handed out runs through.

Full marks for the solutions, none for the stubs, one exercise's for one exercise; the same stubs as ours, no solutions.

Run by `make test-grading`, which installs nbgrader; plain pytest leaves these tests out (marker `grading`).
"""

import getpass
import os
import pathlib
import shutil
import subprocess
import sys

import nbformat
import pytest
from test_pointers import LINK, link_leads

from notebooks.maintain.learner import LEARNER, SOURCE, learner_edition
from notebooks.maintain.work import copy_course

pytestmark = pytest.mark.grading

NAME = "04_gather"  # one notebook without Triton and one with it would cost twice as much and show the same
CONFIG = LEARNER / "nbgrader_config.py"
FETCHED = getpass.getuser()  # the student who goes by nbgrader's own exchange
STUDENTS = ("solved", "unsolved", FETCHED)


def nbgrader(folder, *arguments):
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # nbgrader calls alembic by name
    command = [sys.executable, "-m", "nbgrader", *arguments]
    ran = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course with one assignment, released by nbgrader, handed in by three students, and graded.

    Two hand in by themselves. The third fetches the release, solves the first exercise, and submits.
    """
    course, home, exchange = (tmp_path_factory.mktemp(name) for name in ("course", "home", "exchange"))
    exchange.chmod(0o777)
    by_exchange = f"--Exchange.root={exchange}"
    shutil.copy(CONFIG, course)
    source = course / "source" / "dsa" / f"{NAME}.ipynb"
    source.parent.mkdir(parents=True)
    shutil.copy(SOURCE / source.name, source)
    nbgrader(course, "generate_assignment", "dsa", "--create")
    released = course / "release" / "dsa" / source.name
    nbgrader(course, "release_assignment", "dsa", by_exchange)
    for student in ("solved", "unsolved"):
        handed_in = course / "submitted" / student / "dsa" / source.name
        handed_in.parent.mkdir(parents=True)
        shutil.copy(source if student == "solved" else released, handed_in)
    nbgrader(home, "fetch_assignment", "dsa", "--course", "dsa", by_exchange)
    half = home / "dsa" / source.name
    nb, solved = read(half), {cell.id: cell for cell in read(source).cells}
    first = next(cell for cell in nb.cells if cell.metadata.get("nbgrader", {}).get("solution"))
    first.source = solved[first.id].source
    nbformat.write(nb, half)
    nbgrader(home, "submit", "dsa", "--course", "dsa", by_exchange)
    nbgrader(course, "collect", "dsa", by_exchange)
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
    assert scores(course, FETCHED) == {first: points[first], **dict.fromkeys(others, 0)}


def test_the_release_shows_no_solution_and_has_our_stubs(course):
    released = read(course / "release" / "dsa" / f"{NAME}.ipynb")
    ours = learner_edition(read(SOURCE / f"{NAME}.ipynb"))
    for theirs, cell in zip(released.cells, ours.cells, strict=True):
        assert "END SOLUTION" not in theirs.source
        if cell.cell_type == "code":
            assert theirs.source == cell.source
    text = "\n".join(cell.source for cell in released.cells)
    shown = "\n".join(cell.source for cell in ours.cells)
    exercises = len(scores(course, "solved"))
    for word, count in (("Why.**", 0), ("Common wrong answers", 0), ("<!-- solution", 0), ("<summary>Solution", 0)):
        assert text.count(word) == count and shown.count(word) in (exercises, 0)
    assert text.count("<summary>Hint") == shown.count("<summary>Hint") >= exercises
    assert text.count("<details>") == text.count("</details>") == shown.count("<details>") - exercises


def test_the_release_runs_from_top_to_bottom(course):
    """As "Run All" does: it stops at the first error of a cell that may not fail."""
    release = course / "release" / "dsa" / f"{NAME}.ipynb"
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--output-dir", str(course / "run")]
    subprocess.run([*command, str(release)], check=True, capture_output=True)
    cells = [cell for cell in read(course / "run" / release.name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        errors = [output for output in cell.outputs if output.output_type == "error"]
        assert bool(errors) == bool(cell.metadata.get("nbgrader", {}).get("grade")), cell.source
        assert all(error.traceback == ["✗ not written yet"] for error in errors)


def test_the_releases_links_lead_somewhere(course, tmp_path):
    """In work/dsa/, below the copies that `make lab` makes: pictures, glossary, map and neighbours."""
    (tmp_path / "figures").symlink_to(LEARNER.parent / "figures")
    copy_course(LEARNER, tmp_path / "work")
    folder = tmp_path / "work" / "dsa"
    shutil.copytree(course / "release" / "dsa", folder)
    text = "\n".join(cell.source for cell in read(folder / f"{NAME}.ipynb").cells if cell.cell_type == "markdown")
    assert "](../03_select_topk.ipynb)" in text and len(LINK.findall(text)) >= 20
    assert [link for link in LINK.findall(text) if not link_leads(link, folder, text)] == []
    source = read(SOURCE / f"{NAME}.ipynb")
    unchanged = "\n".join(cell.source for cell in source.cells if cell.cell_type == "markdown")
    assert [link for link in LINK.findall(unchanged) if not link_leads(link, folder, unchanged)]  # so they need it


def test_a_link_to_what_is_handed_out_too_stays(tmp_path):
    from dsa_course.grading import HandOut

    (tmp_path / "03_select_topk.ipynb").touch()
    cell = nbformat.v4.new_markdown_cell("[a](03_select_topk.ipynb) [b](06_mla.ipynb#c) ![e](../../figures/f.svg)")
    HandOut().preprocess_cell(cell, {"metadata": {"path": str(tmp_path)}}, 0)
    assert cell.source == "[a](03_select_topk.ipynb) [b](../06_mla.ipynb#c) ![e](../../figures/f.svg)"


def test_without_the_settings_it_would_stop_and_show_solutions(course, tmp_path):
    """So that it is the settings that the tests above try."""
    (tmp_path / "source" / "dsa").mkdir(parents=True)
    shutil.copy(course / "source" / "dsa" / f"{NAME}.ipynb", tmp_path / "source" / "dsa")
    nbgrader(tmp_path, "generate_assignment", "dsa", "--create")
    cells = read(tmp_path / "release" / "dsa" / f"{NAME}.ipynb").cells
    assert any("Common wrong answers" in cell.source for cell in cells)
    assert not any("raises-exception" in cell.metadata.get("tags", []) for cell in cells)


@pytest.mark.parametrize("path", sorted(pathlib.Path(SOURCE).glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_notebooks_solutions_are_taken_out_whole(path):
    from dsa_course.grading import HandOut

    nb, _ = HandOut().preprocess(read(path), {})
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            assert "<summary>Solution" not in cell.source and "<!-- solution" not in cell.source
            assert cell.source.count("<details>") == cell.source.count("</details>")


def test_a_solution_outside_of_a_fold_is_refused():
    from dsa_course.grading import HandOut

    cell = nbformat.v4.new_markdown_cell("<details><summary>Hint</summary>\n\nh\n</details>\n<!-- solution: x -->")
    with pytest.raises(ValueError, match="every solution must stand in a fold of its own"):
        HandOut().preprocess_cell(cell, {}, 0)


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
