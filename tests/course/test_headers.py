"""The first and last cell of each notebook: the picture with its part lit, and links to neighbours that are there."""

import dataclasses

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from notebooks.maintain.course import COURSE, SOURCE, Notebook, written
from notebooks.maintain.headers import MARK, course_notebooks, with_course
from notebooks.maintain.learner import learner_edition
from notebooks.maintain.pictures import FIGURES


def first_and_last(nb):
    return nb.cells[0].source, nb.cells[-1].source


@pytest.mark.parametrize("notebook", written(), ids=lambda notebook: notebook.stem)
def test_a_notebook_is_as_the_table_makes_it(notebook):
    path = SOURCE / f"{notebook.stem}.ipynb"
    text = path.read_text(encoding="utf-8")
    assert text == course_notebooks()[path], "run python -m notebooks.maintain.headers"
    first, _ = first_and_last(nbformat.reads(text, as_version=4))
    assert first.startswith(f"# {notebook.number} · {notebook.title}\n")
    assert f"**Time** {notebook.minutes} minutes" in first


def test_neighbours_are_linked_and_only_those_that_are_there():
    made = [first_and_last(nbformat.reads(text, as_version=4)) for text in course_notebooks().values()]
    names = [notebook.stem for notebook in written()]
    for place, (first, last) in enumerate(made):
        before, after = names[place - 1] if place else None, names[place + 1] if place + 1 < len(names) else None
        below_first, below_last = first.partition(MARK)[2], last.partition(MARK)[2]
        assert ("Before: " in below_first) == (before is not None) and ("After: " in below_first) == (after is not None)
        for name in filter(None, (before, after)):
            assert f"]({name}.ipynb)" in below_first
        assert f"]({after}.ipynb)" in below_last if after else "](../README.md)" in below_last
    missing = {notebook.stem for notebook in COURSE} - set(names)
    assert not any(f"]({name}.ipynb)" in text for cells in made for text in cells for name in missing)


def small():
    cells = [new_markdown_cell("# 01 · One"), new_code_cell("1"), new_markdown_cell("## What to remember")]
    return new_notebook(cells=cells)


ONE, TWO, THREE = (Notebook(f"0{i}_x", f"Title {i}", 10 * i, lit) for i, lit in ((1, ("kv",)), (2, ()), (3, ())))


def test_what_is_made():
    once = with_course(small(), TWO, ONE, THREE)
    first, last = first_and_last(once)
    assert first.startswith("# 01 · One\n\n<!-- course -->\n\n![DSA: ") and "(../../figures/schematic.svg)" in first
    assert "Before: [01 · Title 1](01_x.ipynb) · After: [03 · Title 3](03_x.ipynb) · " in first
    assert "!git clone ADDRESS dsa\n%pip install -e './dsa[course]'" in first  # a page that Colab opens is all it has
    assert last.endswith("**Next.** [03 · Title 3](03_x.ipynb) (30 minutes).")
    again = with_course(once, dataclasses.replace(TWO, lit=("kv",)), None, None)  # made anew, not made twice
    first, last = first_and_last(again)
    assert first.count(MARK) == last.count(MARK) == 1 and "Title" not in first + last
    assert "(../../figures/schematic-kv.svg)" in first and "Lit here: kv." in first
    assert again.cells[1].source == "1"


def test_links_of_the_learner_edition_are_one_step_shorter():
    first, last = first_and_last(learner_edition(with_course(small(), ONE, None, None)))
    assert "](../figures/schematic-kv.svg)" in first and "](GLOSSARY.md)" in first and "](README.md)" in last


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cell 2 of 01_x must be Markdown, got code"):
        with_course(new_notebook(cells=[*small().cells[:2], new_code_cell("2")]), ONE, None, None)
    (tmp_path / "77_new.ipynb").touch()
    (tmp_path / "00_start_here.ipynb").touch()
    with pytest.raises(ValueError, match="must stand in the table .*, got 77_new"):
        written(tmp_path)
    (tmp_path / "77_new.ipynb").unlink()
    assert [notebook.stem for notebook in written(tmp_path)] == ["00_start_here"]


def test_every_lit_part_has_its_picture():
    assert len({notebook.stem for notebook in COURSE}) == len(COURSE)
    for made in course_notebooks().values():
        (file,) = {part.partition(")")[0] for part in made.split("](../../figures/")[1:]}
        assert (FIGURES / file).is_file()
