"""The picture of the whole: each part can be lit, its words fit, and its files are those of the course."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from dsa_course.schematic import PARTS, parts_of, schematic, schematic_alt, schematic_file
from notebooks.maintain.pictures import FIGURES, schematics

SVG = "{http://www.w3.org/2000/svg}"


def lit_words(svg):
    """The words in what is lit, group by group."""
    groups = ElementTree.fromstring(svg).findall(f"{SVG}g[@class='lit']")
    return [" ".join(text.text for text in group.findall(f"{SVG}text")) for group in groups]


@pytest.mark.parametrize("part", PARTS)
def test_one_part_is_lit_and_no_other(part):
    (words,) = lit_words(schematic(part))
    assert part in words.split() and part in schematic_alt(part) and schematic_file(part) == f"schematic-{part}.svg"
    assert schematic(part) == schematic([part]) and len({schematic(name) for name in PARTS}) == len(PARTS)


def test_several_parts_and_none():
    assert lit_words(schematic()) == [] and schematic_file() == "schematic.svg" and "Lit" not in schematic_alt()
    assert len(lit_words(schematic({"kv", "index_scores"}))) == 2
    assert parts_of({"kv", "index_scores"}) == ("index_scores", "kv")
    assert schematic_file(("kv", "index_scores")) == "schematic-index_scores-kv.svg"


@pytest.mark.parametrize(
    ("lit", "error", "message"),
    [
        ("indexer", ValueError, "lit must be of index_scores, .*, got indexer"),
        (["kv", 3], ValueError, "got 3"),
        (None, TypeError, "got NoneType"),
        (3, TypeError, "got int"),
    ],
)
def test_what_is_refused(lit, error, message):
    for make in (schematic, schematic_alt, schematic_file):
        with pytest.raises(error, match=message):
            make(lit)


def test_the_words_fit_their_boxes():
    """By the widths that common fonts have at most: 0.602 of the size in monospace, 0.6 of it on average elsewhere."""
    root = ElementTree.fromstring(schematic(PARTS))
    for group in root.findall(f"{SVG}g"):
        box = group.find(f"{SVG}rect")
        left, width = float(box.get("x")), float(box.get("width"))
        lines = {}
        for text in group.findall(f"{SVG}text"):
            wide = len(text.text) * (12 * 0.602 if text.get("class") == "code" else 13 * 0.6)
            x = float(text.get("x")) - (wide if text.get("text-anchor") == "end" else 0)
            lines.setdefault(text.get("y"), []).append((x, x + wide))
        for spans in lines.values():
            edges = [left, *(edge for span in sorted(spans) for edge in span), left + width]
            assert edges == sorted(edges), edges


def test_it_is_whole_in_itself_and_says_what_it_shows():
    """An image in a page may load nothing, and a reader who does not see it has its title."""
    svg = schematic("kv")
    assert not re.search(r"href|url\(|@import|<script", svg)
    assert ElementTree.fromstring(svg).find(f"{SVG}title").text == schematic_alt("kv")
    assert "prefers-color-scheme: dark" in svg


def test_its_files_are_the_drawn_ones():
    made = schematics()
    assert {path.name: path.read_text(encoding="utf-8") for path in FIGURES.glob("schematic*.svg")} == made
    assert "schematic.svg" in made and len(made) >= 7
