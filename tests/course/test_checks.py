"""The exercises' checks can fail: each rejects its wrong solutions, all for the stated property, and no right one."""

import importlib
import pathlib

import numpy as np
import pytest
import torch
from conftest import NEEDS_TRITON

from dsa_course import checks
from dsa_course.checking import Check
from dsa_ref.testing import Failed

HERE = pathlib.Path(__file__).parent
for folder in ("wrong_solutions", "right_solutions"):
    for path in sorted((HERE.parent / folder).glob("[a-z]*.py")):
        importlib.import_module(f"{folder}.{path.stem}")
from right_solutions import RIGHT  # noqa: E402 (filled by the imports above)
from wrong_solutions import WRONG  # noqa: E402

CASES = [(exercise, property, solution) for exercise, found in sorted(WRONG.items()) for property, solution in found]


@pytest.mark.parametrize(
    ("exercise", "property", "solution"), CASES, ids=[f"{e}-{getattr(s, '__name__', s)}" for e, _, s in CASES]
)
def test_a_wrong_solution_is_rejected_for_its_fault(exercise, property, solution, capsys):
    if getattr(solution, "needs_triton", False):
        pytest.skip(NEEDS_TRITON)
    with pytest.raises(Failed) as failure:
        checks.ALL[exercise](solution)
    assert failure.value.property == property, str(failure.value)
    assert failure.value.what and failure.value.cause
    assert capsys.readouterr().out == ""  # no ✓ beside a ✗


ACCEPTED = [(exercise, solution) for exercise, found in sorted(RIGHT.items()) for solution in found]


@pytest.mark.parametrize(("exercise", "solution"), ACCEPTED, ids=[f"{e}-{s.__name__}" for e, s in ACCEPTED])
def test_a_right_solution_in_another_style_is_accepted(exercise, solution, capsys):
    if getattr(solution, "needs_triton", False):
        pytest.skip(NEEDS_TRITON)
    checks.ALL[exercise](solution)
    assert capsys.readouterr().out == f"✓ {exercise}: " + " · ".join(checks.ALL[exercise].properties) + "\n"


NONSENSE = {
    "nothing": None,
    "text": "ten",
    "a list": [1.0, 2.0],
    "a pair of nothing": (None, None),
    "three texts": ("a", "b", "c"),
    "a dict": {"mha": None, "whole text": "much"},
    "an object": object(),
    "a complex number": 1j,
    "a number": 3.5,
    "an empty tensor": torch.empty(0),
    "an array of objects": np.array([None, "a"], dtype=object),
    "a complex tensor": torch.ones(2, dtype=torch.complex64),
    "a sparse tensor": torch.eye(2).to_sparse(),
    "a long double": np.longdouble(1) * np.ones(3),
}


@pytest.mark.parametrize("exercise", checks.ALL)
def test_nonsense_is_refused_in_our_words(exercise):
    """Whatever comes back, the check says what is wrong, and does not crash itself."""
    for name, value in NONSENSE.items():
        with pytest.raises(Failed) as failure:
            checks.ALL[exercise](lambda *given, value=value, **named: value)
        assert failure.value.what and failure.value.cause, name


@pytest.mark.parametrize("exercise", checks.ALL)
def test_every_property_has_a_wrong_solution_that_breaks_it(exercise):
    assert len(WRONG[exercise]) >= 3
    assert {property for property, _ in WRONG[exercise]} >= set(checks.ALL[exercise].properties)


@pytest.mark.parametrize("exercise", checks.ALL)
def test_an_untouched_stub_is_told_apart_from_a_wrong_answer(exercise):
    def stub(*args, **kwargs):
        raise NotImplementedError()

    with pytest.raises(NotImplementedError):
        checks.ALL[exercise](stub)


def unnamed(check):
    """What is wrong with the names of the functions behind a check's properties, which tracebacks and tests show."""
    names = [test.__name__ for test in check.properties.values()]
    wrong = [name for name in names if not name.startswith(f"{check.name}_")]
    return wrong + [f"{name} twice" for name in sorted(set(names)) if names.count(name) > 1]


@pytest.mark.parametrize("exercise", checks.ALL)
def test_every_property_has_a_function_of_its_own_name(exercise):
    assert unnamed(checks.ALL[exercise]) == []


def test_a_property_without_a_name_is_found():
    check = Check("double")

    @check.property("shape")
    def _(solution):
        pass

    for value in (2, 3):

        @check.property(f"value {value}")
        def double_value(solution):
            pass

    assert unnamed(check) == ["_", "double_value twice"]
