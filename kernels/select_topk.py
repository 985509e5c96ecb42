"""Exact top-k of rows of any length: find the k-th largest score by its bits, then keep what reaches it.

Schedule: one program a row (or ROWS of them, which only the interpreter does), five reads of it, nothing kept in
between but 256 counters.

1. A score's bits are mapped to integers of the same order (-0.0 first becomes 0.0).
2. Radix select: four passes fix the threshold's bytes from the top down. Each pass counts, among the scores that share
   the bytes known so far, the next byte, and steps into the bin where the k-th largest lies.
3. One pass writes the index of every score above the threshold, and of as many equal ones as are still wanted, in
   ascending order: a running count and a prefix sum give each its place. So the smallest indices win ties.

Bytes: 5 · 4 · S a row, where one read is the floor; a row that L2 still holds pays less. NaN in a visible place raises,
except while a CUDA graph is captured, when it counts as larger than +inf (or smaller than -inf if its sign bit is set).
"""

import torch
import triton
import triton.language as tl

from dsa_ref.contracts import check_select_topk, values_readable

from .runtime import FLOATS, INTERPRETED, check_runnable


@triton.jit
def _ordered(x):
    """fp32 to uint32 such that a < b as floats means a < b as integers."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _select_topk(scores_ptr, start_ptr, end_ptr, out_ptr, nan_ptr, T, S, k, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.arange(0, ROWS)
    t = tl.program_id(0).to(tl.int64) * ROWS + row
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
                candidate = visible & ((_ordered(x) >> (32 - 8 * i)) == (threshold >> (32 - 8 * i))[:, None])
            byte = ((_ordered(x) >> (24 - 8 * i)) & 0xFF).to(tl.int32)
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
        key = _ordered(tl.load(scores_row + s, visible, 0.0).to(tl.float32))
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


def select_topk(scores, k, start=None, end=None):
    """`dsa_ref.select_topk`, exact for rows of any length. Indices happen to ascend; do not rely on it.

    Takes fp32, bf16 and fp16 scores. Raises as the reference does (fp64 is a TypeError here), and as
    `runtime.check_runnable` does.
    """
    _, _, start, end = check_select_topk(scores, k, start, end, FLOATS)
    check_runnable(scores=scores.detach())
    return launch(scores, k, start, end)


def launch(scores, k, start, end):
    """Run the kernel on checked arguments."""
    T, S = scores.shape
    out = torch.empty(T, k, dtype=torch.int32, device=scores.device)
    nan = torch.empty(T, dtype=torch.int32, device=scores.device)
    if T == 0:
        return out
    block = min(triton.next_power_of_2(S), 65536 if INTERPRETED else 4096)
    rows = min(triton.next_power_of_2(T), max(1, 262144 // block)) if INTERPRETED else 1
    _select_topk[(triton.cdiv(T, rows),)](
        scores.detach().contiguous(), start.contiguous(), end.contiguous(), out, nan, T, S, k,
        ROWS=rows, BLOCK=block, num_warps=8,
    )  # fmt: skip
    if values_readable(nan) and nan.any():
        raise ValueError(f"scores must not be NaN, got NaN in row {int(nan.nonzero()[0])}")
    return out
