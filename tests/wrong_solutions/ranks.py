"""Notebook 17: whose rows, whose candidates, which winners. `ranks_sums` has what is merged and summed."""

import numpy as np
import torch

from . import wrong

# ------------------------------------------------------------------------------------------------------------ zigzag


def chunks(T, size, *numbers):
    """The rows of these chunks of 2 · size."""
    return [row for c in numbers for row in range(c * T // (2 * size), (c + 1) * T // (2 * size))]


@wrong("zigzag", "two chunks")
def contiguous(T, size, rank):
    return list(range(rank * T // size, (rank + 1) * T // size))


@wrong("zigzag", "two chunks")
def round_robin(T, size, rank):
    return torch.arange(rank, T, size)


@wrong("zigzag", "two chunks")
def the_first_chunk_alone(T, size, rank):
    return chunks(T, size, rank)


@wrong("zigzag", "two chunks")
def the_next_chunk_instead_of_the_mirrored(T, size, rank):
    return chunks(T, size, rank, rank + size)


@wrong("zigzag", "two chunks")
def the_later_chunk_first(T, size, rank):
    return chunks(T, size, 2 * size - 1 - rank, rank)


@wrong("zigzag", "two chunks")
def mirrored_one_too_far(T, size, rank):
    return chunks(T, size, rank, 2 * size - rank)


@wrong("zigzag", "two chunks")
def no_return(T, size, rank):
    chunks(T, size, rank, 2 * size - 1 - rank)


@wrong("zigzag", "rows that do not divide")
def the_rest_left_out(T, size, rank):
    n = T // (2 * size)
    return [row for c in (rank, 2 * size - 1 - rank) for row in range(c * n, (c + 1) * n)]


@wrong("zigzag", "rows that do not divide")
def the_rest_to_the_last_chunk(T, size, rank):
    n, last = T // (2 * size), 2 * size - 1
    return [row for c in (rank, last - rank) for row in range(c * n, T if c == last else (c + 1) * n)]


@wrong("zigzag", "rows that do not divide")
def chunks_rounded_up(T, size, rank):
    n = -(-T // (2 * size))
    return [row for c in (rank, 2 * size - 1 - rank) for row in range(min(T, c * n), min(T, (c + 1) * n))]


@wrong("zigzag", "fewer rows than chunks")
def a_chunk_is_never_empty(T, size, rank):
    pieces = [chunks(T, size, c) or [min(c, T - 1)] for c in (rank, 2 * size - 1 - rank)]
    return pieces[0] + pieces[1]


@wrong("zigzag", "fewer rows than chunks")
def few_rows_stay_with_rank_0(T, size, rank):
    if T < 2 * size:
        return list(range(T)) if rank == 0 else []
    return chunks(T, size, rank, 2 * size - 1 - rank)


@wrong("zigzag", "in whole numbers")
def a_chunk_of_so_many_rows_as_a_float(T, size, rank):
    n = T / (2 * size)
    return [row for c in (rank, 2 * size - 1 - rank) for row in range(int(c * n), int((c + 1) * n))]


@wrong("zigzag", "in whole numbers")
def a_share_of_the_text_as_a_float(T, size, rank):
    cuts = [int(c / (2 * size) * T) for c in range(2 * size + 1)]
    return [row for c in (rank, 2 * size - 1 - rank) for row in range(cuts[c], cuts[c + 1])]


@wrong("zigzag", "in whole numbers")
def evenly_spaced_floats(T, size, rank):
    cuts = np.linspace(0, T, 2 * size + 1).astype(int)
    return [row for c in (rank, 2 * size - 1 - rank) for row in range(cuts[c], cuts[c + 1])]


# -------------------------------------------------------------------------------------------------------- candidates


def best_rows(scores, k):
    """Rows of the k best, of equal scores the smallest."""
    return scores.argsort(descending=True, stable=True)[:k]


@wrong("candidates", "the k best")
def the_k_lowest(scores, places, k):
    rows = scores.argsort(stable=True)[:k]
    return scores[rows], places[rows]


@wrong("candidates", "the k best")
def everything_sent(scores, places, k):
    return scores, places


@wrong("candidates", "the k best")
def the_last_k(scores, places, k):
    return scores[-k:], places[-k:]


@wrong("candidates", "the k best")
def half_of_k(scores, places, k):
    rows = best_rows(scores, k // 2)
    return scores[rows], places[rows]


@wrong("candidates", "the k best")
def scores_of_all_places_of_some(scores, places, k):
    return scores, places[best_rows(scores, k)]


@wrong("candidates", "the k best")
def scores_stay_in_order(scores, places, k):
    rows = best_rows(scores, k)
    return scores[rows], places[rows.sort().values]


@wrong("candidates", "places in the text")
def local_positions_for_global(scores, places, k):
    rows = best_rows(scores, k)
    return scores[rows], rows


@wrong("candidates", "places in the text")
def counted_from_the_ranks_first_place(scores, places, k):
    rows = best_rows(scores, k)
    return scores[rows], rows + (places[0] if len(places) else 0)


@wrong("candidates", "ties")
def the_largest_place_of_equals(scores, places, k):
    rows = len(scores) - 1 - scores.flip(0).argsort(descending=True, stable=True)[:k]
    return scores[rows], places[rows]


@wrong("candidates", "ties")
def all_that_reach_the_kth_score(scores, places, k):
    if len(scores) <= k:
        return scores, places
    kept = scores >= scores.sort(descending=True).values[k - 1]
    return scores[kept], places[kept]


@wrong("candidates", "ties")
def minus_zero_below_zero(scores, places, k):
    bits = scores.view(torch.int32).long()
    rows = best_rows(torch.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits), k)
    return scores[rows], places[rows]


@wrong("candidates", "ties")
def a_billionth_of_the_place_subtracted_in_fp64(scores, places, k):
    rows = (scores.double() - 1e-9 * places).argsort(descending=True)[:k]
    return scores[rows], places[rows]


@wrong("candidates", "close scores")
def a_millionth_of_the_place_subtracted(scores, places, k):
    rows = best_rows(scores - 1e-6 * places, k)
    return scores[rows], places[rows]


@wrong("candidates", "close scores")
def compared_in_tf32(scores, places, k):
    rows = best_rows(((scores.view(torch.int32) >> 13) << 13).view(torch.float32), k)
    return scores[rows], places[rows]


@wrong("candidates", "a long text")
def places_and_scores_in_one_tensor(scores, places, k):
    together = torch.stack((scores, places))[:, best_rows(scores, k)]
    return together[0], together[1].long()


@wrong("candidates", "few keys")
def filled_up_with_place_0(scores, places, k):
    rows = best_rows(scores, k)
    none = k - len(rows)
    filled = torch.cat((scores[rows], torch.full((none,), -torch.inf)))
    return filled, torch.cat((places[rows], torch.zeros(none, dtype=torch.int64)))


@wrong("candidates", "trained model")
def sixteen_at_most(scores, places, k):
    rows = best_rows(scores, min(k, 16))
    return scores[rows], places[rows]


# ----------------------------------------------------------------------------------------------------------- winners


def in_order(places, k):
    """Ascending, then -1 up to k."""
    kept = sorted(p for p in torch.as_tensor(places).tolist() if p >= 0)
    return torch.tensor(kept + [-1] * (k - len(kept)))


def by_place_first(scores, places):
    """Flat numbers of the candidates, best first, of equal scores the smallest place."""
    flat = places.flatten()
    order = flat.argsort(stable=True)
    return order[scores.flatten()[order].argsort(descending=True, stable=True)]


@wrong("winners", "the k best of all")
def rank_0_alone(scores, places, k):
    return in_order(places[0][:k], k)


@wrong("winners", "the k best of all")
def an_equal_share_of_each(scores, places, k):
    n = k // len(scores)
    kept = [places[r][scores[r].argsort(descending=True, stable=True)[:n]] for r in range(len(scores))]
    return in_order(torch.cat(kept), k)


@wrong("winners", "the k best of all")
def numbers_of_candidates(scores, places, k):
    return by_place_first(scores, places)[:k].sort().values


@wrong("winners", "the k best of all")
def the_smallest_places(scores, places, k):
    return in_order(places.flatten().sort().values[:k], k)


@wrong("winners", "the k best of all")
def all_candidates(scores, places, k):
    return in_order(places.flatten(), places.numel())


@wrong("winners", "ascending")
def best_first(scores, places, k):
    return places.flatten()[by_place_first(scores, places)[:k]]


@wrong("winners", "ascending")
def rank_by_rank(scores, places, k):
    return places.flatten()[by_place_first(scores, places)[:k].sort().values]


@wrong("winners", "ties")
def ties_by_rank(scores, places, k):
    return in_order(places.flatten()[scores.flatten().argsort(descending=True, stable=True)[:k]], k)


@wrong("winners", "ties")
def ties_by_the_last_rank(scores, places, k):
    return ties_by_rank(scores.flip(0), places.flip(0), k)


@wrong("winners", "ties")
def ties_by_the_largest_place(scores, places, k):
    order = places.flatten().argsort(descending=True, stable=True)
    order = order[scores.flatten()[order].argsort(descending=True, stable=True)]
    return in_order(places.flatten()[order[:k]], k)


def by_key(key, places, k):
    """The k best by this key, which is to break ties; as they came where it does not."""
    there = places >= 0
    return in_order(places[there][key[there].argsort(descending=True, stable=True)[:k]], k)


@wrong("winners", "ties")
def a_billionth_of_the_place_subtracted(scores, places, k):
    return by_key(scores - 1e-9 * places, places, k)


@wrong("winners", "ties")
def a_millionth_of_a_millionth_in_fp64(scores, places, k):
    return by_key(scores.double() - 1e-12 * places, places, k)


@wrong("winners", "ties")
def scores_and_places_in_one_number(scores, places, k):
    return by_key(1e9 * scores.double() - places, places, k)


@wrong("winners", "ties")
def a_relative_trifle_in_fp64(scores, places, k):
    scores = scores.double()
    return by_key(scores - 1e-12 * places * scores.abs(), places, k)


@wrong("winners", "close scores")
def rounded_to_a_millionth_of_the_largest(scores, places, k):
    step = 2.0**-20 * scores[scores > -torch.inf].abs().max().clamp(min=1.0)
    coarse = torch.where(scores > -torch.inf, (scores / step).round(), scores)
    return in_order(places.flatten()[by_place_first(coarse, places)[:k]], k)


@wrong("winners", "a long text")
def places_that_went_through_fp32(scores, places, k):
    return in_order(places.float().long().flatten()[by_place_first(scores, places)[:k]], k)


@wrong("winners", "fewer than k")
def ends_where_keys_end(scores, places, k):
    kept = by_place_first(scores, places)
    return places.flatten()[[i for i in kept.tolist() if places.flatten()[i] >= 0][:k]].sort().values


@wrong("winners", "fewer than k")
def minus_one_sorted_to_the_front(scores, places, k):
    return places.flatten()[by_place_first(scores, places)[:k]].sort().values


@wrong("winners", "trained model")
def long_lists_rounded(scores, places, k):
    coarse = scores.round() if k > 32 else scores
    return in_order(places.flatten()[by_place_first(coarse, places)[:k]], k)
