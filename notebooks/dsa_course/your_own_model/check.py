"""Notebook 12b: a comparison of two models' logits that notices a difference, and that knows when it tested nothing."""

import contextlib
import functools
import math
import pathlib

import torch

from dsa_ref.nn.model import load_small_model

from ..checking import Check, expect, normal

same_logits = Check("same_logits")  # same_logits(before, after, mask, index_topk, tolerance) -> True, False or None

K, TOLERANCE = 8, 1e-5


def _answer(solution, before, after, mask, k=K, tolerance=TOLERANCE):
    """True, False or None, as it came back from Python, NumPy or torch."""
    got = solution(before, after, mask, k, tolerance)
    if str(getattr(got, "dtype", "")).endswith("bool") and math.prod(got.shape) == 1:
        got = bool(got)
    kind = type(got).__name__
    expect(got is None or isinstance(got, bool), f"got {kind}, expected True, False or None", "answer yes, no, or None")
    return got


def _batch(seed, lengths=(13, 5), V=11):
    """Logits [B, T, V] of a batch, and its mask [B, T]: padded on the left, as for `generate`."""
    T = max(lengths)
    mask = torch.tensor([[0] * (T - n) + [1] * n for n in lengths])
    return normal(len(lengths), T, V, seed=seed), mask


def _expect(got, wanted, case, cause):
    expect(got is wanted, f"{case}: got {got}, expected {wanted}", cause)


@same_logits.property("equal")
def same_logits_equal(solution):
    for seed in (1, 2):
        before, mask = _batch(seed)
        for case, after in {"the same numbers": before, "the last bits differ": before * (1 + 1e-7)}.items():
            _expect(_answer(solution, before, after.clone(), mask), True, case, "rounding alone is no difference")


@same_logits.property("every token")
def same_logits_every_token(solution):
    cause = "one number of one token is enough: compare all of [B, T, vocab], not means, guesses or the last token"
    for seed in (1, 2):
        before, mask = _batch(seed)
        for place in ((0, 0, 3), (1, 12, 4), (0, 6, int(before[0, 6].argmin()))):
            for step in (0.001, -0.001):
                after = before.clone()
                after[place] += step
                case = f"logit {list(place)} differs by {step}"
                _expect(_answer(solution, before, after, mask), False, case, cause)
    before, after = _trained(64), _trained(32)
    got = _answer(solution, before[None], after[None], torch.ones(1, len(before)).long(), k=64)
    _expect(got, False, "the trained model with k = 64 and with 32", cause)


@same_logits.property("relative")
def same_logits_relative(solution):
    cause = "the tolerance is a share of the largest |before|: logits of 1,000 have a thousand times the rounding"
    for seed in (1, 2):
        before, mask = _batch(seed)
        largest = before[mask.bool()].abs().max()
        for size in (1e3, 1e-3):
            for share, wanted in ((0.5, True), (1.2, False)):
                after = before * size
                after[0, 4, 2] += share * TOLERANCE * largest * size
                case = f"logits up to {float(largest * size):.2g}, one off by {share} of the tolerance"
                _expect(_answer(solution, before * size, after, mask), wanted, case, cause)
        low = before - largest  # nothing is above 0
        after = low.clone()
        after[0, 4, 2] += 0.5 * TOLERANCE * low[mask.bool()].abs().max()
        case = "all logits below 0, one off by 0.5 of the tolerance"
        _expect(_answer(solution, low, after, mask), True, case, f"{cause}, and largest means without the sign")
        loud = before.clone()
        loud[1] *= 1e3
        after = loud.clone()
        after[0, 4, 2] += 100 * TOLERANCE * largest
        case = "one sequence with logits a thousand times those of the other, which is off by less than the tolerance"
        _expect(_answer(solution, loud, after, mask), True, case, f"{cause} of the whole batch")
        after = before.clone()
        after[0, 4, 2] = torch.nextafter(after[0, 4, 2], torch.tensor(torch.inf))
        exactly = (
            "with tolerance 0 equal numbers are near, <= and not <, and no others: allclose adds an rtol of its own"
        )
        for new, wanted in ((before.clone(), True), (after, False)):
            case = "tolerance 0, the same numbers" if wanted else "tolerance 0, one logit off by its last bit"
            _expect(_answer(solution, before, new, mask, tolerance=0.0), wanted, case, exactly)


@same_logits.property("padding")
def same_logits_padding(solution):
    for seed in (1, 2):
        before, mask = _batch(seed)
        for junk in (7.0, torch.nan, torch.inf):
            after = before.clone()
            after[mask == 0] = junk
            cause = "what stands at padding means nothing: leave out places where the mask is 0"
            _expect(_answer(solution, before, after, mask), True, f"padding is {junk}", cause)
        before[mask == 0] = 1e6
        after = before.clone()
        after[0, 3, 1] += 0.1
        cause = "padding must not count in the largest |before| either, or the tolerance grows with it"
        _expect(_answer(solution, before, after, mask), False, "large numbers at padding, a token off by 0.1", cause)


@same_logits.property("NaN")
def same_logits_nan(solution):
    cause = "NaN > x is False, and so is NaN <= x: ask whether all are near, not whether any is far"
    for seed in (1, 2):
        before, mask = _batch(seed)
        after = before.clone()
        after[1, 10, 2] = torch.nan
        _expect(_answer(solution, before, after, mask), False, "a logit became NaN", cause)
        for infinity in (torch.inf, -torch.inf):
            after[1, 10, 2] = infinity
            huge = "an infinite logit is near no number: do not replace it, nor measure by the largest |after|"
            _expect(_answer(solution, before, after, mask), False, f"a logit became {infinity}", huge)
        after[mask.bool()] = torch.nan
        _expect(_answer(solution, before, after, mask), False, "all logits became NaN", cause)


@same_logits.property("tested")
def same_logits_tested(solution):
    few = "with at most index_topk tokens each key is kept, whatever the indexer says: that shows nothing, so None"
    for seed in (1, 2):
        for lengths, wanted in (((8, 5), None), ((9, 5), True), ((5, 9, 2), True), ((3, 3), None)):
            before, mask = _batch(seed, lengths)
            case = f"sequences of {', '.join(map(str, lengths))} tokens, index_topk {K}"
            cause = few if wanted is None else "one sequence with more than index_topk tokens is a test"
            _expect(_answer(solution, before, before.clone(), mask), wanted, case, cause)
        before, mask = _batch(seed, (5, 13))
        mask[1, :6] = 0  # 7 tokens in 13 places
        _expect(_answer(solution, before, before.clone(), mask), None, "7 tokens and 6 of padding, index_topk 8", few)


@functools.cache
def _trained(k):
    """The trained model's logits [80, 256] on the beginning of a text, with k keys."""
    tokens = torch.tensor(list(pathlib.Path(contextlib.__file__).read_bytes()[:80]))
    with torch.no_grad():
        return load_small_model(index_topk=k)(tokens)
