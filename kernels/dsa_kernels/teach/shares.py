"""dk_idx of the sparse stage: what each place of the lists gave to its key, added up without atomics.

A stable sort lists the places of each key in ascending order, and one program adds up their rows in it. The counting
sort of `key_sums` takes fewer bytes, and was the slower one here: a row of 128 or fewer dims is soon added.
"""

import torch
import triton
import triton.language as tl

from ..runtime import INTERPRETED, next_power_of_2


@triton.jit
def _add_shares(shares_ptr, order_ptr, bounds_ptr, out_ptr, D, DP: tl.constexpr, BLOCK: tl.constexpr):
    s, d = tl.program_id(0).to(tl.int64), tl.arange(0, DP)
    first, last = tl.load(bounds_ptr + s), tl.load(bounds_ptr + s + 1)
    total = tl.zeros([BLOCK, DP], tl.float32)
    for i0 in range(first, last, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        row = tl.load(order_ptr + i, i < last, 0).to(tl.int64)
        total += tl.load(shares_ptr + row[:, None] * D + d[None, :], (i < last)[:, None] & (d < D)[None, :], 0.0)
    out = out_ptr + s * D + d
    tl.store(out, tl.load(out, d < D, 0.0) + tl.sum(total, axis=0), d < D)


def places_of_keys(lists, S):
    """Which places of the lists [T, k] hold key s: order[bounds[s] : bounds[s + 1]], numbers t · k + j, ascending."""
    keys = lists.flatten()
    if S < 2**15:  # fewer digits to sort by
        keys = keys.to(torch.int16)
    keys, order = torch.sort(keys, stable=True)  # -1, which is no key, comes first
    return order, torch.searchsorted(keys, torch.arange(S + 1, dtype=keys.dtype, device=keys.device))


def add_shares(shares, lists, out):
    """Add the rows of shares [T · k, D] to out, fp32 [S, D], by the keys in lists, int32 [T, k]; -1 for none."""
    S, D = out.shape
    order, bounds = places_of_keys(lists, S)
    DP = next_power_of_2(D)
    block = 256 if INTERPRETED else max(1, 4096 // DP)
    _add_shares[(S,)](shares, order, bounds, out, D, DP=DP, BLOCK=block, num_warps=4)
