"""Notebook 17: a rank's rows, its candidates, and the winners of all. `check_sums` has attention and the gradient."""

import numpy as np
import torch

from dsa_ref.parallel import Zigzag

from ..checking import Check, expect, expect_int, expect_number, expect_shape, normal, tensor, whole
from .lesson import TEXT, read_alone, select_among

zigzag = Check("zigzag")  # (T, size, rank) -> the rank's rows
candidates = Check("candidates")  # (scores, places, k) -> (scores, places) of the best
winners = Check("winners")  # (scores, places, k) -> the k best places


def expect_pair(got, names):
    expect(
        isinstance(got, (tuple, list)) and len(got) == 2,
        f"got {type(got).__name__}, expected the pair ({names})",
        f"return {names}",
    )
    return got


def places_of(got, count=None, name="places") -> list[int]:
    """`got`, a vector or a list of whole numbers, as ints; of `count` of them where that is given."""
    if isinstance(got, (list, tuple, range)):
        found = [expect_int(place, f"{name}: entry {i} of the list") for i, place in enumerate(got)]
        got = torch.tensor(found, dtype=torch.int64)
    got = tensor(got, name)
    expect_shape(got, [got.numel() if count is None else count], name=name)
    whole_numbers = not got.dtype.is_floating_point and got.dtype != torch.bool
    expect(whole_numbers, f"{name}: got {str(got.dtype).removeprefix('torch.')}, expected ints", "places are ints")
    return got.tolist()


def best_of(scores, places, k) -> list[int]:
    """The contract, one key at a time: the k highest scores, of equal ones the smallest place; ascending places."""
    pairs = [(-score, place) for score, place in zip(scores, places, strict=True) if place >= 0]
    return sorted(place for _, place in sorted(pairs)[:k])


FAR = 3 * 2**23 + 1  # a place in a text of 25M tokens that fp32 does not have
LONG = "fp32 has whole numbers up to 2^24 only: places stay ints, also where they travel with scores"
CLOSE = (
    "scores that differ by little are no tie: nothing that is subtracted, or rounded away, is small enough; sort by "
    "score, and by place among equal ones"
)


def close(n):
    """Scores that differ by little: tiny ones, with ties; then the last bit of numbers around 1, in another order."""
    yield 2.0**-60 * whole(n, seed=31, largest=9)
    yield 2.0**-30 * whole(n, seed=32, largest=9)
    last_bits = torch.from_numpy(np.random.default_rng(33).permutation(n))
    yield (torch.ones(n).view(torch.int32) + last_bits).to(torch.int32).view(torch.float32)


def signed_zeros(scores):
    """The scores that are below 0, and zeros for the others, of both signs, as weights of relus make them."""
    scores = scores.clamp(max=0.0)
    return scores.index_fill(0, (scores == 0).nonzero()[::2, 0], -0.0)


# ------------------------------------------------------------------------------------------------------------ zigzag


def _expect_rows(solution, T, size, cause):
    for rank in range(size):
        got, expected = places_of(solution(T, size, rank), name="rows"), Zigzag(T, size).rows(rank).tolist()
        if got == expected:
            continue
        first, last = Zigzag(T, size).chunks(rank)
        suspects = {
            "those are contiguous shares: the last rank scores the most pairs": (
                list(range(rank * T // size, (rank + 1) * T // size))
            ),
            "those are every size-th row: balanced too, but in T / size pieces": list(range(rank, T, size)),
            "the second chunk is missing: each rank has two": list(first),
            "ascending: the earlier chunk first": [*last, *first],
        }
        near = [why for why, wrong in suspects.items() if wrong == got]
        shown = f"{got[:8]}{'...' if len(got) > 8 else ''}"
        expect(
            False, f"T={T}, size={size}, rank {rank}: got {shown}, expected {expected[:8]}", near[0] if near else cause
        )


@zigzag.property("two chunks")
def zigzag_two_chunks(solution):
    for T, size in ((8, 2), (24, 3), (64, 4), (6, 1)):
        _expect_rows(solution, T, size, "of 2 · size equal chunks, rank r has number r and number 2 · size - 1 - r")


@zigzag.property("rows that do not divide")
def zigzag_rows_that_do_not_divide(solution):
    for T, size in ((10, 2), (17, 3), (257, 4), (7, 1)):
        _expect_rows(solution, T, size, "chunk c is rows c·T // (2·size) to (c+1)·T // (2·size): multiply, then divide")


@zigzag.property("fewer rows than chunks")
def zigzag_fewer_rows_than_chunks(solution):
    for T, size in ((1, 2), (3, 4), (5, 3)):
        _expect_rows(solution, T, size, "a chunk may be empty, and so may a rank")


@zigzag.property("in whole numbers")
def zigzag_in_whole_numbers(solution):
    for T, size in ((122, 7), (164, 10), (22, 11)):  # where floats fall just below a whole number
        _expect_rows(
            solution, T, size, "a float may fall just below a whole number: compute with ints, // in place of /"
        )


# -------------------------------------------------------------------------------------------------------- candidates


def scores_of(got) -> torch.Tensor:
    """`got`, a vector or a list of numbers, as a tensor."""
    if isinstance(got, (list, tuple)):
        found = [expect_number(score, f"scores: entry {i} of the list") for i, score in enumerate(got)]
        return torch.tensor(found, dtype=torch.float64)
    return tensor(got, "scores")


def _expect_candidates(solution, scores, places, k, cause):
    got = expect_pair(solution(scores, places, k), "scores, places")
    expected = best_of(scores.tolist(), places.tolist(), k)
    got_scores, got_places = scores_of(got[0]), places_of(got[1])
    rows = [places.tolist().index(s) for s in expected]
    what = f"{len(scores)} keys at {places.tolist()[:6]}..., k={k}: places"
    if sorted(got_places) != expected:
        suspects = {
            "those are numbers of rows on this rank: places[rows] are places in the text": rows,
            "more than k: no rank can bring more than k of the k best": sorted(places.tolist()),
        }
        near = [why for why, wrong in suspects.items() if sorted(got_places) == wrong]
        expect(False, f"{what}: got {sorted(got_places)}, expected {expected}", near[0] if near else cause)
    expect_shape(got_scores, [len(expected)], name="scores")
    of = dict(zip(places.tolist(), scores.tolist(), strict=True))
    for score, place in zip(got_scores.tolist(), got_places, strict=True):
        expect(
            score == of[place], f"place {place}: got score {score}, expected {of[place]}", "a score goes with its place"
        )


@candidates.property("the k best")
def candidates_the_k_best(solution):
    for n, k, seed in ((12, 3, 1), (40, 16, 2), (5, 5, 3)):  # of the text's beginning: a row's number is its place
        cause = "the k highest scores of this rank"
        _expect_candidates(solution, normal(n, seed=seed), torch.arange(n), k, cause)


@candidates.property("places in the text")
def candidates_places_in_the_text(solution):
    for T, size, k, seed in ((24, 2, 4, 4), (51, 3, 7, 5)):
        for rank in range(size):
            own = Zigzag(T, size).rows(rank)
            cause = "row i of this rank is the key at places[i]"
            _expect_candidates(solution, normal(len(own), seed=seed + rank), own, k, cause)


@candidates.property("ties")
def candidates_ties(solution):
    for T, size, k, seed in ((40, 2, 7, 6), (66, 3, 10, 7)):
        for rank in range(size):
            own = Zigzag(T, size).rows(rank)
            cause = "of equal scores the smallest place is kept: the others may be needed by nobody"
            scores = whole(len(own), seed=seed + rank, largest=2)
            for given in (scores, 2.0**60 * scores, signed_zeros(scores)):
                _expect_candidates(solution, given, own, k, cause)


@candidates.property("close scores")
def candidates_close_scores(solution):
    for case, scores in enumerate(close(45)):
        own = Zigzag(90, 2).rows(case % 2)
        _expect_candidates(solution, scores, own, 9, CLOSE)


@candidates.property("a long text")
def candidates_a_long_text(solution):
    for n, k, seed in ((20, 6, 21), (9, 4, 22)):
        _expect_candidates(solution, normal(n, seed=seed), FAR + torch.arange(n), k, LONG)


@candidates.property("few keys")
def candidates_few_keys(solution):
    for n, k in ((3, 8), (1, 2), (0, 4)):
        cause = "a rank with fewer than k keys brings all that it has, and may have none"
        _expect_candidates(solution, normal(n, seed=8 + n), 5 + 3 * torch.arange(n), k, cause)


@candidates.property("trained model")
def candidates_trained_model(solution):
    for layer, rank in ((0, 1), (2, 0)):
        own = Zigzag(len(TEXT), 2).rows(rank)
        places, scores = select_among(read_alone()[layer], len(TEXT) - 1, own, len(own))
        _expect_candidates(solution, scores, places, 64, f"layer {layer}, rank {rank} of 2: the 64 best of its keys")


# ----------------------------------------------------------------------------------------------------------- winners


def brought(scores, shares, k):
    """(scores [N, k], places [N, k]) as ranks bring them, best first or not, -inf and -1 where a rank has no more."""
    all_scores, all_places = torch.full((len(shares), k), -torch.inf), torch.full((len(shares), k), -1)
    for rank, own in enumerate(shares):
        best = torch.tensor(best_of(scores[own].tolist(), own.tolist(), k), dtype=torch.int64)
        all_scores[rank, : len(best)], all_places[rank, : len(best)] = scores[best], best
    return all_scores, all_places


def _expect_winners(solution, scores, shares, k, cause, ordered=True, first=0):
    """scores: of the keys from place `first` on; shares: each rank's, counted from there."""
    scores_brought, places = brought(scores, shares, k)
    given = scores_brought, torch.where(places < 0, places, places + first)
    got = places_of(solution(*given, k), k, "winners")
    expected = best_of(scores.tolist(), range(first, first + len(scores)), k)
    expected += [-1] * (k - len(expected))
    if got == expected or (not ordered and sorted(got) == sorted(expected)):
        return
    flat = given[0].flatten().argsort(descending=True, stable=True)[:k]
    suspects = {
        "of equal scores the one that came first was kept: the smallest place counts, whichever rank brought it": (
            given[1].flatten()[flat].tolist()
        ),
        "those are numbers of candidates, not places in the text": flat.tolist(),
    }
    near = [why for why, wrong in suspects.items() if sorted(wrong) == sorted(got)]
    if sorted(got) == sorted(expected):
        near = ["the right places in another order: ascending, then -1"]
    what = f"{len(shares)} ranks, k={k}: got {got[:12]}, expected {expected[:12]}"
    expect(False, what, near[0] if near else cause)


def _shares(T, size):
    return [Zigzag(T, size).rows(rank) for rank in range(size)]


@winners.property("the k best of all")
def winners_the_k_best_of_all(solution):
    for T, size, k, seed in ((24, 2, 4, 1), (90, 3, 16, 2), (40, 4, 8, 3)):
        cause = "the k highest scores among the candidates of all ranks, not some of each"
        _expect_winners(solution, normal(T, seed=seed), _shares(T, size), k, cause, ordered=False)
    few = torch.cat((torch.arange(12.0), torch.arange(50.0, 62)))  # all of the best are with rank 0, or with rank 1
    for shares in ([torch.arange(12, 24), torch.arange(12)], [torch.arange(12), torch.arange(12, 24)]):
        cause = "all of the best may come from one rank"
        _expect_winners(solution, few, shares, 6, cause, ordered=False)


@winners.property("ascending")
def winners_ascending(solution):
    for T, size, k, seed in ((24, 2, 4, 4), (60, 3, 9, 5)):
        _expect_winners(solution, normal(T, seed=seed), _shares(T, size), k, "places in ascending order")


@winners.property("ties")
def winners_ties(solution):
    for T, size, k, seed in ((8, 2, 3, 6), (40, 2, 7, 7), (66, 3, 10, 8), (64, 4, 12, 9)):
        cause = "of equal scores the smallest place is kept, as one rank alone would"
        scores = whole(T, seed=seed, largest=2)
        for given in (scores, 2.0**60 * scores, signed_zeros(scores)):
            _expect_winners(solution, given, _shares(T, size), k, cause)


@winners.property("close scores")
def winners_close_scores(solution):
    for scores in close(60):
        _expect_winners(solution, scores, _shares(60, 3), 9, CLOSE)


@winners.property("a long text")
def winners_a_long_text(solution):
    for T, size, k, seed in ((40, 2, 9, 11), (24, 3, 5, 12)):
        _expect_winners(solution, normal(T, seed=seed), _shares(T, size), k, LONG, first=FAR)


@winners.property("fewer than k")
def winners_fewer_than_k(solution):
    for T, size, k in ((5, 2, 8), (3, 4, 4), (1, 3, 2)):
        cause = "a place of -1 is no key: it never wins, and stands at the end where fewer than k keys are there"
        _expect_winners(solution, normal(T, seed=10 + T), _shares(T, size), k, cause)


@winners.property("trained model")
def winners_trained_model(solution):
    every = torch.arange(len(TEXT))
    for layer, size in ((1, 2), (3, 4)):
        _, scores = select_among(read_alone()[layer], len(TEXT) - 1, every, len(TEXT))
        cause = f"layer {layer}, the last byte's query: what one rank alone selects"
        _expect_winners(solution, scores, _shares(len(TEXT), size), 64, cause)
