"""Equation 1 in a decode step on Hopper's FP8 tensor cores: V3.2's 64 heads of 128 numbers, pages of 64 tokens.

As in the portable kernel, the tiles of all sequences, a page each, stand in one row, every program takes an equal
stretch of it, and keys are the rows of the product, (query, head) pairs its columns. Here a program has a
multiprocessor for itself. One warp, `fetch`, reads page numbers ahead of time and brings pages by TMA into a ring;
three warpgroups `score` every third page each:

    fetch   | page 0 | page 1 | page 2 | page 3 | ...  as far ahead as the ring is long
    score 0 |        | k · qᵀ | relu · w, sum, store | k · qᵀ of page 3 | ...
    score 1 |                 | k · qᵀ | relu · w, sum, store | k · qᵀ of page 4 | ...
    score 2 |                          | k · qᵀ | relu · w, sum, store | k · qᵀ of page 5 | ...

A page of 64 keys and two queries takes 256 clocks of the tensor cores, some 190 instructions of each warp, and 8448
bytes, which at 4 TB/s come in 490 clocks. So while one warpgroup multiplies, the others weigh, and neither is waited
for. q lies in shared memory twice: the next sequence's comes while the last one's pages are still scored.

A place of the ring belongs to one consumer, with its barriers. If consumers shared places, one would let phases of a
barrier go by that it need not wait for, and a wait, which knows a phase by its parity alone, would return too early.

One sequence alone: program p has pages p, p + programs, ..., whose numbers are read before the length is known.

Measured 2026-11-26 on one H200, triton 3.7.1 (3.6.0), microseconds a call in a CUDA graph, warm L2, beside the portable
kernel and DeepGEMM. 64 sequences of two queries and 32K keys: 76.2 (76.6), portable 88.6 (84.4), DeepGEMM 78.6 (76.8);
8 such sequences: 11.2 (11.9), 14.3 (14.7), 10.6 (10.6). One sequence of 128K keys, one query: 5.4 (5.6), 5.9 (6.2), 5.7
(5.7), two queries: 6.8 (7.1), 7.9 (7.9), 6.9 (6.9). 64 of them, one query: 274 (274), 276 (277), 275 (276).
Tried, and slower: four consumers with 112 registers each, 78.3 (78.4) for the first; six places for each, 79.6 (80.0).
Before these, all in one run: three consumers, a maximum for the relu, and each score in all four threads of a quad 81.1
(84.0), relus doubled 79.6 (80.7).
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..cards import on_hopper
from ..runtime import aligned, multiprocessors
from .aggregate import aggregate
from .index_scores import doubled_relu, opaque_zero
from .paged_score_work import BK, find_work, tiles_of

Buffer = Barriers = gl.shared_memory_descriptor  # one type in Triton; the name says which is meant
HEADS, DIM = gl.constexpr(64), gl.constexpr(128)
CONSUMERS, STAGES = gl.constexpr(3), gl.constexpr(4)  # warpgroups that multiply, and places of the ring for each
RING = gl.constexpr(CONSUMERS.value * STAGES.value)
TILE_BYTES = gl.constexpr(BK.value * (DIM.value + 4))
PAGE_ROWS = gl.constexpr(TILE_BYTES.value // DIM.value)  # of 128 bytes: 64 of values, 2 of scales
PAGE_WORDS = gl.constexpr(TILE_BYTES.value // 4)
LARGEST_B = 512  # sequences; each warp has a running sum of all lengths in its registers

TILE = gl.constexpr(gl.NVMMASharedLayout(128, 8, 2))  # of e4m3 [rows, 128] in shared memory, as tensor cores read it
ROW = gl.constexpr(gl.NVMMASharedLayout(0, 32, 1))  # of fp32 in shared memory
LANES = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))  # a number for each thread of `fetch`
FLAT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
# Two queries: what `sums_over_heads` makes of the four threads' parts of each score, as `index_scores.TRADED` explains.
# A thread of a quad gets all parts [BK, 2, 4] of one score of the quad's two rows and two queries.
TRADED = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2]],
        lane_bases=[[0, 1, 0], [8, 0, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[BK.value, 2, 4],
    )
)
SCORES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[],
        lane_bases=[[0, 1], [8, 0], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[BK.value, 2],
    )
)


@gluon.constexpr_function
def dots_layout(N):
    """Of the product [BK, N · HEADS] in registers, see `index_scores.DOTS`."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, int(N) * 64, 32])


@aggregate
class Ring:
    """RING places through which the program's tiles pass: tile t goes through place t % RING, in round t // RING.

    Tile t is consumer t % CONSUMERS's, and so is its place, as CONSUMERS divides RING: each consumer passes all phases
    of its places' barriers. For phases and parities see `index_scores.Ring`.
    """

    keys: Buffer  # e4m3 [RING, BK, DIM]
    scales: Buffer  # fp32 [RING, BK]
    full: Barriers  # one a place: its phase ends when TILE_BYTES have arrived
    free: Barriers  # one a place: its phase ends when its consumer has released the tile

    @gluon.jit
    def fill(self, t, page, k_desc, scale_desc):
        """For `fetch`: bring a page as tile t as soon as the tile before it in its place is released."""
        place = t % RING
        mbarrier.wait(self.free.index(place), ((t // RING) & 1) ^ 1)
        full = self.full.index(place)
        mbarrier.expect(full, TILE_BYTES)  # the one arrival; the phase ends when the bytes are there, too
        tma.async_copy_global_to_shared(k_desc, [page * PAGE_ROWS, 0], full, self.keys.index(place))
        tma.async_copy_global_to_shared(scale_desc, [page * PAGE_WORDS + BK * DIM // 4], full, self.scales.index(place))

    @gluon.jit
    def acquire_full(self, t):
        """For a consumer: the place of tile t, as soon as the tile has arrived."""
        place = t % RING
        mbarrier.wait(self.full.index(place), (t // RING) & 1)
        return place

    @gluon.jit
    def release_free(self, place):
        mbarrier.arrive(self.free.index(place), count=1)


@aggregate
class Queries:
    """q and w of two sequences. The program's sequence g has place g % 2; all consumers wait for all sequences."""

    values: Buffer  # e4m3 [2, N · HEADS, DIM]
    weights: Buffer  # fp32 [2, N · HEADS]
    full: Barriers  # a phase ends when the bytes have arrived
    free: Barriers  # ... and when all consumers are done with the sequence

    @gluon.jit
    def fill(self, g, b, q_desc, w_desc):
        COLUMNS: gl.constexpr = self.weights.shape[1]
        place = g % 2
        mbarrier.wait(self.free.index(place), ((g // 2) & 1) ^ 1)
        full = self.full.index(place)
        mbarrier.expect(full, COLUMNS * (DIM + 4))
        tma.async_copy_global_to_shared(q_desc, [b * COLUMNS, 0], full, self.values.index(place))
        tma.async_copy_global_to_shared(w_desc, [b * COLUMNS], full, self.weights.index(place))

    @gluon.jit
    def acquire_full(self, g, N: gl.constexpr):
        """The place of q, and half of w, fp32 [N · HEADS]: relus are doubled."""
        place = g % 2
        mbarrier.wait(self.full.index(place), (g // 2) & 1)
        return place, 0.5 * self.weights.index(place).load(gl.SliceLayout(0, dots_layout(N)))

    @gluon.jit
    def release_free(self, g):
        mbarrier.arrive(self.free.index(g % 2), count=1)


# The producer --------------------------------------------------------------------------------------------------------


@gluon.jit
def fetch_tiles(ring, t, n, table, first, step, stop, pages, k_desc, scale_desc):
    """Bring n tiles of a sequence, as t, t + 1, ...: tile `first`, first + step, and so on, below stop.

    pages: numbers of the first 32 pages, one in each lane. The next 32 are on their way while these are used.
    """
    lane = gl.arange(0, 32, layout=LANES)
    for done in range(0, n, 32):
        at = first + (done + 32 + lane) * step
        following = gl.load(table + at, at < stop, 0)
        for j in range(gl.minimum(n - done, 32)):
            ring.fill(t + done + j, gl.sum(gl.where(lane == j, pages, 0), 0), k_desc, scale_desc)
        pages = following


@gluon.jit
def fetch(work, ring, queries, q_desc, w_desc, k_desc, scale_desc, table_ptr, ALONE: gl.constexpr):
    """The producer, one warp: bring q and w of sequence after sequence, and tile after tile into the ring."""
    lane = gl.arange(0, 32, layout=LANES)
    b, first, left = work.scored.b, work.scored.first, work.scored.left
    if ALONE:
        programs = gl.num_programs(0)
        at = first + lane * programs
        pages = gl.load(table_ptr + at, at < work.P, 0)
        queries.fill(0, 0, q_desc, w_desc)
        tiles = tiles_of(work.length(0))
        fetch_tiles(ring, 0, work.of_one(tiles), table_ptr, first, programs, tiles, pages, k_desc, scale_desc)
    else:
        t = 0
        g = 0
        length = work.length(b)
        while left > 0:
            n = gl.minimum(tiles_of(length) - first, left)
            length = work.length(b + 1)  # on its way while this sequence is brought
            if n > 0:
                table = table_ptr + b * work.P
                pages = gl.load(table + first + lane, lane < n, 0)
                queries.fill(g, b, q_desc, w_desc)
                fetch_tiles(ring, t, n, table, first, 1, first + n, pages, k_desc, scale_desc)
                t += n
                g += 1
                left -= n
            first = 0
            b += 1


# The consumers -------------------------------------------------------------------------------------------------------


@gluon.jit
def sums_over_heads(dots, w, N: gl.constexpr):
    """Sums of weighted, doubled relus over the heads of each query, [BK, N].

    For two queries, parts that the threads of a quad have are traded: see `index_scores.trade_in_quads`. They are added
    as (0 + 2) + (1 + 3) in any case, as the portable kernel's shuffles do, and the bits are the same.
    """
    weighted = doubled_relu(dots) * w[None, :]
    if N == 1:
        return gl.sum(gl.reshape(weighted, [BK, N, HEADS]), 2)
    else:
        by_thread = gl.reshape(weighted, [BK, N, HEADS // 8, 4, 2]).permute((0, 1, 3, 2, 4))
        parts = gl.sum(gl.reshape(by_thread, [BK, N, 4, HEADS // 4]), 3)
        parts = gl.reshape(gl.convert_layout(parts, TRADED), [BK, N, 2, 2])
        return gl.convert_layout(gl.sum(gl.sum(parts, 2), 2), SCORES)


@gluon.jit
def scores_of(ring, queries, t, q, w, N: gl.constexpr, LAYOUT: gl.constexpr):
    """Scores [BK, N] of tile t, which is released as soon as it is multiplied."""
    place = ring.acquire_full(t)
    nothing = gl.zeros([BK, N * HEADS], gl.float32, layout=dots_layout(N))
    q_now = queries.values.index(q + opaque_zero(t)).permute((1, 0))
    dots = warpgroup_mma(ring.keys.index(place), q_now, nothing, use_acc=False, is_async=True)
    scale = ring.scales.index(place).load(gl.SliceLayout(1, LAYOUT))
    dots = warpgroup_mma_wait(0, deps=(dots,))
    ring.release_free(place)
    return sums_over_heads(dots, w, N) * scale[:, None]


@gluon.jit
def store(out, offset, tile, scores, seen, FILL: gl.constexpr):
    """Store scores that are seen; with FILL, -inf in place of the others."""
    if FILL:
        gl.store(out + tile * BK + offset, gl.where(seen, scores, float("-inf")))
    else:
        gl.store(out + tile * BK + offset, scores, seen)


@gluon.jit
def score(
    CONSUMER: gl.constexpr, work, ring, queries, out_ptr, stride,
    N: gl.constexpr, ALONE: gl.constexpr, FILL: gl.constexpr,
):  # fmt: skip
    """A consumer, one warpgroup: tiles CONSUMER, CONSUMER + CONSUMERS, ... of the program's stretches."""
    nothing = gl.zeros([BK, N * HEADS], gl.float32, layout=dots_layout(N))
    LAYOUT: gl.constexpr = sums_over_heads(nothing, gl.sum(nothing, 0), N).type.layout
    key = gl.arange(0, BK, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    n = gl.arange(0, N, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    offset = n * stride + key  # of a tile's scores, from the first one
    unseen = gl.full([BK, N], float("-inf"), gl.float32, layout=LAYOUT)
    b, first, left = work.scored.b, work.scored.first, work.scored.left
    if ALONE:
        programs = gl.num_programs(0)
        length = work.length(0)
        tiles = tiles_of(length)
        q, w = queries.acquire_full(0, N)
        for t in range(CONSUMER, work.of_one(tiles), CONSUMERS):
            tile = first + t * programs
            scores = scores_of(ring, queries, t, q, w, N, LAYOUT)
            store(out_ptr, offset, tile, scores, tile * BK + key < length - N + 1 + n, FILL)
        if FILL:
            for tile in range(tiles + first + CONSUMER * programs, work.P, CONSUMERS * programs):
                store(out_ptr, offset, tile, unseen, key < 0, FILL)
    else:
        start = 0  # the number in the program of its first tile of sequence b
        g = 0
        following = work.length(b)
        while left > 0:
            length = following
            count = gl.minimum(tiles_of(length) - first, left)
            following = work.length(b + 1)
            if count > 0:
                q, w = queries.acquire_full(g, N)
                out = out_ptr + b.to(gl.int64) * N * stride
                stop = start + count
                for t in range(start + (CONSUMER + CONSUMERS - start % CONSUMERS) % CONSUMERS, stop, CONSUMERS):
                    tile = first + t - start
                    scores = scores_of(ring, queries, t, q, w, N, LAYOUT)
                    store(out, offset, tile, scores, tile * BK + key < length - N + 1 + n, FILL)
                queries.release_free(g)
                g += 1
                start = stop
                left -= count
            first = 0
            b += 1
        if FILL:
            b, first, left = work.behind.b, work.behind.first, work.behind.left
            while left > 0:
                tiles = tiles_of(work.length(b))
                count = gl.minimum(work.P - tiles - first, left)
                out = out_ptr + b.to(gl.int64) * N * stride
                for t in range(CONSUMER, count, CONSUMERS):
                    store(out, offset, tiles + first + t, unseen, key < 0, FILL)
                left -= count
                first = 0
                b += 1


# The program ---------------------------------------------------------------------------------------------------------


@gluon.jit
def _paged_index_scores(
    q_desc, w_desc, k_desc, scale_desc, table_ptr, len_ptr, out_ptr, zero_ptr, B, P, stride, zeros,
    N: gl.constexpr, BP: gl.constexpr, ALONE: gl.constexpr, FILL: gl.constexpr,
):  # fmt: skip
    ring = Ring(
        keys=gl.allocate_shared_memory(gl.float8e4nv, [RING, BK, DIM], TILE),
        scales=gl.allocate_shared_memory(gl.float32, [RING, BK], ROW),
        full=gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout()),
        free=gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout()),
    )
    queries = Queries(
        values=gl.allocate_shared_memory(gl.float8e4nv, [2, N * HEADS, DIM], TILE),
        weights=gl.allocate_shared_memory(gl.float32, [2, N * HEADS], ROW),
        full=gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),
        free=gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),
    )
    for j in gl.static_range(RING):
        mbarrier.init(ring.full.index(j), count=1)
        mbarrier.init(ring.free.index(j), count=1)
    for j in gl.static_range(2):
        mbarrier.init(queries.full.index(j), count=1)
        mbarrier.init(queries.free.index(j), count=CONSUMERS)
    work = find_work(len_ptr, B, P, BP, ALONE, FILL)
    for i0 in range(gl.program_id(0) * 1024, zeros, gl.num_programs(0) * 1024):  # counters of whoever comes next
        i = i0 + gl.arange(0, 1024, layout=FLAT)
        gl.store(zero_ptr + i, gl.zeros([1024], gl.int32, layout=FLAT), i < zeros)
    # The first in the program's own four warps, the others in four, four and one more, with 160, 160 and 24 registers.
    gl.warp_specialize(
        [
            (score, (0, work, ring, queries, out_ptr, stride, N, ALONE, FILL)),
            (score, (1, work, ring, queries, out_ptr, stride, N, ALONE, FILL)),
            (score, (2, work, ring, queries, out_ptr, stride, N, ALONE, FILL)),
            (fetch, (work, ring, queries, q_desc, w_desc, k_desc, scale_desc, table_ptr, ALONE)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )


def cannot_serve(q_idx, index_pages, page_table):
    """Why this variant cannot score these queries against these pages, or None."""
    (B, N, *sizes), (pages, page_bytes) = q_idx.shape, index_pages.shape
    if not on_hopper(q_idx):
        return "needs a GPU of compute capability 9.0"
    if sizes != [HEADS.value, DIM.value]:
        return f"needs {HEADS.value} heads of {DIM.value}, got {sizes[0]} of {sizes[1]}"
    if page_bytes != TILE_BYTES.value:
        return f"needs pages of {BK.value} tokens, got {page_bytes // (DIM.value + 4)}"
    if N > 2:
        return f"needs one or two queries a sequence, got {N}"
    if B > LARGEST_B:
        return f"needs at most {LARGEST_B} sequences, got {B}"
    if not 0 < pages * PAGE_WORDS.value < 1 << 31 or page_table.shape[1] == 0:
        return f"needs 1 to {(1 << 31) // PAGE_WORDS.value} pages, got {pages}, of which a sequence has some"
    if not index_pages.is_contiguous() or index_pages.data_ptr() % 16:
        return "needs contiguous pages from a multiple of 16 bytes on"
    return None


def launch(q_idx, index_pages, w, page_table, lengths, out, zeros=None, fill=False):
    """As `dsa_kernels.paged_index_scores.launch`, where nothing says that it cannot. B > 0."""
    (B, N), P = q_idx.shape[:2], page_table.shape[1]
    _paged_index_scores[(min(multiprocessors(q_idx), B * P),)](
        TensorDescriptor.from_tensor(aligned(q_idx).view(-1, DIM.value), [N * HEADS.value, DIM.value], TILE.value),
        TensorDescriptor.from_tensor(aligned(w).view(-1), [N * HEADS.value], ROW.value),
        TensorDescriptor.from_tensor(
            index_pages.view(torch.float8_e4m3fn).view(-1, DIM.value), [BK.value, DIM.value], TILE.value
        ),
        TensorDescriptor.from_tensor(index_pages.view(torch.float32).view(-1), [BK.value], ROW.value),
        page_table.contiguous(), lengths.contiguous(), out, lengths if zeros is None else zeros, B, P, out.shape[2],
        0 if zeros is None else zeros.numel(),
        N=N, BP=max(32, triton.next_power_of_2(B)), ALONE=B == 1, FILL=fill, num_warps=4, maxnreg=128,
    )  # fmt: skip
