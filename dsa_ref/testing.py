"""Judge results: selections by the contract, with a diagnosis, numbers by their distance, memory by poisoning it.

`compare_selection` is what both packages' tests and the exercises' checks stand on. It compares scores, not index
lists, so that it knows a tie from a fault, and it says which property broke, where, and what the likely cause is.

Tensors and arrays are both taken. Source: SPEC section 4.
"""

import contextlib
import math
import threading
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from .contracts import (
    FLOATS,
    check_count,
    check_dtype,
    check_indices,
    check_ranges,
    check_select_topk,
    check_shapes,
    row_ranges,
)
from .select_topk import select_topk

Given = Tensor | np.ndarray


class Failed(AssertionError):
    """What is wrong with a result: the broken `property` in a word, `what` was got and expected, the likely `cause`."""

    def __init__(self, what: str, cause: str, property: str | None = None) -> None:
        self.what, self.cause, self.property = what, cause, property

    def __str__(self) -> str:
        return f"{self.property}: {self.what}. Likely cause: {self.cause}{'' if self.cause.endswith('?') else '.'}"

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows: the sentence, and before it the learner's own error where that is the reason."""
        return [*([self.own] if self.own else []), f"✗ {self}"]

    own = ""  # the traceback of an error raised by the code under test


def _tensor(x) -> Tensor:
    """x itself, or the array or number as a tensor on the CPU, whatever the default device is."""
    return x if isinstance(x, Tensor) else torch.as_tensor(x, device="cpu")


def compare_selection(
    got: Given, scores: Given, k: int, start: Given | None = None, end: Given | None = None, tolerance: float = 0.0
) -> None:
    """Pass silently if `got` int32 [T, k] selects from `scores` [T, S] as the contract says; explain where it does not.

    start, end: int32 [T], default causal. The order within a row is free, but -1 stands only at its end.
    tolerance: 0 for scores that `got` was selected from. Above 0 for scores of another implementation: then a score
    within tolerance · max |score of the row| of the k-th largest may be kept or left, and ties are not judged.

    Raises: Failed, an AssertionError that names the broken property (type, count, padding, range, future, duplicates,
    scores, ties), the first bad row t with its key s, what was got and expected, and the likely cause. ValueError or
    TypeError where scores, k, start, end or tolerance are themselves bad, and for NaN in a visible score.
    """
    scores, start, end = (None if x is None else _tensor(x) for x in (scores, start, end))
    check_select_topk(scores, k, start, end)
    T, S = scores.shape
    start, end = row_ranges(T, S, scores.device, start, end)
    if not 0.0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be finite and at least 0, got {tolerance}")
    got = _selection(got, T, k, scores.device)
    ranges = list(zip(start.tolist(), end.tolist(), strict=True))
    for t, (first, last) in enumerate(ranges):
        _check_places(t, got[t], k, first, last, S)
        if last > first:
            try:
                _check_scores(t, got[t], scores[t, first:last].double(), k, first, tolerance)
            except Failed as failure:
                if failure.property == "scores":
                    failure.cause = _cause_of_wrong_scores(got[t:], scores[t:], k, ranges[t:])
                raise


def _selection(got, T, k, device):
    """`got` as a tensor, once its type, dtype and shape are right."""
    kind = f"{type(got).__name__} {getattr(got, 'dtype', '')}".strip()
    if isinstance(got, np.ndarray):
        got = _tensor(got) if got.dtype == np.int32 else None
    if not isinstance(got, torch.Tensor) or got.dtype != torch.int32:
        _fail("type", f"got {kind}, expected an int32 tensor", "argsort, topk and nonzero give int64: cast at the end")
    if got.dim() != 2 or got.shape[0] != T:
        _fail("count", f"got shape {list(got.shape)}, expected [T, k] = [{T}, {k}]", "one row of k places a query")
    if got.shape[1] != k:
        cause = (
            "keeping every score >= the threshold keeps too many"
            if got.shape[1] > k
            else "a row that sees fewer than k keys is still k wide: pad it with -1"
        )
        _fail("count", f"got {got.shape[1]} places a row, expected k = {k}", cause)
    return got.to(device)


def _check_places(t, row, k, first, last, S):
    """Which keys: everything that can be judged without looking at a score."""
    places = row.tolist()
    chosen = [s for s in places if s != -1]
    n = min(k, last - first)
    where = f"row t={t}, which may select from [{first}, {last})"
    empty = f"expected {n} indices, then {k - n} times -1"
    if n < k and -1 not in places:
        pad, times = Counter(places).most_common(1)[0]
        if times > 1 and times >= k - n:
            _fail("padding", f"{where}, s={pad}: got {pad} {times} times, {empty}", f"padded with {pad} instead of -1")
    for s in chosen:
        if not 0 <= s < S:
            cause = "an index that points outside the keys"
            _fail("range", f"{where}: got {s}, expected -1 or 0 <= s < S = {S}", cause)
        if s >= last:
            cause = "your selection saw the future: hide keys s >= end[t] before selecting"
            _fail("future", f"{where}, s={s}: got {s}, expected s < {last}", cause)
        if s < first:
            cause = "your selection saw keys before start[t], such as another sequence's, or did not add start[t]"
            _fail("range", f"{where}, s={s}: got {s}, expected s >= {first}", cause)
    seen = set()
    for s in chosen:
        if s in seen:
            cause = "a key was selected twice, as when two blocks of keys overlap or are merged"
            _fail("duplicates", f"{where}, s={s}: got it {chosen.count(s)} times, expected once", cause)
        seen.add(s)
    if len(chosen) != n:
        cause = "keys were dropped after selecting (hide the future before), or those that tie at the threshold were"
        _fail("count", f"{where}: got {len(chosen)} keys, expected min(k, visible) = {n}", cause)
    if -1 in places[:n]:
        place = places.index(-1)
        _fail("padding", f"{where}: got -1 in place {place}, {empty}", "-1 stands only after the last index")


def _check_scores(t, row, visible, k, first, tolerance):
    """Whether the chosen keys have the largest scores. visible: float64 scores of the row's range, from key `first`."""
    if visible.isnan().any():
        s = first + int(visible.isnan().nonzero()[0])
        raise ValueError(f"scores must not be NaN in a visible place, got NaN in row t={t}, s={s}")
    n = min(k, visible.shape[0])
    threshold = visible.topk(n).values[-1]
    slack = tolerance * visible[visible.isfinite()].abs().max() if visible.isfinite().any() else 0.0
    kept = torch.zeros_like(visible, dtype=torch.bool)
    kept[row[row >= 0].long() - first] = True
    missing = ((visible > threshold + slack) & ~kept).nonzero().flatten()
    worse = (kept & (visible < threshold - slack)).nonzero().flatten()
    if len(missing) or len(worse):
        left = missing if len(missing) else ((visible >= threshold) & ~kept).nonzero().flatten()
        taken = worse if len(worse) else kept.nonzero().flatten()
        left, taken = left[visible[left].argmax()], taken[visible[taken].argmin()]
        _fail(
            "scores",
            f"row t={t}, s={first + int(taken)}: got a key with score {float(visible[taken])!r}, "
            f"expected s={first + int(left)} with score {float(visible[left])!r} (the {n} largest reach down to "
            f"{float(threshold)!r})",
            "",  # not one row alone shows why
        )
    if tolerance == 0.0:
        tied = visible == threshold
        room = n - int((visible > threshold).sum())
        expected = tied & (tied.cumsum(dim=0) <= room)
        wrong = (tied & kept & ~expected).nonzero().flatten()
        if len(wrong):
            better = (expected & ~kept).nonzero().flatten()
            _fail(
                "ties",
                f"row t={t}, s={first + int(wrong[0])}: got this key, expected s={first + int(better[0])}, the smaller "
                f"index of equal scores {float(threshold)!r}",
                "the sort is not stable (torch.topk promises no order of ties), or -0.0 was put below 0.0",
            )


def _reach(x, n):
    """The first n of x that reach its n-th largest value."""
    reach = x >= x.topk(n).values[-1]
    return reach & (reach.cumsum(dim=0) <= n)


def _same_values(x, kept, others):
    return x[kept].sort().values.equal(others.sort().values)


MISTAKES = (  # (visible scores x, kept bool, how many keys n) -> whether this mistake gives this row; the cause
    (
        lambda x, kept, n: kept.equal(_reach(x, n)),
        "the first keys that reach the threshold were kept: all above it come first, then the first that equal it",
    ),
    (
        lambda x, kept, n: _same_values(x, kept, x.topk(n, largest=False).values),
        "the smallest scores were kept: sort descending",
    ),
    (
        lambda x, kept, n: _same_values(x.abs(), kept, x.abs().topk(n).values),
        "magnitudes were ranked: a negative score stays negative",
    ),
    (lambda x, kept, n: kept[-n:].all(), "the last keys were kept, whatever their scores"),
    (lambda x, kept, n: kept[:n].all(), "the first keys were kept, whatever their scores"),
)


def _cause_of_wrong_scores(got, scores, k, ranges):
    """The first of MISTAKES that explains every wrong row: one short row alone often fits several."""
    rows = []
    for row, numbers, (first, last) in zip(got, scores, ranges, strict=True):
        n, places = min(k, last - first), row[row >= 0].long() - first
        if len(places) == n > 0 and 0 <= places.min() and places.max() < last - first:
            visible, kept = numbers[first:last].double(), torch.zeros(last - first, dtype=torch.bool, device=row.device)
            kept[places] = True
            if not _same_values(visible, kept, visible.topk(n).values):
                rows.append((visible, kept, n))
    for mistake, cause in MISTAKES:
        if all(mistake(*row) for row in rows):
            return cause
    return "a part of the keys was never looked at, or scores were rounded before they were compared"


def _fail(broken, what, cause):
    raise Failed(what, cause, broken)


def overlap(a: Given, b: Given) -> float:
    """The share of a's set that is also in b's, averaged over rows; a row where a selects nothing counts 1.

    a: int [T, ka], b: int [T, kb], -1 ignored. Raises: ValueError for wrong shapes or T = 0, TypeError for wrong types.
    """
    a, b = _tensor(a), _tensor(b)
    check_shapes(a=(a, "T ka"), b=(b, "T kb"))
    for name, indices in (("a", a), ("b", b)):
        check_dtype(name, indices, (torch.int32, torch.int64))
    _check_rows(a)
    shares = []
    for mine, other in zip(a.tolist(), b.tolist(), strict=True):
        mine, other = set(mine) - {-1}, set(other) - {-1}
        shares.append(len(mine & other) / len(mine) if mine else 1.0)
    return sum(shares) / len(shares)


def relative_error(got: Given | float, expected: Given | float) -> float:
    """||got - expected|| / ||expected|| in float64, any float dtypes, any one shape.

    inf where an error has no size: a NaN on either side, an infinity that the other side has not, or any difference
    from an expected zero. Equal infinities (an empty row's log-sum-exp) are equal, and the rest is compared.

    Raises: ValueError where the shapes differ.
    """
    got, expected = (_tensor(x).detach().cpu().double() for x in (got, expected))
    if got.shape != expected.shape:
        raise ValueError(f"got must have the shape of expected, {list(expected.shape)}, got {list(got.shape)}")
    infinite = got.isinf() | expected.isinf()
    if got.isnan().any() or expected.isnan().any() or (got[infinite] != expected[infinite]).any():
        return math.inf
    error = float((got - expected)[~infinite].norm())
    size = float(expected[~infinite].norm())
    if error == 0.0:
        return 0.0
    return error / size if size else math.inf


def attention_recall(weights: Given, indices: Given) -> float:
    """The mean over rows of the attention mass on the selected keys, in [0, 1].

    weights: float [T, S], attention probabilities, each row summing to 1; indices: int32 [T, k], -1 ignored, a key
    named twice counted once.

    Raises: ValueError for wrong shapes, T = 0, indices outside [-1, S) or rows that do not sum to 1; TypeError for
    wrong dtypes.
    """
    weights, indices = _tensor(weights).detach(), _tensor(indices)
    check_shapes(weights=(weights, "T S"), indices=(indices, "T k"))
    check_dtype("weights", weights, FLOATS)
    S = weights.shape[1]
    check_indices(indices, S)
    _check_rows(weights)
    weights = weights.double()
    sums = weights.sum(dim=1)
    if not ((sums - 1.0).abs() < 1e-2).all():  # bf16 probabilities miss 1 by some 1e-3
        t = int((~((sums - 1.0).abs() < 1e-2)).nonzero()[0])
        raise ValueError(f"weights must sum to 1 in every row, got {float(sums[t])} in row {t}")
    selected = weights.new_zeros(weights.shape[0], S + 1)
    selected.scatter_(1, torch.where(indices < 0, S, indices).long(), 1.0)  # column S swallows the padding
    return float((weights * selected[:, :S]).sum(dim=1).mean())


def _check_rows(x):
    if x.shape[0] == 0:
        raise ValueError("T must be at least 1 for a mean over rows, got 0")


def window_selection(k: int, start: Given, end: Given) -> Tensor:
    """The control that needs no scores: the last min(k, visible) keys of each range, the query's own included.

    start, end: int32 [T] -> int32 [T, k], ascending, -1 at the end. Raises: TypeError or ValueError for a bad argument.
    """
    start, end = _ranges(k, start, end)
    keys = torch.maximum(start, end - k)[:, None] + torch.arange(k, dtype=torch.int32, device=start.device)
    return torch.where(keys < end[:, None], keys, -1)


def random_selection(k: int, start: Given, end: Given, seed: int) -> Tensor:
    """The control that knows nothing: min(k, visible) distinct keys of each range, drawn evenly.

    start, end: int32 [T] -> int32 [T, k], ascending, -1 at the end; the same for the same seed. Raises: TypeError or
    ValueError for a bad argument.
    """
    start, end = _ranges(k, start, end)
    S = max(1, int(end.max())) if len(end) else 1
    scores = np.random.default_rng(seed).random((len(end), S))
    return select_topk(torch.from_numpy(scores).to(start.device), k, start, end)  # k of S random numbers: a fair draw


def _ranges(k, start, end):
    check_count("k", k)
    start, end = _tensor(start), _tensor(end)
    check_shapes(start=(start, "T"), end=(end, "T"))
    check_ranges(len(start), int(end.max()) if len(end) else 0, start.device, start, end)
    return start, end


_POISONING = threading.Lock()  # threads may leave in another order than they came; the last one puts back
_ACTIVE: list[None] = []
_REPLACED = contextlib.ExitStack()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory asked for without a value holds NaN, or the largest integer, instead of lucky zeros."""
    with torch.device("cpu"):
        torch.empty(0)  # now torch, not later with these names replaced, notes what a device as a context is for
    with _POISONING:
        _ACTIVE.append(None)
        if len(_ACTIVE) == 1:
            for owner, name in (
                (torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"), (np, "empty"), (np, "empty_like"),
            ):  # fmt: skip
                _REPLACED.enter_context(mock.patch.object(owner, name, _poison(getattr(owner, name))))
    try:
        yield
    finally:
        with _POISONING:
            _ACTIVE.pop()
            if not _ACTIVE:
                _REPLACED.close()


def _poison(make):
    def made(*args, **kwargs):
        fresh = make(*args, **kwargs)
        if isinstance(fresh, torch.Tensor):
            if fresh.is_floating_point() or fresh.is_complex():
                return fresh.fill_(torch.nan)
            return fresh.fill_(True if fresh.dtype == torch.bool else torch.iinfo(fresh.dtype).max)
        if fresh.dtype.kind in "fc":
            fresh.fill(np.nan)
        elif fresh.dtype.kind in "iu":
            fresh.fill(np.iinfo(fresh.dtype).max)
        return fresh

    return made
