"""The gradient of attention over gathered rows, the same bits each time, in three kernels for some queries at a time.

    query pass   one query and up to 64 of its heads: S, P from the log-sum-exp, dP, dS; dq; P and dS go to memory
    key pass     one query, some of its keys, some columns, all heads: the rows Pᵀ · dout + dSᵀ · q, one a place
    sums         one key: the rows of all places that hold it, in their order, added up in fp32

A key's gradient is a sum over all queries that selected it. Added up by atomics it would depend on who comes first; so
each place of each list writes a row of its own, a stable sort of the lists says which places hold a key, and one
program adds them up in that order. `sums="atomic"` saves the rows' memory and the sort, and gives up the same bits.

The memory of P, dS and rows is bounded by `runtime.GRADIENTS_AT_ONCE`: so many queries go through the three kernels
together, and between one lot and the next the sums are kept in fp32.

Cost at V3.2's sizes: 2 · 128 · (3 · 576 + 2 · 512) FLOPs a selected pair. Of a pair P and dS take 512 bytes, written
once and read five times, and its row 1152, written and read. `hopper/sparse_attention_backward.py` is the faster
variant for these sizes.
"""

import torch
import triton
import triton.language as tl

from dsa_ref.contracts import check_sparse_attention_backward

from . import cards, runtime
from .index_scores import TRITON_NAMES
from .rounding import round_to
from .runtime import FLOATS, INTERPRETED, cdiv, check_runnable, dot_dtype, hopper_variant, next_power_of_2
from .sparse_attention import check_scale_in_base_2, packed


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


@triton.jit
def _query_pass(
    q_ptr, kv_ptr, indices_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, p_ptr, ds_ptr, sums_ptr, scale, H, D, V, k,
    LIST: tl.constexpr, VP: tl.constexpr, RP: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dq of BH heads; P and dS [heads, k] of the places up to the list's last index; P summed over the BH heads."""
    t, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    h, v = block * BH + tl.arange(0, BH), tl.arange(0, VP)
    r = V + tl.arange(0, max(RP, 1))
    mask_v, mask_r = (h < H)[:, None] & (v < V)[None, :], (h < H)[:, None] & (r < D)[None, :]
    row = (t * H + h)[:, None]
    q_v = tl.load(q_ptr + row * D + v[None, :], mask_v, 0.0).to(DOT)
    dout = tl.load(dout_ptr + row * V + v[None, :], mask_v, 0.0).to(DOT)
    lse = tl.load(lse_ptr + t * H + h, h < H, float("-inf"))
    some = (lse != float("-inf"))[:, None]  # else P is 0: a row without keys, and heads beyond H
    lse = lse * 1.4426950408889634
    delta = tl.load(delta_ptr + t * H + h, h < H, 0.0)
    dq_v = tl.zeros([BH, VP], tl.float32)
    if RP > 0:
        q_r = tl.load(q_ptr + row * D + r[None, :], mask_r, 0.0).to(DOT)
        dq_r = tl.zeros([BH, RP], tl.float32)

    used = tl.zeros([], tl.int32)
    for j0 in range(0, k, LIST):
        j = j0 + tl.arange(0, LIST)
        s = tl.load(indices_ptr + t * k + j, j < k, -1)
        used = tl.maximum(used, tl.max(tl.where(s >= 0, j + 1, 0), axis=0))

    for j0 in tl.range(0, used, BK, num_stages=STAGES):
        j = j0 + tl.arange(0, BK)
        s = tl.load(indices_ptr + t * k + j, j < k, -1)
        there = s >= 0
        kv_row = kv_ptr + s.to(tl.int64)[:, None] * D
        kv_v = tl.load(kv_row + v[None, :], there[:, None] & (v < V)[None, :], 0.0).to(DOT)
        logits = tl.dot(q_v, tl.trans(kv_v), input_precision="ieee")
        if RP > 0:
            kv_r = tl.load(kv_row + r[None, :], there[:, None] & (r < D)[None, :], 0.0).to(DOT)
            logits += tl.dot(q_r, tl.trans(kv_r), input_precision="ieee")
        seen = there[None, :] & some
        p = tl.where(seen, tl.exp2(logits * (scale * 1.4426950408889634) - lse[:, None]), 0.0)
        dp = tl.dot(dout, tl.trans(kv_v), input_precision="ieee")
        ds = round_to(tl.where(seen, p * (dp - delta[:, None]), 0.0), p_ptr.dtype.element_ty)
        place, mask = row * k + j[None, :], (h < H)[:, None] & (j < k)[None, :]
        tl.store(p_ptr + place, round_to(p, p_ptr.dtype.element_ty), mask)
        tl.store(ds_ptr + place, ds, mask)
        tl.store(sums_ptr + (t * tl.num_programs(1) + block) * k + j, tl.sum(p, axis=0), j < k)
        dq_v += tl.dot(ds.to(DOT), kv_v, input_precision="ieee")
        if RP > 0:
            dq_r += tl.dot(ds.to(DOT), kv_r, input_precision="ieee")

    tl.store(dq_ptr + row * D + v[None, :], round_to(dq_v * scale, dq_ptr.dtype.element_ty), mask_v)
    if RP > 0:
        tl.store(dq_ptr + row * D + r[None, :], round_to(dq_r * scale, dq_ptr.dtype.element_ty), mask_r)


@triton.jit
def _key_pass(
    q_ptr, indices_ptr, dout_ptr, p_ptr, ds_ptr, rows_ptr, scale, H, D, V, k,
    BK: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DOT: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """BD columns of the rows of BK places: row t · k + j of rows, or with ATOMIC added to rows' row indices[t, j]."""
    t = tl.program_id(0).to(tl.int64)
    j, d = tl.program_id(1) * BK + tl.arange(0, BK), tl.program_id(2) * BD + tl.arange(0, BD)
    s = tl.load(indices_ptr + t * k + j, j < k, -1)
    there = s >= 0
    if tl.max(s, axis=0) >= 0:  # behind a list's end there are no P and dS
        of_s = tl.zeros([BK, BD], tl.float32)
        of_v = tl.zeros([BK, BD], tl.float32)
        for h0 in range(0, H, BH):
            h = h0 + tl.arange(0, BH)
            row = (t * H + h)[:, None]
            place, mask = row * k + j[None, :], (h < H)[:, None] & there[None, :]
            ds = tl.load(ds_ptr + place, mask, 0.0).to(DOT)
            q = tl.load(q_ptr + row * D + d[None, :], (h < H)[:, None] & (d < D)[None, :], 0.0).to(DOT)
            of_s += tl.dot(tl.trans(ds), q, input_precision="ieee")
            if tl.program_id(2) * BD < V:
                p = tl.load(p_ptr + place, mask, 0.0).to(DOT)
                dout = tl.load(dout_ptr + row * V + d[None, :], (h < H)[:, None] & (d < V)[None, :], 0.0).to(DOT)
                of_v += tl.dot(tl.trans(p), dout, input_precision="ieee")
        total = of_s * scale + of_v
        if ATOMIC:
            place, mask = s.to(tl.int64)[:, None] * D + d[None, :], there[:, None] & (d < D)[None, :]
            tl.atomic_add(rows_ptr + place, total, mask, sem="relaxed")
        else:
            place, mask = (t * k + j)[:, None] * D + d[None, :], there[:, None] & (d < D)[None, :]
            tl.store(rows_ptr + place, round_to(total, rows_ptr.dtype.element_ty), mask)


@triton.jit
def _sum_rows(
    rows_ptr, order_ptr, bounds_ptr, kept_ptr, dkv_ptr, D,
    R: tl.constexpr, DP: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """The rows of one key's places, R at a time. kept: fp32 [S, D], the sums so far unless FIRST, and after, unless
    LAST: then they are rounded to dkv."""
    s, d, i = tl.program_id(0).to(tl.int64), tl.arange(0, DP), tl.arange(0, R)
    last = tl.load(bounds_ptr + s + 1)
    total = tl.zeros([R, DP], tl.float32)
    for at in range(tl.load(bounds_ptr + s), last, R):
        row = tl.load(order_ptr + at + i, at + i < last, 0).to(tl.int64)
        mask = (at + i < last)[:, None] & (d < D)[None, :]
        total += tl.load(rows_ptr + row[:, None] * D + d[None, :], mask, 0.0).to(tl.float32)
    whole = tl.sum(total, axis=0)
    if not FIRST:
        whole += tl.load(kept_ptr + s * D + d, d < D, 0.0)
    if LAST:
        tl.store(dkv_ptr + s * D + d, round_to(whole, dkv_ptr.dtype.element_ty), d < D)
    else:
        tl.store(kept_ptr + s * D + d, whole, d < D)


def places_of_keys(indices, S):
    """Which places of the lists [T, k] hold key s: order[bounds[s] : bounds[s + 1]], numbers t · k + j, ascending.

    order int32 [T · k], bounds int32 [S + 1].
    """
    keys, order = indices.reshape(-1).sort(stable=True)  # -1 first
    bounds = torch.searchsorted(keys, torch.arange(S + 1, dtype=torch.int32, device=keys.device), out_int32=True)
    return order.int(), bounds


def sum_rows(rows, order, bounds, kept, dkv, first, last):
    """Launch `_sum_rows` for all keys: rows [places, D]."""
    S, D = dkv.shape
    DP = next_power_of_2(D)
    R = next_power_of_2(min(len(order), 4096)) if INTERPRETED else max(1, min(8, 8192 // DP))
    _sum_rows[(S,)](rows, order, bounds, kept, dkv, D, R=R, DP=DP, FIRST=first, LAST=last, num_warps=4)


def deltas(out, dout, dlse):
    """fp32 [T, H]: sum of out · dout over the value, less dlse."""
    T, H, V = out.shape
    delta = torch.empty(T, H, dtype=torch.float32, device=out.device)
    VP = next_power_of_2(V)
    R = next_power_of_2(T * H) if INTERPRETED else max(1, min(8, 4096 // VP))
    _delta[(cdiv(T * H, R),)](
        out.contiguous(), dout.contiguous(), delta if dlse is None else dlse.contiguous(), delta, T * H, V,
        R=R, VP=VP, HAS_DLSE=dlse is not None, num_warps=4,
    )  # fmt: skip
    return delta


def tiles(card, H, VP, RP, size):
    """(BH, BK) of the query pass, the largest whose q, dout and two tiles of keys fit that card's shared memory.

    Arguments, and the error: as `sparse_attention.tiles`.
    """
    BH, BK = max(16, min(next_power_of_2(H), 16 if size == 4 else 64)), 64 if size == 2 else 32 if VP <= 128 else 16

    def shared_memory():
        return (BH * (2 * VP + RP) + 2 * BK * (VP + RP) + 4 * BH * BK) * size + 1024

    while shared_memory() > card.shared_memory:
        if BH == BK == 16:
            raise ValueError(cards.too_wide("q", f"16 heads and 16 keys of {VP + RP} columns", shared_memory(), card))
        BH, BK = (BH // 2, BK) if BH > BK else (BH, BK // 2)
    return BH, BK


def sparse_attention_backward(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
    v_dim: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None = None,
    sums: str = "sorted",
    variant: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`dsa_ref.sparse_attention_backward` on tensor cores: (dq [T, H, D], dkv [S, D], target fp32 [T, k]).

    q [T, H, D], kv [S, D], indices int32 [T, k], scale, v_dim: what `sparse_attention` was given; out [T, H, v_dim] and
    lse fp32 [T, H]: what it returned; dout, and dlse or None for zeros: the gradients of these. One dtype of bf16, fp16
    and fp32, which dq and dkv have too. target: the mean over heads of the probabilities, 0 where indices has -1.
    Products of bf16 and fp16 inputs use those types: P and dS are rounded to them, and in bf16 a query's share of dkv,
    too. Sums are fp32. fp32 goes without TF32.
    sums: "sorted" gives the same bits each time; "atomic" adds to dkv as the programs come, in less memory, and dkv's
    last bits differ from call to call. dq and target are the same bits each time with both.
    Memory beside what is returned: at most 2 GiB, or what one query takes, and an fp32 dkv.

    variant: "portable", "hopper" (compute capability 9.0, bf16, D = 576, v_dim = 512, 64 or 128 heads), or None for
    "hopper" where it can serve, else "portable".
    Index lists that name a key twice, which raise where they can be read, are undefined while a CUDA graph is captured.

    Raises: as the reference does (fp64 is a TypeError here); ValueError as `runtime.check_runnable` does, and for a
    variant that is unknown or cannot serve these inputs. Source: SPEC section 3.
    """
    check_sparse_attention_backward(q, kv, indices, scale, v_dim, out, lse, dout, dlse, sums, FLOATS)
    check_scale_in_base_2(scale)
    check_runnable(q=q, kv=kv, out=out, lse=lse, dout=dout, dlse=dlse)
    hopper = hopper_variant("sparse_attention_backward", variant, "hopper", q, v_dim)
    T, S, k = len(q), len(kv), indices.shape[1]
    dq, dkv = (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty(kv.shape, dtype=q.dtype, device=q.device),
    )
    if T == 0:
        return dq, dkv.zero_(), torch.empty(0, k, dtype=torch.float32, device=q.device)
    lists = packed(indices, S) if k > S else indices.contiguous()
    target = torch.zeros(lists.shape, dtype=torch.float32, device=q.device)
    launch = hopper.sparse_attention_backward if hopper else launch_portable
    launch(q, kv, lists, scale, v_dim, out, lse, dout, dlse, sums, dq, dkv, target)
    if k > S:
        places = (indices >= 0).cumsum(dim=1, dtype=torch.int32) - 1
        target = target.gather(1, places.clamp(min=0).long()).masked_fill_(indices < 0, 0.0)
    return dq, dkv, target


def launch_portable(q, kv, lists, scale, v_dim, out, lse, dout, dlse, sums, dq, dkv, target):
    """Write dq, dkv and target, which is 0, of checked arguments."""
    (T, H, D), S, k, V = q.shape, len(kv), lists.shape[1], v_dim
    q, kv, dout, lse = q.contiguous(), kv.contiguous(), dout.contiguous(), lse.contiguous()
    delta = deltas(out, dout, dlse)
    VP, RP = max(16, next_power_of_2(V)), max(16, next_power_of_2(D - V)) if D > V else 0
    if INTERPRETED:  # few large tiles
        BH, BK = max(16, next_power_of_2(H)), max(16, min(512, next_power_of_2(k)))
        key_tile = BK, max(16, next_power_of_2(D)), BH
    else:
        BH, BK = tiles(cards.card_of(q), H, VP, RP, q.itemsize)
        key_tile = (64, 128, 32) if q.itemsize == 2 else (32, 32, 16)
    sorted_sums, narrow = sums == "sorted", q.dtype == torch.bfloat16
    row_bytes = D * (2 if narrow else 4) + 16 if sorted_sums else 0  # with the sort's keys and places
    n = max(1, min(T, runtime.GRADIENTS_AT_ONCE // (k * (2 * H * q.itemsize + row_bytes))))
    new = {"dtype": torch.float32, "device": q.device}
    p, ds = (torch.empty(n, H, k, dtype=q.dtype, device=q.device) for _ in range(2))
    of_heads = torch.zeros(n, cdiv(H, BH), k, **new)
    rows = torch.empty(n * k, D, dtype=q.dtype if narrow else torch.float32, device=q.device) if sorted_sums else None
    kept = torch.zeros(S, D, **new) if n < T or not sorted_sums else dkv
    dot = getattr(tl, TRITON_NAMES[dot_dtype(q)])
    for first in range(0, T, n):
        some = slice(first, min(T, first + n))
        m = some.stop - first
        _query_pass[(m, cdiv(H, BH))](
            q[some], kv, lists[some], dout[some], lse[some], delta[some], dq[some], p, ds, of_heads, scale, H, D, V, k,
            LIST=min(next_power_of_2(k), 65536 if INTERPRETED else 2048), VP=VP, RP=RP, BH=BH, BK=BK, DOT=dot, STAGES=2,
            num_warps=8 if VP * BH > 16384 else 4,
        )  # fmt: skip
        torch.sum(of_heads[:m], dim=1, out=target[some]).div_(H)
        BK2, BD, BH2 = key_tile
        _key_pass[(m, cdiv(k, BK2), cdiv(D, BD))](
            q[some], lists[some], dout[some], p, ds, rows if sorted_sums else kept, scale, H, D, V, k,
            BK=BK2, BD=BD, BH=BH2, DOT=dot, ATOMIC=not sorted_sums, num_warps=4,
        )  # fmt: skip
        if sorted_sums:
            order, bounds = places_of_keys(lists[some], S)
            sum_rows(rows, order, bounds, kept, dkv, first == 0, some.stop == T)
        of_heads.zero_()
    if not sorted_sums:
        dkv.copy_(kept)
