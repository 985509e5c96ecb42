"""Answers in other styles than the notebooks' own that the checks must accept: NumPy, loops, other ways to the result.

One module a topic of `dsa_course`. test_checks.py runs them all.
"""

import collections

RIGHT = collections.defaultdict(list)  # exercise -> [solution]


def right(exercise):
    """Decorator: this solution of `exercise` is right."""

    def collect(solution):
        RIGHT[exercise].append(solution)
        return solution

    return collect
