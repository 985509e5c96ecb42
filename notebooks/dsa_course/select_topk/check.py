"""Notebook 03: the selection contract, and a check of it that the learner writes."""

import contextlib
import math
import sys

import torch

from dsa_ref.select_topk import select_topk as reference
from dsa_ref.testing import Failed, compare_selection

from ..checking import FORGOTTEN, GENERAL, Check, expect, normal, strided, tensor, whole

select_topk = Check("select_topk")  # (scores [T, S], k) -> indices int32 [T, k]
check_selection = Check("check_selection")  # (indices, scores, k) -> True, or False or an AssertionError


# ------------------------------------------------------------------------------------------------------- select_topk
# Most properties have the names that compare_selection gives to what it finds broken.


@contextlib.contextmanager
def judging(name, cause, words=None):
    """Report what compare_selection finds broken as property `name`; with `words`, pass over any other fault."""
    try:
        yield
    except Failed as failure:
        if failure.property in GENERAL:
            raise
        if words is None or failure.property in words:
            failure.property, failure.cause = name, cause
            raise


def _distinct(T, S, seed):
    """Scores without ties, negative ones among them."""
    return normal(T, S, seed=seed)


def _neighbours(ranks):
    """fp32 scores that differ by ranks, in the last bit only: no rounding, no small change, leaves their order."""
    steps = 1 + ranks * 2.0**-23
    return steps, -steps, steps * 2.0**-60, -steps * 2.0**60, ranks * 2.0**-149


@select_topk.property("type")
def select_topk_type(solution):
    scores = _distinct(6, 6, seed=1)
    got = solution(scores, 1)
    cause = FORGOTTEN if got is None else "return one tensor, or NumPy array, for all rows"
    expect(hasattr(got, "dtype"), f"got {type(got).__name__}, expected an int32 tensor", cause)
    compare_selection(got, scores, 1)
    compare_selection(solution(strided(scores), 2), scores, 2)  # not contiguous, as after a transpose


@select_topk.property("future")
def select_topk_future(solution):
    for T, S, seed in ((6, 6, 1), (3, 8, 2), (1, 5, 3)):
        scores = _distinct(T, S, seed)
        future = torch.arange(S) > S - T + torch.arange(T)[:, None]
        compare_selection(solution(scores + 100 * future, 1), scores, 1)  # the best of all are those to come


@select_topk.property("padding")
def select_topk_padding(solution):
    for T, S, k, seed in ((6, 6, 4, 1), (5, 7, 6, 2)):
        scores = _distinct(T, S, seed)
        compare_selection(solution(scores, k), scores, k)


@select_topk.property("count")
def select_topk_count(solution):
    for T, S, k, seed in ((6, 6, 3, 1), (4, 9, 3, 2), (3, 5, 8, 3)):  # with ties, and k > S
        scores = whole(T, S, seed=seed, largest=1)
        got = solution(scores, k)
        try:
            compare_selection(got, scores, k)
        except Failed as failure:
            if failure.property != "ties":  # judged below
                raise


@select_topk.property("scores")
def select_topk_scores(solution):
    for T, S, k, seed in ((37, 37, 5, 1), (9, 64, 16, 2), (1, 100, 1, 3)):
        for shift, size in ((0.0, 1.0), (-10.0, 1.0), (0.0, 1e30), (0.0, 1e-30)):  # all below 0, huge, tiny
            scores = (_distinct(T, S, seed) + shift) * size
            compare_selection(solution(scores, k), scores, k)
        for close in _neighbours(scores.argsort(dim=1)):
            with judging("scores", "nearly equal is not equal: compare scores as they are, unrounded, unchanged"):
                compare_selection(solution(close, k), close, k)
    scores = torch.arange(32_800.0)[None]
    got = tensor(solution(scores, 2))[0].tolist()
    what = f"T=1, S=32800, k=2, scores ascending: got {got}, expected 32798 and 32799 in any order"
    expect(sorted(got) == [32_798, 32_799], what, "right for short rows: did indices or scores go through 16 bits?")


@select_topk.property("ties")
def select_topk_ties(solution):
    for T, S, k, seed in ((12, 12, 4, 1), (5, 300, 100, 2), (3, 9, 16, 3)):
        scores = whole(T, S, seed=seed, largest=1) + 1.0  # 0, 1 and 2, but never -0.0
        for shift, size in ((0.0, 1.0), (-3.0, 1.0), (-0.5, 1e-30), (-0.5, 1e30)):  # ties below 0, and of both signs
            compare_selection(solution((scores + shift) * size, k), (scores + shift) * size, k)


@select_topk.property("signed zeros")
def select_topk_signed_zeros(solution):
    for T, S, k, seed in ((8, 8, 3, 1), (2, 40, 9, 2)):
        scores = torch.where(normal(T, S, seed=seed) > 0, 0.0, -0.0)
        with judging("signed zeros", "-0.0 equals 0.0: compare the numbers, and not their bits"):
            compare_selection(solution(scores, k), scores, k)


@select_topk.property("infinite scores")
def select_topk_infinite_scores(solution):
    for T, S, k, seed in ((6, 6, 3, 1), (3, 9, 5, 2), (3, 9, 2, 3)):
        scores = _distinct(T, S, seed)
        scores[:, ::2] = -torch.inf
        scores[:, 1] = torch.inf
        got = _unrefused(solution, scores, k)
        with judging("infinite scores", "a visible score may be -inf: it still counts, and ranks before hidden keys"):
            compare_selection(got, scores, k)
        with judging("infinite scores", "+inf equals +inf: of equal scores the smallest index wins"):
            compare_selection(solution(-scores, k), -scores, k)
        largest = torch.finfo(torch.float32).max
        scores[:, 0], scores[:, 2] = largest, -largest
        with judging(
            "infinite scores", "infinity is above the largest finite number, and -inf below the least: no tie"
        ):
            compare_selection(solution(scores, k), scores, k)
            compare_selection(solution(-scores, k), -scores, k)


def _unrefused(solution, scores, k):
    """The selection from scores without NaN; a ValueError says so."""
    try:
        return solution(scores, k)
    except Failed as failure:
        if isinstance(failure.__cause__, ValueError):
            what = f"got a ValueError ({failure.__cause__}) for scores without NaN, infinities of both signs among them"
            raise Failed(what, "inf - inf is NaN: look for NaN in the scores, not in their sum") from None
        raise


@select_topk.property("NaN refused")
def select_topk_nan_refused(solution):
    scores = _distinct(5, 7, seed=1)
    hidden = torch.where(
        torch.arange(7) > 2 + torch.arange(5)[:, None], torch.nan, scores
    )  # row t sees keys 0 to 2 + t
    with judging("NaN refused", "here every NaN is in the future, where nothing may matter"):
        try:
            compare_selection(solution(hidden, 2), scores, 2)
        except Failed as failure:
            if isinstance(failure.__cause__, ValueError):  # it was refused
                failure.property = "NaN"
            raise
    for t, s in ((3, 1), (0, 2), (4, 6), (2, 0)):  # anywhere, the row's own key and a row's worst one included
        broken = scores.clone()
        broken[t, s] = torch.nan
        try:
            got = solution(broken, 2)
        except Failed as failure:
            error = failure.__cause__
            cause = "raise ValueError where a visible score is NaN"
            what = f"a NaN in t={t}, s={s}: got {type(error).__name__}: {error}, expected a ValueError"
            expect(isinstance(error, ValueError), what, cause)
            continue
        row = tensor(got)[t].tolist()
        expect(False, f"row t={t} holds a NaN in s={s}: got {row}, expected a ValueError", "NaN has no rank")


# --------------------------------------------------------------------------------------------------- check_selection


def _verdict(solution, indices, scores, k):
    """True where the learner's check accepts, False where it says no, by an AssertionError too; a crash is neither."""
    try:
        got = solution(indices, scores, k)
    except Failed as failure:
        if isinstance(failure.__cause__, AssertionError):
            return False
        if failure.property != "inputs":
            failure.property = None  # that which was looked for
            failure.cause = "a judge says no, and does not crash: look at the dtype, the shape and the range first"
        raise
    cause = "did you forget to return True at the end?"
    single = hasattr(got, "__bool__") and getattr(got, "shape", ()) == ()  # Python's, NumPy's or torch's
    expect(got is not None and single, f"got {type(got).__name__}, expected True or False", cause)
    return bool(got)


def _tied_scores():
    """(scores, k): whole numbers, ties everywhere; square, T < S, k above S, one row."""
    for seed in (1, 2):
        for T, S, k in ((8, 8, 3), (4, 9, 6), (5, 12, 3), (3, 5, 7), (1, 12, 4), (37, 37, 5)):
            yield whole(T, S, seed=seed + 10 * T, largest=2), k


def _other_scores():
    """(scores, k): no whole numbers, but neighbours among the floats of either sign, fp64's too; infinities; zeros."""
    for T, S, k in ((8, 8, 3), (4, 9, 6), (5, 12, 3)):
        ranks = normal(T, S, seed=T).argsort(dim=1)
        for scores in _neighbours(ranks):
            yield scores, k
        yield 1 + ranks.double() * 2.0**-52, k
        tied = whole(T, S, seed=T, largest=1)
        yield tied.masked_fill(tied == 0, -0.0), k
        yield torch.where(tied == 0, tied, tied * torch.inf), k  # -inf, 0 and +inf
        future = torch.arange(S) > S - T + torch.arange(T)[:, None]
        yield normal(T, S, seed=T).masked_fill(future, -torch.inf), k  # as an indexer leaves them
        yield tied * -torch.where(normal(T, S, seed=T + 1) > 0, 1e-3, 0.0), k  # many -0.0 beside 0.0


def _accepts(solution, name, arrange, given=_tied_scores, cause="it asks for more than the contract does"):
    for scores, k in given():
        indices = arrange(reference(scores, k))
        verdict = _verdict(solution, indices, scores, k)
        T, S = scores.shape
        what = f"T={T}, S={S}, k={k}: your check rejects {name}; row {T - 1} of the scores begins {_few(scores[-1])}"
        expect(verdict, what, cause)


@check_selection.property("accepts the right one")
def check_selection_accepts_the_right_one(solution):
    for arrange in (torch.clone, strided):
        _accepts(solution, "the reference's own selection", arrange)


@check_selection.property("accepts any order")
def check_selection_accepts_any_order(solution):
    def turned_round(indices):
        for row in indices:
            kept = row[row >= 0]
            row[: len(kept)] = kept.flip(0)  # -1 stays at the end
        return indices

    _accepts(solution, "a right selection in descending order", turned_round)


def _few(numbers):
    """The first numbers of a row, as they are."""
    return [int(x) if math.isfinite(x) and x == int(x) else x for x in numbers[:12].tolist()]


def _refuses(solution, mutate, cause, given=_tied_scores):
    """Every wrong row that mutate(row, scores of its visible keys, scores of all its keys) yields is refused."""
    tried = 0
    for scores, k in given():
        T, S = scores.shape
        indices = reference(scores, k)
        rows = [
            list(mutate(indices[t].tolist(), scores[t, : S - T + t + 1].tolist(), scores[t].tolist())) for t in range(T)
        ]
        fitting = [t for t in range(T) if rows[t]]
        for t in {*fitting[:1], *fitting[-1:]}:  # one row is wrong, an early one or a late one
            for row in rows[t]:
                wrong = indices.clone()
                wrong[t] = torch.tensor(row, dtype=torch.int32)
                tried += 1
                verdict = _verdict(solution, wrong, scores, k)
                what = (
                    f"T={T}, S={S}, k={k}: your check accepts row t={t} as {row}, expected it to say no (it "
                    f"should hold {indices[t].tolist()}, the scores are {_few(scores[t])})"
                )
                expect(verdict is not True, what, cause)
    assert tried >= 3, mutate.__name__


@check_selection.property("type")
def check_selection_type(solution):
    scores = whole(8, 8, seed=1)
    for dtype in (torch.int64, torch.int16, torch.float32):
        verdict = _verdict(solution, reference(scores, 3).to(dtype), scores, 3)
        what = f"your check accepts a tensor of dtype {dtype}"
        expect(verdict is not True, what, "the contract says int32, and no other: nothing looked at the dtype")


@check_selection.property("count")
def check_selection_count(solution):
    for scores, k in _tied_scores():
        T, S = scores.shape
        right = reference(scores, k)
        wide = torch.cat((right, torch.full((T, 1), -1, dtype=torch.int32)), dim=1)
        shapes = (wide, f"{k + 1} places a row"), (right[: T - 1], f"{T - 1} rows")
        for wrong, what in (*shapes, (torch.cat((right, right[-1:])), f"{T + 1} rows")):
            verdict = _verdict(solution, wrong, scores, k)
            cause = "nothing looked at the shape, [T, k]"
            expect(verdict is not True, f"T={T}, S={S}, k={k}: your check accepts {what}", cause)
    few = right_without_the_last(scores := whole(8, 8, seed=3, largest=2), 3)
    verdict = _verdict(solution, few, scores, 3)
    what = f"T=8, S=8, k=3: your check accepts row t=7 as {few[7].tolist()}, though it sees 8 keys"
    expect(verdict is not True, what, "count the keys: min(k, visible) of them, no fewer")


def right_without_the_last(scores, k):
    """A right selection, except that the last row leaves out a key that only just got in."""
    few = reference(scores, k)
    row, numbers = few[-1].tolist(), scores[-1]
    row.remove(min(row, key=lambda s: (numbers[s], -s)))
    few[-1] = torch.tensor([*row, -1], dtype=torch.int32)
    return few


def _last_in(row, visible):
    """The key that only just got in: of the smallest score kept, the largest index."""
    return min((s for s in row if s >= 0), key=lambda s: (visible[s], -s))


def _swapped(row, old, new):
    return [new if s == old else s for s in row]


def misplaced_padding(row, visible, everything):
    if -1 in row:
        yield [-1, *row[:-1]]
        yield [s if s >= 0 else 0 for s in row]
        yield [s if s >= 0 else -2 for s in row]


@check_selection.property("padding")
def check_selection_padding(solution):
    cause = "-1 fills the end of a row, and only the end; no other number fills it"
    _refuses(solution, misplaced_padding, cause)


def indices_out_of_range(row, visible, everything):
    n, S = len(visible), len(everything)
    if -1 not in row:
        last = _last_in(row, visible)
        yield [*row[:-1], S]
        yield from (_swapped(row, last, last - size) for size in {n, S} if last - size != -1)  # has the score of `last`


@check_selection.property("range")
def check_selection_range(solution):
    cause = "an index must be -1, or point at a key: 0 <= s < S (Python takes negative ones from the end)"
    _refuses(solution, indices_out_of_range, cause)


def keys_of_the_future(row, visible, everything):
    if -1 not in row:
        last = _last_in(row, visible)
        for s in range(len(visible), len(everything)):
            if everything[s] >= visible[last]:  # as good as the one that it replaces, or better
                yield _swapped(row, last, s)


@check_selection.property("future")
def check_selection_future(solution):
    cause = "row t sees keys up to S - T + t only, whatever the later ones score"
    _refuses(solution, keys_of_the_future, cause)


def duplicated_keys(row, visible, everything):
    kept = [s for s in row if s >= 0]
    for i, a in enumerate(kept):
        for b in kept[:i]:
            if visible[a] == visible[b]:  # so that the scores look right
                yield _swapped(row, a, b)


@check_selection.property("duplicates")
def check_selection_duplicates(solution):
    cause = "the indices of a row must be distinct: naming a key twice drops another one"
    _refuses(solution, duplicated_keys, cause)


def smaller_scores(row, visible, everything):
    worst, best = (
        min(range(len(visible)), key=visible.__getitem__),
        max((s for s in row if s >= 0), key=visible.__getitem__),
    )
    if worst not in row and visible[best] > visible[worst]:
        yield _swapped(row, best, worst)
    below = [s for s in range(len(visible)) if -1 not in row and visible[s] < visible[_last_in(row, visible)]]
    if below:  # the next best instead of the last one in
        yield _swapped(row, _last_in(row, visible), max(below, key=visible.__getitem__))


@check_selection.property("scores")
def check_selection_scores(solution):
    cause = "the kept scores must be the largest ones"
    _refuses(solution, smaller_scores, cause)


def later_ties(row, visible, everything):
    if -1 not in row:
        last = _last_in(row, visible)
        left = [s for s, score in enumerate(visible) if score == visible[last] and s not in row]
        yield from (_swapped(row, last, s) for s in left)


@check_selection.property("ties")
def check_selection_ties(solution):
    cause = "of equal scores at the threshold the smallest index must win: comparing scores alone cannot see it"
    _refuses(solution, later_ties, cause)


@check_selection.property("any scores")
def check_selection_any_scores(solution):
    cause = "right for small whole numbers: scores may differ in the last bit only, be infinite, or be -0.0"
    _accepts(solution, "the reference's own selection", lambda indices: indices, _other_scores, cause)
    cause = "the kept scores must be the largest ones, as they are: nearly equal is not equal, and nothing is rounded"
    _refuses(solution, smaller_scores, cause, _other_scores)
    cause = "of equal scores the smallest index must win, below 0 and at infinity too, and -0.0 equals 0.0"
    _refuses(solution, later_ties, cause, _other_scores)


@check_selection.property("own rules")
def check_selection_own_rules(solution):
    called, outer = set(), sys.getprofile()
    sys.setprofile(lambda frame, event, argument: called.add(frame.f_code))
    try:
        _verdict(solution, reference(scores := whole(8, 8, seed=1), 3), scores, 3)
    finally:
        sys.setprofile(outer)
    cause = "right, but then there is nothing to learn: form, padding, range, distinct keys, and the best of them"
    expect(compare_selection.__code__ not in called, "compare_selection was called, expected your own rules", cause)
