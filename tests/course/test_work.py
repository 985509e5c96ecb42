"""Learners write in copies that git does not see, and no update of the course overwrites what they wrote.

And where they work without a set-up of their own, Binder and a container get what `requirements.txt` names.
"""

import re
import subprocess

import pytest

from notebooks.maintain import work
from notebooks.maintain.learner import LEARNER


@pytest.fixture
def course(tmp_path):
    (tmp_path / "course").mkdir()
    for name in ("00_a.ipynb", "01_b.ipynb", "README.md"):
        (tmp_path / "course" / name).write_text(f"first {name}", encoding="utf-8")
    return tmp_path / "course", tmp_path / "work"


def test_what_was_written_stays_and_what_was_not_follows_the_course(course):
    source, mine = course
    assert work.copy_course(source, mine) == []
    assert (mine / "00_a.ipynb").read_text() == "first 00_a.ipynb" and (mine / "README.md").exists()
    (mine / "00_a.ipynb").write_text("solved")
    assert work.copy_course(source, mine) == []  # nothing new, so nothing to say
    for path in source.iterdir():
        path.write_text("second")
    for _ in range(2):  # said each time, until it is settled
        assert work.copy_course(source, mine) == ["00_a.ipynb"]
        assert (mine / "00_a.ipynb").read_text() == "solved"
        assert (mine / "01_b.ipynb").read_text() == (mine / "README.md").read_text() == "second"
    (mine / "00_a.ipynb").rename(mine / "my_a.ipynb")
    assert work.copy_course(source, mine) == []
    assert (mine / "00_a.ipynb").read_text() == "second" and (mine / "my_a.ipynb").read_text() == "solved"


def test_a_file_of_ones_own_by_a_new_notebooks_name_stays(course):
    source, mine = course
    work.copy_course(source, mine)
    (mine / "02_c.ipynb").write_text("my own")
    (source / "02_c.ipynb").write_text("the course's")
    assert work.copy_course(source, mine) == ["02_c.ipynb"] and (mine / "02_c.ipynb").read_text() == "my own"


def test_git_ignores_the_copies_and_make_lab_opens_them():
    root = LEARNER.parent
    text = (root / "Makefile").read_text(encoding="utf-8")
    assert "-m notebooks.maintain.work" in text and "/lab/tree/work/00_start_here.ipynb" in text
    assert "/work/" in (root / ".gitignore").read_text(encoding="utf-8").splitlines()
    if (root / ".git").exists():
        ran = subprocess.run(["git", "check-ignore", "-q", "work/00_start_here.ipynb"], cwd=root)
        assert ran.returncode == 0


def test_binder_gets_the_requirements_and_a_python_that_the_project_takes():
    """Binder reads .binder/ and no file beside it, unless one there names it."""
    folder = LEARNER.parent / ".binder"
    lines = (folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    named = [line.removeprefix("-r ") for line in lines if line.startswith("-r ")]
    assert [(folder / name).resolve() for name in named] == [LEARNER.parent / "requirements.txt"]
    index = [line.partition(" ")[2] for line in lines if line.startswith("--extra-index-url ")]
    assert re.findall(r"^CPU_TORCH := (\S+)$", (LEARNER.parent / "Makefile").read_text(encoding="utf-8"), re.M) == index
    version = re.fullmatch(r"python-3\.(\d+)\n", (folder / "runtime.txt").read_text(encoding="utf-8"))
    assert version and 10 <= int(version[1]) < 15
