"""The README's example of serving runs as it stands; the one above it needs kernels where the tensors are. Its tables
are those of the records."""

import pathlib
import re

import pytest
import torch

from notebooks.maintain import tables

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"


def test_the_readme_s_serving_runs():
    (block,) = re.findall(r"^```python\n(from dsa_ref\.nn .*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    names = {"torch": torch}
    exec(block, names)
    table, first, second = names["table"], names["first"], names["second"]
    assert list(names["logits"].shape) == [2, 1, 256]
    assert (table.length(first), table.length(second)) == (12, 11) and table.pages - table.free_pages == 2


def test_the_tables_are_the_records():
    text = README.read_text(encoding="utf-8")
    assert tables.written(text) == text
    assert tables.written(text.replace("| 128K | ", "| 128K | 1", 1)) == text  # a number that was edited by hand


def test_a_table_that_is_missing_or_unknown_is_refused():
    text = README.read_text(encoding="utf-8")
    for wrong in (text.replace("<!-- table: layer -->", ""), text.replace("table: layer", "table: laser")):
        with pytest.raises(ValueError, match="README.md must have the tables layer, kernels, decode"):
            tables.written(wrong)


def pins(text):
    """{(package, condition): version} of all that is pinned in a text."""
    found = re.findall(r"([\w-]+)==([\w.]+)(?:; ([^\"#\n]*))?", text.replace("'", ""))
    return {(name, condition.strip()): version for name, version, condition in found}


def test_a_learner_s_packages_and_the_tests_are_apart_and_agree():
    """Only pytest is in both, since notebook 15 runs tests."""
    learner = pins((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    extra = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\ntest = [")[2].partition("\n]")[0]
    tests = pins(extra)
    assert {name for name, _ in tests} >= {"pytest", "nbval", "hypothesis", "transformers", "ruff"}
    both = learner.keys() & tests.keys()
    assert both == {("pytest", "")} and all(learner[pin] == tests[pin] for pin in both)
