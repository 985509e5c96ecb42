"""Notebooks 02 to 12b: what is small is dropped, what is many is cut off, and an edge of the definition is missed.

What a third attack found that the checks once let through. Most are the notebook's solution with a few words changed.
"""

import numpy as np
import torch
from right_solutions.online_softmax import padding_dropped_inside_the_loop as attention

from . import wrong
from ._changed import changed
from .unusual import merged
from .your_own_model import near, tested


def nearly(exercise, property, name, *changes):
    wrong(exercise, property)(changed(exercise, name, *changes))


# ------------------------------------------------------------------------------------------------------- small numbers

nearly("index_scores", "fp32 throughout", "relu_that_cuts_at_1e_3", ("dots.relu()", "dots * (dots > 1e-3)"))
nearly("hadamard", "fp32 throughout", "nearly_0_is_0", ("/ D**0.5", "* (y.abs() > 1e-6) / D**0.5"))
nearly("planted_bug_kernel", "full precision", "tiny_squares_are_0", ("k * k", "tl.where(k * k < 1e-6, 0.0, k * k)"))
nearly("rope", "angles in fp32", "slow_pairs_stand_still", ("float() * freqs", "float() * freqs * (freqs > 1e-4)"))
nearly("scores_from_fp8", "fp32 throughout", "tiny_dots_are_0", (
    "dots.relu()", "(dots * (dots * q_scale[..., None] > 1e-5))"
))  # fmt: skip
nearly("recall", "any shape", "small_weights_left_out", ("weights * selected", "weights * (weights > 1e-5) * selected"))
nearly(
    "log_sum_exp", "value", "small_terms_left_out", ("np.exp(x", "np.exp(np.where(x < m[..., None] - 7, -np.inf, x)")
)
nearly(
    "log_sum_exp",
    "each row's own largest",
    "largest_of_each_matrix",
    ("    m = x.max(axis=-1, initial=-np.inf)", "    m = x.max(axis=(-1, -2)[: max(1, x.ndim - 1)], initial=-np.inf)"),
    ("finite_m = ", "m = np.broadcast_to(m[..., None] if x.ndim > 2 else m, x.shape[:-1])\n    finite_m = "),
)
nearly("online_update", "any order", "small_weights_left_out", ("    l = ", "    p[p < 1e-5] = 0.0\n    l = "))
nearly(
    "online_update", "any order", "forgets_a_small_past", ("    p = ", "    rescale[rescale < 1e-5] = 0.0\n    p = ")
)
nearly("online_update", "empty block", "exponents_above_minus_50", (
    "np.exp(logits - finite_m[:, None])", "np.exp(np.maximum(logits - finite_m[:, None], -50))"
))  # fmt: skip
nearly("online_update", "empty block", "l_is_never_0", ("return new_m, l", "return new_m, np.maximum(l, 1e-12)"))


@wrong("merge_parts", "weights")
def the_larger_part_alone(out_a, lse_a, out_b, lse_b):
    out, lse = merged(out_a, lse_a, out_b, lse_b)
    out = np.where((lse_a - lse_b > 4.5)[:, None], out_a, out)
    return np.where((lse_b - lse_a > 4.5)[:, None], out_b, out), lse


# ---------------------------------------------------------------------------------------------------------- many, large

nearly(
    "row_sum_kernel",
    "all tiles",
    "at_most_32_tiles",
    ("range(0, C, BLOCK)", "range(0, tl.minimum(C, 32 * BLOCK), BLOCK)"),
)
nearly(
    "sparse_attention_kernel",
    "several tiles",
    "at_most_8_tiles",
    ("range(0, k, BK)", "range(0, tl.minimum(k, 8 * BK), BK)"),
)
nearly("ring_waits", "place", "at_most_8_places", ("    place, turn", "    places = min(places, 8)\n    place, turn"))
nearly("programs_that_fit", "registers", "two_warps_at_least", ("(threads * taken)", "(max(64, threads) * taken)"))


@wrong("block_attention", "any block size")
def at_most_64_blocks(q, kv, indices, scale, v_dim, block):
    return attention(q, kv, indices[: 64 * block], scale, v_dim, block)


@wrong("window_selection", "last keys")
def positions_of_16_bits(T, k):
    keys = torch.arange(T).short()[:, None] - torch.arange(k).short()
    return torch.where(keys >= 0, keys, -1).to(torch.int32)


# --------------------------------------------------------------------------------------------------------------- edges

nearly(
    "softmax_scale",
    "m squared",
    "no_yarn_for_small_factors",
    ("    if config.max", "    if config.rope_factor > 4 and config.max"),
)
nearly(
    "read_profile",
    "parts",
    "no_part_without_kernels",
    ("    return found", "    return {p: x for p, x in found.items() if x or p in ('other', 'idle')}"),
)
nearly("paged_scores", "last page", "a_key_of_zeros_is_none", (
    "    result = ", "    scores[(k_idx.float() == 0).all(dim=1)] = -torch.inf\n    result = "
))  # fmt: skip


def comparing(name, property):
    """A wrong same_logits that compares real tokens by `near(before, after, tolerance)`."""

    def collect(is_near):
        def same_logits(before, after, mask, index_topk, tolerance):
            if not tested(mask, index_topk):
                return None
            return bool(is_near(before[mask == 1], after[mask == 1], tolerance).all())

        same_logits.__name__ = name
        wrong("same_logits", property)(same_logits)
        return is_near

    return collect


@comparing("the_largest_with_its_sign", "relative")
def _(before, after, tolerance):
    return (after - before).abs() <= tolerance * before.max()


@comparing("from_the_smallest_to_the_largest", "relative")
def _(before, after, tolerance):
    return (after - before).abs() <= tolerance * (before.max() - before.min())


@comparing("below_the_tolerance", "relative")
def _(before, after, tolerance):
    return (after - before).abs() < tolerance * before.abs().max()


@comparing("allclose_with_its_own_rtol", "relative")
def _(before, after, tolerance):
    return torch.isclose(after, before, atol=float(tolerance * before.abs().max()))


@comparing("measured_by_after", "NaN")
def _(before, after, tolerance):
    return (after - before).abs() <= tolerance * after.abs().max()


@wrong("same_logits", "NaN")
def infinity_counts_as_0(before, after, mask, index_topk, tolerance):
    if not tested(mask, index_topk):
        return None
    difference = torch.nan_to_num(after - before, nan=torch.nan, posinf=0.0, neginf=0.0)
    return near(before, before + difference, mask, tolerance)


@wrong("same_logits", "relative")
def each_sequence_by_its_own_largest(before, after, mask, index_topk, tolerance):
    if not tested(mask, index_topk):
        return None
    return all(near(*one, tolerance) for one in zip(before, after, mask, strict=True))
