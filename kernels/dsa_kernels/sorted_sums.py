"""Sums of rows by key without atomics: in the order of a stable sort, so the same bits every time."""

import torch
import triton
import triton.language as tl

from .runtime import INTERPRETED, next_power_of_2


@triton.jit
def _add_rows(rows_ptr, order_ptr, begins_ptr, out_ptr, D, DP: tl.constexpr, BLOCK: tl.constexpr):
    s, d = tl.program_id(0).to(tl.int64), tl.arange(0, DP)
    first, last = tl.load(begins_ptr + s), tl.load(begins_ptr + s + 1)
    total = tl.zeros([BLOCK, DP], tl.float32)
    for i0 in range(first, last, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        row = tl.load(order_ptr + i, i < last, 0)
        total += tl.load(rows_ptr + row[:, None] * D + d[None, :], (i < last)[:, None] & (d < D)[None, :], 0.0)
    out = out_ptr + s * D + d
    tl.store(out, tl.load(out, d < D, 0.0) + tl.sum(total, axis=0), d < D)


def sort_by_key(keys, S):
    """(order, begins) of keys int32 [n]: where the rows of key 0, 1, ... stand, and where in `order` each key's begin.

    Keys outside of [0, S) are left out. order: int64 [n]; begins: int64 [S + 1].
    """
    if S < 2**15:  # fewer digits to sort by
        keys = keys.to(torch.int16)
    keys, order = torch.sort(keys, stable=True)
    begins = torch.searchsorted(keys, torch.arange(S + 1, dtype=keys.dtype, device=keys.device))
    return order, begins


def add_rows(rows, order, begins, out):
    """Add to out, fp32 [S, D], for each key the rows [n, D] that `sort_by_key` lists for it, in that order."""
    S, D = out.shape
    DP = next_power_of_2(D)
    _add_rows[(S,)](rows, order, begins, out, D, DP=DP, BLOCK=256 if INTERPRETED else max(1, 4096 // DP), num_warps=4)
