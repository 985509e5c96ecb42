"""Bound, scan and choice of a row in one program, with one list in order. What GPUs run for k from 2049 to 8192.

Schedule: a program a row.
1. A sample, runs of eight neighbours, gives a bound midway, as ratios go, between k and the list's CAP entries.
2. One read of the row in blocks of BLOCK scores. What is not below the bound goes to the row's list; a prefix sum a
   block gives each its place, so the list is in the order of the keys.
3. The list comes back into registers, and the k largest of it are found exactly.

Bytes: 4 * S a row and the sample's, read once; 8 written and read for each entry, which stay in L2. A row whose list
holds fewer than k scores, or more than CAP reached the bound, is flagged.
"""

import torch
import triton
import triton.language as tl

from ..runtime import next_power_of_2
from .bound import LONG, bound_of_sample, sampled_place
from .ordering import keep_largest

LARGEST_SAMPLED_K = 8192  # a list of twice as many must fit into a program's registers


@triton.jit
def select_row(
    row, start, n, k, values, places, out_ptr, nan_ptr, redo_ptr,
    SAMPLE: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the keys of the k largest of the n scores at `row`, of which the first is key `start`'s; or flag the row.

    values, places: memory for a list of CAP.
    """
    wanted = tl.maximum(tl.minimum(k, n), 0)

    # A bound that some more than k scores of the row should reach, from evenly spread runs of eight neighbours.
    bound = tl.full([], float("-inf"), tl.float32)
    if n > CAP:
        j = tl.arange(0, SAMPLE)
        place = sampled_place(j, n, SAMPLE, 8)
        sample = tl.load(row + place, place < n, float("-inf")).to(tl.float32)
        rank = (tl.sqrt(1.0 * k * CAP) * SAMPLE / n).to(tl.int32) + 1  # midway, as ratios go, between k and CAP
        bound = bound_of_sample(sample, j >= 0, rank)

    # One read of the row: whatever is not below the bound (NaN is not) goes to this row's list, in order.
    count = tl.zeros([], tl.int32)
    for s0 in range(0, n, BLOCK):
        s = s0 + tl.arange(0, BLOCK)
        x = tl.load(row + s, s < n, float("-inf")).to(tl.float32)
        kept = ((x >= bound) | (x != x)) & (s < n)
        place = count + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(values + place, x, kept & (place < CAP))
        tl.store(places + place, s, kept & (place < CAP))
        count += tl.sum(kept.to(tl.int32), axis=0)
    redo = (count < wanted) | (count > CAP)
    tl.store(redo_ptr, redo.to(tl.int32))

    # The exact threshold among the list, and the ties in the order of their index.
    if redo == 0:
        tl.debug_barrier()  # a thread reads entries that others have written
        c = tl.arange(0, CAP)
        x = tl.load(values + c, c < count, 0.0)
        s = tl.load(places + c, c < count, 0)
        keep_largest(x, s, c < count, wanted, k, start, out_ptr, nan_ptr)


@triton.jit
def _select_sampled(
    scores_ptr, start_ptr, end_ptr, out_ptr, nan_ptr, redo_ptr, value_ptr, index_ptr, S, k,
    SAMPLE: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    start, end = tl.load(start_ptr + t), tl.load(end_ptr + t)
    select_row(
        scores_ptr + t * S + start, start, end - start, k, value_ptr + t * CAP, index_ptr + t * CAP, out_ptr + t * k,
        nan_ptr + t, redo_ptr + t, SAMPLE, CAP, BLOCK,
    )  # fmt: skip


def sizes(S, k):
    """(SAMPLE, CAP, warps) for rows of S scores."""
    sample, least = (32768, 16384) if S > LONG else (8192, 4096)
    cap = max(least, 2 * next_power_of_2(k))
    return sample, cap, 4 if cap == 4096 else 16


def launch(scores, k, start, end, out, nan, redo):
    """Write the selection to out, int32 [T, k], but for the rows it flags; nan and redo, int32 [T], say which.

    All tensors are contiguous; T > 0 and k <= LARGEST_SAMPLED_K. nan of a flagged row stays as it was.
    """
    T, S = scores.shape
    sample, cap, warps = sizes(S, k)
    values = torch.empty(T, cap, dtype=torch.float32, device=scores.device)
    indices = torch.empty(T, cap, dtype=torch.int32, device=scores.device)
    _select_sampled[(T,)](
        scores, start, end, out, nan, redo, values, indices, S, k,
        SAMPLE=sample, CAP=cap, BLOCK=2048, num_warps=warps,
    )  # fmt: skip
