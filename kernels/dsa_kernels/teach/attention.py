"""Attention's side of the indexer's loss: the log-sum-exp, and from it p, the mean over heads of the probabilities.

Schedule: as in `index_scores`, keys lie on the rows of the product and (query, head) pairs on its columns, so that the
mean over heads stays inside a thread's registers. 576 dims of 128 heads and of a tile of keys do not fit into shared
memory together: both stream through it in slices of BD dims.

Cost at V3.2's sizes: 2 · 128 · 576 FLOPs a pair, and as many for the log-sum-exp where attention does not hand it over.
"""

import torch
import triton
import triton.language as tl

from .. import cards
from ..index_scores import TRITON_NAMES
from ..runtime import INTERPRETED, cdiv, dot_dtype, multiprocessors, next_power_of_2
from .walk import keys_at, numbers_at, span

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _products(
    q_ptr, kv_ptr, q_row, kv_row, D,
    COLUMNS: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """kv[kv_row] · q[q_row], [BK, COLUMNS]: rows that are not there must be replaced by ones that are."""
    dots = tl.zeros([BK, COLUMNS], tl.float32)
    for d0 in tl.range(0, D, BD, num_stages=STAGES):
        d = d0 + tl.arange(0, BD)
        kv_ptrs, q_ptrs = kv_ptr + kv_row[:, None] * D + d[None, :], q_ptr + q_row[:, None] * D + d[None, :]
        if WHOLE:
            kv, q = tl.load(kv_ptrs), tl.load(q_ptrs)
        else:
            kv, q = tl.load(kv_ptrs, (d < D)[None, :], 0.0), tl.load(q_ptrs, (d < D)[None, :], 0.0)
        dots = tl.dot(kv.to(DOT), tl.trans(q.to(DOT)), dots, input_precision="ieee")
    return dots


@triton.jit
def _log_sum_exp(
    q_ptr, kv_ptr, indices_ptr, start_ptr, end_ptr, lse_ptr, scale, T, S, H, D, k,
    HB: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    DOT: tl.constexpr, LISTS: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first_t = tl.program_id(0).to(tl.int64) * BQ
    t = first_t + tl.arange(0, BQ)
    first, last, low, high = span(tl.load(start_ptr + t, t < T, 0), tl.load(end_ptr + t, t < T, 0), S, k, LISTS)
    column = tl.arange(0, BQ * HB)
    row, h = first_t + column // HB, tl.program_id(1) * HB + column % HB
    start, end = tl.load(start_ptr + row, row < T, 0), tl.load(end_ptr + row, row < T, 0)
    q_row = tl.minimum(row, T - 1) * H + tl.minimum(h, H - 1)
    m = tl.full([BQ * HB], float("-inf"), tl.float32)
    l = tl.zeros([BQ * HB], tl.float32)  # noqa: E741 (l is the field's name for it)
    for j0 in range(first, last, BK):
        s = keys_at(j0 + tl.arange(0, BK), indices_ptr, first_t, k, LISTS)
        kv_row = tl.minimum(tl.maximum(s, 0), S - 1).to(tl.int64)
        logits = _products(q_ptr, kv_ptr, q_row, kv_row, D, BQ * HB, BK, BD, DOT, WHOLE, STAGES)
        seen = (s[:, None] >= start[None, :]) & (s[:, None] < end[None, :])
        logits = tl.where(seen, logits * (scale * LOG2_E), float("-inf"))  # in base 2
        new_m = tl.maximum(m, tl.max(logits, axis=0))
        finite_m = tl.where(new_m == float("-inf"), 0.0, new_m)
        l = l * tl.exp2(m - finite_m) + tl.sum(tl.exp2(logits - finite_m[None, :]), axis=0)  # noqa: E741
        m = new_m
    lse = tl.where(l == 0, float("-inf"), (m + tl.log2(tl.where(l == 0, 1.0, l))) / LOG2_E)
    tl.store(lse_ptr + row * H + h, lse, (row < T) & (h < H))


@triton.jit
def _mean_probability(
    q_ptr, kv_ptr, indices_ptr, start_ptr, end_ptr, lse_ptr, p_ptr, scale, T, S, H, D, k, width,
    HB: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    DOT: tl.constexpr, LISTS: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first_t = tl.program_id(0).to(tl.int64) * BQ
    t = first_t + tl.arange(0, BQ)
    start, end = tl.load(start_ptr + t, t < T, 0), tl.load(end_ptr + t, t < T, 0)
    first, last, low, high = span(start, end, S, k, LISTS)
    column = tl.arange(0, BQ * HB)
    row = first_t + column // HB
    for j0 in range(first + tl.program_id(1) * BK, last, tl.num_programs(1) * BK):
        places = j0 + tl.arange(0, BK)
        s = keys_at(places, indices_ptr, first_t, k, LISTS)
        kv_row = tl.minimum(tl.maximum(s, 0), S - 1).to(tl.int64)
        p = tl.zeros([BK, BQ], tl.float32)
        for h0 in range(0, H, HB):
            h = h0 + column % HB
            q_row = tl.minimum(row, T - 1) * H + tl.minimum(h, H - 1)
            logits = _products(q_ptr, kv_ptr, q_row, kv_row, D, BQ * HB, BK, BD, DOT, WHOLE, STAGES)
            lse = tl.load(lse_ptr + row * H + h, (row < T) & (h < H), float("-inf"))
            lse = tl.where(lse == float("-inf"), float("inf"), lse)  # a head that sees logits of -inf alone: p = 0
            of_heads = tl.exp2(logits * (scale * LOG2_E) - (lse * LOG2_E)[None, :])
            p += tl.sum(tl.reshape(of_heads, [BK, BQ, HB]), axis=2)
        seen, where = numbers_at(places, s, t, start, end, width, LISTS)
        tl.store(p_ptr + where, p / H, seen)


def tiles(card, H, D, size, lists, sums):
    """(HB, BQ, BK, BD, warps, stages) for that card; size: bytes of a number; sums: of the log-sum-exp, whose running
    state takes registers as well."""
    HB = max(16 if lists else 1, min(next_power_of_2(H), 128))
    if INTERPRETED:  # each operation costs the same whatever its size: few large tiles
        return HB, 1 if lists else max(1, 256 // HB), 256, next_power_of_2(max(D, 16)), 4, 1
    columns, BK, BD, stages = (64, 32, 16, 1) if size == 4 else (128, 128, 64, 3)
    HB = min(HB, columns)
    if D % BD:
        BD = min(BD, 32 if D > 16 else 16)
    while (columns + BK) * BD * size * max(stages, 1) + 4 * columns + 1024 > card.shared_memory:
        stages -= 1
    few = size == 4 or lists and HB < 64 or not sums and card.capability == cards.HOPPER
    return HB, 1 if lists else columns // HB, BK, BD, 4 if few else 8, stages


def _launch_options(q, lists, sums):
    H, D = q.shape[1:]
    HB, BQ, BK, BD, warps, stages = tiles(cards.card_of(q), H, D, q.itemsize, lists, sums)
    dot = getattr(tl, TRITON_NAMES[dot_dtype(q)])
    return {
        "HB": HB, "BQ": BQ, "BK": BK, "BD": BD, "DOT": dot, "LISTS": lists, "WHOLE": D % BD == 0, "STAGES": stages,
        "num_warps": warps,
    }  # fmt: skip


def log_sum_exp(q, kv, scale, indices, start, end):
    """fp32 [T, H] of attention over the ranges or, where they are given, over the lists in them."""
    (T, H, D), S = q.shape, len(kv)
    k = 0 if indices is None else indices.shape[1]
    lse = torch.empty(T, H, dtype=torch.float32, device=q.device)
    options = _launch_options(q, indices is not None, sums=True)
    _log_sum_exp[(cdiv(T, options["BQ"]), cdiv(H, options["HB"]))](
        q, kv, start if indices is None else indices, start, end, lse, scale, T, S, H, D, k, **options
    )
    return lse


def mean_probability(q, kv, scale, indices, start, end, lse, p):
    """Write p for the pairs that are seen into the buffer p [T, width]; the rest of it stays as it is."""
    (T, H, D), S = q.shape, len(kv)
    k = 0 if indices is None else indices.shape[1]
    options = _launch_options(q, indices is not None, sums=False)
    groups = cdiv(T, options["BQ"])
    chunks = max(1, min(cdiv(p.shape[1], options["BK"]), 8 * multiprocessors(q) // groups))
    _mean_probability[(groups, chunks)](
        q, kv, start if indices is None else indices, start, end, lse, p, scale, T, S, H, D, k, p.shape[1], **options
    )
