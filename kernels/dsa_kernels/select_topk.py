"""Exact top-k of rows of any length: one read of the row for short lists, then an exact choice among their members.

Schedule of "listed", which GPUs run for k up to 2048, three kernels (on Hopper, `hopper.select_topk` does the same for
many rows in one):

1. A sample of the row, pairs of neighbours evenly spread, gives a bound that some more than k scores should reach.
2. One read of the row. A thread keeps what is not below the bound in a list of its own, score and index: appending
   takes neither atomics nor prefix sums, and a program is small, so that many reads are under way.
3. The lists of a row are in registers now. A threshold that just k of them reach is found bit by bit; a prefix sum
   gives every kept index its place, and the smallest indices win ties.

"sampled", for larger k and one of the ladder's rungs, does the three in one program with one list, to which a prefix
sum a tile appends in order.

A bound is luck; the counts are not: a row whose lists hold fewer than k scores, or overflow, is left to the last
kernel, "radix", which needs no luck. The interpreter runs that one alone, ROWS rows a program.

1. Radix select: four passes over the row fix the threshold's bytes from the top down. Each pass counts, among the
   scores that share the bytes known so far, the next byte, and steps into the bin where the k-th largest lies.
2. One pass writes the index of every score above the threshold, and of as many equal ones as are still wanted.

All compare scores as integers of the same order (-0.0 first becomes 0.0). Bytes: 4 · S a row and the sample's for the
first two, 5 · 4 · S for the third. NaN in a visible place raises, except while a CUDA graph is captured, when it counts
as larger than +inf (or smaller than -inf if its sign bit is set).
"""

import torch
import triton
import triton.language as tl

from dsa_ref.contracts import check_select_topk, values_readable

from .runtime import FLOATS, INTERPRETED, check_runnable, hopper_variant, multiprocessors

VARIANTS = ("hopper", "portable", "listed", "sampled", "radix")
LARGEST_LISTED_K = 2048  # the bound leaves some 3200 to 3700 scores, 50 to 58 in each of 64 lists
LARGEST_SAMPLED_K = 8192  # a list of twice as many must fit into a program's registers
LANES = 64  # lists of a program of `_scan`, one a thread
PROGRAMS = 8  # of `_scan`, or of a redo, on a multiprocessor
ROWS_AT_ONCE = 4096  # whose lists take 256 MiB
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def ordered(x):
    """fp32 to uint32 such that a < b as floats means a < b as integers."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


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


@triton.jit
def threshold_of(keys, wanted):
    """A key that just `wanted` of the keys reach, or with ties more; keys are uint32 of any shape, 0 is nobody's.

    Found bit by bit from the first one in which the keys differ, until the count fits. 0 where there are too few keys.
    """
    largest = tl.max(keys)
    smallest = tl.min(tl.where(keys == 0, largest, keys))
    below = largest ^ smallest  # becomes a mask: its highest bit and all below
    for i in tl.static_range(5):
        below |= below >> (1 << i)
    threshold = largest ^ (largest & below)
    bit = (below >> 1) + (below & 1)
    reached = tl.sum((keys >= tl.maximum(threshold, 1)).to(tl.int32))
    threshold = tl.where(reached >= wanted, threshold, 0)
    bit = tl.where(reached >= wanted, bit, 0)
    while (bit != 0) & (reached != wanted):
        more = tl.sum((keys >= (threshold | bit)).to(tl.int32))
        threshold = tl.where(more >= wanted, threshold | bit, threshold)
        reached = tl.where(more >= wanted, more, reached)
        bit >>= 1
    return threshold


@triton.jit
def from_ordered(key):
    """What `ordered` was made from."""
    bits = key.to(tl.int32, bitcast=True)
    return (bits ^ (((bits ^ -2147483648) >> 31) | -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def safe_rank(expected):
    """The rank in a sample that leaves at least k scores above it, where `expected` of them are in the sample.

    4.5 standard deviations of that number more: one row in some 300,000 fails if the sample is independent.
    """
    return (expected + 4.5 * tl.sqrt(expected)).to(tl.int32) + 1


@triton.jit
def sampled_place(j, n, M: tl.constexpr, RUN: tl.constexpr):
    """Where the j-th of M samples of n scores lies, int64: runs of neighbours, one in each of M / RUN equal stretches.

    The places in the stretches have no period that data could share. The last run may reach past n.
    """
    stretch = (j // RUN).to(tl.int64)
    shift = (stretch * 2654435761 % 65536) * (n // (M // RUN)) // 65536
    return stretch * n // (M // RUN) + shift + j % RUN


@triton.jit
def bound_of_sample(sample, real, rank):
    """The rank-th largest of the real scores of a sample, -inf if it has fewer."""
    key = tl.where(real, ordered(sample), 0)
    threshold = threshold_of(key, rank)
    return tl.where(threshold == 0, float("-inf"), from_ordered(threshold))


@triton.jit
def keep_largest(x, s, used, wanted, k, offset, out_ptr, nan_ptr):
    """Write offset + s of the `wanted` largest of the used scores x, of equal ones the smallest s, then -1 up to k.

    x, s, used: one block of a list, in any order. *nan_ptr becomes 1 if a used score is NaN, else 0.
    """
    tl.store(nan_ptr, tl.max(((x != x) & used).to(tl.int32), axis=0))
    key = tl.where(used, ordered(x), tl.zeros_like(s).to(tl.uint32))
    threshold = threshold_of(key, wanted)
    above, tied = key > threshold, (key == threshold) & used
    room = wanted - tl.sum(above.to(tl.int32), axis=0)
    if tl.sum(tied.to(tl.int32), axis=0) > room:
        early = tl.where(tied, (0x7FFFFFFF - s).to(tl.uint32), tl.zeros_like(key))  # the smallest s is largest
        tied = tied & (early >= threshold_of(early, room)) & (room > 0)
    kept = above | tied
    place = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(out_ptr + place, offset + s, kept)
    for place0 in range(wanted, k, 1024):
        rest = place0 + tl.arange(0, 1024)
        tl.store(out_ptr + rest, tl.full([1024], -1, tl.int32), rest < k)


@triton.jit
def _bound(scores_ptr, start_ptr, end_ptr, bound_ptr, S, k, M: tl.constexpr, ALL: tl.constexpr):
    """The bound of a row from M / 2 pairs of neighbours; the lowest number, above -inf, for rows of at most ALL."""
    t = tl.program_id(0).to(tl.int64)
    start = tl.load(start_ptr + t)
    n = tl.load(end_ptr + t) - start
    bound = tl.full([], LOWEST, tl.float32)
    if n > ALL:
        j = tl.arange(0, M)
        place = sampled_place(j, n, M, 2)
        sample = tl.load(scores_ptr + t * S + start + place, place < n, float("-inf")).to(tl.float32)
        bound = tl.maximum(bound_of_sample(sample, j >= 0, safe_rank(1.0 * k * M / n)), LOWEST)
    tl.store(bound_ptr + t, bound)


@triton.jit
def _scan(
    scores_ptr, start_ptr, end_ptr, bound_ptr, list_ptr, count_ptr, T, S,
    LANES: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One part of the rows' scores into LANES lists: what is not below the bound, NaN too, with its index.

    The lists that are being written must stay in L2 until their sectors are full: so scores leave it first, and only
    PROGRAMS programs a multiprocessor are at work.
    """
    part = tl.program_id(1)
    LISTS: tl.constexpr = PARTS * LANES
    lane = tl.arange(0, LANES)
    empty = part * LANES + lane
    for row in range(tl.program_id(0), T, tl.num_programs(0)):
        t = row + tl.zeros([], tl.int64)  # the interpreter's row is a plain int
        start = tl.load(start_ptr + t)
        n = tl.load(end_ptr + t) - start
        bound = tl.load(bound_ptr + t)
        scores, lists = scores_ptr + t * S + start, list_ptr + t * (LISTS * SLOTS)
        place = empty  # where each list goes on
        for s0 in range(part * LANES * AHEAD, n, LISTS * AHEAD):
            xs = ()
            for i in tl.static_range(AHEAD):  # all loads before the first store, so that they wait together
                s = s0 + i * LANES + lane
                x = tl.load(scores + s, s < n, float("-inf"), eviction_policy="evict_first")
                xs = xs + (x.to(tl.float32),)
            place = tl.minimum(place, empty + (SLOTS - AHEAD) * LISTS)  # a list grows by at most AHEAD entries now
            for i in tl.static_range(AHEAD):
                kept = (xs[i] < bound) == 0
                s = (start + s0 + i * LANES + lane).to(tl.int64)
                tl.store(lists + place, (xs[i].to(tl.int32, bitcast=True).to(tl.int64) << 32) | s, kept)
                place = tl.where(kept, place + LISTS, place)
        tl.store(count_ptr + t * LISTS + empty, (place - empty) // LISTS)


@triton.jit
def choose(
    list_ptr, count_ptr, start_ptr, end_ptr, out_ptr, nan_ptr, redo_ptr, k,
    LISTS: tl.constexpr, SLOTS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Write the k largest of a row's lists; flag a row that has fewer, or a list that may have lost entries."""
    t = tl.program_id(0).to(tl.int64)
    counts = tl.load(count_ptr + t * LISTS + tl.arange(0, LISTS))
    wanted = tl.maximum(tl.minimum(k, tl.load(end_ptr + t) - tl.load(start_ptr + t)), 0)
    redo = (tl.max(counts, axis=0) >= CAP) | (tl.sum(counts, axis=0) < wanted)
    tl.store(redo_ptr + t, redo.to(tl.int32))
    tl.store(nan_ptr + t, 0)
    if redo == 0:
        slot = tl.arange(0, LISTS * SLOTS)
        used = slot // LISTS < tl.load(count_ptr + t * LISTS + slot % LISTS)
        entry = tl.load(list_ptr + t * (LISTS * SLOTS) + slot, used, 0)
        scores = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        keep_largest(scores, entry.to(tl.int32), used, wanted, k, 0, out_ptr + t * k, nan_ptr + t)


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


def select_topk(scores, k, start=None, end=None, variant=None):
    """`dsa_ref.select_topk`, exact for rows of any length. The order of the indices is not specified.

    Takes fp32, bf16 and fp16 scores. variant: "hopper" (`hopper.select_topk`; compute capability 9.0, k <= 2048),
    "listed" (k <= 2048), "sampled" (k <= 8192), "radix", "portable" for the fastest of these three, or None for the
    fastest of all. All give the same set.
    Raises as the reference does (fp64 is a TypeError here), as `runtime.check_runnable` does, and ValueError for a
    variant that is unknown or cannot serve these inputs.
    """
    _, _, start, end = check_select_topk(scores, k, start, end, FLOATS)
    check_runnable(scores=scores.detach())
    return launch(scores, k, start, end, variant)


def launch(scores, k, start, end, variant=None, out=None, redo=None):
    """Run the kernels on checked arguments.

    With redo, int32 [T], and out, only rows whose redo is not 0 are written, by "radix".
    """
    T, S = scores.shape
    scores, start, end = scores.detach().contiguous(), start.contiguous(), end.contiguous()
    flagged = redo is not None
    out = torch.empty(T, k, dtype=torch.int32, device=scores.device) if out is None else out
    nan = torch.zeros(T, dtype=torch.int32, device=scores.device)
    many = T >= 2 * multiprocessors(scores)  # else programs share a row
    largest = {"listed": LARGEST_LISTED_K, "sampled": LARGEST_SAMPLED_K}
    if variant not in (None, *VARIANTS):
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)} or None, got {variant!r}")
    if k > largest.get(variant, k):
        raise ValueError(f'variant "{variant}" needs k <= {largest[variant]}, got {k}')
    asked = variant if variant in (None, "hopper") else "portable"
    default = "hopper" if many and not flagged else "portable"
    hopper = hopper_variant("select_topk", asked, default, scores, k)
    if T == 0:
        return out
    if hopper:
        variant = "hopper"
    elif flagged or INTERPRETED and variant in (None, "portable"):
        variant = "radix"
    elif variant in (None, "portable"):
        variant = "listed" if k <= LARGEST_LISTED_K else "sampled" if k <= LARGEST_SAMPLED_K else "radix"
    redo = redo if flagged else torch.empty_like(nan)
    long = S > 1 << 18  # then a larger sample, for as safe a bound
    if hopper:
        hopper.select_topk(scores, k, start, end, out, nan, redo)
    elif variant == "listed":
        parts, slots, ahead = (1, 128, 16) if many else (16, 32, 8)
        lists, rows = LANES * parts, min(T, ROWS_AT_ONCE)
        bound = torch.empty(rows, device=scores.device)
        entries = torch.empty(rows, slots * lists, dtype=torch.int64, device=scores.device)
        counts = torch.empty(rows, lists, dtype=torch.int32, device=scores.device)
        for t in range(0, T, rows):
            part = slice(t, t + rows)
            n = len(scores[part])
            _bound[(n,)](
                scores[part], start[part], end[part], bound, S, k,
                M=16384 if long else 4096, ALL=lists * (slots - ahead) // 2, num_warps=8,
            )  # fmt: skip
            _scan[(min(n, PROGRAMS * multiprocessors(scores)), parts)](
                scores[part], start[part], end[part], bound, entries, counts, n, S,
                LANES=LANES, PARTS=parts, SLOTS=slots, AHEAD=ahead, num_warps=LANES // 32,
            )  # fmt: skip
            choose[(n,)](
                entries, counts, start[part], end[part], out[part], nan[part], redo[part], k,
                LISTS=lists, SLOTS=slots, CAP=slots - ahead,
                **({"num_warps": 8, "maxnreg": 128} if many else {"num_warps": 32}),
            )  # fmt: skip
    elif variant == "sampled":
        cap = max(16384 if long else 4096, 2 * triton.next_power_of_2(k))  # room for the larger error of a long row
        values = torch.empty(T, cap, dtype=torch.float32, device=scores.device)
        indices = torch.empty(T, cap, dtype=torch.int32, device=scores.device)
        _select_sampled[(T,)](
            scores, start, end, out, nan, redo, values, indices, S, k,
            SAMPLE=32768 if long else 8192, CAP=cap, BLOCK=2048, num_warps=4 if cap == 4096 else 16,
        )  # fmt: skip
    block = min(triton.next_power_of_2(S), 65536 if INTERPRETED else 4096)
    remaining = flagged or variant != "radix"
    together = INTERPRETED and not remaining
    rows = min(triton.next_power_of_2(T), max(1, 262144 // block)) if together else 1
    programs = min(T, PROGRAMS * multiprocessors(scores)) if remaining else triton.cdiv(T, rows)
    _select_topk[(programs,)](
        scores, start, end, out, nan, redo, T, S, k, ROWS=rows, BLOCK=block, REDO=remaining, num_warps=8,
    )  # fmt: skip
    if values_readable(nan) and nan.any():
        raise ValueError(f"scores must not be NaN, got NaN in row {int(nan.nonzero()[0])}")
    return out
