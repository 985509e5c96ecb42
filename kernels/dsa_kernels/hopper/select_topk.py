"""Exact top-k of many long rows on Hopper: bound, scan and choice of a row in one program, four on a multiprocessor.

The schedule is that of `topk.listed`, whose three kernels wait in turn: for a sample, for memory, for the steps of a
search. Here every program of LANES threads does all three for one row after another. Reading the rows is what takes
time; while one program computes, the other three keep the memory busy.

1. `_bound`: a sample, runs of four neighbours evenly spread, gives a bound that some more than k scores should reach.
2. `_scan`: one read. Thread `lane` sees every LANES-th score and keeps what is not below the bound, NaN too, in a list
   of its own, score and key, of SLOTS entries in L2. The next AHEAD reads are under way while it compares.
3. `choose`: each thread takes its list's scores back into registers. A threshold that just k of them reach is found bit
   by bit; then each thread writes the keys it keeps, after those of the threads before it.

Lists lie slot by slot: slot j of list `lane` is entry j * LANES + lane, so that a warp reads slots side by side. The
lists are reused for the program's next row. No barrier is needed between scan and choice: a thread reads only what it
has written itself. `kernels/book/select_topk.md` draws all of it.

A bound is luck; the counts are not: a row whose lists hold fewer than k scores, or a full one, is flagged, and the
caller redoes it by `topk.radix`. Bytes: 4 * S a row, the sample's 32 a run, and 16 for each of some 3200 entries, in
L2.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..cards import on_hopper
from ..runtime import multiprocessors
from ..topk.bound import LOWEST, safe_rank, sampled_place
from ..topk.listed import LARGEST_LISTED_K
from ..topk.ordering import from_ordered, ordered, threshold_of

LANES = gl.constexpr(128)  # threads of a program, each with a list of its own
AHEAD = gl.constexpr(24)  # scores that a thread reads at once
RUN = gl.constexpr(4)  # neighbours in a sample
TOGETHER = gl.constexpr(16)  # entries that a thread reads at once to write what it keeps
LAST_KEY = gl.constexpr(0x7FFFFFFF)  # no key is larger
PROGRAMS = 4  # on a multiprocessor


@gluon.constexpr_function
def columns(rows):
    """The layout of [rows, LANES] in which a thread holds a column, so that what it sees of a list is its own."""
    return gl.BlockedLayout([rows, 1], [1, 32], [1, LANES.value // 32], [0, 1])


@gluon.jit
def pack(score, key):
    """An entry of a list: the score's bits in the high half of an int64, the key in the low half."""
    low = key.to(gl.uint32, bitcast=True).to(gl.uint64)
    return ((score.to(gl.uint32, bitcast=True).to(gl.uint64) << 32) | low).to(gl.int64, bitcast=True)


@gluon.jit
def score_of(entry):
    """The score of an entry that `pack` has made."""
    return (entry >> 32).to(gl.int32).to(gl.float32, bitcast=True)


@gluon.jit
def key_of(entry):
    """The key of an entry that `pack` has made."""
    return entry.to(gl.int32)


@gluon.jit
def _bound(scores, n, k, M: gl.constexpr):
    """A number that some more than k of the n scores reach, from M of them; at least the lowest one above -inf."""
    SAMPLE: gl.constexpr = columns(M // LANES)
    i = gl.arange(0, M // LANES, layout=gl.SliceLayout(1, SAMPLE))
    lane = gl.arange(0, LANES, layout=gl.SliceLayout(0, SAMPLE))
    j = i[:, None] * LANES + lane[None, :]
    place = sampled_place(j, n, M, RUN)
    sample = gl.load(scores + place, place < n, float("-inf")).to(gl.float32)
    bound = from_ordered(threshold_of(ordered(sample), safe_rank(1.0 * k * M / n)))
    return gl.maximum(bound, LOWEST)


@gluon.jit
def _read(ptr):
    """AHEAD scores a thread, all under way together. They leave L2 first, so that the lists stay."""
    xs = ()
    for i in gl.static_range(AHEAD):
        xs = xs + (gl.load(ptr + i * LANES, eviction_policy="evict_first").to(gl.float32),)
    return xs


@gluon.jit
def _append(xs, key, entries, place, last, bound):
    """Add the scores xs of the keys key, key + LANES, ... to the lists; returns where each goes on.

    place, last: entries that a list writes next, and that it may write at most: a full list stays there.
    """
    for i in gl.static_range(len(xs)):
        kept = (xs[i] < bound) == 0  # NaN is kept
        entry = pack(xs[i], key + i * LANES)
        gl.store(entries + place, entry, kept)
        place = gl.minimum(gl.where(kept, place + LANES, place), last)
    return place


@gluon.jit
def _scan(scores, start, n, entries, bound, lane, SLOTS: gl.constexpr):
    """The n scores from key `start` on into lists; returns how many entries each has, SLOTS - 1 where it is full."""
    STEP: gl.constexpr = AHEAD * LANES
    last = (SLOTS - 1) * LANES + lane
    place = lane
    whole = n // STEP * STEP
    if whole > 0:
        xs = _read(scores + lane)
        for s0 in range(0, whole, STEP):
            following = _read(scores + gl.minimum(s0 + STEP, whole - STEP) + lane)
            place = _append(xs, start + s0 + lane, entries, place, last, bound)
            xs = following
    for s0 in range(whole, n, LANES):
        s = s0 + lane
        x = gl.load(scores + s, s < n, float("-inf")).to(gl.float32)
        place = _append((x,), start + s, entries, place, last, bound)
    return place // LANES


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def _cut(keys, nobody, used, half, wanted):
    """What just `wanted` of the used entries reach: (threshold, latest, kept).

    An entry is kept if its score's integer in `keys` is above the threshold, or equal to it and its key at most
    `latest`. kept: how many each list keeps. half: the entries' low halves, read only where ties need the keys. nobody:
    zeros of the shape and layout of keys.
    """
    threshold = threshold_of(keys, wanted)
    above = gl.sum((keys > threshold).to(gl.int32), 0)
    tied = gl.sum(((keys == threshold) & used).to(gl.int32), 0)
    room = wanted - gl.sum(above, 0)
    latest = gl.to_tensor(LAST_KEY)
    if gl.sum(tied, 0) > room:
        key = gl.load(half, used, 0)
        equal = (keys == threshold) & used
        early = gl.where(equal, (LAST_KEY - key).to(gl.uint32), nobody)  # the smallest key is largest
        latest = gl.where(room > 0, LAST_KEY - threshold_of(early, room).to(gl.int32), -1)
        tied = gl.sum((equal & (key <= latest)).to(gl.int32), 0)
    return threshold, latest, above + tied


@gluon.jit
def choose(
    entries, halves, counts, full, start, end, k, out, nan_ptr, redo_ptr, SLOTS: gl.constexpr, FILTER: gl.constexpr
):  # fmt: skip
    """Write the keys of the k largest entries of LANES lists, then -1; or flag a row that has fewer, is `full`, or
    holds NaN.

    NaN is for the caller's portable kernel to confirm. Where processes take turns on a GPU, which then stops them in
    the middle of a kernel, `lightning_select` of some thousand queries has come out with a NaN that no input explains:
    one score of a row, in the same place of a block each time. A process that has the GPU to itself never met one. Why
    is not known, nor whether processes that take turns can trust all else.

    entries: int64 [SLOTS, LANES], of which list i has counts[i]; halves: the same memory as int32, so that score and
    key can be read apart; FILTER: entries of keys outside [start, end) are dropped.
    """
    TABLE: gl.constexpr = columns(SLOTS)
    LINE: gl.constexpr = gl.SliceLayout(0, TABLE)
    nobody = gl.zeros([SLOTS, LANES], gl.uint32, layout=TABLE)
    lane = gl.arange(0, LANES, layout=LINE)
    slot = gl.arange(0, SLOTS, layout=gl.SliceLayout(1, TABLE))
    half = halves + (slot[:, None] * LANES + lane[None, :]) * 2
    used = slot[:, None] < counts[None, :]
    if FILTER:
        key = gl.load(half, used, -1)
        used = (key >= start) & (key < end)
    wanted = gl.maximum(gl.minimum(k, end - start), 0)
    redo = full | (gl.sum(gl.sum(used.to(gl.int32), 0), 0) < wanted)
    gl.store(redo_ptr, redo.to(gl.int32))
    gl.store(nan_ptr, 0)
    if redo == 0:
        x = gl.load(half + 1, used, 0).to(gl.float32, bitcast=True)
        gl.store(redo_ptr, gl.max(gl.max(((x != x) & used).to(gl.int32), 0), 0))
        keys = gl.where(used, ordered(x), nobody)
        threshold, latest, kept = _cut(keys, nobody, used, half, wanted)
        kept = gl.convert_layout(kept, gl.BlockedLayout([1], [32], [LANES // 32], [0]))
        place = gl.convert_layout(gl.associative_scan(kept, 0, _plus) - kept, LINE)  # after those of lists before
        for j0 in range(0, gl.max(counts, 0), TOGETHER):
            some = ()
            for i in gl.static_range(TOGETHER):
                some = some + (gl.load(entries + (j0 + i) * LANES + lane, j0 + i < counts, 0),)
            for i in gl.static_range(TOGETHER):
                number, s = ordered(score_of(some[i])), key_of(some[i])
                keep = (j0 + i < counts) & ((number > threshold) | ((number == threshold) & (s <= latest)))
                if FILTER:
                    keep = keep & (s >= start) & (s < end)
                gl.store(out + place, s, keep)
                place = gl.where(keep, place + 1, place)
        for place0 in range(wanted, k, LANES):
            gl.store(out + place0 + lane, gl.full([LANES], -1, gl.int32, layout=LINE), place0 + lane < k)


@gluon.jit
def _select_topk(
    scores_ptr, start_ptr, end_ptr, entries_ptr, halves_ptr, out_ptr, nan_ptr, redo_ptr, T, S, k,
    M: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    lane = gl.arange(0, LANES, layout=gl.SliceLayout(0, columns(SLOTS)))
    program = gl.program_id(0)
    entries = entries_ptr + program.to(gl.int64) * (SLOTS * LANES)
    halves = halves_ptr + program.to(gl.int64) * (2 * SLOTS * LANES)
    for row in range(program, T, gl.num_programs(0)):
        t = row.to(gl.int64)
        start, end = gl.load(start_ptr + t), gl.load(end_ptr + t)
        scores = scores_ptr + t * S + start
        bound = gl.to_tensor(LOWEST)
        if end - start > SLOTS * LANES // 2:  # a shorter row goes into the lists whole
            bound = _bound(scores, end - start, k, M)
        counts = _scan(scores, start, end - start, entries, bound, lane, SLOTS)
        full = gl.max(counts, 0) == SLOTS - 1
        choose(entries, halves, counts, full, start, end, k, out_ptr + t * k, nan_ptr + t, redo_ptr + t, SLOTS, False)


def cannot_serve(scores, k):
    """Why this variant cannot select from these scores, or None."""
    if not on_hopper(scores):
        return "needs a GPU of compute capability 9.0"
    if k > LARGEST_LISTED_K:
        return f"needs min(k, S) <= {LARGEST_LISTED_K}, got {k}"
    return None


def select_topk(scores, k, start, end, out, nan, redo):
    """Write the selection to out, int32 [T, k], but for the rows it flags; nan and redo, int32 [T], say which.

    `dsa_kernels.select_topk` has checked the arguments, and they are contiguous; T > 0.
    """
    T, S = scores.shape
    # The longer the row, the fewer of a sample lie above its k-th score: a larger one, and room for a larger error.
    M, slots = (2048, 64) if S <= 1 << 16 else (4096, 64) if S <= 1 << 18 else (8192, 128)
    programs = min(T, PROGRAMS * multiprocessors(scores))
    entries = torch.empty(programs, slots * LANES.value, dtype=torch.int64, device=scores.device)
    _select_topk[(programs,)](
        scores, start, end, entries, entries.view(torch.int32), out, nan, redo, T, S, k,
        M=M, SLOTS=slots, num_warps=LANES.value // 32, maxnreg=128,
    )  # fmt: skip
