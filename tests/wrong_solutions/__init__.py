"""Answers that a learner would plausibly give and that the checks must reject, each for a stated property.

One module a topic of `dsa_course`, and a second, `..._kernel` or `..._machine`, where there are many. test_checks.py
runs them all: every check has at least three, and every property of a check is the stated reason of at least one.
"""

import collections

WRONG = collections.defaultdict(list)  # exercise -> [(property, solution)]


def wrong(exercise, property):
    """Decorator: this solution of `exercise` breaks `property`."""

    def collect(solution):
        WRONG[exercise].append((property, solution))
        return solution

    return collect
