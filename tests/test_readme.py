"""The README's example of serving runs as it stands; the one above it needs kernels where the tensors are. Its tables
are those of the records."""

import pathlib
import re

import pytest
import torch

from notebooks.maintain import tables

README = pathlib.Path(__file__).parents[1] / "README.md"


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
