"""Score and select on Hopper without a score matrix: a bound from a sample, one scan that keeps what reaches it.

1. One key out of every stretch of S / M is scored; the bound of a row is the score at a rank of this sample that leaves
   some more than k keys above it.
2. The scan scores every key as `hopper.index_scores` does. A score that is not below its row's bound goes, with its
   index, into the list of (row, key mod 64). Such a list belongs to one thread: appending takes neither atomics nor
   prefix sums, and the lists are the same in every run.
3. `choose` brings the lists of a row, at most 64 · SLOTS entries, into registers: a threshold that k of them reach is
   found bit by bit, and the smallest indices win ties.

A bound is luck, the counts are not: a row with fewer than k entries, or with CAP in a list, is flagged, and the caller
redoes it without luck. NaN is not below any bound, so it is found, too.

Bytes: 8 an entry, written and read once, instead of 4 a score; the lists take 64 KiB a row.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..select_topk import LARGEST_LISTED_K, LOWEST, ROWS_AT_ONCE, bound_of_sample, choose, safe_rank
from . import index_scores
from .index_scores import BK, BQ, QUERIES, fetch, open_block, rows_of, score_tile, tiles_seen

CAP, SPARE = gl.constexpr(112), gl.constexpr(16)  # entries a list, of which a row has BK; and room to run over
SLOTS = gl.constexpr(CAP.value + SPARE.value)
SHORTEST = 49152  # keys; below, a sample that is large enough costs too much


@gluon.jit
def collect(group, args):
    k_desc, scale_desc, k_tiles, scales, q_tiles, full, free, ranges, pointers = args
    chunk_first, chunk_last, first, last, t0, T, S = ranges
    w, t, start, end, key, whole_first, whole_last = rows_of(group, args)
    bound = gl.load(pointers[3] + t, t < T, float("inf"))
    lists = pointers[4] + (t0 + group * BQ).to(gl.int64) * (SLOTS * BK)
    empty = (t - t0 - group * BQ)[None, :] * (SLOTS * BK) + key[:, None]
    place = empty  # where each list goes on
    hidden = gl.full([BK, BQ], float("-inf"), gl.float32, layout=empty.type.layout)
    tiles = (last - first) // BK
    for i0 in range(0, tiles, SPARE):
        # So far, and no further: in the next SPARE tiles a list grows by at most SPARE entries.
        place = gl.minimum(place, empty + CAP * BK)
        for i in range(i0, gl.minimum(i0 + SPARE, tiles)):
            s0 = first + i * BK
            scores = score_tile(i, group, args, w)
            if (s0 < whole_first) | (s0 >= whole_last):
                s = (s0 + key)[:, None]
                scores = gl.where((s >= start[None, :]) & (s < end[None, :]), scores, hidden)
            kept = (scores < bound[None, :]) == 0  # NaN is kept
            entry = (scores.to(gl.int32, bitcast=True).to(gl.int64) << 32) | (s0 + key)[:, None].to(gl.int64)
            gl.store(lists + place, entry, kept)
            place = gl.where(kept, place + BK, place)
    gl.store(pointers[5] + t[None, :] * BK + key[:, None], (place - empty) // BK, (t < T)[None, :])


@gluon.jit
def _collect(
    q_desc, k_desc, scale_desc, w_ptr, start_ptr, end_ptr, bound_ptr, list_ptr, count_ptr, T, S,
):  # fmt: skip
    t0 = gl.program_id(0) * QUERIES
    first, last = tiles_seen(t0, 0, S, start_ptr, end_ptr, T, S)
    k_tiles, scales, q_tiles, full, free = open_block(q_desc, t0)
    ranges = (0, S, first, last, t0, T, S)
    pointers = (w_ptr, start_ptr, end_ptr, bound_ptr, list_ptr, count_ptr)
    args = (k_desc, scale_desc, k_tiles, scales, q_tiles, full, free, ranges, pointers)
    gl.warp_specialize([(collect, (0, args)), (collect, (1, args)), (fetch, (args,))], [4, 1], [232, 24])


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


def sampled_keys(S, device):
    """int64, ascending: one key of each of M equal stretches, at places without a period that data could share."""
    M = max(4096, min(32768, triton.next_power_of_2(S // 64)))
    edges = torch.arange(M + 1, device=device) * S // M
    return edges[:-1] + (torch.arange(M, device=device) * 2654435761 % 65536) * edges.diff() // 65536


def cannot_serve(q_idx, k_scale, S, k):
    """Why this variant cannot select for these queries, or None."""
    if k > LARGEST_LISTED_K:
        return f"needs k <= {LARGEST_LISTED_K}, got {k}"
    if S < SHORTEST:
        return f"needs at least {SHORTEST} keys, got {S}"
    return index_scores.cannot_serve(q_idx, k_scale, S)


def lightning_select(q_idx, k_idx, w, k, k_scale, start, end, out):
    """Write the selection to out, int32 [T, k], but for the rows it flags. Returns (nan, redo), int32 [T].

    `kernels.lightning_select` has checked the arguments; T > 0.
    """
    T, S = len(q_idx), len(k_idx)
    start, end, w = start.contiguous(), end.contiguous(), w.float().contiguous()
    nan, redo = (torch.empty(T, dtype=torch.int32, device=out.device) for _ in range(2))
    sample = sampled_keys(S, out.device)
    M = len(sample)
    first, last = (torch.searchsorted(sample, x.long()).int() for x in (start, end))
    sample_keys, sample_scales = k_idx[sample], None if k_scale is None else k_scale[sample]
    for t in range(0, T, ROWS_AT_ONCE):
        part = slice(t, t + ROWS_AT_ONCE)
        rows = len(q_idx[part])
        scores = torch.empty(rows, M, device=out.device)
        index_scores.index_scores(q_idx[part], sample_keys, w[part], sample_scales, first[part], last[part], scores)
        bound = torch.empty(rows, device=out.device)
        _bound[(rows,)](
            scores, first[part], last[part], start[part], end[part], bound, k, M=M, ALL=BK.value * CAP.value // 2,
            num_warps=8,
        )  # fmt: skip
        lists = torch.empty(rows, SLOTS.value * BK.value, dtype=torch.int64, device=out.device)
        counts = torch.empty(rows, BK.value, dtype=torch.int32, device=out.device)
        _collect[(triton.cdiv(rows, QUERIES.value),)](
            *index_scores.descriptors(q_idx[part], k_idx, k_scale), w[part], start[part], end[part], bound,
            lists, counts, rows, S, num_warps=4, maxnreg=168,
        )  # fmt: skip
        choose[(rows,)](
            lists, counts, start[part], end[part], out[part], nan[part], redo[part], k,
            LISTS=BK.value, SLOTS=SLOTS.value, CAP=CAP.value, num_warps=8, maxnreg=128,
        )  # fmt: skip
    return nan, redo
