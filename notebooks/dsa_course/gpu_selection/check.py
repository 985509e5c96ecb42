"""Notebook 10: selecting on a GPU. `check_kernel` has the kernel."""

import contextlib
import math
import operator
import sys
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsa_ref.select_topk import select_topk
from dsa_ref.testing import Failed, compare_selection

from ..checking import GENERAL, Check, expect, expect_number, expect_shape, normal, spread, tensor, whole
from ..launching import LONG, NARROW

INF = math.inf


def whole_row(scores, k):
    """The reference's selection from one row, all of it visible to its one query: int32 [k]."""
    return select_topk(scores[None], k)[0]


lower_bound = Check("lower_bound")  # lower_bound(scores fp32 [S], k, group) -> a number


def _maxima(scores, group, of=max):
    return sorted((float(of(scores[i : i + group])) for i in range(0, len(scores), group)), reverse=True)


def _bound(solution, scores, k, group):
    return expect_number(solution(scores, k, group), "the bound")


def _rows_of_whole_groups():
    """Random rows, equal maxima, and a row where every winner sits in a group of its own: there the bound is tight."""
    yield normal(64, seed=1), 5, 4
    yield normal(96, seed=2), 7, 3
    yield normal(24, seed=3), 1, 8
    yield whole(64, seed=5, largest=9), 5, 4
    row = normal(60, seed=4).abs().neg()
    row[::5] += 10.0
    yield row, 6, 5
    yield normal(1000, seed=7), 100, 4
    yield spread(normal(64, seed=6)), 5, 4  # a view whose numbers do not lie side by side


@lower_bound.property("never above")
def lower_bound_never_above(solution):
    for scores, k, group in _rows_of_whole_groups():
        got, kth = _bound(solution, scores, k, group), float(scores.topk(k).values[-1])
        cause = "a winner would be dropped: groups that overlap count one score twice, or k is off by one (topk(k)[-1])"
        if got not in scores.tolist():
            cause = "that is none of the scores: they were rounded, or what lies between them in a view was read"
        what = f"S={len(scores)}, k={k}, group={group}: got {got:.6g}, expected at most the k-th score {kth:.6g}"
        expect(got <= kth, what, cause)


@lower_bound.property("tight")
def lower_bound_tight(solution):
    for scores, k, group in _rows_of_whole_groups():
        got, best = _bound(solution, scores, k, group), _maxima(scores, group)[k - 1]
        left, fewest = int((scores >= got).sum()), int((scores >= best).sum())
        mean = _maxima(scores, group, of=lambda x: x.mean())[k - 1]
        n = len(scores) // group  # no remainder in these cases
        if got == sorted(float(scores[i::n].max()) for i in range(n))[-k]:
            cause = "every n-th score was put in one group: a group is a run of neighbours, view(-1, group)"
        elif abs(got - mean) < 1e-5:
            cause = "the mean of a group is a bound too, but a weaker one than its maximum"
        elif got == _maxima(scores, group, of=min)[k - 1]:
            cause = "the minima of the groups were taken: max, not min"
        elif got == -INF:
            cause = f"there are {n} groups, enough for a bound: `group` is their size, not their number"
        elif got == sorted(set(_maxima(scores, group)))[-k:][0]:
            cause = "equal maxima were merged: they belong to different scores, and each counts"
        elif got == float(scores.topk(k).values[-1]):
            cause = "that is the k-th largest score itself, of the whole row: the maxima alone are asked"
        else:
            cause = "a bound, but not the k-th largest of the maxima (k = 1 is the largest), or it was rounded"
        expect(
            got == best and left <= fewest,
            f"S={len(scores)}, k={k}, group={group}: got {got!r}, which leaves {left} candidates, expected {best!r} "
            f"and {fewest}",
            cause,
        )


@lower_bound.property("ragged end")
def lower_bound_ragged_end(solution):
    for seed, S, k, group in ((1, 37, 2, 8), (2, 37, 5, 8), (3, 3, 1, 8), (4, 33, 3, 16), (5, 41, 3, 10)):
        scores = normal(S, seed=seed).abs().neg() - 1.0  # all negative: a 0 filled in would win
        scores[-1] = -0.5  # the largest of all stands alone at the end
        scores *= 1e35 if k == 1 else 1.0  # no number is low enough to fill with
        got, best = _bound(solution, scores, k, group), _maxima(scores, group)[k - 1]
        expect(
            got == best,
            f"S={S}, k={k}, group={group}: got {got:.6g}, expected {best:.6g}",
            "the missing places of the last group were filled with a number that beats some scores: fill with -inf"
            if got > best
            else f"-inf is for fewer than k groups: {-(-S // group)} are enough here, and a short row is a group, too"
            if got == -INF
            else f"every group has {group} scores, the last one {S % group}; its maximum counts as any other",
        )

    got = _bound(solution, torch.tensor([3.0, 1.0, -1e38, 2.0, -INF]), 3, 2)
    cause = "a last group of nothing but -inf has the maximum -inf: no fill may lift it"
    expect(got == -INF, f"maxima 3, 2 and -inf, k=3: got {got:.6g}, expected -inf", cause)


@lower_bound.property("few groups")
def lower_bound_few_groups(solution):
    for seed, S, k, group in ((1, 32, 5, 8), (2, 37, 20, 4), (3, 5, 9, 1)):
        got = _bound(solution, normal(S, seed=seed), k, group)
        expect(
            got == -INF,
            f"S={S}, k={k}, group={group}: got {got:.6g} from {-(-S // group)} maxima, expected -inf",
            "with fewer than k groups the maxima say nothing about the k-th score",
        )


ordered_bits = Check("ordered_bits")  # ordered_bits(x fp32, any shape) -> integers of that shape and order

# among them three that differ in the last bit, and the largest float beside infinity
SMALL, LARGE = [1e-45, 1e-42, 1.1754944e-38, 1e-20, 0.5], [1.5, 2.0, 3.0, 448.0, 3e38, 3.4028234663852886e38, INF]
POSITIVE = torch.tensor([*SMALL, 1.0, 1.0 + 2**-23, 1.0 + 2**-22, *LARGE])


def _integers(solution, x):
    got = solution(x)
    expect_shape(got, x.shape)
    got = torch.as_tensor(got)
    whole_numbers = not got.dtype.is_floating_point and not got.dtype.is_complex and got.dtype != torch.bool
    expect(whole_numbers, f"got {got.dtype}, expected integers", "the bits are to be *viewed* as integers: x.view")
    return got.cpu().to(torch.int64)


def _rising(solution, x, cause):
    """x in strictly rising order must give strictly rising integers."""
    got = _integers(solution, x)
    wrong = (got.diff() <= 0).nonzero().flatten()
    if len(wrong):
        i = int(wrong[0])
        sign = "=" if got[i] == got[i + 1] else ">"
        raise Failed(
            f"{float(x[i])!r} < {float(x[i + 1])!r}, but got {int(got[i])} {sign} {int(got[i + 1])}",
            "two different scores became one integer: nothing may be rounded or flushed" if sign == "=" else cause,
        )


@ordered_bits.property("positive numbers")
def ordered_bits_positive_numbers(solution):
    _rising(solution, POSITIVE, "the bits of positive floats are in order as they are")
    x = normal(7, 5, seed=1).abs() + 1e-3
    ranks = _integers(solution, x).flatten().argsort()
    expect(torch.equal(ranks, x.flatten().argsort()), "a [7, 5] tensor comes out of order", "see the row above")


@ordered_bits.property("negative numbers")
def ordered_bits_negative_numbers(solution):
    _rising(
        solution,
        -POSITIVE.flip(0),
        "among negative numbers the order is the other way round: larger bits mean a smaller number, so flip them all",
    )


@ordered_bits.property("both signs")
def ordered_bits_both_signs(solution):
    x = torch.cat([-POSITIVE.flip(0), POSITIVE])
    _rising(
        solution,
        x,
        "negative numbers came out above positive ones: the sign bit weighs most, and in a signed type it counts "
        "downwards (0x80000000 is the smallest int32)",
    )
    for seed in (1, 2):
        x = normal(200 if seed == 1 else 2000, seed=seed).sort().values
        _rising(solution, x, "the order is lost where the sign changes")


@ordered_bits.property("zeros")
def ordered_bits_zeros(solution):
    minus, plus = _integers(solution, torch.tensor([-0.0, 0.0])).tolist()
    cause = "-0.0 has a sign bit, but equals 0.0: replace it first"
    expect(minus == plus, f"got {minus} for -0.0 and {plus} for 0.0, expected one integer", cause)
    _rising(solution, torch.tensor([-1e-45, -0.0, 1e-45]), "0.0 lies between the smallest numbers of both signs")


@ordered_bits.property("number by number")
def ordered_bits_number_by_number(solution):
    x = normal(100, seed=3)
    all_, some = _integers(solution, x), _integers(solution, x[::3])
    expect(
        torch.equal(all_[::3], some),
        "the same numbers gave other integers in a shorter tensor",
        "ranks within the tensor: the integer must come from the bits of its own number alone",
    )


threshold_select = Check("threshold_select")  # threshold_select(scores fp32 [S], k) -> int32 [k]


def _select(solution, scores, k, judge_ties=True):
    got = solution(scores, k)
    got = tensor(got)
    expect(got.dim() == 1, f"got shape {list(got.shape)}, expected [k] = [{k}]", "one row, so one axis")
    try:
        compare_selection(got[None], scores[None], k)
    except Failed as failure:
        if judge_ties or failure.property != "ties":
            raise
    return got


def _select_for(solution, scores, k, cause):
    """`_select`, where a wrong selection has this cause."""
    try:
        _select(solution, scores, k)
    except Failed as failure:
        if failure.property not in GENERAL:
            failure.cause = cause
        raise


def last_bit(S, seed):
    """Scores that differ in the last bit of fp32 alone, all of them."""
    return 1.0 + normal(S, seed=seed).argsort() * 2.0**-23


@threshold_select.property("largest")
def threshold_select_largest(solution):
    for seed, S, k in ((1, 300, 7), (2, 1000, 100), (3, 37, 5), (4, 64, 64)):
        _select(solution, normal(S, seed=seed), k)
    _select_for(solution, last_bit(300, seed=5), 11, "scores were rounded before they were compared")
    _select(solution, spread(normal(300, seed=6)), 7)
    _select_for(solution, normal(LONG, seed=7), 7, f"right for short rows alone: {NARROW}")


@threshold_select.property("exactly k")
def threshold_select_exactly_k(solution):
    for seed, S, k in ((1, 300, 7), (2, 500, 61), (3, 37, 5)):
        _select(solution, whole(S, seed=seed), k, judge_ties=False)


@threshold_select.property("smallest index")
def threshold_select_smallest_index(solution):
    for seed, S, k in ((1, 300, 7), (2, 500, 61), (3, 37, 5)):
        _select(solution, whole(S, seed=seed), k)
    _select(solution, torch.full((100,), -2.0), 3)


@threshold_select.property("zeros")
def threshold_select_zeros(solution):
    for seed, S, k in ((1, 90, 7), (2, 37, 30)):
        row = whole(S, seed=seed, largest=1).clamp(max=0.0)
        row[row == 0] = torch.tensor([-0.0, -0.0, 0.0]).repeat(S)[: int((row == 0).sum())]
        _select_for(solution, row, k, "-0.0 equals 0.0: order the bits only after making them one")


@threshold_select.property("minus infinity")
def threshold_select_minus_infinity(solution):
    row = torch.full((80,), -INF)
    row[[3, 40, 79]] = torch.tensor([1.0, -5.0, 2.0])
    _select_for(solution, row, 7, "a score of -inf is a score: it is kept where nothing better is left")
    row[[50, 60]] = -3e38
    _select_for(solution, row, 7, "-inf is below every other score, however low: no number stands for it")


@threshold_select.property("short row")
def threshold_select_short_row(solution):
    for seed, S, k in ((1, 5, 9), (2, 1, 3), (3, 40, 64)):
        _select(solution, whole(S, seed=seed), k)


@threshold_select.property("ascending")
def threshold_select_ascending(solution):
    for seed, S, k in ((1, 300, 7), (2, 5, 9)):
        scores = whole(S, seed=seed)
        got, expected = _select(solution, scores, k).tolist(), whole_row(scores, k).tolist()
        cause = "the right set, but not by ascending index"
        expect(got == expected, f"S={S}, k={k}: got {got}, expected {expected}", cause)


@threshold_select.property("few sorted")
def threshold_select_few_sorted(solution):
    for seed, S, k in ((1, 4096, 64), (2, 4000, 99)):
        scores = normal(S, seed=seed)
        with _watched_sorts() as lengths:
            solution(scores, k)
        expect(
            max(lengths, default=0) <= S // 4,
            f"S={S}, k={k}: {max(lengths, default=0)} scores were sorted at once, expected at most S / 4",
            "sort or topk of the whole row: take the group maxima first, and go on with the candidates alone",
        )


SORTS = ("sort", "topk", "kthvalue", "median", "nanmedian", "mode", "_unique2", "unique_dim")  # what argsort etc. call
METHODS = ("sort", "argsort", "partition", "argpartition")  # of a list or an array
HEAPS = ("nlargest", "nsmallest")  # of heapq, Python's topk


@contextlib.contextmanager
def _watched_sorts():
    """The lengths of what torch, NumPy or Python sorted meanwhile."""
    lengths = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if operation.__name__.split(".")[0] in SORTS:
                lengths.append(args[0].numel())
            return operation(*args, **(kwargs or {}))

    def method(frame, event, called):  # np.sort, np.argsort and others arrive here as well
        if event == "c_call" and called.__name__ in METHODS and isinstance(called.__self__, (list, np.ndarray)):
            lengths.append(len(called.__self__))
        if event == "call" and frame.f_code.co_name in HEAPS and "iterable" in frame.f_locals:
            lengths.append(operator.length_hint(frame.f_locals["iterable"]))

    def pythons(x, sort=sorted, **kwargs):
        lengths.append(len(x := list(x)))
        return sort(x, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.callback(sys.setprofile, sys.getprofile())
        stack.enter_context(Watch())
        stack.enter_context(mock.patch("builtins.sorted", pythons))
        sys.setprofile(method)
        yield lengths
