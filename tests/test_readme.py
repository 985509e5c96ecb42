"""The README's example of serving runs as it stands; the one above it needs kernels where the tensors are."""

import pathlib
import re

import torch

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_readme_s_serving_runs():
    (block,) = re.findall(r"^```python\n(from dsa_ref\.nn .*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    names = {"torch": torch}
    exec(block, names)
    table, first, second = names["table"], names["first"], names["second"]
    assert list(names["logits"].shape) == [2, 1, 256]
    assert (table.length(first), table.length(second)) == (12, 11) and table.pages - table.free_pages == 2
