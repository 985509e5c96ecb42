"""Rows that a fused kernel has flagged, scored and selected again: without luck, and without a host that counts them.

Schedule, launched whether there are flagged rows or not; what finds none ends at once:
1. `_list_flagged`, one program, writes the numbers of the flagged rows one after the other, and how many they are.
2. `_score_listed` scores some of the listed rows as the portable `index_scores` does, with the same tiles and so the
   same bits. A persistent grid shares the work once it has read how many there are: one row is cut into as many
   stretches of keys as there are programs, and many rows are not cut at all. Row j of the scores begins with the first
   key that its query sees.
3. `_choose_listed` plays each row's tournament, a program a chunk (`topk.tournament`).
2 and 3 come again until all rows could have had their turn; how many have one at a time follows from
`runtime.REDONE_AT_ONCE`.

FLOPs: 16,384 a pair of V3.2's sizes, as in the fused kernel, for blocks of four rows. Bytes: 4 written and read a
score.
"""

import torch
import triton
import triton.language as tl

from dsa_ref.contracts import values_readable

from . import cards, runtime
from .index_scores import TRITON_NAMES, tiles
from .rounding import operand
from .runtime import INTERPRETED, dot_dtype, multiprocessors
from .topk.tournament import play

CHUNK = 16384  # scores that a program of the tournament takes at once
PROGRAMS = 2  # of `_score_listed`, on a multiprocessor
SHORTEST = 8  # tiles of keys; a row is not cut into shorter stretches


@triton.jit(do_not_specialize=["T"])
def _list_flagged(redo_ptr, rows_ptr, count_ptr, T, BLOCK: tl.constexpr):
    count = tl.zeros([], tl.int32)
    for t0 in range(0, T, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        flagged = (tl.load(redo_ptr + t, t < T, 0) != 0).to(tl.int32)
        tl.store(rows_ptr + count + tl.cumsum(flagged, 0) - flagged, t, flagged != 0)
        count += tl.sum(flagged, 0)
    tl.store(count_ptr, count)


@triton.jit(do_not_specialize=["first", "at_once", "S"])
def _score_listed(
    q_ptr, k_ptr, w_ptr, k_scale_ptr, start_ptr, end_ptr, rows_ptr, count_ptr, out_ptr, nan_ptr, first, at_once, S,
    Hi, Di, stride,
    HP: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, SHORTEST: tl.constexpr,
    DOT: tl.constexpr, SCALED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scores of the listed rows first to first + at_once, each from its query's first key on; 1 to *nan for NaN."""
    rows = tl.minimum(tl.load(count_ptr) - first, at_once)
    blocks = tl.maximum(tl.cdiv(rows, BQ), 0)
    parts = tl.minimum(tl.num_programs(0) // tl.maximum(blocks, 1), tl.cdiv(S, SHORTEST * BK))
    stretch = tl.cdiv(tl.cdiv(S, tl.maximum(parts, 1)), BK) * BK
    parts = tl.cdiv(S, stretch)
    d, column = tl.arange(0, DP), tl.arange(0, BQ * HP)  # a column is a (query, head) pair
    h = column % HP
    for item in range(tl.program_id(0), blocks * parts, tl.num_programs(0)):
        j0 = item // parts * BQ
        j = j0 + tl.arange(0, BQ)
        t = tl.load(rows_ptr + first + j, j < rows, 0)
        start, end = tl.load(start_ptr + t, j < rows, S), tl.load(end_ptr + t, j < rows, 0)
        stretch_first = item % parts * stretch
        lowest = tl.maximum(tl.min(start, 0) // BK * BK, stretch_first)
        last = tl.minimum(tl.max(end, 0), tl.minimum(stretch_first + stretch, S))
        real = (j0 + column // HP < rows) & (h < Hi)
        row = tl.load(rows_ptr + first + j0 + column // HP, real, 0).to(tl.int64)
        q = tl.load(q_ptr + (row * Hi + h)[:, None] * Di + d[None, :], real[:, None] & (d < Di)[None, :], 0.0)
        q = tl.trans(operand(q, DOT))
        w = tl.load(w_ptr + row * Hi + h, real, 0.0).to(tl.float32)
        out_row = out_ptr + j.to(tl.int64) * stride - start
        nan = tl.zeros([BK, BQ], tl.int32)
        for s0 in tl.range(lowest, last, BK, num_stages=STAGES):
            s = s0 + tl.arange(0, BK)
            k = tl.load(k_ptr + s[:, None].to(tl.int64) * Di + d[None, :], (s < S)[:, None] & (d < Di)[None, :], 0.0)
            dots = tl.dot(operand(k, DOT), q, input_precision="ieee")
            weighted = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL) * w[None, :]
            scores = tl.sum(tl.reshape(weighted, [BK, BQ, HP]), axis=2)
            if SCALED:
                scores = scores * tl.load(k_scale_ptr + s, s < S, 0.0).to(tl.float32)[:, None]
            seen = (s[:, None] >= start[None, :]) & (s[:, None] < end[None, :]) & (s < stretch_first + stretch)[:, None]
            tl.store(out_row[None, :] + s[:, None], scores, seen)
            nan |= (seen & (scores != scores)).to(tl.int32)
        found = tl.max(nan, 0)
        tl.store(nan_ptr + t, found, (found != 0) & (j < rows))


@triton.jit(do_not_specialize=["first", "at_once"])
def _choose_listed(
    scores_ptr, pairs_ptr, start_ptr, end_ptr, rows_ptr, count_ptr, arrived_ptr, out_ptr, first, at_once, k, stride,
    ROWS: tl.constexpr, EACH: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Selections of the same rows. pairs_ptr: the scores' memory, as numbers of 8 bytes."""
    SIZE: tl.constexpr = ROWS * EACH
    rows, chunks = tl.minimum(tl.load(count_ptr) - first, at_once), stride // SIZE
    for item in range(tl.program_id(0), rows * chunks, tl.num_programs(0)):
        j = (item // chunks).to(tl.int64)
        t = tl.load(rows_ptr + first + j).to(tl.int64)
        start = tl.load(start_ptr + t)
        n = tl.maximum(tl.load(end_ptr + t) - start, 0)
        if item % chunks < tl.maximum(tl.cdiv(n, SIZE), 1):
            play(
                item % chunks, n, start, scores_ptr + j * stride, pairs_ptr + j * (stride // 2),
                arrived_ptr + j * (2 * chunks + 2), out_ptr + t * k, out_ptr, out_ptr, k, k, ROWS, EACH, KP, 0,
            )  # fmt: skip


def select_again(q_idx, k_idx, w, k, k_scale, start, end, redo, out, nan):
    """Write the selections of the rows whose redo, int32 [T], is not 0 to out, int32 [T, k]; 1 to nan, int32 [T], where
    one of them sees NaN.

    The arguments are checked; start, end and out are contiguous; T > 0, and k at most CHUNK / 2 and at most S. Where
    values can be read the host waits, and launches no more than it must.
    """
    (T, Hi, Di), S, device = q_idx.shape, len(k_idx), q_idx.device
    stride = triton.cdiv(S, CHUNK) * CHUNK
    at_once = min(T, max(1, runtime.REDONE_AT_ONCE // stride))
    turns = triton.cdiv(int((redo != 0).sum()) if values_readable(redo) else T, at_once)
    if turns == 0:
        return
    rows, count = torch.empty(T, dtype=torch.int32, device=device), torch.empty(1, dtype=torch.int32, device=device)
    _list_flagged[(1,)](redo, rows, count, T, BLOCK=4096, num_warps=8)
    scores = torch.empty(at_once, stride, device=device)
    arrived = torch.zeros(at_once * (2 * (stride // CHUNK) + 2), dtype=torch.int32, device=device)
    HP, DP, multiplied = triton.next_power_of_2(Hi), max(32, triton.next_power_of_2(Di)), dot_dtype(q_idx).itemsize
    if INTERPRETED:
        columns, BK, warps = 4 * HP, max(16, min(512, triton.next_power_of_2(S))), 4
    else:
        columns, BK, warps = tiles(cards.card_of(q_idx), HP, DP, q_idx.itemsize, multiplied)
    many = multiprocessors(q_idx)
    for first in range(0, turns * at_once, at_once):
        _score_listed[(PROGRAMS * many,)](
            q_idx.contiguous(), k_idx.contiguous(), w.contiguous(), w if k_scale is None else k_scale.contiguous(),
            start, end, rows, count, scores, nan, first, at_once, S, Hi, Di, stride,
            HP=HP, DP=DP, BQ=max(columns // HP, triton.cdiv(16, HP)), BK=BK, SHORTEST=SHORTEST,
            DOT=getattr(tl, TRITON_NAMES[dot_dtype(q_idx)]), SCALED=k_scale is not None, STAGES=3, num_warps=warps,
        )  # fmt: skip
        _choose_listed[(many,)](
            scores, scores.view(torch.int64), start, end, rows, count, arrived, out, first, at_once, k, stride,
            ROWS=CHUNK // 4, EACH=4, KP=max(16, triton.next_power_of_2(k)), num_warps=16, maxnreg=128,
        )  # fmt: skip
