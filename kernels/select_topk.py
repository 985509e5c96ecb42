"""Exact top-k of rows of any length: one read of the row for a short list, then an exact choice among its members.

Schedule of "sampled", which GPUs run: one program a row.

1. A sample of the row, runs of eight neighbours evenly spread, gives a bound that some more than k scores should reach.
2. One read of the row writes what is not below the bound into a list of at most CAP scores with their indices.
3. The list is in registers now. Its k-th largest score is found bit by bit; a prefix sum gives every kept index its
   place, and the smallest indices win ties.

A bound is luck; the count is not: a row whose list holds fewer than k scores, or more than CAP, is left to the second
kernel, "radix", which needs no luck. The interpreter runs that one alone, ROWS rows a program.

1. Radix select: four passes over the row fix the threshold's bytes from the top down. Each pass counts, among the
   scores that share the bytes known so far, the next byte, and steps into the bin where the k-th largest lies.
2. One pass writes the index of every score above the threshold, and of as many equal ones as are still wanted.

Both compare scores as integers of the same order (-0.0 first becomes 0.0). Bytes: 4 · S a row and the sample's for the
first, 5 · 4 · S for the second. NaN in a visible place raises, except while a CUDA graph is captured, when it counts as
larger than +inf (or smaller than -inf if its sign bit is set).
"""

import torch
import triton
import triton.language as tl

from dsa_ref.contracts import check_select_topk, values_readable

from .runtime import FLOATS, INTERPRETED, check_runnable

LARGEST_SAMPLED_K = 8192  # a list of twice as many must fit into a program's registers


@triton.jit
def _ordered(x):
    """fp32 to uint32 such that a < b as floats means a < b as integers."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _select_topk(
    scores_ptr, start_ptr, end_ptr, out_ptr, nan_ptr, redo_ptr, T, S, k,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, REDO: tl.constexpr,
):  # fmt: skip
    if REDO:  # the rows that `_select_sampled` could not do
        if tl.load(redo_ptr + tl.program_id(0)) == 0:
            return
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


@triton.jit
def _threshold(keys, wanted):
    """The largest key that at least `wanted` of the keys reach, found bit by bit; keys are uint32, 0 is nobody's."""
    threshold, bit = tl.full([], 0, tl.uint32), tl.full([], 1 << 31, tl.uint32)
    for _ in range(32):
        reached = tl.sum((keys >= (threshold | bit)).to(tl.int32), axis=0)
        threshold = tl.where(reached >= wanted, threshold | bit, threshold)
        bit >>= 1
    return threshold


@triton.jit
def _from_ordered(key):
    """What `_ordered` was made from."""
    bits = key.to(tl.int32, bitcast=True)
    return (bits ^ (((bits ^ -2147483648) >> 31) | -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def bound_of_sample(sample, real, rank):
    """The rank-th largest of the real scores of a sample, -inf if it has fewer."""
    key = tl.where(real, _ordered(sample), tl.zeros_like(sample).to(tl.uint32))
    threshold = _threshold(key, rank)
    return tl.where(threshold == 0, float("-inf"), _from_ordered(threshold))


@triton.jit
def keep_largest(x, s, used, wanted, k, offset, out_ptr, nan_ptr):
    """Write offset + s of the `wanted` largest of the used scores x, of equal ones the smallest s, then -1 up to k.

    x, s, used: one block of a list, in any order. *nan_ptr becomes 1 if a used score is NaN, else 0.
    """
    tl.store(nan_ptr, tl.max(((x != x) & used).to(tl.int32), axis=0))
    key = tl.where(used, _ordered(x), tl.zeros_like(s).to(tl.uint32))
    threshold = _threshold(key, wanted)
    above, tied = key > threshold, (key == threshold) & used
    room = wanted - tl.sum(above.to(tl.int32), axis=0)
    if tl.sum(tied.to(tl.int32), axis=0) > room:
        early = tl.where(tied, ~s.to(tl.uint32), tl.zeros_like(key))
        tied = tied & (early >= _threshold(early, room)) & (room > 0)
    kept = above | tied
    place = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(out_ptr + place, offset + s, kept)
    for place0 in range(wanted, k, 1024):
        rest = place0 + tl.arange(0, 1024)
        tl.store(out_ptr + rest, tl.full([1024], -1, tl.int32), rest < k)


@triton.jit
def _select_sampled(
    scores_ptr, start_ptr, end_ptr, out_ptr, nan_ptr, redo_ptr, value_ptr, index_ptr, S, k,
    SAMPLE: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    start, end = tl.load(start_ptr + t), tl.load(end_ptr + t)
    n = end - start
    wanted = tl.maximum(tl.minimum(k, n), 0)
    row = scores_ptr + t * S + start

    # A bound that some more than k scores of the row should reach, from evenly spread runs of eight neighbours.
    bound = tl.full([], float("-inf"), tl.float32)
    if n > CAP:
        j = tl.arange(0, SAMPLE)
        place = ((j // 8).to(tl.int64) * n // (SAMPLE // 8)).to(tl.int32) + j % 8
        sample = tl.load(row + place, place < n, float("-inf")).to(tl.float32)
        rank = (tl.sqrt(1.0 * k * CAP) * SAMPLE / n).to(tl.int32) + 1  # midway, as ratios go, between k and CAP
        bound = bound_of_sample(sample, j >= 0, rank)

    # One read of the row: whatever is not below the bound (NaN is not) goes to this row's list, in order.
    values, places = value_ptr + t * CAP, index_ptr + t * CAP
    count = tl.zeros([], tl.int32)
    for s0 in range(0, n, BLOCK):
        s = s0 + tl.arange(0, BLOCK)
        x = tl.load(row + s, s < n, float("-inf")).to(tl.float32)
        kept = ((x >= bound) | (x != x)) & (s < n)
        place = count + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(values + place, x, kept & (place < CAP))
        tl.store(places + place, s, kept & (place < CAP))
        count += tl.sum(kept.to(tl.int32), axis=0)
    redo = (count < wanted) | (count > CAP)
    tl.store(redo_ptr + t, redo.to(tl.int32))

    # The exact threshold among the list, and the ties in the order of their index.
    if redo == 0:
        tl.debug_barrier()
        c = tl.arange(0, CAP)
        x = tl.load(values + c, c < count, 0.0)
        s = tl.load(places + c, c < count, 0)
        keep_largest(x, s, c < count, wanted, k, start, out_ptr + t * k, nan_ptr + t)


def select_topk(scores, k, start=None, end=None):
    """`dsa_ref.select_topk`, exact for rows of any length. Indices happen to ascend; do not rely on it.

    Takes fp32, bf16 and fp16 scores. Raises as the reference does (fp64 is a TypeError here), and as
    `runtime.check_runnable` does.
    """
    _, _, start, end = check_select_topk(scores, k, start, end, FLOATS)
    check_runnable(scores=scores.detach())
    return launch(scores, k, start, end)


def launch(scores, k, start, end, variant=None, out=None, redo=None):
    """Run the kernels on checked arguments. variant: "sampled" or "radix"; None picks the faster one.

    With redo, int32 [T], and out, only rows whose redo is not 0 are written, by "radix".
    """
    T, S = scores.shape
    scores, start, end = scores.detach().contiguous(), start.contiguous(), end.contiguous()
    flagged = redo is not None
    out = torch.empty(T, k, dtype=torch.int32, device=scores.device) if out is None else out
    nan = torch.zeros(T, dtype=torch.int32, device=scores.device)
    if T == 0:
        return out
    sampled = variant == "sampled" if variant else not INTERPRETED and k <= LARGEST_SAMPLED_K
    sampled = sampled and not flagged
    redo = redo if flagged else torch.empty_like(nan)
    if sampled:
        long = S > 1 << 18  # then a larger sample, for as safe a bound, and room for its larger error
        cap = max(16384 if long else 4096, 2 * triton.next_power_of_2(k))
        values = torch.empty(T, cap, dtype=torch.float32, device=scores.device)
        indices = torch.empty(T, cap, dtype=torch.int32, device=scores.device)
        _select_sampled[(T,)](
            scores, start, end, out, nan, redo, values, indices, S, k,
            SAMPLE=32768 if long else 8192, CAP=cap, BLOCK=2048, num_warps=4 if cap == 4096 else 16,
        )  # fmt: skip
    block = min(triton.next_power_of_2(S), 65536 if INTERPRETED else 4096)
    many = INTERPRETED and not sampled and not flagged
    rows = min(triton.next_power_of_2(T), max(1, 262144 // block)) if many else 1
    _select_topk[(triton.cdiv(T, rows),)](
        scores, start, end, out, nan, redo, T, S, k, ROWS=rows, BLOCK=block, REDO=sampled or flagged, num_warps=8,
    )  # fmt: skip
    if values_readable(nan) and nan.any():
        raise ValueError(f"scores must not be NaN, got NaN in row {int(nan.nonzero()[0])}")
    return out
