"""What the gradient of sparse attention takes beside its products: delta, and the sum of the rows of each key.

A key's gradient is a sum over all queries that selected it. Added up by atomics, it would depend on who comes first. So
each place of each list has a row of its own; a stable sort of the lists says which places hold a key, and one program
adds up their rows in that order, in fp32.
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


def places_of_keys(lists, S):
    """Which places of the lists [T, k] hold key s: order[bounds[s] : bounds[s + 1]], numbers t · k + j, ascending.

    order int64 [T · k], bounds int32 [S + 1].
    """
    flat = lists.reshape(-1)
    if S <= 1 << 15:
        flat = flat.to(torch.int16)  # half of the sort's rounds
    keys, order = flat.sort(stable=True)  # -1 first
    before = torch.arange(-1, S, dtype=keys.dtype, device=keys.device)
    bounds = torch.searchsorted(keys, before, right=True, out_int32=True)
    return order, bounds


@triton.jit
def _sum_rows(
    rows_ptr, order_ptr, bounds_ptr, kept_ptr, dkv_ptr, D,
    R: tl.constexpr, A: tl.constexpr, B: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """The rows of one key's places, R at a time: A columns and, where B > 0, the rest in B. kept: fp32 [S, D], the sums
    so far unless FIRST, and after unless LAST, when they are rounded to dkv."""
    s, i = tl.program_id(0).to(tl.int64), tl.arange(0, R)
    a, b = tl.arange(0, A), A + tl.arange(0, max(B, 1))
    last = tl.load(bounds_ptr + s + 1)
    of_a, of_b = tl.zeros([R, A], tl.float32), tl.zeros([R, max(B, 1)], tl.float32)
    for at in range(tl.load(bounds_ptr + s), last, R):
        there = (at + i < last)[:, None]
        row = rows_ptr + tl.load(order_ptr + at + i, at + i < last, 0).to(tl.int64)[:, None] * D
        of_a += tl.load(row + a[None, :], there & (a < D)[None, :], 0.0).to(tl.float32)
        if B > 0:
            of_b += tl.load(row + b[None, :], there & (b < D)[None, :], 0.0).to(tl.float32)
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


def sum_rows(rows, lists, kept, dkv, first, last):
    """Add the rows [T · k, D] to the sums of their keys, see `_sum_rows`. lists: int32 [T, k], the keys."""
    S, D = dkv.shape
    order, bounds = places_of_keys(lists, S)
    A = 1 << (D.bit_length() - 1)
    B = next_power_of_2(D - A)
    R = next_power_of_2(min(len(order), 4096)) if INTERPRETED else max(1, min(8, 4096 // A))
    _sum_rows[(S,)](rows, order, bounds, kept, dkv, D, R=R, A=A, B=B, FIRST=first, LAST=last, num_warps=4)
