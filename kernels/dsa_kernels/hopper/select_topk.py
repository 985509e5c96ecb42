"""Exact top-k of many long rows on Hopper: bound, scan and choice of a row in one program, four on a multiprocessor.

The schedule is that of "listed" in `dsa_kernels.select_topk`, whose three kernels wait in turn: for a sample, for
memory, for the steps of a search. Here every program does all three for one row after another. Reading the rows is
what takes time; while one program computes, the other three keep the memory busy.

1. `_bound`: a sample, runs of four neighbours evenly spread, gives a bound that some more than k scores should reach.
2. `_scan`: one read. Thread `lane` of LANES sees every LANES-th score and keeps what is not below the bound, NaN too,
   in a list of its own, score and index, of SLOTS entries in L2. The next AHEAD reads are under way while it compares.
3. `choose`: each thread takes its list's scores back into registers. A threshold that just k of them reach is found bit
   by bit; then each thread writes the indices it keeps, after those of the threads before it.

A bound is luck; the counts are not: a row whose lists hold fewer than k scores, or a full one, is flagged, and the
caller redoes it by "radix". Bytes: 4 · S a row, the sample's 32 a run, and 16 for each of some 3200 entries, in L2.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..topk.bound import LOWEST, safe_rank, sampled_place
from ..topk.listed import LARGEST_LISTED_K
from ..topk.ordering import from_ordered, ordered, threshold_of

LANES = gl.constexpr(128)
AHEAD = gl.constexpr(24)  # scores that a thread reads at once
RUN = gl.constexpr(4)  # neighbours in a sample
PROGRAMS = 4  # on a multiprocessor


@gluon.jit
def _bound(scores, n, k, M: gl.constexpr):
    """A number that some more than k of the n scores reach, from M of them; at least the lowest one above -inf."""
    TABLE: gl.constexpr = gl.BlockedLayout([M // LANES, 1], [1, 32], [1, LANES // 32], [0, 1])
    i = gl.arange(0, M // LANES, layout=gl.SliceLayout(1, TABLE))
    lane = gl.arange(0, LANES, layout=gl.SliceLayout(0, TABLE))
    j = i[:, None] * LANES + lane[None, :]
    place = sampled_place(j, n, M, RUN)
    sample = gl.load(scores + place, place < n, float("-inf")).to(gl.float32)
    bound = from_ordered(threshold_of(ordered(sample), safe_rank(1.0 * k * M / n)))
    return gl.maximum(bound, LOWEST)


@gluon.jit
def _read(ptr):
    """AHEAD scores a thread. They leave L2 first, so that the lists stay."""
    xs = ()
    for i in gl.static_range(AHEAD):
        xs = xs + (gl.load(ptr + i * LANES, eviction_policy="evict_first").to(gl.float32),)
    return xs


@gluon.jit
def _append(xs, s, lists, place, last, bound):
    """Add the scores xs of keys s, s + LANES, ... to the lists where they go on; a full list stays in its last slot."""
    for i in gl.static_range(len(xs)):
        kept = (xs[i] < bound) == 0
        index = (s + i * LANES).to(gl.uint32, bitcast=True).to(gl.uint64)
        entry = (xs[i].to(gl.uint32, bitcast=True).to(gl.uint64) << 32) | index
        gl.store(lists + place, entry.to(gl.int64, bitcast=True), kept)
        place = gl.minimum(gl.where(kept, place + LANES, place), last)
    return place


@gluon.jit
def _scan(scores, start, n, lists, bound, lane, SLOTS: gl.constexpr):
    """The n scores from key `start` on into lists; returns how many entries each has, SLOTS - 1 where it is full."""
    STEP: gl.constexpr = AHEAD * LANES
    last = (SLOTS - 1) * LANES + lane
    place = lane
    whole = n // STEP * STEP
    if whole > 0:
        xs = _read(scores + lane)
        for s0 in range(0, whole, STEP):
            following = _read(scores + gl.minimum(s0 + STEP, whole - STEP) + lane)
            place = _append(xs, start + s0 + lane, lists, place, last, bound)
            xs = following
    for s0 in range(whole, n, LANES):
        s = s0 + lane
        x = gl.load(scores + s, s < n, float("-inf")).to(gl.float32)
        place = _append((x,), start + s, lists, place, last, bound)
    return place // LANES


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def choose(
    lists, words, counts, full, start, end, k, out, nan_ptr, redo_ptr, SLOTS: gl.constexpr, FILTER: gl.constexpr
):  # fmt: skip
    """Write the k largest entries of LANES lists, -1 after them; or flag a row that has fewer, or is `full`.

    lists: int64 entries, score and index, [SLOTS, LANES], of which list i has counts[i]; words: the same, as int32;
    FILTER: entries of keys outside [start, end) are dropped.
    """
    TABLE: gl.constexpr = gl.BlockedLayout([SLOTS, 1], [1, 32], [1, LANES // 32], [0, 1])
    LINE: gl.constexpr = gl.SliceLayout(0, TABLE)
    nobody = gl.zeros([SLOTS, LANES], gl.uint32, layout=TABLE)
    lane = gl.arange(0, LANES, layout=LINE)
    slot = gl.arange(0, SLOTS, layout=gl.SliceLayout(1, TABLE))
    word = words + (slot[:, None] * LANES + lane[None, :]) * 2
    used = slot[:, None] < counts[None, :]
    if FILTER:
        key_of = gl.load(word, used, -1)
        used = (key_of >= start) & (key_of < end)
    wanted = gl.maximum(gl.minimum(k, end - start), 0)
    redo = full | (gl.sum(gl.sum(used.to(gl.int32), 0), 0) < wanted)
    gl.store(redo_ptr, redo.to(gl.int32))
    gl.store(nan_ptr, 0)
    if redo == 0:
        x = gl.load(word + 1, used, 0).to(gl.float32, bitcast=True)
        gl.store(nan_ptr, gl.max(gl.max(((x != x) & used).to(gl.int32), 0), 0))
        keys = gl.where(used, ordered(x), nobody)
        threshold = threshold_of(keys, wanted)
        above = gl.sum((keys > threshold).to(gl.int32), 0)
        tied = gl.sum(((keys == threshold) & used).to(gl.int32), 0)
        room = wanted - gl.sum(above, 0)
        latest = gl.to_tensor(0x7FFFFFFF)  # the largest index that is kept of equal scores
        if gl.sum(tied, 0) > room:
            indices = gl.load(word, used, 0)
            equal = (keys == threshold) & used
            early = gl.where(equal, (0x7FFFFFFF - indices).to(gl.uint32), nobody)
            latest = gl.where(room > 0, 0x7FFFFFFF - threshold_of(early, room).to(gl.int32), -1)
            tied = gl.sum((equal & (indices <= latest)).to(gl.int32), 0)
        kept = gl.convert_layout(above + tied, gl.BlockedLayout([1], [32], [LANES // 32], [0]))
        place = gl.convert_layout(gl.associative_scan(kept, 0, _plus) - kept, LINE)
        for j0 in range(0, gl.max(counts, 0), 16):
            entries = ()
            for i in gl.static_range(16):
                entries = entries + (gl.load(lists + (j0 + i) * LANES + lane, j0 + i < counts, 0),)
            for i in gl.static_range(16):
                key = ordered((entries[i] >> 32).to(gl.int32).to(gl.float32, bitcast=True))
                s = entries[i].to(gl.int32)
                keep = (j0 + i < counts) & ((key > threshold) | ((key == threshold) & (s <= latest)))
                if FILTER:
                    keep = keep & (s >= start) & (s < end)
                gl.store(out + place, s, keep)
                place = gl.where(keep, place + 1, place)
        for place0 in range(wanted, k, LANES):
            gl.store(out + place0 + lane, gl.full([LANES], -1, gl.int32, layout=LINE), place0 + lane < k)


@gluon.jit
def _select_topk(
    scores_ptr, start_ptr, end_ptr, list_ptr, word_ptr, out_ptr, nan_ptr, redo_ptr, T, S, k,
    M: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    TABLE: gl.constexpr = gl.BlockedLayout([SLOTS, 1], [1, 32], [1, LANES // 32], [0, 1])
    lane = gl.arange(0, LANES, layout=gl.SliceLayout(0, TABLE))
    program = gl.program_id(0)
    lists = list_ptr + program.to(gl.int64) * (SLOTS * LANES)
    words = word_ptr + program.to(gl.int64) * (2 * SLOTS * LANES)
    for row in range(program, T, gl.num_programs(0)):
        t = row.to(gl.int64)
        start, end = gl.load(start_ptr + t), gl.load(end_ptr + t)
        scores = scores_ptr + t * S + start
        bound = gl.to_tensor(LOWEST)
        if end - start > SLOTS * LANES // 2:
            bound = _bound(scores, end - start, k, M)
        counts = _scan(scores, start, end - start, lists, bound, lane, SLOTS)
        full = gl.max(counts, 0) == SLOTS - 1
        choose(lists, words, counts, full, start, end, k, out_ptr + t * k, nan_ptr + t, redo_ptr + t, SLOTS, False)


def cannot_serve(scores, k):
    """Why this variant cannot select from these scores, or None."""
    if not scores.is_cuda or torch.cuda.get_device_capability(scores.device) != (9, 0):
        return "needs a GPU of compute capability 9.0"
    if k > LARGEST_LISTED_K:
        return f"needs k <= {LARGEST_LISTED_K}, got {k}"
    return None


def select_topk(scores, k, start, end, out, nan, redo):
    """Write the selection to out, int32 [T, k], but for the rows it flags; nan and redo, int32 [T], say which.

    `dsa_kernels.select_topk` has checked the arguments, and they are contiguous; T > 0.
    """
    T, S = scores.shape
    # The longer the row, the fewer of a sample lie above its k-th score: a larger one, and room for a larger error.
    M, slots = (2048, 64) if S <= 1 << 16 else (4096, 64) if S <= 1 << 18 else (8192, 128)
    programs = min(T, PROGRAMS * torch.cuda.get_device_properties(scores.device).multi_processor_count)
    lists = torch.empty(programs, slots * LANES.value, dtype=torch.int64, device=scores.device)
    _select_topk[(programs,)](
        scores, start, end, lists, lists.view(torch.int32), out, nan, redo, T, S, k,
        M=M, SLOTS=slots, num_warps=LANES.value // 32, maxnreg=128,
    )  # fmt: skip
