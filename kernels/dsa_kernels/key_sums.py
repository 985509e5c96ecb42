"""What gradients over lists of keys take beside their products: delta, and the sum of the rows of each key.

A key's gradient is a sum over all queries that selected it. Added up by atomics, it would depend on who comes first. So
each place of each list has a row of its own, the places that hold a key are listed in ascending order, and one program
adds up their rows in that order, in fp32.

`places_of_keys` is a counting sort. A list of 32 bits for each key and 32 queries says who selected it. What stands
before a place is then the number of smaller keys' places, of this key's in earlier queries, and of bits below. Its time
grows with keys and queries, that of torch's sort with the places: `places_by_sort` serves the indexer's short rows.
"""

import torch
import triton
import triton.language as tl

from .rounding import round_to
from .runtime import INTERPRETED, cdiv, next_power_of_2


@triton.jit
def _delta(out_ptr, dout_ptr, dlse_ptr, delta_ptr, n, V, R: tl.constexpr, VP: tl.constexpr, HAS_DLSE: tl.constexpr):
    """What the softmax's gradient subtracts, of R rows and heads at a time."""
    r = tl.program_id(0) * R + tl.arange(0, R)
    v = tl.arange(0, VP)
    place, mask = r.to(tl.int64)[:, None] * V + v[None, :], (r < n)[:, None] & (v < V)[None, :]
    out = tl.load(out_ptr + place, mask, 0.0).to(tl.float32)
    delta = tl.sum(out * tl.load(dout_ptr + place, mask, 0.0).to(tl.float32), axis=1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + r, r < n, 0.0)
    tl.store(delta_ptr + r, delta, r < n)


def deltas(out, dout, dlse):
    """fp32 [T, H]: the sum of out · dout over the value, less dlse. Contiguous arguments; dlse may be None."""
    T, H, V = out.shape
    delta = torch.empty(T, H, dtype=torch.float32, device=out.device)
    VP = next_power_of_2(V)
    R = next_power_of_2(T * H) if INTERPRETED else max(1, min(8, 4096 // VP))
    _delta[(cdiv(T * H, R),)](
        out, dout, delta if dlse is None else dlse, delta, T * H, V, R=R, VP=VP, HAS_DLSE=dlse is not None, num_warps=4
    )
    return delta


@triton.jit
def _popcount(x):
    """How many of an int32's bits are set. The interpreter has no instruction for it."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + ((x >> 4) & 0x0F0F0F0F)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0x3F


@triton.jit
def _mark(lists_ptr, marks_ptr, n, k, S, BLOCK: tl.constexpr):
    """Set bit t % 32 of marks[t // 32, s] for each s in list t."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s, t = tl.load(lists_ptr + i, i < n, -1), i // k
    tl.atomic_or(marks_ptr + (t // 32).to(tl.int64) * S + s, 1 << (t % 32), s >= 0, sem="relaxed")


@triton.jit
def _count(marks_ptr, before_ptr, totals_ptr, groups, S, BLOCK: tl.constexpr):
    """before[group, s]: the bits of s in the groups before; totals[s]: in all."""
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for group in range(groups):
        place = tl.cast(group, tl.int64) * S + s
        tl.store(before_ptr + place, total, s < S)
        total += _popcount(tl.load(marks_ptr + place, s < S, 0))
    tl.store(totals_ptr + s, total, s < S)


@triton.jit
def _place(lists_ptr, marks_ptr, before_ptr, bounds_ptr, order_ptr, n, k, S, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s, t = tl.load(lists_ptr + i, i < n, -1), i // k
    there, place = s >= 0, (t // 32).to(tl.int64) * S + s
    earlier = tl.load(marks_ptr + place, there, 0) & ((1 << (t % 32)) - 1)
    before = tl.load(bounds_ptr + s, there, 0) + tl.load(before_ptr + place, there, 0) + _popcount(earlier)
    tl.store(order_ptr + before, i, there)


def places_of_keys(lists, S):
    """Which places of the lists [T, k] hold key s: order[bounds[s] : bounds[s + 1]], numbers t · k + j, ascending.

    order int32 [T · k], of which as many are used as the lists have keys; bounds int32 [S + 1].
    """
    (T, k), groups = lists.shape, cdiv(len(lists), 32)
    new = {"dtype": torch.int32, "device": lists.device}
    marks, before, bounds = torch.zeros(groups, S, **new), torch.empty(groups, S, **new), torch.zeros(S + 1, **new)
    totals, order = torch.empty(S, **new), torch.empty(T * k, **new)
    block, keys = (65536, next_power_of_2(S)) if INTERPRETED else (1024, 128)
    many = cdiv(T * k, block)
    _mark[(many,)](lists, marks, T * k, k, S, BLOCK=block)
    _count[(cdiv(S, keys),)](marks, before, totals, groups, S, BLOCK=keys)
    torch.cumsum(totals, dim=0, dtype=torch.int32, out=bounds[1:])
    _place[(many,)](lists, marks, before, bounds, order, T * k, k, S, BLOCK=block)
    return order, bounds


def places_by_sort(lists, S):
    """As `places_of_keys`, both int64, by a stable sort."""
    keys = lists.flatten()
    if S < 2**15:  # fewer digits to sort by
        keys = keys.to(torch.int16)
    keys, order = torch.sort(keys, stable=True)  # -1, which is no key, comes first
    return order, torch.searchsorted(keys, torch.arange(S + 1, dtype=keys.dtype, device=keys.device))


@triton.jit
def _sum_rows(
    rows_ptr, order_ptr, bounds_ptr, kept_ptr, dkv_ptr,
    D: tl.constexpr, R: tl.constexpr, A: tl.constexpr, B: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """The rows of one key's places, R at a time: A <= D columns and, where B > 0, the rest in B. kept: fp32 [S, D], the
    sums so far unless FIRST, and after unless LAST, when they are rounded to dkv."""
    s, i = tl.program_id(0).to(tl.int64), tl.arange(0, R)
    a, b = tl.arange(0, A), A + tl.arange(0, max(B, 1))
    last = tl.load(bounds_ptr + s + 1)
    of_a, of_b = tl.zeros([R, A], tl.float32), tl.zeros([R, max(B, 1)], tl.float32)
    for at in range(tl.load(bounds_ptr + s), last, R):
        there = (at + i < last)[:, None]
        row = rows_ptr + tl.load(order_ptr + at + i, at + i < last, 0).to(tl.int64)[:, None] * D
        of_a += tl.load(row + a[None, :], there, 0.0).to(tl.float32)
        if B > 0:
            mask = there if A + B == D else there & (b < D)[None, :]
            of_b += tl.load(row + b[None, :], mask, 0.0).to(tl.float32)
    _finish(tl.sum(of_a, axis=0), a, kept_ptr + s * D, dkv_ptr + s * D, D, FIRST, LAST)
    if B > 0:
        _finish(tl.sum(of_b, axis=0), b, kept_ptr + s * D, dkv_ptr + s * D, D, FIRST, LAST)


@triton.jit
def _finish(total, d, kept_ptr, dkv_ptr, D, FIRST: tl.constexpr, LAST: tl.constexpr):
    if not FIRST:
        total += tl.load(kept_ptr + d, d < D, 0.0)
    if LAST:
        tl.store(dkv_ptr + d, round_to(total, dkv_ptr.dtype.element_ty), d < D)
    else:
        tl.store(kept_ptr + d, total, d < D)


def sum_rows(rows, order, bounds, kept, dkv, first, last):
    """Add the rows [T · k, D] to the sums of their keys, see `_sum_rows`. order, bounds: their places."""
    S, D = dkv.shape
    A = 1 << (D.bit_length() - 1)
    B = next_power_of_2(D - A)
    R = next_power_of_2(min(len(order), 4096)) if INTERPRETED else max(1, min(64, 4096 // A))
    _sum_rows[(S,)](rows, order, bounds, kept, dkv, D=D, R=R, A=A, B=B, FIRST=first, LAST=last, num_warps=4)
