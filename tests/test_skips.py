"""The account of skipped tests: what it accepts, and that nothing can be skipped past it."""

import pathlib
import re
import types

import pytest
from conftest import (
    EXPECTED_SKIPS,
    NEEDS_GPU,
    NEEDS_HOPPER,
    NEEDS_TRITON,
    RUN_BY_TARGET,
    SkipAccount,
    cannot_run,
    pytest_collection_modifyitems,
)

ROOT = pathlib.Path(__file__).parents[1]


def report(reason=None, *marks, when="setup", xfail=None):
    made = types.SimpleNamespace(nodeid="test_x", keywords=dict.fromkeys(marks, 1), when=when, skipped=bool(reason))
    made.longrepr = ("test_x.py", 1, f"Skipped: {reason}")
    if xfail:
        made.wasxfail, made.skipped = xfail, True
    return made


def verdict(where, *reports, modules=()):
    account = SkipAccount(where)
    for made in modules:
        account.pytest_collectreport(made)
    for made in reports:
        account.pytest_runtest_logreport(made)
    return account.verdict()


GPU, HOPPER, TRITON = report(NEEDS_GPU, "gpu"), report(NEEDS_HOPPER, "hopper"), report(NEEDS_TRITON)
RAN = report(None, when="call")


@pytest.mark.parametrize(
    "where, reports",
    [
        ("cuda", [RAN, report(None, "gpu", when="call"), report(None, "hopper", when="call")]),
        ("cuda, not Hopper", [RAN, HOPPER, report(None, "gpu", when="call")]),
        ("cpu", [RAN, GPU, report(NEEDS_GPU, "hopper")]),
        ("no triton", [RAN, GPU, TRITON, report(NEEDS_TRITON, "gpu")]),
    ],
)
def test_the_expected_reasons_are_accepted(where, reports):
    assert verdict(where, *reports) == []


@pytest.mark.parametrize(
    "where, reports, wrong",
    [
        ("cpu", [GPU, report("not today")], "no test may be skipped here for: not today"),
        ("cpu", [GPU, TRITON], f"no test may be skipped here for: {NEEDS_TRITON}"),
        ("cpu", [GPU, report(xfail="known fault")], "no test may be skipped here for: known fault"),
        ("cpu", [RAN], f"no test was skipped for: {NEEDS_GPU}"),
        ("cpu", [GPU, report(NEEDS_GPU)], f"test_x {NEEDS_GPU} and has no mark that says so"),
        ("cpu", [GPU, report(None, "gpu", when="call")], f"test_x ran, and {NEEDS_GPU}"),
        ("cuda", [RAN, GPU], f"no test may be skipped here for: {NEEDS_GPU}"),
        ("cuda, not Hopper", [HOPPER, report(None, "hopper", when="call")], f"test_x ran, and {NEEDS_HOPPER}"),
        ("no triton", [GPU], f"no test was skipped for: {NEEDS_TRITON}"),
    ],
)
def test_anything_else_is_refused(where, reports, wrong):
    assert verdict(where, *reports) == [wrong]


@pytest.mark.parametrize("where", EXPECTED_SKIPS)
def test_a_module_must_not_be_skipped_as_a_whole(where):
    reasons = [report(reason, "gpu", "hopper") for reason in EXPECTED_SKIPS[where]]
    assert verdict(where, *reasons, modules=[report("no transformers")]) == [
        "test_x is skipped as a whole: Skipped: no transformers"
    ]


def test_what_a_mark_asks_for():
    assert [cannot_run({"gpu"}, where) for where in EXPECTED_SKIPS] == [None, None, NEEDS_GPU, NEEDS_GPU]
    assert [cannot_run({"hopper"}, where) for where in EXPECTED_SKIPS] == [None, NEEDS_HOPPER, NEEDS_GPU, NEEDS_GPU]
    assert [cannot_run(set(), where) for where in EXPECTED_SKIPS] == [None] * 4


def item(file, *marks):
    made = types.SimpleNamespace(
        nodeid=f"{file}::test_x", path=ROOT / file, config=types.SimpleNamespace(rootpath=ROOT)
    )
    made.get_closest_marker = lambda name: name if name in marks else None
    return made


@pytest.mark.parametrize("mark", RUN_BY_TARGET)
def test_a_test_that_no_target_would_run_is_refused(mark):
    pytest_collection_modifyitems([item("tests/steps/test_rope.py"), item(RUN_BY_TARGET[mark], mark)])
    with pytest.raises(pytest.UsageError, match=f"tests/steps/test_rope.py::test_x is marked {mark}"):
        pytest_collection_modifyitems([item("tests/steps/test_rope.py", mark)])


def test_the_makefile_runs_each_mark_that_plain_pytest_leaves_out():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    left_out = re.search(r'"-m", "(not .+)"', project)[1].removeprefix("not ").split(" and not ")
    targets = re.findall(r"-m (\w+) (tests/\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert sorted(left_out) == sorted(RUN_BY_TARGET) and dict(targets) == RUN_BY_TARGET
