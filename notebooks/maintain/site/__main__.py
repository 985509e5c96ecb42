"""Build the course as a static site in build/site/html: `make site`, or `python -m notebooks.maintain.site`.

The learner edition as it is stored, not executed; Sphinx and myst-nb make pages of it. Everything that a page needs is
in the folder: it can be opened from a disk, or served anywhere. --repository makes the buttons for Colab and Binder,
and the links to files that are no pages of the site.
"""

import argparse
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

import nbformat

from dsa_course.export import AltText

from ..learner import LEARNER

HERE = pathlib.Path(__file__).parent
ROOT = LEARNER.parent
BUILD = ROOT / "build"
SITE = BUILD / "site" / "html"

MATHJAX = "3.2.2"  # of npm's package `mathjax`: the one place that says which
MATHJAX_FILE = "package/es5/tex-svg.js"  # all of it, fonts included
MATHJAX_SHA256 = "d4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882"

LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)")
ELSEWHERE = re.compile(r"[a-z]+:|#")


class Pages:
    """The site's sources: what is a page, and where links lead that leave the site."""

    def __init__(self, repository="", branch="main"):
        self.repository, self.branch = repository.removesuffix("/").removesuffix(".git"), branch
        self.notebooks = sorted(LEARNER.glob("*.ipynb"))
        self.texts = sorted(path for path in LEARNER.glob("*.md") if path.name != "README.md")
        self.pictures = set()
        self.names = {path.name for path in (*self.notebooks, *self.texts)} | {"README.md"}

    def adapt(self, text) -> str:
        """Markdown of notebooks/ with its links made fit for the site, which holds no file of other folders."""
        return LINK.sub(self._link, text)

    def _link(self, match):
        target, anchor = (*match["target"].partition("#")[::2],)
        anchor = f"#{anchor}" if anchor else ""
        if ELSEWHERE.match(match["target"]):
            return match[0]
        path = (LEARNER / target).resolve()
        if not path.exists():  # no link at all, such as `kernel[grid](x)`, or one that another test reports
            return match[0]
        words = f"{match['image']}[{self.adapt(match['text'])}]"
        if path.parent == LEARNER and path.name in self.names:
            return f"{words}({'index.md' if path.name == 'README.md' else path.name}{anchor})"
        if match["image"]:
            self.pictures.add(path)
            return f"{words}(pictures/{path.name})"
        if not self.repository:
            return match["text"]
        kind = "tree" if path.is_dir() else "blob"
        return f"{words}({self.repository}/{kind}/{self.branch}/{path.relative_to(ROOT).as_posix()}{anchor})"

    def write(self, folder):
        """All sources into an empty folder."""
        folder.mkdir(parents=True)
        for path in self.notebooks:
            nb, _ = AltText(enabled=True).preprocess(nbformat.read(path, as_version=4), {})
            for cell in nb.cells:
                if cell.cell_type == "markdown":
                    cell.source = self.adapt(cell.source)
            nbformat.write(nb, folder / path.name)
        for path in self.texts:
            (folder / path.name).write_text(self.adapt(path.read_text(encoding="utf-8")), encoding="utf-8")
        (folder / "index.md").write_text(self.front_page(), encoding="utf-8")
        (folder / "pictures").mkdir()
        for path in self.pictures:
            shutil.copy(path, folder / "pictures")

    def front_page(self) -> str:
        """The course's README, what the buttons do or why there are none, and the order of the pages."""
        text = self.adapt((LEARNER / "README.md").read_text(encoding="utf-8"))
        if self.repository:
            how = (
                "```{note}\nThe rocket above a notebook opens it on Binder or Colab. On Colab, run these two lines "
                f"first, and restart the session:\n\n    !git clone {self.repository} dsa\n"
                "    %pip install -e './dsa[course]'\n```"
            )
        else:
            how = (
                "```{note}\nThese pages show the course, with all results. To run a notebook, get the project (or the "
                "notebook, by the arrow above it). This copy was built without the project's address, so there are "
                "no buttons for Colab and Binder.\n```"
            )
        title, _, rest = text.partition("\n")
        pages = "\n".join(path.stem for path in (*self.notebooks, *self.texts))
        return f"{title}\n\n{how}\n{rest}\n```{{toctree}}\n:hidden:\n\n{pages}\n```\n"


def mathjax(folder) -> pathlib.Path:
    """MathJax as one script, fetched by npm the first time. Raises: RuntimeError without npm, or for other bytes."""
    script = folder / f"mathjax-{MATHJAX}.js"
    if not script.exists():
        folder.mkdir(parents=True, exist_ok=True)
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError(
                "The site needs npm (https://nodejs.org) once, to fetch MathJax, and it is not on the PATH."
            )
        subprocess.run(
            [npm, "pack", "--silent", f"mathjax@{MATHJAX}"], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
        with tarfile.open(folder / f"mathjax-{MATHJAX}.tgz") as package:
            data = package.extractfile(MATHJAX_FILE).read()
        if (found := hashlib.sha256(data).hexdigest()) != MATHJAX_SHA256:
            raise RuntimeError(f"MathJax {MATHJAX} must have the SHA-256 {MATHJAX_SHA256}, got {found}")
        script.write_bytes(data)
    return script


def build(site=SITE, repository="", branch="main"):
    """The whole site into the folder `site`, anew. Raises: CalledProcessError for any warning of Sphinx's."""
    pages = Pages(repository, branch)
    source = site.with_name("source")
    for folder in (site, source):
        shutil.rmtree(folder, ignore_errors=True)
    pages.write(source)
    script = mathjax(BUILD)
    sphinx = [sys.executable, "-m", "sphinx", "-b", "html", "-c", str(HERE), "-W", "--keep-going", "-q"]
    where = {"SITE_REPOSITORY": pages.repository, "SITE_BRANCH": pages.branch}
    subprocess.run([*sphinx, str(source), str(site)], check=True, env={**os.environ, **where})
    shutil.copy(script, site / "_static" / "mathjax.js")
    for path in pages.notebooks:  # what the arrow downloads: the notebook itself, not the page's source
        shutil.copy(path, site / "_sources")
    shutil.rmtree(site / ".doctrees", ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(prog="python -m notebooks.maintain.site", description=__doc__)
    parser.add_argument("--repository", default="", help="https://github.com/owner/name, for the buttons and links")
    parser.add_argument("--branch", default="main")
    arguments = parser.parse_args()
    build(repository=arguments.repository, branch=arguments.branch)
    print(f"The site is in {SITE.relative_to(ROOT)}: open index.html")


if __name__ == "__main__":
    main()
