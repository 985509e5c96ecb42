"""Notebook 10, the selection kernel. The names say what is wrong."""

from . import wrong
from ._triton import INTERPRETED, jit, tl


@wrong("selection_kernel", "runs")
def not_a_kernel(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK):
    return out_ptr


@wrong("selection_kernel", "runs")
@jit
def arange_of_k(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
    place = tl.arange(0, k)
    tl.store(out_ptr + place, tl.full([k], -1, tl.int32))


@wrong("selection_kernel", "one block")
@jit
def prefix_sum_without_minus_one(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
    threshold, lane = tl.load(threshold_ptr), tl.arange(0, BLOCK)
    written = 0
    for s0 in range(0, S, BLOCK):
        s = s0 + lane
        x = tl.load(scores_ptr + s, s < S, 0.0)
        kept = ((s < S) & (x >= threshold)).to(tl.int32)
        tl.store(out_ptr + written + tl.cumsum(kept, axis=0), s, kept != 0)
        written += tl.sum(kept, axis=0)


@wrong("selection_kernel", "one block")
@jit
def threshold_itself_left_out(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
    threshold, lane = tl.load(threshold_ptr), tl.arange(0, BLOCK)
    written = 0
    for s0 in range(0, S, BLOCK):
        s = s0 + lane
        x = tl.load(scores_ptr + s, s < S, 0.0)
        kept = ((s < S) & (x > threshold)).to(tl.int32)
        tl.store(out_ptr + written + tl.cumsum(kept, axis=0) - 1, s, kept != 0)
        written += tl.sum(kept, axis=0)
    for p0 in range(written, k, BLOCK):
        tl.store(out_ptr + p0 + lane, tl.full([BLOCK], -1, tl.int32), p0 + lane < k)


@wrong("selection_kernel", "one block")
@jit
def scores_written_where_they_stand(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
    threshold, lane = tl.load(threshold_ptr), tl.arange(0, BLOCK)
    for s0 in range(0, S, BLOCK):
        s = s0 + lane
        x = tl.load(scores_ptr + s, s < S, 0.0)
        tl.store(out_ptr + s, tl.where(x >= threshold, s, -1), s < k)


@wrong("selection_kernel", "one block")
@jit
def ties_before_the_rest(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
    threshold, ties, lane = tl.load(threshold_ptr), tl.load(ties_ptr), tl.arange(0, BLOCK)
    tied, written = 0, ties
    for s0 in range(0, S, BLOCK):
        s = s0 + lane
        x = tl.load(scores_ptr + s, s < S, 0.0)
        equal = ((s < S) & (x == threshold)).to(tl.int32)
        place = tied + tl.cumsum(equal, axis=0) - 1
        tl.store(out_ptr + place, s, (equal != 0) & (place < ties))
        above = ((s < S) & (x > threshold)).to(tl.int32)
        tl.store(out_ptr + written + tl.cumsum(above, axis=0) - 1, s, above != 0)
        tied += tl.sum(equal, axis=0)
        written += tl.sum(above, axis=0)
    for p0 in range(written, k, BLOCK):
        tl.store(out_ptr + p0 + lane, tl.full([BLOCK], -1, tl.int32), p0 + lane < k)


@wrong("selection_kernel", "one block")
@jit
def compared_in_half_precision(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
    threshold, ties, lane = tl.load(threshold_ptr).to(tl.float16), tl.load(ties_ptr), tl.arange(0, BLOCK)
    written, tied = 0, 0
    for s0 in range(0, S, BLOCK):
        s = s0 + lane
        x = tl.load(scores_ptr + s, s < S, 0.0).to(tl.float16)
        equal = ((s < S) & (x == threshold)).to(tl.int32)
        early = (equal != 0) & (tied + tl.cumsum(equal, axis=0) <= ties)
        kept = (((s < S) & (x > threshold)) | early).to(tl.int32)
        tl.store(out_ptr + written + tl.cumsum(kept, axis=0) - 1, s, kept != 0)
        written += tl.sum(kept, axis=0)
        tied += tl.sum(equal, axis=0)
    for p0 in range(written, k, BLOCK):
        tl.store(out_ptr + p0 + lane, tl.full([BLOCK], -1, tl.int32), p0 + lane < k)


@wrong("selection_kernel", "padding")
@jit
def no_padding(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
    threshold, lane = tl.load(threshold_ptr), tl.arange(0, BLOCK)
    written = 0
    for s0 in range(0, S, BLOCK):
        s = s0 + lane
        x = tl.load(scores_ptr + s, s < S, 0.0)
        kept = ((s < S) & (x >= threshold)).to(tl.int32)
        tl.store(out_ptr + written + tl.cumsum(kept, axis=0) - 1, s, kept != 0)
        written += tl.sum(kept, axis=0)


@wrong("selection_kernel", "padding")
@jit
def one_block_of_padding(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
    threshold, ties, lane = tl.load(threshold_ptr), tl.load(ties_ptr), tl.arange(0, BLOCK)
    written, tied = 0, 0
    for s0 in range(0, S, BLOCK):
        s = s0 + lane
        x = tl.load(scores_ptr + s, s < S, 0.0)
        equal = ((s < S) & (x == threshold)).to(tl.int32)
        early = (equal != 0) & (tied + tl.cumsum(equal, axis=0) <= ties)
        kept = (((s < S) & (x > threshold)) | early).to(tl.int32)
        tl.store(out_ptr + written + tl.cumsum(kept, axis=0) - 1, s, kept != 0)
        written += tl.sum(kept, axis=0)
        tied += tl.sum(equal, axis=0)
    tl.store(out_ptr + written + lane, tl.full([BLOCK], -1, tl.int32), written + lane < k)


@wrong("selection_kernel", "padding")
@jit
def padded_with_zeros(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
    threshold, lane = tl.load(threshold_ptr), tl.arange(0, BLOCK)
    for p0 in range(0, k, BLOCK):
        tl.store(out_ptr + p0 + lane, tl.full([BLOCK], 0, tl.int32), p0 + lane < k)
    written = 0
    for s0 in range(0, S, BLOCK):
        s = s0 + lane
        x = tl.load(scores_ptr + s, s < S, 0.0)
        kept = ((s < S) & (x >= threshold)).to(tl.int32)
        tl.store(out_ptr + written + tl.cumsum(kept, axis=0) - 1, s, kept != 0)
        written += tl.sum(kept, axis=0)


@wrong("selection_kernel", "padding")
@jit
def padding_without_a_mask(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
    threshold, lane = tl.load(threshold_ptr), tl.arange(0, BLOCK)
    written = 0
    for s0 in range(0, S, BLOCK):
        s = s0 + lane
        x = tl.load(scores_ptr + s, s < S, 0.0)
        kept = ((s < S) & (x >= threshold)).to(tl.int32)
        tl.store(out_ptr + written + tl.cumsum(kept, axis=0) - 1, s, kept != 0)
        written += tl.sum(kept, axis=0)
    for p0 in range(written, k, BLOCK):
        tl.store(out_ptr + p0 + lane, tl.full([BLOCK], -1, tl.int32))


@wrong("selection_kernel", "tail")
@jit
def no_tail_mask(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
    threshold, ties, lane = tl.load(threshold_ptr), tl.load(ties_ptr), tl.arange(0, BLOCK)
    written, tied = 0, 0
    for s0 in range(0, S, BLOCK):
        s = s0 + lane
        x = tl.load(scores_ptr + s)
        equal = (x == threshold).to(tl.int32)
        early = (equal != 0) & (tied + tl.cumsum(equal, axis=0) <= ties)
        kept = ((x > threshold) | early).to(tl.int32)
        place = written + tl.cumsum(kept, axis=0) - 1
        tl.store(out_ptr + place, s, (kept != 0) & (place < k))
        written += tl.sum(kept, axis=0)
        tied += tl.sum(equal, axis=0)
    for p0 in range(written, k, BLOCK):
        tl.store(out_ptr + p0 + lane, tl.full([BLOCK], -1, tl.int32), p0 + lane < k)


@wrong("selection_kernel", "tail")
@jit
def missing_lanes_hold_zero(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
    threshold, ties, lane = tl.load(threshold_ptr), tl.load(ties_ptr), tl.arange(0, BLOCK)
    written, tied = 0, 0
    for s0 in range(0, S, BLOCK):
        s = s0 + lane
        x = tl.load(scores_ptr + s, s < S, 0.0)
        equal = (x == threshold).to(tl.int32)
        early = (equal != 0) & (tied + tl.cumsum(equal, axis=0) <= ties)
        kept = ((x > threshold) | early).to(tl.int32)
        place = written + tl.cumsum(kept, axis=0) - 1
        tl.store(out_ptr + place, s, (kept != 0) & (place < k))
        written += tl.sum(kept, axis=0)
        tied += tl.sum(equal, axis=0)
    for p0 in range(written, k, BLOCK):
        tl.store(out_ptr + p0 + lane, tl.full([BLOCK], -1, tl.int32), p0 + lane < k)


@wrong("selection_kernel", "tail")
@jit
def whole_blocks_only(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
    threshold, ties, lane = tl.load(threshold_ptr), tl.load(ties_ptr), tl.arange(0, BLOCK)
    written, tied = 0, 0
    for block in range(S // BLOCK):
        s = block * BLOCK + lane
        x = tl.load(scores_ptr + s)
        equal = (x == threshold).to(tl.int32)
        early = (equal != 0) & (tied + tl.cumsum(equal, axis=0) <= ties)
        kept = ((x > threshold) | early).to(tl.int32)
        tl.store(out_ptr + written + tl.cumsum(kept, axis=0) - 1, s, kept != 0)
        written += tl.sum(kept, axis=0)
        tied += tl.sum(equal, axis=0)
    for p0 in range(written, k, BLOCK):
        tl.store(out_ptr + p0 + lane, tl.full([BLOCK], -1, tl.int32), p0 + lane < k)


if INTERPRETED:  # a read that no result shows is seen by the interpreter alone

    @wrong("selection_kernel", "bounds")
    @jit
    def only_the_comparison_masked(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
        threshold, ties, lane = tl.load(threshold_ptr), tl.load(ties_ptr), tl.arange(0, BLOCK)
        written, tied = 0, 0
        for s0 in range(0, S, BLOCK):
            s = s0 + lane
            x = tl.load(scores_ptr + s)
            equal = ((s < S) & (x == threshold)).to(tl.int32)
            early = (equal != 0) & (tied + tl.cumsum(equal, axis=0) <= ties)
            kept = (((s < S) & (x > threshold)) | early).to(tl.int32)
            tl.store(out_ptr + written + tl.cumsum(kept, axis=0) - 1, s, kept != 0)
            written += tl.sum(kept, axis=0)
            tied += tl.sum(equal, axis=0)
        for p0 in range(written, k, BLOCK):
            tl.store(out_ptr + p0 + lane, tl.full([BLOCK], -1, tl.int32), p0 + lane < k)


@wrong("selection_kernel", "carry")
@jit
def prefix_sum_of_the_block_alone(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
    threshold, ties, lane = tl.load(threshold_ptr), tl.load(ties_ptr), tl.arange(0, BLOCK)
    for p0 in range(0, k, BLOCK):
        tl.store(out_ptr + p0 + lane, tl.full([BLOCK], -1, tl.int32), p0 + lane < k)
    tied = 0
    for s0 in range(0, S, BLOCK):
        s = s0 + lane
        x = tl.load(scores_ptr + s, s < S, 0.0)
        equal = ((s < S) & (x == threshold)).to(tl.int32)
        early = (equal != 0) & (tied + tl.cumsum(equal, axis=0) <= ties)
        kept = (((s < S) & (x > threshold)) | early).to(tl.int32)
        tl.store(out_ptr + tl.cumsum(kept, axis=0) - 1, s, kept != 0)
        tied += tl.sum(equal, axis=0)


@wrong("selection_kernel", "carry")
@jit
def only_the_last_block_carried(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
    threshold, ties, lane = tl.load(threshold_ptr), tl.load(ties_ptr), tl.arange(0, BLOCK)
    written, tied = tl.full((), 0, tl.int32), 0
    for s0 in range(0, S, BLOCK):
        s = s0 + lane
        x = tl.load(scores_ptr + s, s < S, 0.0)
        equal = ((s < S) & (x == threshold)).to(tl.int32)
        early = (equal != 0) & (tied + tl.cumsum(equal, axis=0) <= ties)
        kept = (((s < S) & (x > threshold)) | early).to(tl.int32)
        tl.store(out_ptr + written + tl.cumsum(kept, axis=0) - 1, s, kept != 0)
        written = tl.sum(kept, axis=0)
        tied += tl.sum(equal, axis=0)
    for p0 in range(written, k, BLOCK):
        tl.store(out_ptr + p0 + lane, tl.full([BLOCK], -1, tl.int32), p0 + lane < k)


@wrong("selection_kernel", "carry")
@jit
def first_block_only(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
    threshold, s = tl.load(threshold_ptr), tl.arange(0, BLOCK)
    x = tl.load(scores_ptr + s, s < S, 0.0)
    kept = ((s < S) & (x >= threshold)).to(tl.int32)
    tl.store(out_ptr + tl.cumsum(kept, axis=0) - 1, s, kept != 0)
    for p0 in range(tl.sum(kept, axis=0), k, BLOCK):
        tl.store(out_ptr + p0 + s, tl.full([BLOCK], -1, tl.int32), p0 + s < k)


@wrong("selection_kernel", "carry")
@jit
def the_lane_written_for_the_index(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
    threshold, ties, lane = tl.load(threshold_ptr), tl.load(ties_ptr), tl.arange(0, BLOCK)
    written, tied = 0, 0
    for s0 in range(0, S, BLOCK):
        s = s0 + lane
        x = tl.load(scores_ptr + s, s < S, 0.0)
        equal = ((s < S) & (x == threshold)).to(tl.int32)
        early = (equal != 0) & (tied + tl.cumsum(equal, axis=0) <= ties)
        kept = (((s < S) & (x > threshold)) | early).to(tl.int32)
        tl.store(out_ptr + written + tl.cumsum(kept, axis=0) - 1, lane, kept != 0)
        written += tl.sum(kept, axis=0)
        tied += tl.sum(equal, axis=0)
    for p0 in range(written, k, BLOCK):
        tl.store(out_ptr + p0 + lane, tl.full([BLOCK], -1, tl.int32), p0 + lane < k)


@wrong("selection_kernel", "carry")
@jit
def all_kept_keys_counted_as_ties(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
    threshold, ties, lane = tl.load(threshold_ptr), tl.load(ties_ptr), tl.arange(0, BLOCK)
    written, tied = 0, 0
    for s0 in range(0, S, BLOCK):
        s = s0 + lane
        x = tl.load(scores_ptr + s, s < S, 0.0)
        equal = ((s < S) & (x == threshold)).to(tl.int32)
        early = (equal != 0) & (tied + tl.cumsum(equal, axis=0) <= ties)
        kept = (((s < S) & (x > threshold)) | early).to(tl.int32)
        tl.store(out_ptr + written + tl.cumsum(kept, axis=0) - 1, s, kept != 0)
        written += tl.sum(kept, axis=0)
        tied += tl.sum(kept, axis=0)
    for p0 in range(written, k, BLOCK):
        tl.store(out_ptr + p0 + lane, tl.full([BLOCK], -1, tl.int32), p0 + lane < k)


@wrong("selection_kernel", "smallest index")
@jit
def ties_counted_in_each_block_anew(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
    threshold, ties, lane = tl.load(threshold_ptr), tl.load(ties_ptr), tl.arange(0, BLOCK)
    written = 0
    for s0 in range(0, S, BLOCK):
        s = s0 + lane
        x = tl.load(scores_ptr + s, s < S, 0.0)
        equal = ((s < S) & (x == threshold)).to(tl.int32)
        early = (equal != 0) & (tl.cumsum(equal, axis=0) <= ties)
        kept = (((s < S) & (x > threshold)) | early).to(tl.int32)
        place = written + tl.cumsum(kept, axis=0) - 1
        tl.store(out_ptr + place, s, (kept != 0) & (place < k))
        written += tl.sum(kept, axis=0)
    for p0 in range(written, k, BLOCK):
        tl.store(out_ptr + p0 + lane, tl.full([BLOCK], -1, tl.int32), p0 + lane < k)


@wrong("selection_kernel", "smallest index")
@jit
def the_first_k_that_reach_it(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
    threshold, lane = tl.load(threshold_ptr), tl.arange(0, BLOCK)
    written = 0
    for s0 in range(0, S, BLOCK):
        s = s0 + lane
        x = tl.load(scores_ptr + s, s < S, 0.0)
        kept = ((s < S) & (x >= threshold)).to(tl.int32)
        place = written + tl.cumsum(kept, axis=0) - 1
        tl.store(out_ptr + place, s, (kept != 0) & (place < k))
        written += tl.sum(kept, axis=0)
    for p0 in range(written, k, BLOCK):
        tl.store(out_ptr + p0 + lane, tl.full([BLOCK], -1, tl.int32), p0 + lane < k)


@wrong("selection_kernel", "smallest index")
@jit
def last_ties_of_the_block(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
    threshold, ties, lane = tl.load(threshold_ptr), tl.load(ties_ptr), tl.arange(0, BLOCK)
    written, tied = 0, 0
    for s0 in range(0, S, BLOCK):
        s = s0 + lane
        x = tl.load(scores_ptr + s, s < S, 0.0)
        equal = ((s < S) & (x == threshold)).to(tl.int32)
        total = tl.sum(equal, axis=0)
        late = (equal != 0) & (total - tl.cumsum(equal, axis=0) < ties - tied)
        kept = (((s < S) & (x > threshold)) | late).to(tl.int32)
        tl.store(out_ptr + written + tl.cumsum(kept, axis=0) - 1, s, kept != 0)
        written += tl.sum(kept, axis=0)
        tied += total
    for p0 in range(written, k, BLOCK):
        tl.store(out_ptr + p0 + lane, tl.full([BLOCK], -1, tl.int32), p0 + lane < k)


@wrong("selection_kernel", "zeros")
@jit
def bits_compared(scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK: tl.constexpr):
    threshold, ties, lane = tl.load(threshold_ptr), tl.load(ties_ptr), tl.arange(0, BLOCK)
    limit = threshold.to(tl.int32, bitcast=True)
    limit = limit ^ ((limit >> 31) & 0x7FFFFFFF)
    written, tied = 0, 0
    for s0 in range(0, S, BLOCK):
        s = s0 + lane
        bits = tl.load(scores_ptr + s, s < S, 0.0).to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        equal = ((s < S) & (key == limit)).to(tl.int32)
        early = (equal != 0) & (tied + tl.cumsum(equal, axis=0) <= ties)
        kept = (((s < S) & (key > limit)) | early).to(tl.int32)
        place = written + tl.cumsum(kept, axis=0) - 1
        tl.store(out_ptr + place, s, (kept != 0) & (place < k))
        written += tl.sum(kept, axis=0)
        tied += tl.sum(equal, axis=0)
    for p0 in range(written, k, BLOCK):
        tl.store(out_ptr + p0 + lane, tl.full([BLOCK], -1, tl.int32), p0 + lane < k)
