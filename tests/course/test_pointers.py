"""What the notebooks point at exists: files, tests by their node id, and modules, functions and classes of ours."""

import importlib
import importlib.util
import pathlib
import re

import nbformat
import pytest
import rungs
from conftest import OLD_PYTHON
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from notebooks.maintain.learner import LEARNER, SOURCE

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ("dsa_ref", "dsa_kernels", "dsa_bench", "dsa_course")
# In a longer path, and in an address, none of these is ours.
PATH = re.compile(r"(?<![\w./-])(?:dsa_ref|kernels|notebooks|tests|figures)/[\w./-]*(?:::\w+)?")
DOTTED = re.compile(r"(?<![\w./-])(?:dsa_\w+|kernels)(?:\.[A-Za-z_]\w*)+")  # ours is called dsa_kernels
LINK = re.compile(r"\]\(([\w./-]+\.(?:ipynb|json|md|png|py|svg)(?:#[\w-]+)?|#[\w-]+)\)")


def dangling(text, folder=LEARNER):
    """The paths, names and links in the text that lead nowhere. Links are relative to `folder`."""
    found = [path for path in PATH.findall(text) if not path_exists(path.rstrip("."))]
    found += [name for name in DOTTED.findall(text) if not name_exists(name)]
    return found + [link for link in LINK.findall(text) if not link_leads(link, folder, text)]


def link_leads(link, folder, text):
    """The file is there, and in a page of Markdown the heading is, by the name that GitHub gives it."""
    file, _, heading = link.partition("#")
    if file and not (folder / file).exists():
        return False
    page = (folder / file).read_text(encoding="utf-8") if file.endswith(".md") else text
    return not heading or heading in [made.lower().replace(" ", "-") for made in re.findall("^#+ (.+)$", page, re.M)]


def path_exists(path):
    file, _, test = path.partition("::")
    if not (ROOT / file).exists():
        return False
    return not test or f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8")


def name_exists(name):
    package, *rest = name.split(".")
    if package not in PACKAGES:
        return False
    if package in ("dsa_kernels", "dsa_bench") and not rungs.has_triton():
        return True  # cannot be looked up here
    if name.startswith("dsa_ref.integrations.") and OLD_PYTHON:
        return True  # nor can this
    found = importlib.import_module(package)
    for i, attribute in enumerate(rest):
        module = ".".join((package, *rest[: i + 1]))
        if hasattr(found, attribute):
            found = getattr(found, attribute)
        elif hasattr(found, "__path__") and importlib.util.find_spec(module):
            found = importlib.import_module(module)
        else:
            return False
    return True


def text_of(nb):
    """All that a reader sees: every cell's source, and every output as text or Markdown."""
    for cell in nb.cells:
        yield cell.source
        for output in cell.get("outputs", []):
            yield output.get("text", "")
            yield from (value for kind, value in output.get("data", {}).items() if kind.startswith("text/"))


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_points_at_what_exists(path):
    text = "\n".join(text_of(nbformat.read(path, as_version=4)))
    assert dangling(text, SOURCE) == []
    assert dangling("\n".join(text_of(nbformat.read(LEARNER / path.name, as_version=4)))) == []
    assert DOTTED.search(text)  # so there was something to look up


@pytest.mark.parametrize("page", [LEARNER / "README.md", LEARNER / "GLOSSARY.md", ROOT / "README.md"], ids=str)
def test_a_page_points_at_what_exists(page):
    assert dangling(page.read_text(encoding="utf-8"), page.parent) == []


def test_the_glossary_is_in_order_and_explains_each_word_once():
    words = re.findall("^#### (.+)$", (LEARNER / "GLOSSARY.md").read_text(encoding="utf-8"), re.M)
    assert words == sorted(set(words), key=str.lower) and len(words) >= 45


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("see `dsa_ref/training/train.py`, `tests/wrong_solutions`; dsa_ref/nn/train.py.", ["dsa_ref/nn/train.py."]),
        ("`dsa_ref.lab.viz` became dsa_course.viz.", ["dsa_ref.lab.viz"]),
        ("Our kernels. `kernels.index_scores` is now `dsa_kernels.index_scores`.", ["kernels.index_scores"]),
        ("dsa_ref.V32.latent_dim, dsa_ref.V32.no_such_dim", ["dsa_ref.V32.no_such_dim"]),
        ("python -m dsa_course.traps, python -m dsa_course.trap", ["dsa_course.trap"]),
        ("tests/steps/test_rope.py::test_turns_pairs[x]", []),
        ("tests/steps/test_rope.py::test_no_such[x]", ["tests/steps/test_rope.py::test_no_such"]),
        ("[map](README.md) [none](READ.md) [far](https://example.org/x)", ["READ.md"]),
        ("[nat](GLOSSARY.md#nat) [map](../README.md) [no](GLOSSARY.md#gnat)", ["GLOSSARY.md#gnat"]),
        ("## Two words\n[up](#two-words), [nowhere](#three-words)", ["#three-words"]),
        ("![a](../figures/schematic.svg) ![b](../figures/scheme.svg)", ["../figures/scheme.svg"]),
        ("https://github.com/someone/kernels/tree, ../figures/none.png", []),
    ],
)
def test_what_leads_nowhere_is_found(text, wrong):
    assert dangling(text) == wrong


@pytest.mark.parametrize("place", range(4))
def test_it_is_found_wherever_it_stands(place):
    texts = ["", "", "", ""]
    texts[place] = "dsa_ref/lab/none.py"
    outputs = [
        new_output("stream", name="stdout", text=texts[2]),
        new_output("execute_result", data={"text/markdown": texts[3]}),
    ]
    nb = new_notebook(cells=[new_markdown_cell(texts[0]), new_code_cell(texts[1], outputs=outputs)])
    assert dangling("\n".join(text_of(nb))) == ["dsa_ref/lab/none.py"]
