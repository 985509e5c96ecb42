"""Put the picture of the whole and the links to the neighbours into the source notebooks: `make course` does, first.

`python -m notebooks.maintain.headers` writes them below the mark `<!-- course -->` at the end of each notebook's first
and last cell, from the table in `course.py`. Above the mark stands what an author wrote, below it what is made here.
"""

import copy

import nbformat

from dsa_course.schematic import schematic_alt, schematic_file

from .course import SOURCE, written

MARK = "<!-- course -->"
# Colab's button opens one file of the project, and that file does not know the project's address.
ALONE = """<details><summary>Opened alone, as on Colab?</summary>

Then the project is missing. Get it first, in a cell of its own above the next one, with the address of the project's
page in place of ADDRESS:

```
!git clone ADDRESS dsa
%pip install -e './dsa[course]'
```

Restart the session, then go on below.
</details>"""


def with_course(nb, notebook, before, after):
    """A copy of a source notebook whose first cell ends with the picture and links, and whose last with what is next.

    notebook, and its neighbours before and after (or None): rows of `course.COURSE`.
    Raises: ValueError where the first or the last cell is no Markdown.
    """
    nb = copy.deepcopy(nb)
    links = [f"Before: {_link(before)}" if before else "", f"After: {_link(after)}" if after else ""]
    links += ["[The map of the course](../README.md)", "[Glossary](../GLOSSARY.md)"]
    picture = f"![{schematic_alt(notebook.lit)}](../../figures/{schematic_file(notebook.lit)})"
    below = {0: f"{picture}\n\n{' · '.join(filter(None, links))}\n\n{ALONE}"}
    end = f"{_link(after)} ({after.minutes} minutes)." if after else "[the map of the course](../README.md)."
    below[len(nb.cells) - 1] = f"**Next.** {end}"
    for place, text in below.items():
        cell = nb.cells[place]
        if cell.cell_type != "markdown":
            raise ValueError(f"cell {place} of {notebook.stem} must be Markdown, got {cell.cell_type}")
        cell.source = f"{cell.source.partition(MARK)[0].rstrip()}\n\n{MARK}\n\n{text}"
    return nb


def _link(notebook):
    return f"[{notebook.number} · {notebook.title}]({notebook.stem}.ipynb)"


def course_notebooks():
    """{path: text} of every source notebook as it should be."""
    there = written()
    made = {}
    for before, notebook, after in zip([None, *there], there, [*there[1:], None], strict=False):
        path = SOURCE / f"{notebook.stem}.ipynb"
        nb = with_course(nbformat.read(path, as_version=4), notebook, before, after)
        made[path] = nbformat.writes(nb) + "\n"
    return made


def main():
    for path, text in course_notebooks().items():  # all are made before one is replaced
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
