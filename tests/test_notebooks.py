"""What strict nbval cannot see: that notebooks were executed, stay small, describe their pictures, and are live."""

import pathlib

import ipywidgets
import nbformat
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").rglob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)


def code_cells(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert "00_start_here" in NAMES


@every_notebook
def test_every_cell_was_executed_in_order(path):
    """A stripped notebook passes nbval without comparing anything."""
    assert [cell.execution_count for cell in code_cells(path)] == list(range(1, len(code_cells(path)) + 1))
    for cell in code_cells(path):
        prints = any(line.startswith("print(") for line in cell.source.splitlines())
        assert cell.outputs or not prints, cell.source
        assert not any(output.output_type == "error" for output in cell.outputs), cell.source


@every_notebook
def test_size_and_metadata(path):
    assert path.stat().st_size <= 500_000
    assert "widgets" not in nbformat.read(path, 4).metadata  # GitHub's viewer fails on it


@every_notebook
def test_pictures_are_described(path):
    pictures = [
        output
        for cell in code_cells(path)
        for output in cell.outputs
        if output.output_type in ("display_data", "execute_result") and "image/png" in output.data
    ]
    for output in pictures:
        assert len(output.metadata["image/png"]["alt"].split()) > 8
    assert pictures or path.stem != "00_start_here"


def test_the_slider_of_notebook_00():
    """Run the notebook down to its live figure, move the sliders, and look at the data and the picture."""
    (path,) = (path for path in NOTEBOOKS if path.stem == "00_start_here")
    sources = [cell.source for cell in code_cells(path)]
    (last,) = (i for i, source in enumerate(sources) if "live_selection(" in source)
    before, call = sources[last].split("\nlive_selection(")
    names = {}
    exec("\n".join([*sources[:last], before]), names)  # the notebook's own code
    figure = eval("live_selection(" + call, names)
    controls = {child.description: child for child in figure.children if isinstance(child, ipywidgets.IntSlider)}
    first, picture = figure.data, figure.children[0].value
    controls["byte t"].value = 300
    assert figure.data["byte"] == 300 and figure.children[0].value != picture
    chosen = figure.data["chosen"]
    assert chosen.max() <= 300 and len(set(chosen.tolist())) == 64
    assert figure.data["weights"].sum().item() == pytest.approx(1, abs=1e-4)
    controls["layer"].value = 0
    assert not chosen.equal(figure.data["chosen"]) and figure.data["layer"] == 0
    assert first["byte"] != 300 and "300" in repr(figure) and "300" in figure.alt
