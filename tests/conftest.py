"""What every test shares: the rungs, the device, poisoned memory, small blocks, and the account of skipped tests.

A test that takes `ops` runs once for each rung: "loops", "reference", "kernels", or those its mark `rungs(...)` names.
`pytest --check-skips` on the whole directory fails unless exactly the expected tests were skipped.
"""

import collections
import importlib

import pytest
import rungs
import torch

from dsa_ref import blocks, testing

torch.set_num_threads(1)  # pytest -n runs one process a core

NEEDS_GPU = "needs a CUDA GPU"
NEEDS_HOPPER = "needs a GPU of compute capability 9.0"
NEEDS_TRITON = "kernels need triton, which cannot be imported here"
EXPECTED_SKIPS = {
    "cuda": {},
    "cuda, not Hopper": {NEEDS_HOPPER: 84},
    "cpu": {NEEDS_GPU: 111},
    "no triton": {NEEDS_GPU: 66, NEEDS_TRITON: 666},
}


def pytest_addoption(parser):
    parser.addoption("--check-skips", action="store_true", help="fail unless exactly the expected tests are skipped")


def pytest_configure(config):
    config.addinivalue_line("markers", "rungs(*names): run a test that takes `ops` over these rungs alone")
    config.addinivalue_line("markers", "gpu: the test needs a CUDA GPU")
    config.addinivalue_line("markers", "hopper: the test needs a GPU of compute capability 9.0")
    if config.getoption("check_skips") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SkipAccount())


def pytest_generate_tests(metafunc):
    if "ops" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("rungs")
        metafunc.parametrize("ops", mark.args if mark else rungs.NAMES, indirect=True)


def pytest_collection_modifyitems(items):
    missing = {"gpu": NEEDS_GPU, "hopper": NEEDS_GPU}
    if torch.cuda.is_available():
        missing = {} if has_hopper() else {"hopper": NEEDS_HOPPER}
    for item in items:
        for mark, reason in missing.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


def has_hopper():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.fixture
def ops(request):
    """The package (or namespace) whose steps the test runs."""
    try:
        return rungs.load(request.param)
    except rungs.NoTriton:
        pytest.skip(NEEDS_TRITON)


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
        monkeypatch.setattr("dsa_kernels.runtime.SCORES_AT_ONCE", 300)


class SkipAccount:
    """Counts skipped tests by reason and compares the table with EXPECTED_SKIPS. Lives in the controller process."""

    def __init__(self):
        self.found = collections.Counter()
        without_gpu = "cpu" if rungs.has_triton() else "no triton"
        with_gpu = "cuda" if has_hopper() else "cuda, not Hopper"
        self.platform = with_gpu if torch.cuda.is_available() else without_gpu
        self.wanted = {reason: count for reason, count in EXPECTED_SKIPS[self.platform].items() if count}

    def pytest_runtest_logreport(self, report):
        if report.skipped:
            reason = getattr(report, "wasxfail", None) or report.longrepr[2]
            self.found[reason.removeprefix("Skipped: ")] += 1

    def pytest_collectreport(self, report):
        if report.skipped:
            self.found[f"{report.nodeid} as a whole"] += 1

    def pytest_sessionfinish(self, session):
        if session.exitstatus == 0 and self.found != self.wanted:
            session.exitstatus = 1

    def pytest_terminal_summary(self, terminalreporter):
        verdict = "as expected" if self.found == self.wanted else "NOT as expected"
        terminalreporter.section(f"skipped tests on platform {self.platform!r}: {verdict}")
        for reason in sorted(self.found | self.wanted):
            found, wanted = self.found[reason], self.wanted.get(reason, 0)
            terminalreporter.write_line(f"{found:5d} skipped, {wanted:5d} expected: {reason}")
