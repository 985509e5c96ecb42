"""Answers that a learner would plausibly give and that the checks must reject, each for a stated property.

In `right_*.py` are answers of unusual style that the checks must accept.

One module a topic of `dsa_course`, and a second, `..._kernel` or `..._machine`, where there are many. test_checks.py
runs them all: every check has at least three, and every property of a check is the stated reason of at least one.
"""

import collections

WRONG = collections.defaultdict(list)  # exercise -> [(property, solution)]
RIGHT = collections.defaultdict(list)  # exercise -> [solution]: right, but not as the notebook's solution is


def wrong(exercise, property):
    """Decorator: this solution of `exercise` breaks `property`."""

    def collect(solution):
        WRONG[exercise].append((property, solution))
        return solution

    return collect


def right(exercise):
    """Decorator: this solution of `exercise` is right, so the check must accept it."""

    def collect(solution):
        RIGHT[exercise].append(solution)
        return solution

    return collect
