"""The sparse stage of the indexer's loss: KL(p || softmax(I)) over index lists, and its gradients.

A program has one query, and walks over the places of its list.

    `rows`        the scores of all places to memory; from there their log-sum-exp, the KL, and dI = softmax(I) - p
                  in their stead
    `gradients`   dq, dw, and for each place a row, its share of its key's gradient

With M[j, h] = (q[h] · k[j] > 0), the relu's derivative, and G[h] = sum over places j of M[j, h] · dI[j] · k[j], the
gradients are dq[h] = w[h] · G[h] and dw[h] = q[h] · G[h]; a place's share is the sum over h of M[j, h] · dI[j] · w[h] ·
q[h].

Each key's shares are added up in the order of the queries (`key_sums`). Where lists are long, `rows` marks who selected
what, marks are counted, and `gradients` writes the shares of a key next to each other. This takes T · S / 32 marks. If
places are fewer, they are sorted, and shares lie as the places do.

Dot products are computed twice, which costs less than to keep Hi numbers a pair. Types are those of `kl`.
"""

import torch
import triton
import triton.language as tl

from .. import cards
from ..index_scores import TRITON_NAMES
from ..key_sums import count_marks, mark, no_marks, places_by_sort, slots_of
from ..rounding import round_to
from ..runtime import INTERPRETED, dot_dtype, next_power_of_2


@triton.jit
def _visible(indices_ptr, places, k, start, end):
    """The keys in these places of a list, and whether the query may see them."""
    s = tl.load(indices_ptr + places, places < k, -1)
    return s, (s >= start) & (s < end)


@triton.jit
def _keys(k_ptr, s, seen, d, Di: tl.constexpr):
    return tl.load(k_ptr + s[:, None].to(tl.int64) * Di + d[None, :], seen[:, None] & (d < Di)[None, :], 0.0)


@triton.jit
def _rows(
    q_ptr, k_ptr, w_ptr, indices_ptr, start_ptr, end_ptr, p_ptr, scores_ptr, marks_ptr, kl_ptr, alive_ptr, S, k,
    Hi: tl.constexpr, Di: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr, LIST: tl.constexpr,
    DOT: tl.constexpr, WANTED: tl.constexpr, COUNTED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    start, end = tl.load(start_ptr + t), tl.load(end_ptr + t)
    last = tl.where(start < end, k, 0)
    h, d, i = tl.arange(0, HP), tl.arange(0, DP), tl.arange(0, LIST)
    at = t * k  # of the query's list, and of what stands beside it
    q = tl.load(q_ptr + (t * Hi + h)[:, None] * Di + d[None, :], (h < Hi)[:, None] & (d < Di)[None, :], 0.0)
    q = tl.trans(q.to(DOT))
    w = tl.load(w_ptr + t * Hi + h, h < Hi, 0.0).to(tl.float32)
    for j0 in tl.range(0, last, BK, num_stages=STAGES):
        j = j0 + tl.arange(0, BK)
        s, seen = _visible(indices_ptr + at, j, k, start, end)
        dots = tl.dot(_keys(k_ptr, s, seen, d, Di).to(DOT), q, input_precision="ieee")
        scores = tl.sum(tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL) * w[None, :], axis=1)
        tl.store(scores_ptr + at + j, scores, j < k)
    tl.debug_barrier()  # other threads read them

    m = tl.full([LIST], float("-inf"), tl.float32)
    any_seen = tl.zeros([LIST], tl.int32)
    for j0 in range(0, last, LIST):
        s, seen = _visible(indices_ptr + at, j0 + i, k, start, end)
        m = tl.maximum(m, tl.load(scores_ptr + at + j0 + i, seen, float("-inf")))
        any_seen |= seen.to(tl.int32)
        if COUNTED:
            mark(marks_ptr, s, t, seen, S)
    largest = tl.max(m, axis=0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros([LIST], tl.float32)
    mass = tl.zeros([LIST], tl.float32)
    kl = tl.zeros([LIST], tl.float32)  # sum of p · (ln p - (I - largest))
    for j0 in range(0, last, LIST):
        s, seen = _visible(indices_ptr + at, j0 + i, k, start, end)
        score = tl.load(scores_ptr + at + j0 + i, seen, float("-inf")) - largest
        p = tl.load(p_ptr + at + j0 + i, seen, 0.0)
        total += tl.exp(score)
        mass += p
        kl += p * (tl.log(tl.where(p == 0, 1.0, p)) - tl.where(p == 0, 0.0, score))
    total, mass = tl.sum(total, axis=0), tl.sum(mass, axis=0)
    log_total = tl.log(tl.where(total == 0, 1.0, total))  # all I are -inf: softmax(I) is 0
    tl.store(kl_ptr + t, tl.sum(kl, axis=0) + log_total * mass)
    tl.store(alive_ptr + t, tl.max(any_seen, axis=0))
    if WANTED:
        for j0 in range(0, last, LIST):
            s, seen = _visible(indices_ptr + at, j0 + i, k, start, end)
            score = tl.load(scores_ptr + at + j0 + i, seen, 0.0)
            p = tl.load(p_ptr + at + j0 + i, seen, 0.0)
            of_score = tl.where(seen, tl.exp(score - (largest + log_total)) * mass - p, 0.0)
            tl.store(scores_ptr + at + j0 + i, of_score, j0 + i < k)


@triton.jit
def _weighted_queries(q_ptr, w, h, d, Hi: tl.constexpr, Di: tl.constexpr, GRAD: tl.constexpr):
    """w · q in these dims."""
    q = tl.load(q_ptr + h[:, None] * Di + d[None, :], (h < Hi)[:, None] & (d < Di)[None, :], 0.0)
    return round_to(q.to(tl.float32) * w[:, None], GRAD)


@triton.jit
def _store_shares(gated, weighted_q, shares_ptr, slot, d, Di: tl.constexpr):
    share = round_to(tl.dot(gated, weighted_q, input_precision="ieee"), shares_ptr.dtype.element_ty)
    place = slot[:, None].to(tl.int64) * Di + d[None, :]
    tl.store(shares_ptr + place, share, (slot >= 0)[:, None] & (d < Di)[None, :], cache_modifier=".cs")


@triton.jit
def _gradients(
    q_ptr, k_ptr, w_ptr, indices_ptr, start_ptr, end_ptr, of_scores_ptr, marks_ptr, before_ptr, bounds_ptr, slots_ptr,
    dq_ptr, dw_ptr, shares_ptr, S, k,
    Hi: tl.constexpr, Di: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr, LIST: tl.constexpr,
    DOT: tl.constexpr, GRAD: tl.constexpr, COUNTED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    start, end = tl.load(start_ptr + t), tl.load(end_ptr + t)
    last = tl.where(start < end, k, 0)
    h, d, i = tl.arange(0, HP), tl.arange(0, DP), tl.arange(0, LIST)
    at = t * k
    if COUNTED:
        for j0 in range(0, last, LIST):
            s, seen = _visible(indices_ptr + at, j0 + i, k, start, end)
            slots = slots_of(marks_ptr, before_ptr, bounds_ptr, s, t, seen, S)
            tl.store(slots_ptr + at + j0 + i, tl.where(seen, slots, -1), j0 + i < k)
        tl.debug_barrier()  # other threads read them

    q_ptr += t * Hi * Di
    row, q_there = h[:, None] * Di + d[None, :], (h < Hi)[:, None] & (d < Di)[None, :]
    q = tl.trans(tl.load(q_ptr + row, q_there, 0.0).to(DOT))
    w = tl.load(w_ptr + t * Hi + h, h < Hi, 0.0).to(tl.float32)
    d_left = tl.arange(0, DP // 2)  # shares are made in two halves of Di, to take half of the registers
    d_right = DP // 2 + d_left
    left = _weighted_queries(q_ptr, w, h, d_left, Hi, Di, GRAD)
    right = _weighted_queries(q_ptr, w, h, d_right, Hi, Di, GRAD)
    gathered = tl.zeros([HP, DP], tl.float32)  # G
    for j0 in tl.range(0, last, BK, num_stages=STAGES):
        j = j0 + tl.arange(0, BK)
        s, seen = _visible(indices_ptr + at, j, k, start, end)
        slot = tl.load(slots_ptr + at + j, j < k, -1) if COUNTED else tl.where(seen, at + j, -1)
        of_scores = tl.load(of_scores_ptr + at + j, j < k, 0.0)
        keys = _keys(k_ptr, s, seen, d, Di)
        dots = tl.dot(keys.to(DOT), q, input_precision="ieee")
        gated = round_to(tl.where(dots > 0, of_scores[:, None], 0.0), GRAD)
        gathered = tl.dot(tl.trans(gated), keys.to(GRAD), gathered, input_precision="ieee")
        _store_shares(gated, left, shares_ptr, slot, d_left, Di)
        _store_shares(gated, right, shares_ptr, slot, d_right, Di)
    # Rows that see nothing get zeros, whatever they hold.
    dq = tl.where(start < end, gathered * w[:, None], 0.0)
    tl.store(dq_ptr + t * Hi * Di + row, round_to(dq, dq_ptr.dtype.element_ty), q_there)
    dw = tl.where(start < end, tl.sum(gathered * tl.load(q_ptr + row, q_there, 0.0).to(tl.float32), axis=1), 0.0)
    tl.store(dw_ptr + t * Hi + h, round_to(dw, dw_ptr.dtype.element_ty), h < Hi)


def tiles(card, HP, DP, size):
    """(BK, warps, stages) for that card. HP, DP: heads and dims, powers of two; size: bytes of a number.

    Raises ValueError where not even the smallest tile fits into its shared memory.
    """
    if INTERPRETED:  # each operation costs the same whatever its size: few large tiles
        return 256, 4, 1
    BK, stages = (16, 1) if size == 4 else (64, 5)

    def shared_memory():
        return (2 * HP + stages * BK) * DP * size + 2 * BK * HP * size + BK * HP // 2 + 2048

    while shared_memory() > card.shared_memory:
        if stages > 1:
            stages -= 1
        elif BK > 16:
            BK //= 2
        else:
            raise ValueError(cards.too_wide("q_idx", f"{HP} heads of {DP} dims", shared_memory(), card))
    if HP <= 16 and size != 4:
        return BK, 1, stages
    return BK, 8 if size == 4 or HP > 128 or (HP > 32 and card.capability != cards.HOPPER) else 4, stages


def _launch_options(q_idx, k):
    Hi, Di = q_idx.shape[1:]
    HP, DP = max(next_power_of_2(Hi), 16), max(32, next_power_of_2(Di))
    dtype = dot_dtype(q_idx)
    BK, warps, stages = tiles(cards.card_of(q_idx), HP, DP, dtype.itemsize)
    LIST = next_power_of_2(k) if INTERPRETED else min(next_power_of_2(k), 512 * warps)
    sizes = {"Hi": Hi, "Di": Di, "HP": HP, "DP": DP, "BK": BK, "LIST": LIST}
    return sizes | {"DOT": getattr(tl, TRITON_NAMES[dtype]), "STAGES": stages, "num_warps": warps}


def rows(q_idx, k_idx, w, indices, start, end, p, wanted):
    """(KL and whether it sees a key of each row [T], dI fp32 [T, k], marks or None for `gradients`). p: fp32 [T, k].

    Without `wanted` there are no marks, and dI holds anything.
    """
    (T, k), S = indices.shape, len(k_idx)
    kl, scores = (torch.empty(shape, dtype=torch.float32, device=q_idx.device) for shape in ((T,), (T, k)))
    alive = torch.empty(T, dtype=torch.int32, device=q_idx.device)
    marks = no_marks(T, S, q_idx.device) if wanted and S <= 32 * k else None
    _rows[(T,)](
        q_idx, k_idx, w, indices, start, end, p, scores, alive if marks is None else marks, kl, alive, S, k,
        WANTED=wanted, COUNTED=marks is not None, **_launch_options(q_idx, k),
    )  # fmt: skip
    return kl, alive, scores, marks


def gradients(q_idx, k_idx, w, indices, start, end, of_scores, marks, dq, dw, shares):
    """Write dq [T, Hi, Di], dw [T, Hi], and to shares [T · k, Di] a row for each pair that is seen.

    Returns what `key_sums.sum_rows` asks of them: order, None where they lie in the order of the keys, and bounds.
    """
    (T, k), S = indices.shape, len(k_idx)
    if marks is None:
        seen = (indices >= start[:, None]) & (indices < end[:, None])
        order, bounds = places_by_sort(torch.where(seen, indices, -1), S)
        marks = before = slots = indices  # not looked at
    else:
        order, (before, bounds) = None, count_marks(marks)
        slots = torch.empty_like(indices)
    grad = tl.float32 if dot_dtype(q_idx).itemsize == 4 else tl.bfloat16
    _gradients[(T,)](
        q_idx, k_idx, w, indices, start, end, of_scores, marks, before, bounds, slots, dq, dw, shares, S, k,
        GRAD=grad, COUNTED=order is None, **_launch_options(q_idx, k),
    )  # fmt: skip
    return order, bounds
