"""Every notebook in JupyterLab in a real browser: run it, move the slider, and see the picture change.

Run by `make test-browser`, which installs Playwright; it needs Chromium on the PATH (Debian's `chromium` will do).
Plain pytest leaves these tests out (marker `browser`). SCREENSHOTS=folder keeps a picture of every page.
"""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest

from notebooks.maintain.learner import LEARNER

pytestmark = pytest.mark.browser

MINUTE = 60_000  # milliseconds
NAMES = sorted(path.stem for path in LEARNER.glob("*.ipynb"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on copies of the learner edition, without their stored outputs; the address of its notebooks."""
    folder = tmp_path_factory.mktemp("lab")
    for name in NAMES:
        nb = nbformat.read(LEARNER / f"{name}.ipynb", as_version=4)
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(nb, folder / f"{name}.ipynb")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1"]
    options = ["--ServerApp.token=", "--ServerApp.password=", "--ServerApp.port_retries=0"]
    server = subprocess.Popen([*command, *options], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(120):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/api")
                break
            time.sleep(0.5)
        yield f"{address}/lab/workspaces"
    finally:
        server.terminate()
        server.wait()


@pytest.mark.parametrize("name", NAMES)
def test_the_slider_moves_and_the_picture_changes(lab, chromium, name):
    page = chromium.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(2 * MINUTE)
    try:
        page.goto(f"{lab}/{name}/tree/{name}.ipynb?reset")
        page.locator(".jp-Notebook").wait_for()
        page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for(state="attached")
        run_all_cells(page)
        moved = 0
        for picture in page.locator(".jupyter-widgets.widget-box:has(img)").all():
            moved += move(page, picture)
        assert moved, "no slider in this notebook changed its picture"
    finally:
        if folder := os.environ.get("SCREENSHOTS"):
            page.screenshot(path=f"{folder}/{name}.png")
        page.close()


PROMPTS = "() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(p => p.textContent.trim())"
ERRORS = "() => [...document.querySelectorAll('[data-mime-type*=stderr]')].map(output => output.textContent)"


def run_all_cells(page):
    """Run > Run All Cells, and wait until every cell has run; the stubs' one line is the only error."""
    clicked, deadline = -60.0, time.monotonic() + 120
    while True:
        prompts = page.evaluate(PROMPTS)
        if prompts and all(re.search(r"\d", prompt) for prompt in prompts):
            return
        if not re.search(r"[*\d]", "".join(prompts)) and time.monotonic() > clicked + 15:  # not yet, or it was missed
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
            clicked = time.monotonic()
        errors = [error for error in page.evaluate(ERRORS) if error.strip() != "✗ not written yet"]
        assert not errors, errors[0]
        assert time.monotonic() < deadline, f"cells that have not run: {prompts}"
        page.wait_for_timeout(200)


def move(page, figure):
    """Move the first slider of one live figure by the keyboard; 1 if it has one, once the picture has changed."""
    handle = figure.locator(".noUi-handle")
    if not handle.count():
        return 0
    handle, image = handle.first, figure.locator("img")
    image.scroll_into_view_if_needed()
    before, value = image.get_attribute("src"), float(handle.get_attribute("aria-valuenow"))
    assert before.startswith("data:image/png") and len(image.get_attribute("alt").split()) > 8
    largest = float(handle.get_attribute("aria-valuemax"))
    handle.focus()
    handle.press("ArrowLeft" if value >= largest else "ArrowRight")
    deadline = time.monotonic() + 30
    while image.get_attribute("src") == before:  # asked anew each time: a new picture is a new element
        assert time.monotonic() < deadline, "the slider moved and the picture stayed as it was"
        page.wait_for_timeout(100)
    assert float(handle.get_attribute("aria-valuenow")) != value
    return 1
