"""The README's example of serving runs as it stands; the one above it needs kernels where the tensors are."""

import pathlib
import re

import torch

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"


def test_the_readme_s_serving_runs():
    (block,) = re.findall(r"^```python\n(from dsa_ref\.nn .*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    names = {"torch": torch}
    exec(block, names)
    table, first, second = names["table"], names["first"], names["second"]
    assert list(names["logits"].shape) == [2, 1, 256]
    assert (table.length(first), table.length(second)) == (12, 11) and table.pages - table.free_pages == 2


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
