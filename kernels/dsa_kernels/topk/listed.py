"""Bound, scan and choice in three kernels, with a list for each thread. What GPUs run for k up to 2048.

Schedule:
1. `_bound`: a program a row reads a sample, pairs of neighbours, and makes a bound of it.
2. `_scan`: one read of the rows. A thread keeps what is not below the bound in a list of its own, score and index:
   appending takes neither atomics nor prefix sums. A program is two warps, so that many reads are under way.
3. `choose`: a program a row takes the row's lists into registers. A threshold that just k of them reach is found bit by
   bit; a prefix sum gives every kept index its place, and the smallest indices win ties.
Many rows have 64 lists of 128 entries each and a program of `_scan` walks over rows; few rows are shared by 16 programs
with 64 lists of 32 entries each.

Bytes: 4 * S a row and the sample's sectors, read once; 8 written and 8 read for each of some 3200 to 3700 entries,
which stay in L2. A row whose lists hold fewer than k scores, or of which one may have lost entries, is flagged.
"""

import torch
import triton
import triton.language as tl

from ..runtime import multiprocessors
from .bound import LONG, LOWEST, bound_of_sample, safe_rank, sampled_place
from .ordering import keep_largest

LARGEST_LISTED_K = 2048  # the bound leaves some 3200 to 3700 scores, 50 to 58 in each of 64 lists
LANES = 64  # lists of a program of `_scan`, one a thread
PROGRAMS = 8  # of `_scan`, on a multiprocessor
ROWS_AT_ONCE = 4096  # whose lists take 256 MiB


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
                kept = (xs[i] < bound) == 0  # NaN is kept
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


def launch(scores, k, start, end, out, nan, redo):
    """Write the selection to out, int32 [T, k], but for the rows it flags; nan and redo, int32 [T], say which.

    All tensors are contiguous; T > 0 and k <= LARGEST_LISTED_K.
    """
    T, S = scores.shape
    many = T >= 2 * multiprocessors(scores)  # else programs share a row
    parts, slots, ahead = (1, 128, 16) if many else (16, 32, 8)
    lists, rows = LANES * parts, min(T, ROWS_AT_ONCE)
    bound = torch.empty(rows, device=scores.device)
    entries = torch.empty(rows, slots * lists, dtype=torch.int64, device=scores.device)
    counts = torch.empty(rows, lists, dtype=torch.int32, device=scores.device)
    sample = 16384 if S > LONG else 4096
    for t in range(0, T, rows):
        part = slice(t, t + rows)
        n = len(scores[part])
        _bound[(n,)](
            scores[part], start[part], end[part], bound, S, k,
            M=sample, ALL=lists * (slots - ahead) // 2, num_warps=8,
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
