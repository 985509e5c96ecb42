"""HTML that nbconvert makes of a notebook describes its pictures, with our preprocessor and not without."""

import html
import re

import nbformat
import pytest
from nbconvert import HTMLExporter

from notebooks.maintain.learner import LEARNER


def exported(path, *preprocessors):
    return HTMLExporter(preprocessors=list(preprocessors)).from_notebook_node(nbformat.read(path, as_version=4))[0]


@pytest.mark.parametrize("name", ["02_index_scores", "12_serving"])  # live figures, and still ones too
def test_alt_text_reaches_html(name):
    path = LEARNER / f"{name}.ipynb"
    wanted = [
        output.metadata["image/png"]["alt"]
        for cell in nbformat.read(path, as_version=4).cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert wanted
    page = exported(path, "dsa_course.export.AltText")
    assert [html.unescape(alt) for alt in re.findall(r'<img alt="([^"]*)"[^>]* src="data:image/png', page)] == wanted
    assert "No description has been provided" not in page
    assert "No description has been provided" in exported(path)  # nbconvert by itself
