"""Make the pictures of the README and of the notebooks' first cells: `python -m notebooks.maintain.pictures`.

`make course` does. `figures/selection.png` is copied out of the executed course, `figures/recall.png`,
`figures/training.png` and `figures/cost.png` are drawn from their records, and `figures/schematic*.svg` shows the whole
of DSA, once with each choice of parts lit that the course makes.
"""

import base64

import nbformat

from dsa_course.million.live import still_curves
from dsa_course.schematic import schematic, schematic_file
from dsa_course.teaching.live_record import live_regimes
from dsa_course.viz import png, recall_curves
from dsa_ref import records
from dsa_ref.training.results import read_runs

from .course import COURSE
from .learner import SOURCE

FIGURES = records.figures_folder()


def stored(notebook, text) -> bytes:
    """The PNG of the output whose text begins so, of a source notebook. Raises: ValueError unless there is just one."""
    outputs = [
        output
        for cell in nbformat.read(SOURCE / f"{notebook}.ipynb", as_version=4).cells
        for output in cell.get("outputs", [])
        if output.get("data", {}).get("text/plain", "").startswith(text)
    ]
    if len(outputs) != 1:
        raise ValueError(f"text must begin one output of {notebook}, got {len(outputs)} for {text!r}")
    return base64.b64decode(outputs[0].data["image/png"])


def selection() -> bytes:
    """What the trained indexer selects and what the model then guesses, the first picture of the course."""
    return stored("00_start_here", "<IPython.core.display.Image")


def recall() -> bytes:
    """The recorded recall of the trained indexer and its controls."""
    recorded = records.read("small_model_recall.json")
    order = ("indexer", "attention itself", "window", "random")
    figure = recall_curves(recorded["k"], {name: recorded["recall"][name] for name in order})
    return png(figure, "Attention mass on the selected keys against k, for the indexer and its controls")


def training() -> bytes:
    """The recorded regimes of training, as notebook 13 first shows them."""
    return live_regimes(read_runs()).png


def cost() -> bytes:
    """A layer's cost against the context, recorded and predicted."""
    return png(*still_curves())


PICTURES = {"selection.png": selection, "recall.png": recall, "training.png": training, "cost.png": cost}


def schematics() -> dict[str, str]:
    """{file: SVG text}: the picture with nothing lit, and what each notebook lights."""
    return {schematic_file(lit): schematic(lit) for lit in ((), *(notebook.lit for notebook in COURSE))}


def main():
    made = {file: make() for file, make in PICTURES.items()}  # all, before one is replaced
    for file, picture in made.items():
        with records.replacing(FIGURES / file) as new:
            new.write_bytes(picture)
    for file, svg in schematics().items():
        with records.replacing(FIGURES / file) as new:
            new.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
