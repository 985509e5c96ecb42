"""The site: every link leads somewhere, no page asks another host, pictures and folds are there, wide and narrow.

Run by `make test-site`, which installs Sphinx and Playwright; it needs Chromium, and npm for MathJax. Plain pytest
leaves these tests out (marker `site`). SCREENSHOTS=folder keeps a picture of every page that is looked at.
"""

import html.parser
import os
import sys
import urllib.parse

import nbformat
import pytest

from notebooks.maintain.learner import LEARNER, guessed
from notebooks.maintain.site import __main__ as site

pytestmark = [
    pytest.mark.site,
    pytest.mark.skipif(sys.version_info < (3, 11), reason="sphinx-book-theme needs Python 3.11"),
]

NAMES = sorted(path.stem for path in LEARNER.glob("*.ipynb"))
REPOSITORY = "https://github.com/owner/name"
HOSTS = ("https://", "http://", "//")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The site without the project's address, as `make site` builds it."""
    folder = tmp_path_factory.mktemp("site") / "html"
    site.build(folder)
    return folder


class Page(html.parser.HTMLParser):
    """What a page links to, what it loads, its anchors and its images."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.anchors, self.images, self.details = [], [], {""}, [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "img":
            self.images.append(given)
            self.loads.append(given.get("src", ""))
        elif tag in ("script", "link", "iframe", "source") and (given.get("src") or given.get("href")):
            self.loads.append(given.get("src") or given["href"])
        elif tag == "details":
            self.details += 1


def pages(folder):
    return {path: Page(path.read_text(encoding="utf-8")) for path in folder.glob("*.html")}


def leads_nowhere(folder):
    """Links and loaded files of the pages in the folder that are not there, as "page: target"."""
    found = pages(folder)
    for path, page in found.items():
        for target in (*page.links, *page.loads):
            file, _, anchor = target.partition("#")
            if target.startswith((*HOSTS, "data:", "mailto:")):
                continue
            place = (path.parent / urllib.parse.unquote(file.partition("?")[0])).resolve() if file else path
            if not place.is_file() or (place in found and urllib.parse.unquote(anchor) not in found[place].anchors):
                yield f"{path.name}: {target}"


def test_every_link_leads_somewhere(built):
    assert list(leads_nowhere(built)) == []
    assert {f"{name}.html" for name in (*NAMES, "index", "search")} <= {path.name for path in pages(built)}


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    text = '<a href="b.html">x</a><a href="#here">x</a><a href="a.html#there">x</a><img src="c.png"><b id="here">x</b>'
    (tmp_path / "a.html").write_text(text)
    assert sorted(leads_nowhere(tmp_path)) == ["a.html: a.html#there", "a.html: b.html", "a.html: c.png"]


def test_nothing_is_loaded_from_another_host(built):
    for path, page in pages(built).items():
        assert not [target for target in page.loads if target.startswith(HOSTS)], path.name


def test_pages_follow_each_other_and_are_on_the_map(built):
    for before, after in zip(NAMES, NAMES[1:], strict=False):
        links = Page((built / f"{before}.html").read_text(encoding="utf-8")).links
        assert links.count(f"{after}.html") >= 2, (before, after)  # in the sidebar, and as the next one
    index = (built / "searchindex.js").read_text(encoding="utf-8")
    assert all(name in index for name in NAMES) and "einsum" in index


@pytest.mark.parametrize("name", NAMES)
def test_a_page_shows_its_notebook(built, name):
    """Live figures as pictures with alt text, and as many folds as there are hints, solutions, answers and guesses."""
    nb = nbformat.read(LEARNER / f"{name}.ipynb", as_version=4)
    page = Page((built / f"{name}.html").read_text(encoding="utf-8"))
    alts = [
        output.metadata["image/png"]["alt"]
        for cell in nb.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    shown = [image["alt"] for image in page.images if image["src"].startswith("data:image/png")]
    assert shown == alts and alts
    assert all(image.get("alt") for image in page.images)
    folds = sum(cell.source.count("<details") for cell in nb.cells if cell.cell_type == "markdown")
    assert page.details == folds + len(list(guessed(nb)))
    assert (built / "_sources" / f"{name}.ipynb").read_bytes() == (LEARNER / f"{name}.ipynb").read_bytes()


def test_one_setting_makes_the_buttons(built, tmp_path):
    without, page = (built / "index.html").read_text(encoding="utf-8"), built / f"{NAMES[0]}.html"
    assert "without the project’s address" in without and "mybinder" not in page.read_text(encoding="utf-8")
    site.build(tmp_path / "html", REPOSITORY + ".git")
    page = Page((tmp_path / "html" / f"{NAMES[0]}.html").read_text(encoding="utf-8"))
    file = f"notebooks/{NAMES[0]}.ipynb"
    assert f"https://colab.research.google.com/github/owner/name/blob/main/{file}" in page.links
    assert f"https://mybinder.org/v2/gh/owner/name/main?urlpath=lab/tree/{file}" in page.links
    assert (LEARNER.parent / file).is_file()
    front = (tmp_path / "html" / "index.html").read_text(encoding="utf-8")
    assert "git clone https://github.com/owner/name dsa" in front and "without the project’s address" not in front
    assert list(leads_nowhere(tmp_path / "html")) == []


@pytest.mark.parametrize(
    ("text", "without", "with_address"),
    [
        ("[a](00_start_here.ipynb)", None, None),
        ("[map](README.md#the-map)", "[map](index.md#the-map)", "[map](index.md#the-map)"),
        ("[`s`](../dsa_ref/SPEC.md)", "`s`", f"[`s`]({REPOSITORY}/blob/main/dsa_ref/SPEC.md)"),
        ("[s](solutions/)", "s", f"[s]({REPOSITORY}/tree/main/notebooks/solutions)"),
        ("![r](../figures/recall.png)", "![r](pictures/recall.png)", "![r](pictures/recall.png)"),
        ("`k[(2,)](x)` [far](https://example.org/a)", None, None),
    ],
)
def test_links_are_made_fit_for_the_site(text, without, with_address):
    assert site.Pages().adapt(text) == (without or text)
    assert site.Pages(REPOSITORY).adapt(text) == (with_address or text)


def test_mathjax_is_the_pinned_one(tmp_path, monkeypatch):
    monkeypatch.setattr(site, "MATHJAX_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match="must have the SHA-256 0000"):
        site.mathjax(tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="needs npm"):
        site.mathjax(tmp_path / "empty")


@pytest.mark.parametrize(
    ("width", "scheme", "names"),  # every page narrow and wide, light and dark; some of them in both
    [(390, "light", NAMES), (1366, "dark", NAMES), (390, "dark", NAMES[:3]), (1366, "light", NAMES[:3])],
    ids=["narrow", "wide, dark", "narrow, dark", "wide"],
)
def test_in_a_browser(built, chromium, width, scheme, names):
    """Nothing is wider than the screen, no host is asked, pictures keep their shape, formulas are set, folds open."""
    context = chromium.new_context(viewport={"width": width, "height": 768}, color_scheme=scheme)
    asked, wrong = [], []
    context.on("request", lambda request: asked.append(request.url))
    context.on("requestfailed", lambda request: wrong.append(request.url))
    context.on("weberror", lambda error: wrong.append(str(error.error)))
    for name in ("index", *names):
        page = context.new_page()
        page.goto((built / f"{name}.html").as_uri())
        if page.locator(".math").count():
            page.locator("mjx-container svg").first.wait_for(state="attached")
        looks = page.evaluate(LOOKS)
        assert looks["wide"] <= width, name
        assert looks["theme"] == scheme
        for shown, own in looks["pictures"]:
            assert abs(shown / own - 1) < 0.02, f"{name}: a picture is {shown} as wide as high, not {own}"
        dark = scheme == "dark"
        assert (looks["paper"] < 90) == dark and looks["behind"] > 200, name  # a picture's own paper stays white
        for fold in page.locator("details").all()[:3]:
            fold.locator("summary").first.click()
            assert fold.evaluate("fold => fold.open")
        if folder := os.environ.get("SCREENSHOTS"):
            page.screenshot(path=f"{folder}/site-{name}-{width}-{scheme}.png", full_page=name == "index")
        page.close()
    context.close()
    assert wrong == []
    assert asked and not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]


def test_the_search_finds_a_word_of_a_notebook(built, chromium):
    page = chromium.new_page()
    page.goto((built / "search.html").as_uri() + "?q=einsums")
    page.locator("#search-results li a", has_text="The lightning indexer").first.wait_for()
    page.close()


LOOKS = """() => {
    const light = colour => { const [r, g, b] = colour.match(/\\d+/g).map(Number); return (r + g + b) / 3 }
    const pictures = [...document.querySelectorAll('div.cell_output img')]
    const open = pictures.filter(picture => picture.clientWidth)
    return {
        wide: document.documentElement.scrollWidth,
        theme: document.documentElement.dataset.theme,
        paper: light(getComputedStyle(document.body).backgroundColor),
        behind: open.length ? light(getComputedStyle(open[0]).backgroundColor) : 255,
        pictures: open.map(p => [p.clientWidth / p.clientHeight, p.naturalWidth / p.naturalHeight]),
    }
}"""
