"""Notebook 10, all but its kernel. The names say what is wrong."""

import numpy as np
import torch

import dsa_ref
from dsa_course.gpu_selection.thresholds import group_maxima, kth_by_digits, ordered_bits
from dsa_course.gpu_selection.thresholds import lower_bound as bound

from . import wrong

INF = torch.inf


# ------------------------------------------------------------------------------------------------------- lower_bound


@wrong("lower_bound", "never above")
def windows_that_overlap(scores, k, group):
    maxima = scores.unfold(0, min(group, len(scores)), 1).amax(dim=1)
    return maxima.topk(k).values[-1] if k <= len(maxima) else -INF


@wrong("lower_bound", "never above")
def k_counted_from_zero(scores, k, group):
    maxima = group_maxima(scores, group)
    return maxima.topk(max(1, k - 1)).values[-1] if k <= len(maxima) else -INF


@wrong("lower_bound", "never above")
def the_best_of_the_groups(scores, k, group):
    return group_maxima(scores, group).max()


@wrong("lower_bound", "tight")
def the_kth_smallest(scores, k, group):
    maxima = group_maxima(scores, group).sort().values
    return maxima[k - 1] if k <= len(maxima) else -INF


@wrong("lower_bound", "tight")
def means_of_groups(scores, k, group):
    filled = torch.nn.functional.pad(scores, (0, -len(scores) % group), value=-INF)
    means = filled.view(-1, group).mean(dim=1)
    return means.topk(k).values[-1] if k <= len(means) else -INF


@wrong("lower_bound", "tight")
def minima_of_groups(scores, k, group):
    filled = torch.nn.functional.pad(scores, (0, -len(scores) % group), value=-INF)
    minima = filled.view(-1, group).amin(dim=1)
    return minima.topk(k).values[-1] if k <= len(minima) else -INF


@wrong("lower_bound", "tight")
def always_minus_infinity(scores, k, group):
    return -INF


@wrong("lower_bound", "tight")
def the_smallest_maximum(scores, k, group):
    maxima = group_maxima(scores, group)
    return maxima.min() if k <= len(maxima) else -INF


@wrong("lower_bound", "tight")
def one_k_too_far(scores, k, group):
    maxima = group_maxima(scores, group)
    return maxima.topk(min(k + 1, len(maxima))).values[-1] if k <= len(maxima) else -INF


@wrong("lower_bound", "tight")
def groups_spread_out(scores, k, group):
    return bound(scores, k, group, "spread out")


@wrong("lower_bound", "tight")
def the_kth_score_itself(scores, k, group):
    return scores.topk(k).values[-1] if k * group <= len(scores) else -INF


@wrong("lower_bound", "tight")
def a_number_of_groups(scores, k, group):
    maxima = torch.stack([part.max() for part in scores.chunk(group)])
    return maxima.topk(k).values[-1] if k <= len(maxima) else -INF


@wrong("lower_bound", "tight")
def equal_maxima_merged(scores, k, group):
    maxima = group_maxima(scores, group).unique()
    return maxima.topk(k).values[-1] if k <= len(maxima) else -INF


@wrong("lower_bound", "ragged end")
def equal_chunks(scores, k, group):
    maxima = torch.stack([part.max() for part in scores.chunk(-(-len(scores) // group))])
    return maxima.topk(k).values[-1] if k <= len(maxima) else -INF


@wrong("lower_bound", "ragged end")
def filled_with_a_large_negative_number(scores, k, group):
    maxima = torch.nn.functional.pad(scores, (0, -len(scores) % group), value=-1e30).view(-1, group).amax(dim=1)
    return maxima.topk(k).values[-1] if k <= len(maxima) else -INF


@wrong("lower_bound", "ragged end")
def last_group_dropped(scores, k, group):
    whole = len(scores) // group
    if k > whole:
        return -INF
    return scores[: whole * group].view(whole, group).amax(dim=1).topk(k).values[-1]


@wrong("lower_bound", "ragged end")
def filled_with_zeros(scores, k, group):
    filled = torch.nn.functional.pad(scores, (0, -len(scores) % group))
    maxima = filled.view(-1, group).amax(dim=1)
    return maxima.topk(k).values[-1] if k <= len(maxima) else -INF


@wrong("lower_bound", "few groups")
def the_last_maximum_there_is(scores, k, group):
    maxima = group_maxima(scores, group)
    return maxima.topk(min(k, len(maxima))).values[-1]


@wrong("lower_bound", "few groups")
def the_smallest_score(scores, k, group):
    maxima = group_maxima(scores, group)
    return maxima.topk(k).values[-1] if k <= len(maxima) else scores.min()


# ------------------------------------------------------------------------------------------------------ ordered_bits


@wrong("ordered_bits", "positive numbers")
def rounded_to_integers(x):
    return x.to(torch.int64)


@wrong("ordered_bits", "positive numbers")
def tiny_numbers_flushed(x):
    return ordered_bits(torch.where(x.abs() < 1e-30, 0.0, x))


@wrong("ordered_bits", "positive numbers")
def bits_kept_as_floats(x):
    return ordered_bits(x).float()


@wrong("ordered_bits", "positive numbers")
def sixteen_bits(x):
    return ordered_bits(x) >> 16


@wrong("ordered_bits", "negative numbers")
def plain_view(x):
    return torch.where(x == 0, 0.0, x).view(torch.int32)


@wrong("ordered_bits", "negative numbers")
def only_the_sign_bit_flipped(x):
    return (torch.where(x == 0, 0.0, x).view(torch.int32) ^ -(2**31)).long() & 0xFFFFFFFF


@wrong("ordered_bits", "negative numbers")
def sign_dropped(x):
    return x.view(torch.int32) & 0x7FFFFFFF


@wrong("ordered_bits", "both signs")
def unsigned_trick_in_a_signed_type(x):
    bits = torch.where(x == 0, 0.0, x).view(torch.int32)
    return bits ^ ((bits >> 31) | -(2**31))


@wrong("ordered_bits", "both signs")
def negative_ones_flipped_and_no_more(x):
    bits = torch.where(x == 0, 0.0, x).view(torch.int32)
    return torch.where(bits < 0, ~bits, bits)


@wrong("ordered_bits", "zeros")
def minus_zero_below_zero(x):
    bits = x.view(torch.int32).long()
    return torch.where(bits < 0, ~bits, bits + 2**31)


@wrong("ordered_bits", "zeros")
def minus_zero_tested_by_sign(x):
    bits = torch.where(x < 0, 0.0 + x, x).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@wrong("ordered_bits", "number by number")
def ranks(x):
    return x.unique(return_inverse=True)[1]


# -------------------------------------------------------------------------------------------------- threshold_select


def finish(chosen, k):
    """int32 [k], -1 after the last."""
    return torch.nn.functional.pad(chosen, (0, k - len(chosen)), value=-1).to(torch.int32)


def candidates_of(scores, k):
    return (scores >= bound(scores, k)).nonzero().flatten()


@wrong("threshold_select", "largest")
def groups_instead_of_scores(scores, k):
    return finish(group_maxima(scores, 16).topk(min(k, -(-len(scores) // 16))).indices.sort().values, k)


@wrong("threshold_select", "largest")
def candidates_are_the_answer(scores, k):
    return finish(candidates_of(scores, k)[:k], k)


@wrong("threshold_select", "largest")
def places_among_the_candidates(scores, k):
    candidates = candidates_of(scores, k)
    values = scores[candidates]
    return finish(values.topk(min(k, len(values))).indices.sort().values, k)


@wrong("threshold_select", "largest")
def magnitudes(scores, k):
    return finish(scores.abs().topk(min(k, len(scores))).indices.sort().values, k)


@wrong("threshold_select", "largest")
def rounded_to_half_precision(scores, k):
    return dsa_ref.select_topk(scores.half()[None], k)[0]


@wrong("threshold_select", "largest")
def int64_indices(scores, k):
    return dsa_ref.select_topk(scores[None], k)[0].long()


@wrong("threshold_select", "exactly k")
def everything_that_reaches_the_threshold(scores, k):
    threshold = scores.topk(min(k, len(scores))).values[-1]
    chosen = (scores >= threshold).nonzero().flatten()
    return finish(chosen, max(k, len(chosen)))


@wrong("threshold_select", "exactly k")
def the_first_k_that_reach_the_threshold(scores, k):
    threshold = scores.topk(min(k, len(scores))).values[-1]
    return finish((scores >= threshold).nonzero().flatten()[:k], k)


@wrong("threshold_select", "largest")
def ties_at_the_bound_lost(scores, k):
    candidates = (scores > bound(scores, k)).nonzero().flatten()
    values = scores[candidates]
    return finish(candidates[values.topk(min(k, len(values))).indices].sort().values, k)


@wrong("threshold_select", "smallest index")
def last_ties_first(scores, k):
    order = scores.flip(0).sort(descending=True, stable=True).indices[:k]
    return finish((len(scores) - 1 - order).sort().values, k)


@wrong("threshold_select", "smallest index")
def one_tie_too_far_right(scores, k):
    threshold = scores.topk(min(k, len(scores))).values[-1]
    above, equal = scores > threshold, scores == threshold
    late = equal & (equal.flip(0).cumsum(0).flip(0) <= k - above.sum())
    return finish((above | late).nonzero().flatten(), k)


@wrong("threshold_select", "zeros")
def minus_zero_ordered_below(scores, k):
    bits = scores.view(torch.int32).long()
    keys = torch.where(bits < 0, ~bits, bits + 2**31)
    threshold, ties = kth_by_digits(keys, min(k, len(scores)))
    equal = keys == threshold
    return finish(((keys > threshold) | (equal & (equal.cumsum(0) <= ties))).nonzero().flatten(), k)


@wrong("threshold_select", "inputs")
def infinities_replaced_in_the_row(scores, k):
    return dsa_ref.select_topk(scores.clamp_(min=-1e30)[None], k)[0]


@wrong("threshold_select", "minus infinity")
def minus_infinity_never_kept(scores, k):
    chosen = dsa_ref.select_topk(scores[None], k)[0]
    chosen = chosen[chosen >= 0]
    return finish(chosen[scores[chosen.long()] > -INF], k)


@wrong("threshold_select", "short row")
def padded_with_zero(scores, k):
    chosen = dsa_ref.select_topk(scores[None], k)[0]
    return chosen.clamp(min=0)


@wrong("threshold_select", "short row")
def not_padded(scores, k):
    chosen = dsa_ref.select_topk(scores[None], k)[0]
    return chosen[chosen >= 0]


@wrong("threshold_select", "ascending")
def best_first(scores, k):
    return finish(scores.sort(descending=True, stable=True).indices[:k], k)


@wrong("threshold_select", "few sorted")
def pythons_sorted(scores, k):
    row = scores.tolist()
    best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
    return torch.tensor((sorted(best) + [-1] * k)[:k], dtype=torch.int32)


@wrong("threshold_select", "few sorted")
def sorted_in_place(scores, k):
    row = (-scores).numpy()
    falling = row.copy()
    falling.sort()
    n = min(k, len(row))
    equal = row == falling[n - 1]
    kept = (row < falling[n - 1]) | (equal & (equal.cumsum() <= n - (row < falling[n - 1]).sum()))
    return torch.tensor((kept.nonzero()[0].tolist() + [-1] * k)[:k], dtype=torch.int32)


@wrong("threshold_select", "few sorted")
def the_whole_row_sorted(scores, k):
    return finish(scores.sort(descending=True, stable=True).indices[:k].sort().values, k)


@wrong("threshold_select", "few sorted")
def the_whole_row_by_topk(scores, k):
    return dsa_ref.select_topk(scores[None], k)[0]


@wrong("threshold_select", "few sorted")
def the_whole_row_by_numpy(scores, k):
    order = np.argsort(-scores.numpy(), kind="stable")[:k]
    return finish(torch.from_numpy(np.sort(order)), k)
