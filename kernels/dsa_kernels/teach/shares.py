"""dk_idx of the sparse stage: what each place of the lists gave to its key, added up without atomics.

`key_sums.places_of_keys` lists the places of a key in ascending order, and one program adds up their rows in it.
"""

import triton
import triton.language as tl

from ..key_sums import places_of_keys
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


def add_shares(shares, lists, out):
    """Add the rows of shares [T · k, D] to out, fp32 [S, D], by the keys in lists, int32 [T, k]; -1 for none."""
    S, D = out.shape
    order, bounds = places_of_keys(lists, S)
    DP = next_power_of_2(D)
    block = 256 if INTERPRETED else max(1, 8192 // DP)
    _add_shares[(S,)](shares, order, bounds, out, D, DP=DP, BLOCK=block, num_warps=4)
