"""The warm-up of the indexer's loss: each row's KL(p || softmax(I)), then the gradients by dI = softmax(I) - p.

`rows` walks once over a row's keys: scores, their log-sum-exp, and the KL as it goes, against the running maximum of I.
The scores go to a buffer, and so dI = exp(I - lse) · sum of p - p is a matter of two numbers a pair from there on.
`queries` walks again. With M[s, h] = (q[h] · k[s] > 0), the relu's derivative, and G[h] = sum over s of M[s, h] · dI[s]
· k[s], the gradients are dq[h] = w[h] · G[h] and dw[h] = q[h] · G[h].
dk_idx sums over queries: `keys` owns a block of keys and walks over them. The sparse stage is in `listed`.

Dot products are computed again in each walk, which costs less than to keep Hi numbers a pair. Products are of the
inputs' type, but gradients of fp16 inputs are of bf16, as dI is far below what fp16 can hold; sums are fp32.
"""

import torch
import triton
import triton.language as tl

from .. import cards
from ..index_scores import TRITON_NAMES
from ..rounding import round_to
from ..runtime import INTERPRETED, cdiv, dot_dtype, multiprocessors, next_power_of_2
from .walk import numbers_at, span


@triton.jit
def _scores(dots, w, BK: tl.constexpr, BQ: tl.constexpr, HP: tl.constexpr):
    """Equation 1 [BK, BQ] from the dot products [BK, BQ · HP]."""
    weighted = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL) * w[None, :]
    return tl.sum(tl.reshape(weighted, [BK, BQ, HP]), axis=2)


@triton.jit
def _of_scores(scores_ptr, p_ptr, where, seen, lse, mass):
    """dI of the pairs that lie there, 0 where a pair is not seen."""
    scores, p = tl.load(scores_ptr + where, seen, 0.0), tl.load(p_ptr + where, seen, 0.0)
    return tl.where(seen, tl.exp(scores - lse[None, :]) * mass[None, :] - p, 0.0)


@triton.jit
def _for_heads(x, BK: tl.constexpr, BQ: tl.constexpr, HP: tl.constexpr):
    """[BK, BQ] as [BK, BQ · HP]: each query's number for each of its heads."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], [BK, BQ, HP]), [BK, BQ * HP])


@triton.jit
def _rows(
    q_ptr, k_ptr, w_ptr, start_ptr, end_ptr, p_ptr, scores_ptr, kl_ptr, lse_ptr, mass_ptr, alive_ptr,
    T, S, Hi, Di, width,
    HP: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    DOT: tl.constexpr, KEEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first_t = tl.program_id(0).to(tl.int64) * BQ
    t, d = first_t + tl.arange(0, BQ), tl.arange(0, DP)
    start, end = tl.load(start_ptr + t, t < T, 0), tl.load(end_ptr + t, t < T, 0)
    first, last, low, high = span(start, end, S, 0, False)
    column = tl.arange(0, BQ * HP)
    row, h = first_t + column // HP, column % HP
    real = (row < T) & (h < Hi)
    q = tl.load(q_ptr + (row * Hi + h)[:, None] * Di + d[None, :], real[:, None] & (d < Di)[None, :], 0.0)
    w = tl.load(w_ptr + row * Hi + h, real, 0.0).to(tl.float32)
    q = tl.trans(q.to(DOT))
    # Each place in a tile keeps sums of its own, which meet only at the end: no thread waits for another.
    m = tl.full([BK, BQ], float("-inf"), tl.float32)
    l = tl.zeros([BK, BQ], tl.float32)  # noqa: E741 (l is the field's name for it)
    mass = tl.zeros([BK, BQ], tl.float32)
    kl = tl.zeros([BK, BQ], tl.float32)  # sum of p · (ln p - (I - m))
    any_seen = tl.zeros([BK, BQ], tl.int32)
    for j0 in tl.range(first, last, BK, num_stages=STAGES):
        s = j0 + tl.arange(0, BK)
        visible = (s >= low) & (s < high)
        keys = tl.load(k_ptr + s[:, None].to(tl.int64) * Di + d[None, :], visible[:, None] & (d < Di)[None, :], 0.0)
        scores = _scores(tl.dot(keys.to(DOT), q, input_precision="ieee"), w, BK, BQ, HP)
        seen, where = numbers_at(s, s, t, start, end, width, False)
        if KEEP:
            tl.store(scores_ptr + where, scores, seen)
        scores = tl.where(seen, scores, float("-inf"))
        p = tl.load(p_ptr + where, seen, 0.0)
        new_m = tl.maximum(m, scores)
        old, new = tl.where(m == float("-inf"), 0.0, m), tl.where(new_m == float("-inf"), 0.0, new_m)
        l = l * tl.exp(m - new) + tl.exp(scores - new)  # noqa: E741
        surprise = tl.log(tl.where(p == 0, 1.0, p)) - tl.where(p == 0, 0.0, scores - new)
        kl += (new - old) * mass + p * surprise
        mass += p
        any_seen |= seen.to(tl.int32)
        m = new_m
    largest = tl.max(m, axis=0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    m_or_0 = tl.where(m == float("-inf"), 0.0, m)
    total = tl.sum(l * tl.exp(m - largest[None, :]), axis=0)
    kl_of_row = tl.sum(kl + (largest[None, :] - m_or_0) * mass, axis=0)
    mass_of_row = tl.sum(mass, axis=0)
    log_total = tl.log(tl.where(total == 0, 1.0, total))  # all I are -inf: softmax(I) is 0
    tl.store(kl_ptr + t, kl_of_row + log_total * mass_of_row, t < T)
    tl.store(lse_ptr + t, largest + log_total, t < T)
    tl.store(mass_ptr + t, mass_of_row, t < T)
    tl.store(alive_ptr + t, tl.max(any_seen, axis=0), t < T)


@triton.jit
def _queries(
    q_ptr, k_ptr, w_ptr, start_ptr, end_ptr, p_ptr, scores_ptr, lse_ptr, mass_ptr, dq_ptr, dw_ptr,
    T, S, Hi, Di, width,
    HP: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    DOT: tl.constexpr, GRAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first_t = tl.program_id(0).to(tl.int64) * BQ
    t, d = first_t + tl.arange(0, BQ), tl.arange(0, DP)
    start, end = tl.load(start_ptr + t, t < T, 0), tl.load(end_ptr + t, t < T, 0)
    first, last, low, high = span(start, end, S, 0, False)
    lse, mass = tl.load(lse_ptr + t, t < T, 0.0), tl.load(mass_ptr + t, t < T, 0.0)
    column = tl.arange(0, BQ * HP)
    row, h = first_t + column // HP, column % HP
    real = (row < T) & (h < Hi)
    q_ptrs = q_ptr + (row * Hi + h)[:, None] * Di + d[None, :]
    q_there = real[:, None] & (d < Di)[None, :]
    loaded = tl.load(q_ptrs, q_there, 0.0)
    w = tl.load(w_ptr + row * Hi + h, real, 0.0).to(tl.float32)
    q = tl.trans(loaded.to(DOT))
    gathered = tl.zeros([BQ * HP, DP], tl.float32)  # G
    for j0 in tl.range(first, last, BK, num_stages=STAGES):
        s = j0 + tl.arange(0, BK)
        visible = (s >= low) & (s < high)
        keys = tl.load(k_ptr + s[:, None].to(tl.int64) * Di + d[None, :], visible[:, None] & (d < Di)[None, :], 0.0)
        seen, where = numbers_at(s, s, t, start, end, width, False)
        of_scores = _for_heads(_of_scores(scores_ptr, p_ptr, where, seen, lse, mass), BK, BQ, HP)
        dots = tl.dot(keys.to(DOT), q, input_precision="ieee")
        gated = round_to(tl.where(dots > 0, of_scores, 0.0), GRAD)
        gathered = tl.dot(tl.trans(gated), keys.to(GRAD), gathered, input_precision="ieee")
    # Rows that see nothing get zeros, whatever they hold.
    lively = tl.load(start_ptr + row, row < T, 0) < tl.load(end_ptr + row, row < T, 0)
    dq = tl.where(lively[:, None], gathered * w[:, None], 0.0)
    tl.store(dq_ptr + (row * Hi + h)[:, None] * Di + d[None, :], round_to(dq, dq_ptr.dtype.element_ty), q_there)
    dw = tl.where(lively, tl.sum(gathered * tl.load(q_ptrs, q_there, 0.0).to(tl.float32), axis=1), 0.0)
    tl.store(dw_ptr + row * Hi + h, round_to(dw, dw_ptr.dtype.element_ty), real)


@triton.jit
def _keys(
    q_ptr, k_ptr, w_ptr, start_ptr, end_ptr, lows_ptr, highs_ptr, p_ptr, scores_ptr, lse_ptr, mass_ptr, out_ptr,
    T, S, Hi, Di, width, groups,
    HP: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, LOOK: tl.constexpr,
    DOT: tl.constexpr, GRAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    s0 = tl.program_id(0) * BK
    s, d = s0 + tl.arange(0, BK), tl.arange(0, DP)
    # The first and the last group of BQ queries of which one sees one of these keys.
    first, last = groups, 0
    for g0 in range(0, groups, LOOK):
        g = g0 + tl.arange(0, LOOK)
        meets = (tl.load(lows_ptr + g, g < groups, S) < s0 + BK) & (tl.load(highs_ptr + g, g < groups, 0) > s0)
        first = tl.minimum(first, tl.min(tl.where(meets, g, groups), 0))
        last = tl.maximum(last, tl.max(tl.where(meets, g + 1, 0), 0))
    # This program's share of them.
    share = tl.cdiv(tl.maximum(last - first, 0), tl.num_programs(1))
    first = first + tl.program_id(1) * share
    last = tl.minimum(first + share, last)

    column = tl.arange(0, BQ * HP)
    h = column % HP
    k_there = (s < S)[:, None] & (d < Di)[None, :]
    keys = tl.load(k_ptr + s[:, None].to(tl.int64) * Di + d[None, :], k_there, 0.0).to(DOT)
    dk = tl.zeros([DP, BK], tl.float32)  # so both operands of its products come from shared memory
    for g in tl.range(first, last, num_stages=STAGES):
        row = (g * BQ + column // HP).to(tl.int64)
        row_start, row_end = tl.load(start_ptr + row, row < T, 0), tl.load(end_ptr + row, row < T, 0)
        real = (row_start < tl.minimum(row_end, s0 + BK)) & (row_end > s0) & (h < Hi)  # others may hold NaN
        q = tl.load(q_ptr + (row * Hi + h)[:, None] * Di + d[None, :], real[:, None] & (d < Di)[None, :], 0.0)
        w = tl.load(w_ptr + row * Hi + h, real, 0.0).to(tl.float32)
        t = (g * BQ + tl.arange(0, BQ)).to(tl.int64)
        start, end = tl.load(start_ptr + t, t < T, 0), tl.load(end_ptr + t, t < T, 0)
        seen, where = numbers_at(s, s, t, start, end, width, False)
        lse, mass = tl.load(lse_ptr + t, t < T, 0.0), tl.load(mass_ptr + t, t < T, 0.0)
        of_scores = _for_heads(_of_scores(scores_ptr, p_ptr, where, seen, lse, mass), BK, BQ, HP)
        dots = tl.dot(keys, tl.trans(q.to(DOT)), input_precision="ieee")
        gated = tl.where(dots > 0, of_scores * w[None, :], 0.0)
        dk = tl.dot(tl.trans(q.to(GRAD)), tl.trans(round_to(gated, GRAD)), dk, input_precision="ieee")
    out = out_ptr + (tl.program_id(1) * S + s)[:, None].to(tl.int64) * Di + d[None, :]
    tl.store(out, tl.trans(dk), k_there)


# (columns, BK, stages) of 16-bit inputs, as measured on an H200: (query, head) pairs and keys at a time.
SIZES = {"rows": (128, 64, 3), "queries": (64, 64, 3), "keys": (64, 64, 2)}


def tiles(card, kernel, HP, DP, size):
    """(BQ, BK, warps, stages) of the kernel "rows", "queries" or "keys" for that card. HP, DP: heads and dims, powers
    of two; size: bytes of a number.

    Raises ValueError where not even the smallest tile fits into its shared memory.
    """
    if INTERPRETED:  # each operation costs the same whatever its size: few large tiles
        return max(1, 256 // HP), 256, 4, 1
    columns, BK, stages = (64, 16, 1) if size == 4 else SIZES[kernel]
    columns = max(columns, HP, 16)
    if DP < 64:
        stages = min(stages, 2 if kernel == "rows" else 1)

    def shared_memory():
        held = columns * DP * size * (2 if kernel == "queries" else 1) + stages * BK * DP * size
        return held + (0 if kernel == "rows" else 2 * BK * columns * size) + BK * columns // 2 + 2048

    while shared_memory() > card.shared_memory:
        if stages > 1:
            stages -= 1
        elif columns > max(HP, 16):
            columns //= 2
        elif BK > 16:
            BK //= 2
        else:
            raise ValueError(cards.too_wide("q_idx", f"{HP} heads of {DP} dims", shared_memory(), card))
    warps = 8 if size == 4 or columns > 128 or (columns > 32 and card.capability != cards.HOPPER) else 4
    return max(1, columns // HP), BK, warps, stages


def _launch_options(kernel, q_idx):
    Hi, Di = q_idx.shape[1:]
    HP, DP = next_power_of_2(Hi), max(32, next_power_of_2(Di))
    size = dot_dtype(q_idx).itemsize
    BQ, BK, warps, stages = tiles(cards.card_of(q_idx), kernel, HP, DP, size)
    options = {"HP": HP, "DP": DP, "BQ": BQ, "BK": BK, "STAGES": stages, "num_warps": warps}
    options["DOT"] = getattr(tl, TRITON_NAMES[dot_dtype(q_idx)])
    if kernel != "rows":
        options["GRAD"] = tl.float32 if size == 4 else tl.bfloat16
    return options


def rows(q_idx, k_idx, w, start, end, p, scores):
    """(KL, log-sum-exp of I, sum of p, whether it sees a key) of each row, [T] each; p [T, width] as in `walk`, and so
    scores, to be written, or None."""
    (T, Hi, Di), S = q_idx.shape, len(k_idx)
    kl, lse, mass = (torch.empty(T, dtype=torch.float32, device=q_idx.device) for _ in range(3))
    alive = torch.empty(T, dtype=torch.int32, device=q_idx.device)
    options = _launch_options("rows", q_idx)
    _rows[(cdiv(T, options["BQ"]),)](
        q_idx, k_idx, w, start, end, p, p if scores is None else scores, kl, lse, mass, alive,
        T, S, Hi, Di, p.shape[1], KEEP=scores is not None, **options,
    )  # fmt: skip
    return kl, lse, mass, alive


def queries(q_idx, k_idx, w, start, end, p, scores, lse, mass, dq, dw):
    """Write dq [T, Hi, Di] and dw [T, Hi]."""
    (T, Hi, Di), S = q_idx.shape, len(k_idx)
    options = _launch_options("queries", q_idx)
    _queries[(cdiv(T, options["BQ"]),)](
        q_idx, k_idx, w, start, end, p, scores, lse, mass, dq, dw, T, S, Hi, Di, p.shape[1], **options
    )


def keys(q_idx, k_idx, w, start, end, p, scores, lse, mass, dk):
    """Add the sums over these queries to dk, fp32 [S, Di]."""
    (T, Hi, Di), S = q_idx.shape, len(k_idx)
    options = _launch_options("keys", q_idx)
    BQ, BK = options["BQ"], options["BK"]
    groups, blocks = cdiv(T, BQ), cdiv(S, BK)
    busy = cdiv(min(S, T + p.shape[1]), BK)  # of these blocks: ranges of packed sequences lie next to each other
    some = start < end
    lows = torch.nn.functional.pad(torch.where(some, start, S), (0, groups * BQ - T), value=S).view(groups, BQ).amin(1)
    highs = torch.nn.functional.pad(torch.where(some, end, 0), (0, groups * BQ - T)).view(groups, BQ).amax(1)
    parts = max(1, min(8 * multiprocessors(q_idx) // busy, groups))  # of the queries, where keys are few
    sums = torch.empty(parts, S, Di, dtype=torch.float32, device=q_idx.device)
    _keys[(blocks, parts)](
        q_idx, k_idx, w, start, end, lows, highs, p, scores, lse, mass, sums, T, S, Hi, Di, p.shape[1], groups,
        LOOK=1024, **options,
    )  # fmt: skip
    for part in sums:  # in their order
        dk += part
