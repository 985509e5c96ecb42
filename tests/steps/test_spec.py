"""Citations lead somewhere: sections and steps of dsa_ref/SPEC.md, and documents that code, pages and records name."""

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
ROOMS = ("dsa_ref", "kernels", "notebooks", "tests", "figures", ".github", ".ci", ".devcontainer")
ENDINGS = {".py", ".md", ".ipynb", ".json", ".toml", ".yml", ".yaml"}
NUMBERS = r"\d+(?:(?:\s*,\s*|\s+and\s+|\s+to\s+)\d+)*"
SECTIONS = re.compile(rf"\bSPEC,?\s+sections?\s+({NUMBERS})(?:,?\s+steps?\s+({NUMBERS}))?")
DOCUMENT = re.compile(r"(?<![\w/.:*{}-])[\w.-]+(?:/[\w.-]+)*\.md\b(?![\w/*])")
PLANTED = (  # they hold wrong citations on purpose, or pages that a test or the site makes
    "tests/steps/test_spec.py",
    "tests/course/test_pointers.py",
    "tests/course/test_headers.py",
    "tests/course/test_site.py",
    "notebooks/maintain/site/__main__.py",
)


def files():
    found = [path for path in ROOT.iterdir() if path.is_file()]
    found += [path for room in ROOMS for path in (ROOT / room).rglob("*") if ".ipynb_checkpoints" not in path.parts]
    return [path for path in found if path.suffix in ENDINGS or path.name == "Makefile"]


def prose(path):
    """The text of a file, a notebook's cells without their JSON, comment signs and line breaks as blanks."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return re.sub(r"\n[ \t]*(?:# ?)?", "\n", text)


def spec():
    """{section: its numbered steps}."""
    parts = re.split(r"(?m)^## (\d+)\. ", (ROOT / "dsa_ref" / "SPEC.md").read_text(encoding="utf-8"))[1:]
    return {
        int(number): {int(step) for step in re.findall(r"(?m)^(\d+)\. ", text)}
        for number, text in zip(parts[::2], parts[1::2], strict=True)
    }


def wrong_citations(text, path=ROOT / "README.md"):
    """What `text`, read in the file `path`, cites and cannot be found."""
    wrong, known = [], spec()
    for match in SECTIONS.finditer(text):
        sections, steps = ([int(number) for number in re.findall(r"\d+", part or "")] for part in match.groups())
        there = all(n in known for n in sections) and all(step in known[sections[-1]] for step in steps)
        wrong += [] if there else [match[0]]
    names = {document.name for document in files() if document.suffix == ".md"}
    for document in DOCUMENT.findall(text):
        here = any((folder / document).is_file() for folder in (ROOT, path.parent))
        if not here and document not in names:  # a bare name may be any document's of ours
            wrong.append(document)
    return wrong


def test_specification_has_the_sections_that_the_code_is_written_by():
    assert list(spec()) == list(range(1, 12))
    assert spec()[2] == set(range(1, 10))


def test_citations_lead_somewhere():
    named = {path.relative_to(ROOT).as_posix(): path for path in files()}
    assert len(named) > 100 and set(PLANTED) <= set(named)
    wrong = {name: wrong_citations(prose(path), path) for name, path in named.items() if name not in PLANTED}
    assert {name: found for name, found in wrong.items() if found} == {}


def cited(text):
    """All sections in a text's "Source: ..." up to the end of its paragraph."""
    sources = re.findall(r"Source:(.*?)(?:\n\s*\n|\"\"\"|$)", text, re.DOTALL)
    groups = [group for source in sources for group in re.findall(rf"\bsections?\s+({NUMBERS})", source)]
    return {int(number) for group in groups for number in re.findall(r"\d+", group)}


def test_other_checkpoints_and_serving_are_cited_where_they_belong():
    """Sections that were written last: a number that has moved since leads somewhere, but not there."""
    named = {path.relative_to(ROOT).as_posix(): cited(prose(path)) for path in files() if path.suffix == ".py"}
    named = {name: sections for name, sections in named.items() if name not in PLANTED}
    reading = ("config.py", "hf_config.py", "nn/checkpoint.py", "nn/block_scales.py")
    assert {name for name, sections in named.items() if 9 in sections} == {f"dsa_ref/{name}" for name in reading}
    serving = {name for name, sections in named.items() if 10 in sections}
    assert {"dsa_ref/append.py", "dsa_ref/decode.py", "dsa_ref/page_table.py"} <= serving
    assert all(re.search("page|decode|append", name) for name in serving), serving
    parallel = {name for name, sections in named.items() if 11 in sections}
    assert {"dsa_ref/parallel/gathered.py", "dsa_ref/parallel/sharded.py"} <= parallel
    assert all(name.startswith("dsa_ref/parallel/") for name in parallel), parallel
    assert cited("Source: SPEC section 2 steps 1 to 6, sections 6 and\n9.\n\nsection 3") == {2, 6, 9}


def test_every_step_cites_the_specification():
    for path in (ROOT / "dsa_ref").glob("*.py"):
        if "_loops(" in path.read_text(encoding="utf-8") and path.name != "__init__.py":
            assert SECTIONS.search(prose(path)), path.name


@pytest.mark.parametrize(
    "text",
    (
        "Source: SPEC section 0.",
        "Source: SPEC\nsections 2, 3 and 12",
        "SPEC section 2 steps 3 to 10",
        "SPEC section 3, step 1",
        "see DESIGN.md",
        "(`kernels/NOTHING.md`)",
    ),
)
def test_planted_citation_is_found(text):
    assert wrong_citations(text)


@pytest.mark.parametrize(
    "text",
    (
        "SPEC section 2, steps 3 to 5",
        "SPEC sections 2, 3 and 7",
        "README.md",
        "https://example.org/a/DESIGN.md",
        "*.md",
    ),
)
def test_good_citation_passes(text):
    assert wrong_citations(text) == []
