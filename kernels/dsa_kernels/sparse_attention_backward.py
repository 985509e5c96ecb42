"""The gradient of attention over gathered rows, the same bits each time, in four kernels for some queries at a time.

    weights    one query and up to 64 of its heads: S, P from the log-sum-exp, dP and dS; P and dS go to memory
    queries    the same heads, some columns: dq = dS · kv
    keys       one query, some of its places, some columns, all heads: the rows Pᵀ · dout + dSᵀ · q, one a place
    sums       one key: the rows of all places that hold it, in their order, added up in fp32 (`key_sums`)

`key_sums` says why rows are written, and not added to dkv at once. `sums="atomic"` does that: it saves the rows' memory
and the order, and gives up the same bits.

The memory of P, dS and rows is bounded by `runtime.GRADIENTS_AT_ONCE`: so many queries go through the four kernels
together, and between one lot and the next the sums are kept in fp32.

Cost at V3.2's sizes: 2 · 128 · (3 · 576 + 2 · 512) FLOPs a selected pair. Of a pair P and dS take 512 bytes, and its
row 1152. `hopper/sparse_attention_backward.py` is the faster variant for these sizes.
"""

import torch
import triton
import triton.language as tl

from dsa_ref.contracts import check_sparse_attention_backward

from . import runtime
from .index_scores import TRITON_NAMES
from .key_sums import deltas, places_of_keys, sum_rows
from .rounding import round_to
from .runtime import FLOATS, INTERPRETED, cdiv, check_runnable, dot_dtype, hopper_variant, next_power_of_2
from .sparse_attention import check_scale_in_base_2, packed


@triton.jit
def _weights(
    q_ptr, kv_ptr, indices_ptr, dout_ptr, lse_ptr, delta_ptr, p_ptr, ds_ptr, sums_ptr, scale, H, D, V, k,
    LIST: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """P and dS [heads, k] of BH heads, for the places up to the list's last index; P summed over the heads."""
    t, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    h, d = block * BH + tl.arange(0, BH), tl.arange(0, BD)
    row = (t * H + h)[:, None]
    lse = tl.load(lse_ptr + t * H + h, h < H, float("-inf"))
    some = (lse != float("-inf"))[:, None]  # else P is 0: a row without keys, and heads beyond H
    lse = lse * 1.4426950408889634
    delta = tl.load(delta_ptr + t * H + h, h < H, 0.0)
    for j0 in range(0, _used(indices_ptr + t * k, k, LIST), BK):
        j = j0 + tl.arange(0, BK)
        s = tl.load(indices_ptr + t * k + j, j < k, -1)
        there = s >= 0
        kv_row = kv_ptr + s.to(tl.int64)[:, None] * D
        logits = tl.zeros([BH, BK], tl.float32)
        dp = tl.zeros([BH, BK], tl.float32)
        for c0 in tl.range(0, D, BD, num_stages=STAGES):
            c = c0 + d
            q = tl.load(q_ptr + row * D + c[None, :], (h < H)[:, None] & (c < D)[None, :], 0.0).to(DOT)
            kv = tl.load(kv_row + c[None, :], there[:, None] & (c < D)[None, :], 0.0).to(DOT)
            logits += tl.dot(q, tl.trans(kv), input_precision="ieee")
            dout = tl.load(dout_ptr + row * V + c[None, :], (h < H)[:, None] & (c < V)[None, :], 0.0).to(DOT)
            value = tl.where((c < V)[None, :], kv, tl.zeros([BK, BD], DOT))  # not 0 · an infinite key
            dp += tl.dot(dout, tl.trans(value), input_precision="ieee")
        seen = there[None, :] & some
        p = tl.where(seen, tl.exp2(logits * (scale * 1.4426950408889634) - lse[:, None]), 0.0)
        ds = tl.where(seen, p * (dp - delta[:, None]) * scale, 0.0)
        place, mask = row * k + j[None, :], (h < H)[:, None] & (j < k)[None, :]
        tl.store(p_ptr + place, round_to(p, p_ptr.dtype.element_ty), mask)
        tl.store(ds_ptr + place, round_to(ds, ds_ptr.dtype.element_ty), mask)
        tl.store(sums_ptr + (t * tl.num_programs(1) + block) * k + j, tl.sum(p, axis=0), j < k)


@triton.jit
def _used(list_ptr, k, LIST: tl.constexpr):
    """How many places a list has up to its last index."""
    used = tl.zeros([], tl.int32)
    for j0 in range(0, k, LIST):
        j = j0 + tl.arange(0, LIST)
        used = tl.maximum(used, tl.max(tl.where(tl.load(list_ptr + j, j < k, -1) >= 0, j + 1, 0), axis=0))
    return used


@triton.jit
def _queries(
    kv_ptr, indices_ptr, ds_ptr, dq_ptr, H, D, k,
    LIST: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BD columns of dq of BH heads."""
    t = tl.program_id(0).to(tl.int64)
    h, d = tl.program_id(1) * BH + tl.arange(0, BH), tl.program_id(2) * BD + tl.arange(0, BD)
    row = (t * H + h)[:, None]
    dq = tl.zeros([BH, BD], tl.float32)
    for j0 in tl.range(0, _used(indices_ptr + t * k, k, LIST), BK, num_stages=STAGES):
        j = j0 + tl.arange(0, BK)
        s = tl.load(indices_ptr + t * k + j, j < k, -1)
        kv_row = kv_ptr + s.to(tl.int64)[:, None] * D
        kv = tl.load(kv_row + d[None, :], (s >= 0)[:, None] & (d < D)[None, :], 0.0).to(DOT)
        ds = tl.load(ds_ptr + row * k + j[None, :], (h < H)[:, None] & (s >= 0)[None, :], 0.0).to(DOT)
        dq += tl.dot(ds, kv, input_precision="ieee")
    mask = (h < H)[:, None] & (d < D)[None, :]
    tl.store(dq_ptr + row * D + d[None, :], round_to(dq, dq_ptr.dtype.element_ty), mask)


@triton.jit
def _keys(
    q_ptr, indices_ptr, dout_ptr, p_ptr, ds_ptr, rows_ptr, H, D, V, k,
    BK: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DOT: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """BD columns of the rows of BK places: row t · k + j of rows, or with ATOMIC added to rows' row indices[t, j]."""
    t = tl.program_id(0).to(tl.int64)
    j, d = tl.program_id(1) * BK + tl.arange(0, BK), tl.program_id(2) * BD + tl.arange(0, BD)
    s = tl.load(indices_ptr + t * k + j, j < k, -1)
    there = s >= 0
    if tl.max(s, axis=0) >= 0:  # behind a list's end there are no P and dS
        total = tl.zeros([BK, BD], tl.float32)
        for h0 in range(0, H, BH):
            h = h0 + tl.arange(0, BH)
            row = (t * H + h)[:, None]
            place, mask = row * k + j[None, :], (h < H)[:, None] & there[None, :]
            ds = tl.load(ds_ptr + place, mask, 0.0).to(DOT)
            q = tl.load(q_ptr + row * D + d[None, :], (h < H)[:, None] & (d < D)[None, :], 0.0).to(DOT)
            total += tl.dot(tl.trans(ds), q, input_precision="ieee")
            if tl.program_id(2) * BD < V:
                p = tl.load(p_ptr + place, mask, 0.0).to(DOT)
                dout = tl.load(dout_ptr + row * V + d[None, :], (h < H)[:, None] & (d < V)[None, :], 0.0).to(DOT)
                total += tl.dot(tl.trans(p), dout, input_precision="ieee")
        if ATOMIC:
            place, mask = s.to(tl.int64)[:, None] * D + d[None, :], there[:, None] & (d < D)[None, :]
            tl.atomic_add(rows_ptr + place, total, mask, sem="relaxed")
        else:
            place, mask = (t * k + j)[:, None] * D + d[None, :], there[:, None] & (d < D)[None, :]
            tl.store(rows_ptr + place, round_to(total, rows_ptr.dtype.element_ty), mask)


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
    Memory beside what is returned: at most 3.5 GiB, or what one query takes, and an fp32 dkv.

    variant: "portable", "hopper" (compute capability 9.0, bf16, D = 576, v_dim = 512, at most 128 heads), or None for
    "hopper" where it can serve, else "portable". "hopper" computes 64 or 128 heads, of which those beyond H are zeros.
    A row with logits of -inf alone has no gradient in the reference; here its dq is NaN where its keys are infinite.
    Index lists that name a key twice, which raise where they can be read, are undefined while a CUDA graph is captured.

    Raises: as the reference does (fp64 is a TypeError here); ValueError as `runtime.check_runnable` does, and for a
    variant that is unknown or cannot serve these inputs. Source: SPEC section 3.
    """
    check_sparse_attention_backward(q, kv, indices, scale, v_dim, out, lse, dout, dlse, sums, FLOATS)
    check_scale_in_base_2(scale)
    check_runnable(q=q, kv=kv, out=out, lse=lse, dout=dout, dlse=dlse)
    hopper = hopper_variant("sparse_attention_backward", variant, "hopper", q, v_dim)
    T, S, k = len(q), len(kv), indices.shape[1]
    dq, dkv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, kv))
    if T == 0:
        return dq, dkv.zero_(), torch.empty(0, k, dtype=torch.float32, device=q.device)
    lists = packed(indices, S) if k > S else indices.contiguous()
    target = torch.empty(lists.shape, dtype=torch.float32, device=q.device)
    q, kv, out, lse, dout = (x.contiguous() for x in (q, kv, out, lse, dout))
    delta = deltas(out, dout, None if dlse is None else dlse.contiguous())
    launch = hopper.sparse_attention_backward if hopper else launch_portable
    launch(q, kv, lists, scale, v_dim, lse, dout, delta, sums == "sorted", dq, dkv, target)
    if k > S:
        places = (indices >= 0).cumsum(dim=1, dtype=torch.int32) - 1
        target = target.gather(1, places.clamp(min=0).long()).masked_fill_(indices < 0, 0.0)
    return dq, dkv, target


def tiles(size, H, k, D):
    """(BH, BK, BD, warps) of `_weights`, `_queries` and `_keys`: heads, keys and columns of a tile. size: in bytes."""
    if INTERPRETED:  # few large tiles
        return ((*(max(16, next_power_of_2(n)) for n in (H, min(512, k), D)), 4),) * 3
    if size == 4:
        return ((16, 32, 32, 4),) * 3
    BH = max(16, min(64, next_power_of_2(H)))
    return (BH, 64, 64, 4), (BH, 64, 128, 4), (64, 64, 128, 4)


def launch_portable(q, kv, lists, scale, v_dim, lse, dout, delta, sorted_sums, dq, dkv, target):
    """Write dq, dkv and target of checked and contiguous arguments. delta: `key_sums.deltas`."""
    (T, H, D), S, k, V = q.shape, len(kv), lists.shape[1], v_dim
    of_weights, of_queries, of_keys = tiles(q.itemsize, H, k, D)
    list_places = min(next_power_of_2(k), 65536 if INTERPRETED else 2048)
    dot = getattr(tl, TRITON_NAMES[dot_dtype(q)])
    narrow = q.dtype == torch.bfloat16
    row_bytes = D * (2 if narrow else 4) + 4 if sorted_sums else 0  # with its place in the sums' order
    n = max(1, min(T, runtime.GRADIENTS_AT_ONCE // (k * (2 * H * q.itemsize + row_bytes))))
    new = {"dtype": torch.float32, "device": q.device}
    p, ds = (torch.empty(n, H, k, dtype=q.dtype, device=q.device) for _ in range(2))
    rows = torch.empty(n * k, D, dtype=q.dtype if narrow else torch.float32, device=q.device) if sorted_sums else None
    kept = torch.zeros(S, D, **new) if n < T or not sorted_sums else dkv
    for start in range(0, T, n):
        some = slice(start, min(T, start + n))
        m, some_q, some_dout, some_lists = some.stop - start, q[some], dout[some], lists[some]
        BH, BK, BD, warps = of_weights
        sums = torch.zeros(m, cdiv(H, BH), k, **new)  # behind a list's end, nobody writes
        _weights[(m, cdiv(H, BH))](
            some_q, kv, some_lists, some_dout, lse[some], delta[some], p, ds, sums, scale, H, D, V, k,
            LIST=list_places, BH=BH, BK=BK, BD=BD, DOT=dot, STAGES=3, num_warps=warps,
        )  # fmt: skip
        torch.sum(sums, dim=1, out=target[some]).div_(H)
        BH, BK, BD, warps = of_queries
        _queries[(m, cdiv(H, BH), cdiv(D, BD))](
            kv, some_lists, ds, dq[some], H, D, k,
            LIST=list_places, BH=BH, BK=BK, BD=BD, DOT=dot, STAGES=3, num_warps=warps,
        )  # fmt: skip
        BH, BK, BD, warps = of_keys
        _keys[(m, cdiv(k, BK), cdiv(D, BD))](
            some_q, some_lists, some_dout, p, ds, rows if sorted_sums else kept, H, D, V, k,
            BK=BK, BD=BD, BH=BH, DOT=dot, ATOMIC=not sorted_sums, num_warps=warps,
        )  # fmt: skip
        if sorted_sums:
            sum_rows(rows, *places_of_keys(some_lists, S), kept, dkv, start == 0, some.stop == T)
    if not sorted_sums:
        dkv.copy_(kept)
