"""Score and select on Hopper without a score matrix: a bound from a sample, one scan that keeps what reaches it.

1. One key out of every stretch of S / M is scored; the bound of a row is the score at a rank of this sample that leaves
   some more than k keys above it.
2. The scan scores every key as `hopper.index_scores` does. A score that is not below its row's bound goes, with its
   index, into the list of (row, key mod 64). Such a list belongs to one thread: appending takes neither atomics nor
   prefix sums, and the lists are the same in every run.
3. `choose` brings the lists of a row, at most 64 · SLOTS entries, into registers: a threshold that k of them reach is
   found bit by bit, and the smallest indices win ties.

A bound is luck, the counts are not: a row with fewer than k entries, or with CAP in a list, is flagged, and the caller
redoes it without luck. NaN is not below any bound, so it is found, and its row flagged, too.

Bytes: 8 an entry, written and read once, instead of 4 a score; the lists take 64 KiB a row. The chapter
kernels/book/lightning_select.md follows a row through all three.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..runtime import cdiv
from ..topk.bound import LOWEST, bound_of_sample, safe_rank
from ..topk.listed import LARGEST_LISTED_K, ROWS_AT_ONCE
from ..topk.sample import sampled_keys
from . import index_scores
from .aggregate import aggregate
from .index_scores import BK, BQ, QUERIES, SCORES, fetch, open_block, row_pointer, visible_tiles, walk
from .select_topk import LANES, choose, columns

SLOTS = gl.constexpr(128)  # entries of a list, of which a row has BK
CAP = gl.constexpr(SLOTS.value - 1)  # a list that is full goes on in its last slot
SHORTEST = 24576  # keys; below, a sample that is large enough costs too much


@aggregate
class Lists:
    """The lists of a warpgroup's queries, BK a query: a key's score goes into list key mod BK.

    Each list is one thread's, which has two. Slot j of a query's list i is its entry j · BK + i: threads whose lists
    are equally long write side by side.
    """

    entries: gl.tensor  # pointer to the entries of the first query
    empty: gl.tensor  # int32 [BK, BQ]: the first slot of each list, counted from `entries`
    next: gl.tensor  # int32 [BK, BQ]: the slot in which it goes on, the last one when it is full
    key: gl.tensor  # int32 [BK]: keys of a tile
    bound: gl.tensor  # fp32 [BQ]

    @gluon.jit
    def take(self, s0, scores):
        """Append the scores of a tile that are not below the bound, NaN too, each with its key, as one int64."""
        kept = (scores < self.bound[None, :]) == 0
        key = (s0 + self.key)[:, None].to(gl.int64)
        entry = (scores.to(gl.int32, bitcast=True).to(gl.int64) << 32) | key  # what `select_topk.pack` makes of them
        gl.store(self.entries + self.next, entry, kept)
        following = gl.minimum(gl.where(kept, self.next + BK, self.next), self.empty + CAP * BK)
        return Lists(entries=self.entries, empty=self.empty, next=following, key=self.key, bound=self.bound)

    @gluon.jit
    def counts(self):
        """How many entries each list has, int32 [BK, BQ]."""
        return (self.next - self.empty) // BK


@gluon.jit
def _lists(warpgroup, block, w_ptr, bound_ptr, entry_ptr, count_ptr):
    row = gl.arange(0, BQ, layout=gl.SliceLayout(0, SCORES))
    key = gl.arange(0, BK, layout=gl.SliceLayout(1, SCORES))
    t = block.t0 + warpgroup * BQ + row
    bound = gl.load(bound_ptr + t, t < block.T, float("inf"))
    entries = row_pointer(entry_ptr, block.t0 + warpgroup * BQ, SLOTS * BK)
    empty = row[None, :] * (SLOTS * BK) + key[:, None]
    lists = Lists(entries=entries, empty=empty, next=empty, key=key, bound=bound)
    lists = walk(warpgroup, block, w_ptr, lists)
    gl.store(count_ptr + t[None, :] * BK + key[:, None], lists.counts(), (t < block.T)[None, :])


@gluon.jit
def _collect(
    q_desc, k_desc, scale_desc, w_ptr, start_ptr, end_ptr, bound_ptr, entry_ptr, count_ptr, T, S,
):  # fmt: skip
    """Lists of every query of a block, from all tiles that some query of it sees.

    No key is masked: a list holds also keys that its own query does not see, and of rows past T; `choose` drops them.
    """
    t0 = gl.program_id(0) * QUERIES
    first, tiles = visible_tiles(t0, 0, S, start_ptr, end_ptr, T, S)
    block = open_block(q_desc, t0, first, tiles, T, S)
    gl.warp_specialize(
        [
            (_lists, (0, block, w_ptr, bound_ptr, entry_ptr, count_ptr)),
            (_lists, (1, block, w_ptr, bound_ptr, entry_ptr, count_ptr)),
            (fetch, (block, k_desc, scale_desc)),
        ],
        [4, 1],
        [232, 24],
    )


@triton.jit
def _bound(scores_ptr, first_ptr, last_ptr, start_ptr, end_ptr, bound_ptr, k, M: tl.constexpr, ALL: tl.constexpr):
    """The bound of a row from its sample; the lowest number, above -inf, for rows of at most ALL keys."""
    t = tl.program_id(0)
    first, last = tl.load(first_ptr + t), tl.load(last_ptr + t)
    n = tl.load(end_ptr + t) - tl.load(start_ptr + t)
    bound = tl.full([], LOWEST, tl.float32)
    if n > ALL:
        j = tl.arange(0, M)
        sample = tl.load(scores_ptr + t.to(tl.int64) * M + j)
        rank = safe_rank(1.0 * k * (last - first) / n)
        bound = tl.maximum(bound_of_sample(sample, (j >= first) & (j < last), rank), LOWEST)
    tl.store(bound_ptr + t, bound)


@gluon.jit
def _choose(entry_ptr, half_ptr, count_ptr, start_ptr, end_ptr, out_ptr, nan_ptr, redo_ptr, k):
    """Choose k keys from a row's BK lists, two threads a list: `choose` is told of LANES lists of HALF entries.

    Threads i and i + BK share list i: one has the slots 0, 2, 4, ..., the other 1, 3, 5, ... half_ptr is the memory of
    entry_ptr as int32 (see `choose`).
    """
    HALF: gl.constexpr = SLOTS * BK // LANES
    lane = gl.arange(0, LANES, layout=gl.SliceLayout(0, columns(HALF)))
    t = gl.program_id(0).to(gl.int64)
    counts = gl.load(count_ptr + t * BK + lane % BK)
    full = gl.max(counts, 0) == CAP
    counts = (counts + 1 - lane // BK) // 2
    start, end = gl.load(start_ptr + t), gl.load(end_ptr + t)
    entries, halves = entry_ptr + t * (SLOTS * BK), half_ptr + t * (2 * SLOTS * BK)
    choose(entries, halves, counts, full, start, end, k, out_ptr + t * k, nan_ptr + t, redo_ptr + t, HALF, True)


def cannot_serve(q_idx, k_scale, S, k):
    """Why this variant cannot select for these queries, or None."""
    if k > LARGEST_LISTED_K:
        return f"needs min(k, S) <= {LARGEST_LISTED_K}, got {k}"
    if S < SHORTEST:
        return f"needs at least {SHORTEST} keys, got {S}"
    return index_scores.cannot_serve(q_idx, k_scale, S)


def lightning_select(q_idx, k_idx, w, k, k_scale, start, end, out):
    """Write the selection to out, int32 [T, k], but for the rows it flags. Returns (nan, redo), int32 [T].

    `dsa_kernels.lightning_select` has checked the arguments; T > 0.
    """
    T, S = len(q_idx), len(k_idx)
    start, end, w = start.contiguous(), end.contiguous(), w.float().contiguous()
    nan, redo = (torch.empty(T, dtype=torch.int32, device=out.device) for _ in range(2))
    k_idx, k_scale = k_idx.contiguous(), None if k_scale is None else k_scale.contiguous()
    sample, sample_scale, first, last = sampled_keys(k_idx, k_scale, start, end)
    M = len(sample)
    for t in range(0, T, ROWS_AT_ONCE):
        part = slice(t, t + ROWS_AT_ONCE)
        rows = len(q_idx[part])
        scores = torch.empty(rows, M, device=out.device)
        index_scores.index_scores(q_idx[part], sample, w[part], sample_scale, first[part], last[part], scores)
        bound = torch.empty(rows, device=out.device)
        _bound[(rows,)](
            scores, first[part], last[part], start[part], end[part], bound, k, M=M, ALL=BK.value * CAP.value // 2,
            num_warps=8,
        )  # fmt: skip
        whole = cdiv(rows, QUERIES.value) * QUERIES.value  # a block may write into lists of rows past the last
        entries = torch.empty(whole, SLOTS.value * BK.value, dtype=torch.int64, device=out.device)
        counts = torch.empty(rows, BK.value, dtype=torch.int32, device=out.device)
        _collect[(cdiv(rows, QUERIES.value),)](
            *index_scores.descriptors(q_idx[part], k_idx, k_scale), w[part], start[part], end[part], bound,
            entries, counts, rows, S, num_warps=4, maxnreg=168,
        )  # fmt: skip
        _choose[(rows,)](
            entries, entries.view(torch.int32), counts, start[part], end[part], out[part], nan[part], redo[part], k,
            num_warps=LANES.value // 32, maxnreg=128,
        )  # fmt: skip
    return nan, redo
