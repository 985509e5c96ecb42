"""Make the learner edition from the source notebooks: `python -m notebooks.maintain.learner`, or `make learner`.

notebooks/solutions/NN_title.ipynb is the source; notebooks/NN_title.ipynb is generated from it and never edited.
What lies between `### BEGIN SOLUTION` and `### END SOLUTION` becomes nbgrader's stub, the folded solution below each
exercise gets the code, and the check's stored output becomes the error that the stub raises. All other outputs are the
source's own: no cell may use what a learner wrote, so they are the same. Strict nbval on both editions proves it.

Where a text asks for a guess, the output of the cell below it is folded: JupyterLab opens it when the cell is run or
the fold is clicked, and the site (`hide-output`) on a click. A source cell with `outputs_hidden` is folded too.
"""

import copy
import pathlib
import re

import nbformat

from dsa_course.checking import NotWritten

SOURCE = pathlib.Path(__file__).parents[1] / "solutions"
LEARNER = SOURCE.parent

SOLUTION = re.compile(r"^([ \t]*)### BEGIN SOLUTION[^\n]*\n(.*?)^[ \t]*### END SOLUTION[^\n]*(?:\n|\Z)", re.M | re.S)
ASKS = re.compile(  # words that ask for a guess
    r"\bPredict\b|\*\*predict\*\*|\bpredict:|\bGuess\b|\bguess before\b|\b[Bb]efore you (?:look|run)\b"
    r"|\bDecide before\b|\*\*What will\b"
)
PLACE = re.compile(r"<!-- solution: (\w+) -->")  # in the folded text below an exercise


def learner_edition(source):
    """The notebook that a learner gets, from a source notebook that has been executed. Neither touches a file.

    Raises: ValueError for a solution cell without a marked region, a check that no solution cell precedes, a solution
    that is not folded in below, or a fold for an unknown exercise.
    """
    nb = copy.deepcopy(source)
    solved, folded = {}, set()
    for cell in nb.cells:
        kind = cell.metadata.get("nbgrader", {})
        if kind.get("solution"):
            solved[kind["grade_id"]] = _code_to_show(cell.source)
            cell.source, count = SOLUTION.subn(r"\1# YOUR CODE HERE\n\1raise NotImplementedError()\n", cell.source)
            cell.source = cell.source.rstrip("\n")
            if not count:
                raise ValueError(f"cell {kind['grade_id']!r} must mark its solution with BEGIN and END lines, got none")
        elif kind.get("grade"):
            exercise = kind["grade_id"].removeprefix("check_")
            if exercise not in solved:
                raise ValueError(f"check {exercise!r} must stand below its solution cell, which is missing")
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "raises-exception"]
            stub = NotWritten()
            cell.outputs = [
                nbformat.v4.new_output(
                    "error", ename=type(stub).__name__, evalue=str(stub), traceback=stub._render_traceback_()
                )
            ]
        elif cell.cell_type == "markdown":
            for exercise in PLACE.findall(cell.source):
                if exercise not in solved:
                    raise ValueError(f"fold for {exercise!r} must stand below its solution cell, which is missing")
                code = f"```python\n{solved[exercise]}\n```"
                cell.source = cell.source.replace(f"<!-- solution: {exercise} -->", code)
                folded.add(exercise)
    for cell in guessed(nb):
        cell.metadata["tags"] = list(dict.fromkeys([*cell.metadata.get("tags", []), "hide-output"]))
        cell.metadata["collapsed"] = True  # JupyterLab keeps this and the next one equal
        cell.metadata["jupyter"] = {**cell.metadata.get("jupyter", {}), "outputs_hidden": True}
    missing = set(solved) - folded
    if missing:
        raise ValueError(f"every solution must be folded in below its check, missing: {', '.join(sorted(missing))}")
    return nb


def guessed(nb):
    """The code cells whose output somebody was asked to guess: the first below a text that asks, or marked so."""
    asked = False
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            asked = "<details>" not in cell.source and ASKS.search(cell.source)
        elif "nbgrader" in cell.metadata:
            asked = False
        elif (asked and cell.outputs) or cell.metadata.get("jupyter", {}).get("outputs_hidden"):
            asked = False
            yield cell


def _code_to_show(source):
    """A solved cell without the two marks."""
    return "\n".join(line for line in source.splitlines() if not re.match(r"[ \t]*### (BEGIN|END) SOLUTION", line))


def main():
    sources = sorted(SOURCE.glob("*.ipynb"))
    editions = [learner_edition(nbformat.read(path, as_version=4)) for path in sources]  # all, before one is replaced
    for path, edition in zip(sources, editions, strict=True):
        nbformat.write(edition, LEARNER / path.name)


if __name__ == "__main__":
    main()
