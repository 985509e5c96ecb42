"""What gradients over lists of keys take beside their products: delta, and the sum of the rows of each key.

A key's gradient is a sum over all queries that selected it. Added up by atomics, it would depend on who comes first. So
each place of each list has a row of its own, the places that hold a key are listed in ascending order, and one program
adds up their rows in that order, in fp32.

`places_of_keys` is a counting sort. A list of 32 bits for each key and 32 queries says who selected it. What stands
before a place is then the number of smaller keys' places, of this key's in earlier queries, and of bits below. The
indexer's kernels mark and place within themselves (`teach.listed`). Its time grows with keys and queries, that of
torch's sort with the places: `places_by_sort` serves lists that are short beside the number of keys.
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
def mark(marks_ptr, s, t, there, S):
    """Set bit t % 32 of marks[t // 32, s] for each s that is there in list t."""
    tl.atomic_or(marks_ptr + (t // 32).to(tl.int64) * S + s, 1 << (t % 32).to(tl.int32), there, sem="relaxed")


@triton.jit
def slots_of(marks_ptr, before_ptr, bounds_ptr, s, t, there, S):
    """How many places come before that of key s in list t."""
    place = (t // 32).to(tl.int64) * S + s
    earlier = tl.load(marks_ptr + place, there, 0) & ((1 << (t % 32).to(tl.int32)) - 1)
    return tl.load(bounds_ptr + s, there, 0) + tl.load(before_ptr + place, there, 0) + _popcount(earlier)


@triton.jit
def _mark(lists_ptr, marks_ptr, n, k, S, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(lists_ptr + i, i < n, -1)
    mark(marks_ptr, s, i // k, s >= 0, S)


@triton.jit
def _count(marks_ptr, before_ptr, totals_ptr, groups, S, G: tl.constexpr, BLOCK: tl.constexpr):
    """before[group, s]: the bits of s in the groups before; totals[s]: in all."""
    g, s = tl.arange(0, G), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for g0 in range(0, groups, G):
        place = (g0 + g)[:, None].to(tl.int64) * S + s[None, :]
        there = (g0 + g < groups)[:, None] & (s < S)[None, :]
        bits = _popcount(tl.load(marks_ptr + place, there, 0))
        tl.store(before_ptr + place, total[None, :] + tl.cumsum(bits, axis=0) - bits, there)
        total += tl.sum(bits, axis=0)
    tl.store(totals_ptr + s, total, s < S)


@triton.jit
def _place(lists_ptr, marks_ptr, before_ptr, bounds_ptr, order_ptr, n, k, S, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(lists_ptr + i, i < n, -1)
    slots = slots_of(marks_ptr, before_ptr, bounds_ptr, s, i // k, s >= 0, S)
    tl.store(order_ptr + slots, i, s >= 0)


def no_marks(T, S, device):
    """int32 zeros for the bits of T lists of S keys."""
    return torch.zeros(cdiv(T, 32), S, dtype=torch.int32, device=device)


def count_marks(marks):
    """(before, bounds) for `slots_of`: bounds int32 [S + 1] says where each key's places begin, then how many are."""
    groups, S = marks.shape
    before, totals, bounds = torch.empty_like(marks), marks.new_empty(S), marks.new_zeros(S + 1)
    G, keys = (next_power_of_2(n) for n in (groups, S)) if INTERPRETED else (64, 32)
    _count[(cdiv(S, keys),)](marks, before, totals, groups, S, G=G, BLOCK=keys)
    torch.cumsum(totals, dim=0, dtype=torch.int32, out=bounds[1:])
    return before, bounds


def places_of_keys(lists, S):
    """Which places of the lists [T, k] hold key s: order[bounds[s] : bounds[s + 1]], numbers t · k + j, ascending.

    order int32 [T · k], of which as many are used as the lists have keys; bounds int32 [S + 1].
    """
    T, k = lists.shape
    marks, order = no_marks(T, S, lists.device), torch.empty(T * k, dtype=torch.int32, device=lists.device)
    block = 65536 if INTERPRETED else 1024
    many = cdiv(T * k, block)
    _mark[(many,)](lists, marks, T * k, k, S, BLOCK=block)
    before, bounds = count_marks(marks)
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
    ORDERED: tl.constexpr,
):  # fmt: skip
    """The rows of one key's places, R at a time: A <= D columns and, where B > 0, the rest in B. kept: fp32 [S, D], the
    sums so far unless FIRST, and after unless LAST, when they are rounded to dkv. ORDERED: order is to be looked at."""
    s, i = tl.program_id(0).to(tl.int64), tl.arange(0, R)
    a, b = tl.arange(0, A), A + tl.arange(0, max(B, 1))
    last = tl.load(bounds_ptr + s + 1)
    of_a, of_b = tl.zeros([R, A], tl.float32), tl.zeros([R, max(B, 1)], tl.float32)
    for at in range(tl.load(bounds_ptr + s), last, R):
        there = (at + i < last)[:, None]
        place = tl.load(order_ptr + at + i, at + i < last, 0) if ORDERED else at + i
        row = rows_ptr + place.to(tl.int64)[:, None] * D
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
    """Add the rows [T · k, D] to the sums of their keys, see `_sum_rows`. order, bounds: their places; order is None
    where the rows lie in that order already."""
    S, D = dkv.shape
    A = 1 << (D.bit_length() - 1)
    B = next_power_of_2(D - A)
    R = next_power_of_2(min(len(rows), 4096)) if INTERPRETED else max(1, min(64, 4096 // A))
    _sum_rows[(S,)](
        rows, bounds if order is None else order, bounds, kept, dkv,
        D=D, R=R, A=A, B=B, FIRST=first, LAST=last, ORDERED=order is not None, num_warps=4,
    )  # fmt: skip
