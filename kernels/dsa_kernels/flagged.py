"""Rows that a fused kernel has flagged, scored and selected again: without luck, and without a host that counts them.

Schedule, launched whether there are flagged rows or not; what finds none ends at once:
1. `_list_flagged`, one program, writes the numbers of the flagged rows one after the other, and how many they are.
2. `_score_listed` scores some of the listed rows as the portable `index_scores` does, with the same tiles and so the
   same bits. A persistent grid shares the work once it has read how many there are: one row is cut into as many
   stretches of keys as there are programs, and many rows are not cut at all. Row j of the scores begins with the first
   key that its query sees.
3. `_guess_listed` selects in them where they are many, a program a row, as `topk.sampled` does: one read, a bound that
   may be wrong, and a count that says so.
4. `_choose_listed` plays the others' tournaments, a program a chunk (`topk.tournament`): it needs no luck, and spreads
   few rows over the card.
2 to 4 come again until all rows could have had their turn; how many have one at a time follows from
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
from .runtime import INTERPRETED, cdiv, dot_dtype, multiprocessors, next_power_of_2
from .topk import sampled
from .topk.sampled import select_row
from .topk.tournament import play

CHUNK = 16384  # scores that a program of the tournament takes at once
PROGRAMS = 2  # of `_score_listed`, on a multiprocessor
GUESSING = 32  # warps of `_guess_listed` on a multiprocessor
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


@triton.jit(do_not_specialize=["first", "at_once", "many"])
def _guess_listed(
    scores_ptr, start_ptr, end_ptr, rows_ptr, count_ptr, values_ptr, places_ptr, out_ptr, nan_ptr, again_ptr,
    first, at_once, many, k, stride, SAMPLE: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Selections of the same rows where they are at least `many`, but for those that again_ptr, int32 [at_once], is
    told of."""
    rows = tl.minimum(tl.load(count_ptr) - first, at_once)
    if rows >= many:
        values, places = values_ptr + tl.program_id(0) * CAP, places_ptr + tl.program_id(0) * CAP
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            j = row + tl.zeros([], tl.int64)  # the interpreter's row is a plain int
            t = tl.load(rows_ptr + first + j).to(tl.int64)
            start = tl.load(start_ptr + t)
            select_row(
                scores_ptr + j * stride, start, tl.load(end_ptr + t) - start, k, values, places, out_ptr + t * k,
                nan_ptr + t, again_ptr + j, SAMPLE, CAP, BLOCK,
            )  # fmt: skip
            tl.debug_barrier()  # the next row's list lies where all threads must have read this one's


@triton.jit(do_not_specialize=["first", "at_once", "many"])
def _choose_listed(
    scores_ptr, pairs_ptr, start_ptr, end_ptr, rows_ptr, count_ptr, arrived_ptr, out_ptr, again_ptr,
    first, at_once, many, k, stride, ROWS: tl.constexpr, EACH: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Selections of the same rows, or of those that the guess has left. pairs_ptr: the scores' memory, as numbers of 8
    bytes."""
    SIZE: tl.constexpr = ROWS * EACH
    rows, chunks = tl.minimum(tl.load(count_ptr) - first, at_once), stride // SIZE
    for item in range(tl.program_id(0), rows * chunks, tl.num_programs(0)):
        j = (item // chunks).to(tl.int64)
        t = tl.load(rows_ptr + first + j).to(tl.int64)
        start = tl.load(start_ptr + t)
        n = tl.maximum(tl.load(end_ptr + t) - start, 0)
        left = rows < many
        if rows >= many:
            left = tl.load(again_ptr + j) != 0
        if left & (item % chunks < tl.maximum(tl.cdiv(n, SIZE), 1)):
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
    stride = cdiv(S, CHUNK) * CHUNK
    at_once = min(T, max(1, runtime.REDONE_AT_ONCE // stride))
    turns = cdiv(int((redo != 0).sum()) if values_readable(redo) else T, at_once)
    if turns == 0:
        return
    rows, count = torch.empty(T, dtype=torch.int32, device=device), torch.empty(1, dtype=torch.int32, device=device)
    _list_flagged[(1,)](redo, rows, count, T, BLOCK=4096, num_warps=8)
    scores = torch.empty(at_once, stride, device=device)
    arrived = torch.zeros(at_once * (2 * (stride // CHUNK) + 2), dtype=torch.int32, device=device)
    HP, DP, multiplied = next_power_of_2(Hi), max(32, next_power_of_2(Di)), dot_dtype(q_idx).itemsize
    if INTERPRETED:
        columns, BK, warps = 4 * HP, max(16, min(512, next_power_of_2(S))), 4
    else:
        columns, BK, warps = tiles(cards.card_of(q_idx), HP, DP, q_idx.itemsize, multiplied)
    many = multiprocessors(q_idx)
    sample, cap, guess_warps = sampled.sizes(S, k)
    guessing = many * (GUESSING // guess_warps)
    values, places = (torch.empty(guessing * cap, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32))
    again = torch.empty(at_once, dtype=torch.int32, device=device)
    for first in range(0, turns * at_once, at_once):
        _score_listed[(PROGRAMS * many,)](
            q_idx.contiguous(), k_idx.contiguous(), w.contiguous(), w if k_scale is None else k_scale.contiguous(),
            start, end, rows, count, scores, nan, first, at_once, S, Hi, Di, stride,
            HP=HP, DP=DP, BQ=max(columns // HP, cdiv(16, HP)), BK=BK, SHORTEST=SHORTEST,
            DOT=getattr(tl, TRITON_NAMES[dot_dtype(q_idx)]), SCALED=k_scale is not None, STAGES=3, num_warps=warps,
        )  # fmt: skip
        _guess_listed[(guessing,)](
            scores, start, end, rows, count, values, places, out, nan, again, first, at_once, many // 2 + 1, k, stride,
            SAMPLE=sample, CAP=cap, BLOCK=2048, num_warps=guess_warps,
        )  # fmt: skip
        _choose_listed[(many,)](
            scores, scores.view(torch.int64), start, end, rows, count, arrived, out, again,
            first, at_once, many // 2 + 1, k, stride,
            ROWS=CHUNK // 4, EACH=4, KP=max(16, next_power_of_2(k)), num_warps=16, maxnreg=128,
        )  # fmt: skip
