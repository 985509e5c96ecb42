"""What strict nbval cannot see: notebooks were executed, stay small and quick, describe their pictures, are live."""

import subprocess
import sys
import time

import ipywidgets
import nbformat
import numpy as np
import pytest
import rungs
import torch
from conftest import NEEDS_PYTHON_311, NEEDS_TRITON, OLD_PYTHON
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from dsa_course.viz import LiveFigure
from notebooks.conftest import LOAD_MODELS, WRITE_KERNELS
from notebooks.maintain.course import written
from notebooks.maintain.learner import LEARNER, SOURCE

SOURCES = sorted(SOURCE.glob("*.ipynb"))
EDITIONS = [*SOURCES, *sorted(LEARNER.glob("*.ipynb"))]
every_notebook = pytest.mark.parametrize("path", EDITIONS, ids=lambda path: f"{path.parent.name}-{path.stem}")
every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)

SECONDS = 10  # of one core's time for a notebook, without the start of a kernel


def code_cells(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert [notebook.number for notebook in written()][:6] == ["00", "01", "02", "03", "04", "04b"]
    assert len(SOURCES) == len(written()) >= 15


@every_notebook
def test_every_cell_was_executed_in_order(path):
    """A stripped notebook passes nbval without comparing anything."""
    assert [cell.execution_count for cell in code_cells(path)] == list(range(1, len(code_cells(path)) + 1))
    for cell in code_cells(path):
        prints = any(line.startswith("print(") for line in cell.source.splitlines())
        assert cell.outputs or not prints, cell.source


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
    assert pictures


@every_notebook
def test_nothing_that_differs_from_run_to_run_is_stored(path):
    for cell in code_cells(path):
        if "# NBVAL_IGNORE_OUTPUT" not in cell.source:
            for output in cell.outputs:
                shown = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
                assert " at 0x" not in shown.replace("<IPython.core.display", ""), cell.source
                assert "tensor(" not in shown and "array(" not in shown, cell.source


@every_notebook
def test_nbval_sees_its_markers(path):
    """nbval knows a marker only where it is alone on its line."""
    marked = [line for cell in code_cells(path) for line in cell.source.splitlines() if "NBVAL_" in line]
    assert marked and set(marked) == {"# NBVAL_IGNORE_OUTPUT"}  # the environment's card


@every_source
def test_every_control_of_every_live_figure(path, monkeypatch):
    """Run the notebook as Jupyter would, keep its live figures, move each control: the data and the picture change."""
    if path.name.startswith(WRITE_KERNELS) and not rungs.has_triton():
        pytest.skip(NEEDS_TRITON)
    if path.name.startswith(LOAD_MODELS) and OLD_PYTHON:
        pytest.skip(NEEDS_PYTHON_311)
    monkeypatch.chdir(path.parent)
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    began, figures = time.process_time(), []
    for cell in code_cells(path):
        ran = shell.run_cell(cell.source)
        ran.raise_error()
        if isinstance(ran.result, LiveFigure):
            figures.append(ran.result)
    seconds = time.process_time() - began
    assert figures
    for figure in figures:
        assert "<p" not in figure.children[-1].value, "it starts with a value that it cannot show"
        for control in figure.children[:-1]:
            check_control(figure, control)
    # A GPU's compiler takes its own time at the first call of each kernel.
    assert seconds <= SECONDS or torch.cuda.is_available(), f"{path.stem} took {seconds:.1f} s"


def check_control(figure, control):
    first, data, picture = control.value, figure.data, figure.png
    control.value = another_value(control)
    assert not same(figure.data, data), f"{control.description} of {figure!r} changes no data"
    assert figure.png != picture, f"{control.description} of {figure!r} changes no picture"
    assert figure.children[-1].value.count("<img") == 1 and len(figure.alt.split()) > 8
    assert str(control.value) in repr(figure)
    control.value = first
    assert same(figure.data, data) and figure.png == picture  # nothing is left over


def another_value(control):
    if isinstance(control, ipywidgets.Checkbox | ipywidgets.ToggleButton):
        return not control.value
    if hasattr(control, "options"):  # values, or (label, value) pairs
        values = [option[1] if isinstance(option, tuple) else option for option in control.options]
        place = values.index(control.value)
        return values[place - 1 if place else 1]
    return control.min if control.value != control.min else control.max


def same(a, b):
    """Equality of nested data that may hold tensors, arrays and figures' text."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor | np.ndarray):
        a, b = np.asarray(a), np.asarray(b)
        return a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return a == b


def test_the_slider_of_notebook_00():
    """The numbers behind the first live figure of the course, not only that they change."""
    path = next(path for path in SOURCES if path.stem == "00_start_here")
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    for cell in code_cells(path):
        ran = shell.run_cell(cell.source)
        ran.raise_error()
        if isinstance(figure := ran.result, LiveFigure):
            break
    controls = {control.description: control for control in figure.children[:-1]}
    controls["byte t"].value = 300
    chosen = figure.data["chosen"]
    assert figure.data["byte"] == 300 and "300" in repr(figure) and "300" in figure.alt
    assert chosen.max() <= 300 and len(set(chosen.tolist())) == 64
    assert figure.data["weights"].sum().item() == pytest.approx(1, abs=1e-4)
    controls["k"].value = 16
    assert len(figure.data["chosen"]) == 16 and set(figure.data["chosen"].tolist()) != set(chosen.tolist())


@pytest.mark.parametrize("number", ("08", "09", "10"))
@pytest.mark.parametrize("folder", (LEARNER, SOURCE))
def test_without_triton_a_notebook_of_kernels_says_what_is_missing(number, folder):
    """Its cells up to the first error, where triton cannot be imported."""
    (path,) = folder.glob(f"{number}_*.ipynb")
    cells = [cell.source for cell in code_cells(path)]
    code = f"import sys; sys.modules['triton'] = None\nfor cell in {cells!r}: exec(cell)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "RuntimeError: This notebook writes Triton kernels, and Triton exists for Linux only" in ran.stderr


@pytest.mark.parametrize("version", ("5.22.2", "none"))
@pytest.mark.parametrize("folder", (LEARNER, SOURCE))
def test_without_transformers_a_notebook_of_models_says_what_to_install(version, folder):
    """Its first cell, where transformers is another's version or missing; with the installed one it goes on."""
    (path,) = folder.glob("12b_*.ipynb")
    code = f"""
import importlib.metadata as metadata
own = metadata.version
def version(name):
    if name == "transformers" and {version!r} == "none":
        raise metadata.PackageNotFoundError(name)
    return {version!r} if name == "transformers" else own(name)
metadata.version = version
exec({code_cells(path)[0].source!r})
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = ran.stderr.strip().splitlines()[-1]
    assert said.startswith("RuntimeError: This notebook loads a model with transformers: run `%pip install ")
    assert f"needs transformers 5.23 or newer, got {version}" in said
