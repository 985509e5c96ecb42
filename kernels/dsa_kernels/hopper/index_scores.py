"""Equation 1 on Hopper's FP8 tensor cores, V3.2's sizes: 64 index heads of 128 numbers.

A block owns QUERIES queries and walks over a chunk of the keys in tiles of BK. One warp, `fetch`, brings the tiles by
TMA into a ring of STAGES places; two warpgroups share each tile and `walk` over them for BQ queries each. As in the
portable kernel, keys are the rows of the product and (query, head) pairs its columns, so that most of the sum over
heads stays in a thread's registers. A tile is read from L2 once for eight queries, half of what the portable kernel
reads.

A tile of 64 keys and eight queries takes 2 · 64 · 8 · 64 · 128 FLOPs, 1024 clocks of the tensor cores, and 8448 bytes.
Under them hide the relus and weights, two instructions a product: a warpgroup multiplies its queries in two halves of
HALF, and weighs the first half while the second is multiplied.

The chapter kernels/book/index_scores.md draws the schedule, the memory and the barriers.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..cards import on_hopper
from ..runtime import aligned, cdiv, multiprocessors
from .aggregate import aggregate

Buffer = Barriers = gl.shared_memory_descriptor  # one type in Triton; the name says which is meant
HEADS, DIM = gl.constexpr(64), gl.constexpr(128)
WARPGROUPS, BQ = gl.constexpr(2), gl.constexpr(4)  # those that multiply, and the queries of each
BK, STAGES = gl.constexpr(64), gl.constexpr(4)  # keys a tile, places of the ring (a power of two)
QUERIES = gl.constexpr(WARPGROUPS.value * BQ.value)
HALF = gl.constexpr(BQ.value // 2)  # queries that are multiplied at once
COLUMNS = gl.constexpr(HALF.value * HEADS.value)  # (query, head) pairs that are multiplied at once
TILE_BYTES = gl.constexpr(BK.value * (DIM.value + 4))  # keys, and a float32 scale for each

TILE = gl.constexpr(gl.NVMMASharedLayout(128, 8, 2))  # of e4m3 [rows, 128] in shared memory, as tensor cores read it
SCALES = gl.constexpr(gl.NVMMASharedLayout(0, 32, 1))  # of fp32 [BK] in shared memory
# The product [BK, COLUMNS] in registers. Warp w of a warpgroup's four has the rows 16 w to 16 w + 15. In it the quad of
# threads 4 r to 4 r + 3 has rows r and r + 8, and thread p of the quad has columns 2 p and 2 p + 1 of every eight.
DOTS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS.value, 32]))
# What `trade_in_quads` makes of it: rows stay where they are, and thread p of a quad has what belongs to query p, first
# parts [BK, BQ, 4], whose last axis is the thread that had them, then scores [BK, BQ]. The lists say how far each bit
# of the number of a register, a lane (a thread of a warp) and a warp moves an element.
TRADED = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0, 0], [0, 0, 1], [0, 0, 2]],
        lane_bases=[[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[BK.value, BQ.value, 4],
    )
)
SCORES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[BK.value, BQ.value],
    )
)


@aggregate
class Ring:
    """STAGES places through which the tiles pass: tile i goes through place i % STAGES, in round i // STAGES.

    A barrier counts arrivals; with the last one that it waits for, a phase ends and the next begins. In round r both
    barriers of a place end their phase r. `mbarrier.wait` names a phase by its parity alone: it returns when the phase
    that last ended has that parity. A reader waits for phase r of `full`. The filler waits for phase r - 1 of `free`;
    in round 0 it goes ahead, since a new barrier counts as one whose last phase had parity 1.
    """

    keys: Buffer  # e4m3 [STAGES, BK, DIM]
    scales: Buffer  # fp32 [STAGES, BK]
    full: Barriers  # one a place: its phase ends when TILE_BYTES have arrived
    free: Barriers  # one a place: its phase ends when both warpgroups have released the tile

    @gluon.jit
    def acquire_free(self, i):
        """For `fetch`: the place of tile i, as soon as the tile before it in this place is released."""
        place = i & (STAGES - 1)
        mbarrier.wait(self.free.index(place), ((i // STAGES) & 1) ^ 1)
        return place

    @gluon.jit
    def acquire_full(self, i):
        """For a warpgroup: the place of tile i, as soon as the tile has arrived."""
        place = i & (STAGES - 1)
        mbarrier.wait(self.full.index(place), (i // STAGES) & 1)
        return place

    @gluon.jit
    def release_free(self, place):
        """For a warpgroup: the tile in this place is needed no more."""
        mbarrier.arrive(self.free.index(place), count=1)


@aggregate
class Block:
    """What the warps of a block share."""

    ring: Ring
    queries: Buffer  # e4m3 [QUERIES / HALF, COLUMNS, DIM]
    first: gl.tensor  # the first key of the first tile
    tiles: gl.tensor  # how many there are
    t0: gl.tensor  # the first query
    T: gl.tensor
    S: gl.tensor


@gluon.jit
def opaque_zero(i):
    """0, as i stays below 2^28, which the compiler does not know.

    It stands in the index of the queries, which a loop over i multiplies again and again. Without it the compiler sees
    that their descriptors, by which the tensor cores find them, are the same in every round, computes them before the
    loop, and keeps them in some 15 registers a thread, so that others could spill. (With triton 3.6.0 and 3.7.1 they
    would not, and both loops together would have 41 instructions fewer; how fast that is has not been measured.)
    """
    return i >> 28


@gluon.jit
def row_pointer(ptr, t, width):
    """The address of row t of rows of `width` elements, in 64 bits: many rows may pass 2^31 elements.

    It is one number for a warpgroup. What each thread adds to it, a place in the next few rows, fits into 32 bits, at
    half the registers and instructions.
    """
    return ptr + t.to(gl.int64) * width


@gluon.jit
def doubled_relu(x):
    """2 · max(x, 0), exactly, as x + |x|; `walk` halves the scale of the key instead.

    An addition takes |x| in place of x at no cost, runs at twice the rate of a maximum, and keeps NaN.
    """
    return x + gl.abs(x)


@gluon.jit
def multiply(block, place, half, i):
    """Start the products [BK, COLUMNS] of tile i, in `place`, with queries `half` of QUERIES / HALF: k · qᵀ.

    They run in the background, and whoever wants the result waits for it.
    """
    queries = block.queries.index(half + opaque_zero(i)).permute((1, 0))
    nothing = gl.zeros([BK, COLUMNS], gl.float32, layout=DOTS)
    return warpgroup_mma(block.ring.keys.index(place), queries, nothing, use_acc=False, is_async=True)


@gluon.jit
def head_sums(dots, w):
    """Sums of weighted, doubled relus over the 16 heads of a query that a thread has, [BK, HALF, 4 threads of a quad].

    A query's 64 columns are eight times four threads' two. Those of a thread are summed: nothing leaves it.
    """
    weighted = gl.reshape(doubled_relu(dots) * w[None, :], [BK, HALF, HEADS // 8, 4, 2])
    by_thread = gl.reshape(weighted.permute((0, 1, 3, 2, 4)), [BK, HALF, 4, HEADS // 4])
    return gl.sum(by_thread, 3)


@gluon.jit
def trade_in_quads(first_half, second_half):
    """Add what the four threads of a quad have of each score: from two times [BK, HALF, 4] to scores [BK, BQ].

    Adding by shuffles would leave every score in all four threads. Instead they trade: each gets all parts of the
    scores of one query, and has a fourth of the scores to scale, mask and store. Parts are added as (0 + 2) + (1 + 3),
    as the portable kernel's shuffles do: the bits are the same.
    """
    parts = gl.reshape(gl.join(first_half, second_half).permute((0, 3, 1, 2)), [BK, BQ, 4])
    parts = gl.reshape(gl.convert_layout(parts, TRADED), [BK, BQ, 2, 2])
    return gl.convert_layout(gl.sum(gl.sum(parts, 2), 2), SCORES)


@gluon.jit
def half_weights(w_ptr, t, T):
    """Weights of the (query, head) pairs of HALF queries from t on, fp32 [COLUMNS]; 0 past T."""
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, DOTS))
    return gl.load(row_pointer(w_ptr, t, HEADS) + column, t + column // HEADS < T, 0.0)


@gluon.jit
def fetch(block, k_desc, scale_desc):
    """The producer, one warp: bring tile after tile into the ring."""
    ring = block.ring
    for i in range(block.tiles):
        s0 = block.first + i * BK
        place = ring.acquire_free(i)
        full = ring.full.index(place)
        mbarrier.expect(full, TILE_BYTES)  # the one arrival; the phase ends when the bytes are there, too
        tma.async_copy_global_to_shared(k_desc, [s0, 0], full, ring.keys.index(place))
        tma.async_copy_global_to_shared(scale_desc, [s0], full, ring.scales.index(place))


@gluon.jit
def walk(warpgroup, block, w_ptr, sink):
    """The consumer, a warpgroup: sink = sink.take(first key, scores [BK, BQ] of its queries) for tile after tile.

    sink: an aggregate that does something with scores: `ScoreRows` here, `Lists` in lightning_select.
    """
    ring = block.ring
    t = block.t0 + warpgroup * BQ
    first_w, second_w = half_weights(w_ptr, t, block.T), half_weights(w_ptr, t + HALF, block.T)
    for i in range(block.tiles):
        place = ring.acquire_full(i)
        first_dots = multiply(block, place, 2 * warpgroup, i)
        second_dots = multiply(block, place, 2 * warpgroup + 1, i)
        k_scale = ring.scales.index(place).load(gl.SliceLayout(1, SCORES))
        # Wait until at most one product is under way, weigh the first half meanwhile, wait for the second. Written out,
        # not looped over, so that both products start before the first wait.
        first_sums = head_sums(warpgroup_mma_wait(1, deps=(first_dots,)), first_w)
        second_sums = head_sums(warpgroup_mma_wait(0, deps=(second_dots,)), second_w)
        scores = trade_in_quads(first_sums, second_sums)
        k_scale *= 0.5  # relus are doubled
        sink = sink.take(block.first + i * BK, scores * k_scale[:, None])
        ring.release_free(place)  # late: it makes the warps wait for each other
    return sink


@aggregate
class ScoreRows:
    """The rows of the score matrix that a warpgroup writes, and what its queries may see."""

    out: gl.tensor  # pointer to the scores of the first query
    offset: gl.tensor  # int32 [BK, BQ]: where a tile's scores go, counted from `out` and the tile's first key
    key: gl.tensor  # int32 [BK]: keys of a tile
    real: gl.tensor  # [BQ]: the query is below T
    start: gl.tensor  # int32 [BQ]
    end: gl.tensor  # int32 [BQ]
    chunk_last: gl.tensor  # no scores are written from this key on

    @gluon.jit
    def take(self, s0, scores):
        """Store the scores of a tile, -inf for what a query may not see."""
        s = (s0 + self.key)[:, None]
        seen = (s >= self.start[None, :]) & (s < self.end[None, :])
        inside = self.real[None, :] & (s < self.chunk_last)
        gl.store(self.out + s0 + self.offset, gl.where(seen, scores, float("-inf")), inside)
        return self

    @gluon.jit
    def fill(self, first, last):
        """Store -inf for the keys from first to last."""
        nothing = gl.full([BK, BQ], float("-inf"), gl.float32, layout=SCORES)
        for s0 in range(first, last, BK):
            gl.store(self.out + s0 + self.offset, nothing, self.real[None, :] & (s0 + self.key < last)[:, None])


@gluon.jit
def _score(warpgroup, block, w_ptr, start_ptr, end_ptr, out_ptr, chunk_first, chunk_last):
    """A warpgroup's rows of the block's chunk of keys: -inf before and after the tiles, scores in them."""
    T, S = block.T, block.S
    row = gl.arange(0, BQ, layout=gl.SliceLayout(0, SCORES))
    key = gl.arange(0, BK, layout=gl.SliceLayout(1, SCORES))
    t = block.t0 + warpgroup * BQ + row
    start, end = gl.load(start_ptr + t, t < T, S), gl.load(end_ptr + t, t < T, 0)
    rows = ScoreRows(
        out=row_pointer(out_ptr, block.t0 + warpgroup * BQ, S), offset=row[None, :] * S + key[:, None], key=key,
        real=t < T, start=start, end=end, chunk_last=chunk_last,
    )  # fmt: skip
    rows.fill(chunk_first, gl.minimum(block.first, chunk_last))
    walk(warpgroup, block, w_ptr, rows)
    rows.fill(block.first + block.tiles * BK, chunk_last)


@gluon.jit
def open_block(q_desc, t0, first, tiles, T, S):
    """Allocate a block's shared memory, make its barriers, and bring its queries, which are there on return."""
    PIECES: gl.constexpr = QUERIES // HALF
    queries = gl.allocate_shared_memory(gl.float8e4nv, [PIECES, COLUMNS, DIM], TILE)
    keys = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BK, DIM], TILE)
    scales = gl.allocate_shared_memory(gl.float32, [STAGES, BK], SCALES)
    queries_arrived = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(queries_arrived, count=1)
    for j in gl.static_range(STAGES):
        mbarrier.init(full.index(j), count=1)
        mbarrier.init(free.index(j), count=WARPGROUPS)
    mbarrier.expect(queries_arrived, QUERIES * HEADS * DIM)
    for j in gl.static_range(PIECES):
        tma.async_copy_global_to_shared(q_desc, [t0 * HEADS + j * COLUMNS, 0], queries_arrived, queries.index(j))
    mbarrier.wait(queries_arrived, 0)
    ring = Ring(keys=keys, scales=scales, full=full, free=free)
    # A size of 1 is a constant to Triton, and these fields take tensors.
    T, S = gl.to_tensor(T), gl.to_tensor(S)
    return Block(ring=ring, queries=queries, first=first, tiles=tiles, t0=t0, T=T, S=S)


@gluon.jit
def visible_tiles(t0, chunk_first, chunk_last, start_ptr, end_ptr, T, S):
    """(first key, number) of the tiles that hold all that some query of the block sees of the chunk."""
    t = t0 + gl.arange(0, QUERIES, layout=gl.BlockedLayout([1], [32], [4], [0]))
    seen_first = gl.min(gl.load(start_ptr + t, t < T, S), 0)
    seen_last = gl.minimum(gl.max(gl.load(end_ptr + t, t < T, 0), 0), chunk_last)
    first = gl.minimum(gl.maximum(seen_first, chunk_first), chunk_last) // BK * BK
    return first, gl.maximum((seen_last - first + BK - 1) // BK, 0)


@gluon.jit
def _index_scores(q_desc, k_desc, scale_desc, w_ptr, start_ptr, end_ptr, out_ptr, T, S, chunk):
    t0 = gl.program_id(0) * QUERIES
    chunk_first = gl.program_id(1) * chunk
    chunk_last = gl.minimum(chunk_first + chunk, S)
    first, tiles = visible_tiles(t0, chunk_first, chunk_last, start_ptr, end_ptr, T, S)
    block = open_block(q_desc, t0, first, tiles, T, S)
    # Three functions side by side: the first in the block's own four warps, the others in four more and in one more,
    # whose threads get 232 and 24 registers; the first gets what is left.
    gl.warp_specialize(
        [
            (_score, (0, block, w_ptr, start_ptr, end_ptr, out_ptr, chunk_first, chunk_last)),
            (_score, (1, block, w_ptr, start_ptr, end_ptr, out_ptr, chunk_first, chunk_last)),
            (fetch, (block, k_desc, scale_desc)),
        ],
        [4, 1],
        [232, 24],
    )


def descriptors(q_idx, k_idx, k_scale):
    """What TMA reads: queries [T · Hi, Di], keys [S, Di] and their scales [S], ones where there are none."""
    rows = aligned(q_idx).view(-1, DIM.value)
    k_scale = torch.ones(len(k_idx), device=k_idx.device) if k_scale is None else aligned(k_scale)
    return (
        TensorDescriptor.from_tensor(rows, [COLUMNS.value, DIM.value], TILE.value),
        TensorDescriptor.from_tensor(aligned(k_idx), [BK.value, DIM.value], TILE.value),
        TensorDescriptor.from_tensor(k_scale, [BK.value], SCALES.value),
    )


def cannot_serve(q_idx, k_scale, S):
    """Why this variant cannot score these queries against S keys, or None."""
    if S >= 1 << 28:
        return f"needs fewer than {1 << 28} keys, so that 32 bits hold a place in the scores of a block, got {S}"
    if not on_hopper(q_idx):
        return "needs a GPU of compute capability 9.0"
    if q_idx.dtype != torch.float8_e4m3fn:
        return f"needs float8_e4m3fn, got {str(q_idx.dtype).removeprefix('torch.')}"
    if tuple(q_idx.shape[1:]) != (HEADS.value, DIM.value):
        return f"needs {HEADS.value} heads of {DIM.value}, got {q_idx.shape[1]} of {q_idx.shape[2]}"
    if k_scale is not None and k_scale.dtype != torch.float32:
        return f"needs float32 scales, got {str(k_scale.dtype).removeprefix('torch.')}"
    return None


def index_scores(q_idx, k_idx, w, k_scale, start, end, out):
    """Write the scores to out, fp32 [T, S]. `dsa_kernels.index_scores` has checked the arguments; T > 0."""
    T, S = out.shape
    blocks = cdiv(T, QUERIES.value)
    # About four blocks a multiprocessor, but chunks of at least 32 tiles to pay for fetching the queries.
    chunks = max(1, min(cdiv(S, 32 * BK.value), 4 * multiprocessors(out) // blocks))
    chunk = cdiv(cdiv(S, chunks), BK.value) * BK.value
    _index_scores[(blocks, cdiv(S, chunk))](
        *descriptors(q_idx, k_idx, k_scale), w.float().contiguous(), start.contiguous(), end.contiguous(),
        out, T, S, chunk, num_warps=4, maxnreg=168,  # three times 168 registers are what the warps share out
    )  # fmt: skip
