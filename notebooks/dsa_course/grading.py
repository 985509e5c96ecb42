"""What nbgrader hands out of a notebook: no solution, folded or not, and checks that do not stop "Run All".

Learners put it one folder below their copy of the course, in work/dsa/ say. So a link to a neighbour that is not handed
out with it leads up, to that copy; all other links are right there, since solutions/ is one folder deeper, too.

Named in notebooks/nbgrader_config.py, which a teacher copies into the class's folder. Needs nbgrader (extra `grading`).
"""

import pathlib
import re

from nbgrader.converters import GenerateAssignment
from nbgrader.preprocessors import NbGraderPreprocessor
from nbgrader.utils import is_grade

# The fold below an exercise that holds the solution, its reasons and the common wrong answers. Hints stay.
FOLD = re.compile(
    r"<details><summary>(?:(?!</?details>).)*?<!-- solution: \w+ -->(?:(?!</?details>).)*?</details>\n?", re.S
)

NEIGHBOUR = re.compile(r"\]\((?=([\w-]+\.ipynb)(?:#[\w-]+)?\))")


class HandOut(NbGraderPreprocessor):
    """Takes the folded solutions out whole, turns links to neighbours, and lets the cells below a failing check run."""

    def preprocess_cell(self, cell, resources, index):
        if is_grade(cell):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "raises-exception"]
        elif cell.cell_type == "markdown":
            cell.source = FOLD.sub("", cell.source).rstrip("\n")
            if "<!-- solution: " in cell.source:
                raise ValueError(f"every solution must stand in a fold of its own, got {cell.source!r}")
            folder = pathlib.Path(resources.get("metadata", {}).get("path", ""))  # of the assignment's sources
            cell.source = NEIGHBOUR.sub(lambda m: m[0] if (folder / m[1]).exists() else "](../", cell.source)
        return cell, resources


PREPROCESSORS = [HandOut, *GenerateAssignment.class_traits()["preprocessors"].default()]
