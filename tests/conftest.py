"""What every test shares: the rungs, the device, poisoned memory, small blocks, and the account of skipped tests.

A test that takes `ops` runs once for each rung: "loops", "reference", "kernels", or those its mark `rungs(...)` names.
`pytest --check-skips` on the whole directory fails unless tests were skipped for the reasons expected here.
"""

import collections
import shutil
import sys

import pytest
import rungs
import torch

from dsa_ref import blocks, testing

torch.set_num_threads(1)  # pytest -n runs one process a core

NEEDS_GPU = "needs a CUDA GPU"
NEEDS_HOPPER = "needs a GPU of compute capability 9.0"
NEEDS_TRITON = "kernels need triton, which cannot be imported here"
NEEDS_PYTHON_311 = "needs transformers 5.23, and that Python 3.11"
OLD_PYTHON = sys.version_info < (3, 11)
collect_ignore_glob = ["integrations/*"] if OLD_PYTHON else []  # which import transformers: see pytest_report_header
# The reasons for which tests are skipped, by platform: all of these, and no others.
EXPECTED_SKIPS = {
    "cuda": set(),
    "cuda, not Hopper": {NEEDS_HOPPER},
    "cpu": {NEEDS_GPU},
    "no triton": {NEEDS_GPU, NEEDS_TRITON},
}
if OLD_PYTHON:
    EXPECTED_SKIPS = {where: reasons | {NEEDS_PYTHON_311} for where, reasons in EXPECTED_SKIPS.items()}
# Tests that plain pytest leaves out, by their mark: the file that a target of the Makefile runs with that mark.
RUN_BY_TARGET = {
    "grading": "tests/course/test_grading.py",
    "browser": "tests/course/test_browser.py",
    "site": "tests/course/test_site.py",
    "install": "tests/test_install.py",
}
MARKS = {"gpu", "hopper"}  # the only tests that NEEDS_GPU and NEEDS_HOPPER may skip, and on a CPU all of them


def pytest_report_header():
    return f"left out, since each {NEEDS_PYTHON_311}: tests/integrations" if OLD_PYTHON else None


def pytest_addoption(parser):
    parser.addoption(
        "--check-skips", action="store_true", help="fail unless tests are skipped for the expected reasons"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "rungs(*names): run a test that takes `ops` over these rungs alone")
    config.addinivalue_line("markers", "gpu: the test needs a CUDA GPU")
    config.addinivalue_line("markers", "hopper: the test needs a GPU of compute capability 9.0")
    if config.getoption("check_skips") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SkipAccount(platform()))


def pytest_generate_tests(metafunc):
    if "ops" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("rungs")
        metafunc.parametrize("ops", mark.args if mark else rungs.NAMES, indirect=True)


@pytest.hookimpl(tryfirst=True)  # before `-m` leaves tests out
def pytest_collection_modifyitems(items):
    lost = [
        f"{item.nodeid} is marked {mark}: only {file} is run with that mark"
        for item in items
        for mark, file in RUN_BY_TARGET.items()
        if item.get_closest_marker(mark) and item.path != item.config.rootpath / file
    ]
    if lost:
        raise pytest.UsageError(*lost)
    for item in items:
        marks = {mark for mark in MARKS if item.get_closest_marker(mark)}
        if reason := cannot_run(marks, platform()):
            item.add_marker(pytest.mark.skip(reason=reason))


def platform():
    """The key of EXPECTED_SKIPS for this machine."""
    if torch.cuda.is_available():
        return "cuda" if torch.cuda.get_device_capability() == (9, 0) else "cuda, not Hopper"
    return "cpu" if rungs.has_triton() else "no triton"


def cannot_run(marks, where):
    """Why a test with these marks cannot run on that platform, None if it can."""
    if where == "cuda, not Hopper":
        return NEEDS_HOPPER if "hopper" in marks else None
    return NEEDS_GPU if marks and where != "cuda" else None


@pytest.fixture
def ops(request):
    """The package (or namespace) whose steps the test runs."""
    try:
        return rungs.load(request.param)
    except rungs.NoTriton:
        pytest.skip(NEEDS_TRITON)


@pytest.fixture(scope="session")
def worlds():
    """A function of a number of ranks that gives processes in such a group: see tests/parallel."""
    from parallel_worlds import Worlds  # beside the tests that ask for it

    with Worlds() as started:
        yield started


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned():
    """Memory asked for without a value holds NaN or the largest integer, never lucky zeros."""
    with testing.poisoned():
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    """Every step that works block by block does so with blocks of a few rows, as it would on large inputs."""
    monkeypatch.setattr(blocks, "pairs_at_once", lambda tensor: 300)
    if rungs.has_triton():
        for most in ("SCORES_AT_ONCE", "PAIRS_AT_ONCE", "SHARES_AT_ONCE"):
            monkeypatch.setattr(f"dsa_kernels.runtime.{most}", 300)
        monkeypatch.setattr("dsa_kernels.runtime.GRADIENTS_AT_ONCE", 30_000)


class SkipAccount:
    """Counts skipped tests by reason, and collects what is wrong with them. Lives in the controller process."""

    def __init__(self, where):
        self.where, self.expected = where, EXPECTED_SKIPS[where]
        self.found, self.faults = collections.Counter(), []

    def pytest_runtest_logreport(self, report):
        marks = MARKS & set(report.keywords)
        if report.skipped:
            reason = (getattr(report, "wasxfail", None) or report.longrepr[2]).removeprefix("Skipped: ")
            self.found[reason] += 1
            if reason in (NEEDS_GPU, NEEDS_HOPPER) and not marks:
                self.faults.append(f"{report.nodeid} {reason} and has no mark that says so")
        elif report.when == "call" and cannot_run(marks, self.where):
            self.faults.append(f"{report.nodeid} ran, and {cannot_run(marks, self.where)}")

    def pytest_collectreport(self, report):
        if report.skipped:
            self.faults.append(f"{report.nodeid} is skipped as a whole: {report.longrepr[2]}")

    def verdict(self):
        """What is wrong, a line each."""
        unknown = [f"no test may be skipped here for: {reason}" for reason in self.found if reason not in self.expected]
        idle = [f"no test was skipped for: {reason}" for reason in self.expected if reason not in self.found]
        return [*self.faults, *unknown, *idle]

    def pytest_sessionfinish(self, session):
        if session.exitstatus == 0 and self.verdict():
            session.exitstatus = 1

    def pytest_terminal_summary(self, terminalreporter):
        wrong = self.verdict()
        terminalreporter.section(f"skipped tests on platform {self.where!r}: {'NOT ' if wrong else ''}as expected")
        for reason, count in sorted(self.found.items()):
            terminalreporter.write_line(f"{count:5d} skipped: {reason}")
        for line in wrong:
            terminalreporter.write_line(line, red=True)


@pytest.fixture(scope="session")
def chromium():
    """A headless browser, for the tests with the marks `browser` and `site`; only who runs those has Playwright."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    assert found, "needs Chromium: apt-get install chromium"
    without = ("background-networking", "component-update", "gpu", "sync")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", *(f"--disable-{feature}" for feature in without)]
        )
        yield browser
        browser.close()
