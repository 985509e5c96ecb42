"""Radix select: exact without luck, for any k and any scores. Four passes fix the threshold, a fifth writes.

Schedule: a program takes a row (in the interpreter ROWS of them) and reads it in blocks of BLOCK scores.
1. Four passes fix the threshold's bytes from the top down. Each counts, in a histogram of 256 bins, the next byte of
   the scores that share the bytes known so far, and steps into the bin where the k-th largest lies.
2. A fifth pass writes the index of every score above the threshold, and of as many equal ones as are still wanted, in
   ascending order: a prefix sum gives each its place.

Bytes: 5 * 4 * S a row in fp32, and 4 * k written. It is what the interpreter runs, what serves k above 8192, and what
redoes the rows that the algorithms with a sampled bound have flagged.
"""

import triton
import triton.language as tl

from ..runtime import INTERPRETED, cdiv, multiprocessors, next_power_of_2
from .ordering import ordered

PROGRAMS = 8  # of a redo, on a multiprocessor


@triton.jit
def _radix(
    block, scores_ptr, start_ptr, end_ptr, out_ptr, nan_ptr, T, S, k, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Select for the ROWS rows from block * ROWS on."""
    row = tl.arange(0, ROWS)
    t = block.to(tl.int64) * ROWS + row
    start, end = tl.load(start_ptr + t, t < T, S), tl.load(end_ptr + t, t < T, 0)
    first, last = tl.min(start, axis=0), tl.max(end, axis=0)
    scores_row, out_row = scores_ptr + (t * S)[:, None], out_ptr + (t * k)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]

    # The threshold's bytes, from the top; `wanted` more keys are to be found among those that share them.
    wanted = tl.maximum(tl.minimum(k, end - start), 0)
    threshold = tl.zeros([ROWS], tl.uint32)
    nan = tl.zeros([ROWS], tl.int32)
    for i in tl.static_range(4):
        counts = tl.zeros([ROWS * 256], tl.int32)
        for s0 in range(first, last, BLOCK):
            s = s0 + lane
            visible = (s >= start[:, None]) & (s < end[:, None])
            x = tl.load(scores_row + s, visible, 0.0).to(tl.float32)
            if i == 0:
                nan = tl.maximum(nan, tl.max((x != x).to(tl.int32), axis=1))
                candidate = visible
            else:
                candidate = visible & ((ordered(x) >> (32 - 8 * i)) == (threshold >> (32 - 8 * i))[:, None])
            byte = ((ordered(x) >> (24 - 8 * i)) & 0xFF).to(tl.int32)
            bins = tl.reshape(row[:, None] * 256 + byte, [ROWS * BLOCK])  # a histogram for each row
            counts += tl.histogram(bins, ROWS * 256, mask=tl.reshape(candidate, [ROWS * BLOCK]))
        table = tl.reshape(counts, [ROWS, 256])
        at_least = tl.sum(table, axis=1)[:, None] - tl.cumsum(table, axis=1) + table  # in this bin or a higher one
        chosen = tl.maximum(tl.sum((at_least >= wanted[:, None]).to(tl.int32), axis=1) - 1, 0)
        wanted -= tl.sum(tl.where(tl.arange(0, 256)[None, :] > chosen[:, None], table, 0), axis=1)
        threshold |= chosen.to(tl.uint32) << (24 - 8 * i)
    tl.store(nan_ptr + t, nan, t < T)

    # `wanted` is now how many of the scores equal to the threshold are kept.
    written, tied = tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32)
    for s0 in range(first, last, BLOCK):
        s = s0 + lane
        visible = (s >= start[:, None]) & (s < end[:, None])
        key = ordered(tl.load(scores_row + s, visible, 0.0).to(tl.float32))
        equal = (visible & (key == threshold[:, None])).to(tl.int32)
        early = tied[:, None] + tl.cumsum(equal, axis=1) <= wanted[:, None]
        kept = ((visible & (key > threshold[:, None])) | ((equal != 0) & early)).to(tl.int32)
        place = written[:, None] + tl.cumsum(kept, axis=1) - 1
        tl.store(out_row + place, s + tl.zeros_like(place), kept != 0)
        written += tl.sum(kept, axis=1)
        tied += tl.sum(equal, axis=1)
    for place0 in range(tl.min(written, axis=0), k, BLOCK):
        place = place0 + lane
        rest = (place >= written[:, None]) & (place < k) & (t < T)[:, None]
        tl.store(out_row + place, tl.full([ROWS, BLOCK], -1, tl.int32), rest)


@triton.jit
def _select_topk(
    scores_ptr, start_ptr, end_ptr, out_ptr, nan_ptr, redo_ptr, T, S, k,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, REDO: tl.constexpr,
):  # fmt: skip
    if REDO:  # the rows, few, that a faster kernel could not do
        for row in range(tl.program_id(0), T, tl.num_programs(0)):
            t = row + tl.zeros([], tl.int64)  # the interpreter's row is a plain int
            if tl.load(redo_ptr + t) != 0:
                _radix(t, scores_ptr, start_ptr, end_ptr, out_ptr, nan_ptr, T, S, k, 1, BLOCK)
    else:
        _radix(tl.program_id(0), scores_ptr, start_ptr, end_ptr, out_ptr, nan_ptr, T, S, k, ROWS, BLOCK)


def launch(scores, k, start, end, out, nan, redo=None):
    """Write the selection of all T rows, or of those whose redo, int32 [T], is not 0, to out, int32 [T, k].

    nan, int32 [T], becomes 1 or 0 for each row written: whether it sees NaN. All tensors are contiguous; T > 0.
    """
    T, S = scores.shape
    block = min(next_power_of_2(S), 65536) if INTERPRETED else 1024 if S <= 1024 else 4096
    rows, programs = 1, T
    if redo is not None:
        programs = min(T, PROGRAMS * multiprocessors(scores))
    elif INTERPRETED:  # each operation costs the same whatever its size: few large blocks
        rows = min(next_power_of_2(T), max(1, 262144 // block))
        programs = cdiv(T, rows)
    _select_topk[(programs,)](
        scores, start, end, out, nan, nan if redo is None else redo, T, S, k,
        ROWS=rows, BLOCK=block, REDO=redo is not None, num_warps=8,
    )  # fmt: skip
