"""Notebook 00: the simplest selection there is, the last k bytes."""

import numpy as np
import torch

from ..checking import Check, expect, tensor

keep_last = Check("keep_last")  # keep(t, k) -> the positions that byte t may look at

LONG = (
    (640, 64),
    (640, 100),
    (3000, 2500),
    (63, 64),
    (100, 1),
    (9, 3),
    (5, 5),
)  # t, k: no fewer than k bytes are there
SHORT = ((0, 1), (0, 64), (2, 64), (62, 64), (3, 5), (300, 1000))  # fewer, or just one


def _positions(solution, t, k):
    """The answer as a list of ints; whatever holds them: list, tuple, range, set, array or tensor."""
    got = solution(t, k)
    where = f"keep_last(t={t}, k={k})"
    if isinstance(got, (torch.Tensor, np.ndarray)):
        got = tensor(got, where).tolist()
    good = isinstance(got, (list, tuple, range, set, frozenset))
    expect(good, f"{where}: got {type(got).__name__}, expected a list of positions", "the last line must return it")
    for position in got:
        whole = isinstance(position, (int, np.integer)) and not isinstance(position, bool)
        whole = whole or isinstance(position, torch.Tensor) and position.dim() == 0 and not position.is_floating_point()
        expect(whole, f"{where}: got {position!r} in it, expected whole numbers", "a position is an int")
    return where, [int(position) for position in got]


@keep_last.property("no future")
def keep_last_no_future(solution):
    for t, k in LONG + SHORT:
        where, got = _positions(solution, t, k)
        cause = "your selection saw the future: range(a, b) ends with b - 1, so b = t + 1 ends with t"
        expect(not got or max(got) <= t, f"{where}: got position {max(got, default=t)}, expected at most {t}", cause)


@keep_last.property("right bytes")
def keep_last_right_bytes(solution):
    for t, k in LONG:
        where, got = _positions(solution, t, k)
        cause = "one position twice, or too many, or too few: t - k + 1 to t are k positions, byte t among them"
        expect(len(got) == k == len(set(got)), f"{where}: got {len(got)} positions, expected {k} different ones", cause)
        missing = sorted(set(range(t - k + 1, t + 1)) - set(got))
        cause = "byte t may look at itself: its own is the last of the k" if missing == [t] else "the last k, up to t"
        what = f"{where}: got positions {min(got)} to {max(got)}, expected {t - k + 1} to {t}"
        expect(not missing, what, cause)


@keep_last.property("start of the text")
def keep_last_start_of_the_text(solution):
    for t, k in SHORT:
        where, got = _positions(solution, t, k)
        cause = "there is nothing before position 0, where fewer than k bytes have been read: start at max(0, ...)"
        expect(not got or min(got) >= 0, f"{where}: got position {min(got, default=0)}, expected at least 0", cause)
        cause = "near its start a text has fewer than k bytes; then all of them are kept, each once"
        expected = list(range(t + 1))[-k:]
        expect(sorted(got) == expected, f"{where}: got {len(got)} positions, expected {len(expected)}", cause)
