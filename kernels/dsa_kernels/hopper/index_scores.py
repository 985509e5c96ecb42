"""Equation 1 on Hopper's FP8 tensor cores, V3.2's sizes: 64 index heads of 128 numbers.

A block owns QUERIES queries and walks over a chunk of the keys in tiles of BK. One warp, `fetch`, brings the tiles by
TMA into a ring of STAGES; two warpgroups share each tile and `walk` over them for BQ queries each. As in the portable
kernel, keys are the rows of the product and (query, head) pairs its columns, so that most of the sum over heads stays
in a thread's registers. A tile is read from L2 once for eight queries, half of what the portable kernel reads.

A tile of 64 keys and eight queries takes 2 · 64 · 8 · 64 · 128 FLOPs, 1024 clocks of the tensor cores, and 8448 bytes.
Under them hide the relus and weights, at two instructions a product:
- a warpgroup multiplies two queries at a time, and weighs the first half while the second is multiplied;
- a relu is x + |x| here, twice the maximum with 0: the addition runs at twice the maximum's rate, keeps NaN, and is
  exact; the key's scale takes half back;
- the last sum crosses the four threads of a quad, which hold parts of the same BQ scores. They trade: each gets all
  parts of one query's scores, adds them, and has a fourth of the scores to scale, mask and store.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..runtime import aligned

HEADS, DIM = gl.constexpr(64), gl.constexpr(128)
GROUPS, BQ = gl.constexpr(2), gl.constexpr(4)  # warpgroups, and the queries of each
BK, STAGES = gl.constexpr(64), gl.constexpr(4)  # keys a tile, tiles in flight (a power of two)
QUERIES = gl.constexpr(GROUPS.value * BQ.value)
TILE = gl.constexpr(gl.NVMMASharedLayout(128, 8, 2))
SCALES = gl.constexpr(gl.NVMMASharedLayout(0, 32, 1))
# The tensor cores leave row r of a tile with warp r // 16, there in a quad of threads, r % 8. After the trade, the
# thread of a quad is the query: of sums [BK, BQ, 4], whose last axis is who had it, and of scores [BK, BQ].
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
# "halves" is what runs. The ladder's others: "whole" multiplies four queries at once, "turns" lets the warpgroups
# multiply strictly in turn; "maximum" takes relus as such and "saturate" by a multiplication that clamps to [0, 1], and
# both lose NaN.
VERSIONS = ("whole", "turns", "maximum", "saturate", "halves")
LARGEST = gl.constexpr(2.0**25)  # above any product of 128 numbers up to 448


@gluon.jit
def fetch(args):
    k_desc, scale_desc, k_tiles, scales, q_tiles, full, free, turn, ranges, pointers = args
    first, tiles = ranges[0], ranges[1]
    for i in range(tiles):
        stage = i & (STAGES - 1)
        mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), BK * (DIM + 4))
        tma.async_copy_global_to_shared(k_desc, [first + i * BK, 0], full.index(stage), k_tiles.index(stage))
        tma.async_copy_global_to_shared(scale_desc, [first + i * BK], full.index(stage), scales.index(stage))


@gluon.jit
def own_sums(dots, w, VERSION: gl.constexpr):
    """Sums over the heads that a thread holds, [BK, queries, 4], of relus, doubled, times their weights."""
    if VERSION == "maximum":
        relus = gl.maximum(dots, 0.0)
    elif VERSION == "saturate":
        relus = gl.inline_asm_elementwise("mul.sat.f32 $0, $1, 0f33000000;", "=f,f", [dots], gl.float32, True, 1)
    else:
        relus = dots + gl.abs(dots)
    # A thread of a quad holds columns 2 · thread + (0, 1) of every eight.
    QUERIES_HERE: gl.constexpr = dots.shape[1] // HEADS
    weighted = gl.reshape(relus * w[None, :], [BK, QUERIES_HERE, HEADS // 8, 4, 2]).permute((0, 1, 3, 2, 4))
    return gl.sum(gl.reshape(weighted, [BK, QUERIES_HERE, 4, HEADS // 4]), 3)


@gluon.jit
def walk(group, args, use: gl.constexpr, state, VERSION: gl.constexpr):
    """For tile after tile: state = use(state, its first key, scores [BK, BQ] of this warpgroup's queries)."""
    k_desc, scale_desc, k_tiles, scales, q_tiles, full, free, turn, ranges, pointers = args
    first, tiles, t0, T, S = ranges
    COLUMNS: gl.constexpr = q_tiles.shape[1]  # (query, head) pairs that are multiplied at once
    PARTS: gl.constexpr = BQ * HEADS // COLUMNS
    DOTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    zeros = gl.zeros([BK, COLUMNS], gl.float32, layout=DOTS)
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, DOTS))
    weights = ()
    for j in gl.static_range(PARTS):
        t = t0 + group * BQ + j * (BQ // PARTS)
        w = gl.load(pointers[0] + t.to(gl.int64) * HEADS + column, t + column // HEADS < T, 0.0)
        weights = weights + (w,)
    for i in range(tiles):
        stage = i & (STAGES - 1)
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        if VERSION == "turns":
            mbarrier.wait(turn.index(group), (i & 1) ^ (1 - group))
        dots = ()
        for j in gl.static_range(PARTS):
            # i >> 28 is 0, but the compiler does not know: the queries' descriptor is not hoisted into registers
            q_tile = q_tiles.index(PARTS * group + j + (i >> 28)).permute((1, 0))
            dots = dots + (warpgroup_mma(k_tiles.index(stage), q_tile, zeros, use_acc=False, is_async=True),)
        k_scale = scales.index(stage).load(gl.SliceLayout(1, SCORES))
        sums = ()
        for j in gl.static_range(PARTS):
            done = warpgroup_mma_wait(PARTS - 1 - j, deps=(dots[j],))
            if VERSION == "turns" and j == 0:
                mbarrier.arrive(turn.index(1 - group), count=1)
            sums = sums + (own_sums(done, weights[j], VERSION),)
        if PARTS == 2:
            both = gl.reshape(gl.join(sums[0], sums[1]).permute((0, 3, 1, 2)), [BK, BQ, 4])
        else:
            both = sums[0]
        both = gl.reshape(gl.convert_layout(both, TRADED), [BK, BQ, 2, 2])
        score = gl.convert_layout(gl.sum(gl.sum(both, 2), 2), SCORES)
        k_scale *= 1.0 if VERSION == "maximum" else LARGEST if VERSION == "saturate" else 0.5  # as `own_sums` left it
        state = use(state, first + i * BK, score * k_scale[:, None])
        mbarrier.arrive(free.index(stage), count=1)  # late: it makes the warps wait for each other
    return state


@gluon.jit
def _store(state, s0, scores):
    out, place, key, inside, start, end, chunk_last = state
    s = (s0 + key)[:, None]
    seen = (s >= start[None, :]) & (s < end[None, :])
    gl.store(out + s0 + place, gl.where(seen, scores, float("-inf")), inside[None, :] & (s < chunk_last))
    return state


@gluon.jit
def _fill(state, first, last):
    """Store -inf for the keys from first to last."""
    out, place, key, inside, start, end, chunk_last = state
    nothing = gl.full([BK, BQ], float("-inf"), gl.float32, layout=SCORES)
    for s0 in range(first, last, BK):
        gl.store(out + s0 + place, nothing, inside[None, :] & (s0 + key < last)[:, None])


@gluon.jit
def _score(group, args, VERSION: gl.constexpr):
    k_desc, scale_desc, k_tiles, scales, q_tiles, full, free, turn, ranges, pointers = args
    first, tiles, t0, T, S = ranges
    w_ptr, start_ptr, end_ptr, out_ptr, chunk_first, chunk_last = pointers
    row = gl.arange(0, BQ, layout=gl.SliceLayout(0, SCORES))
    key = gl.arange(0, BK, layout=gl.SliceLayout(1, SCORES))
    t = t0 + group * BQ + row
    start, end = gl.load(start_ptr + t, t < T, S), gl.load(end_ptr + t, t < T, 0)
    out = out_ptr + (t0 + group * BQ).to(gl.int64) * S  # the rest of an address fits into 32 bits
    state = (out, row[None, :] * S + key[:, None], key, t < T, start, end, chunk_last)
    _fill(state, chunk_first, gl.minimum(first, chunk_last))
    walk(group, args, _store, state, VERSION)
    _fill(state, first + tiles * BK, chunk_last)


@gluon.jit
def open_block(q_desc, t0):
    """Shared memory and barriers of a block whose queries start at t0, which have arrived when this returns."""
    ROWS: gl.constexpr = q_desc.block_type.shape[0]
    PIECES: gl.constexpr = QUERIES * HEADS // ROWS
    q_tiles = gl.allocate_shared_memory(gl.float8e4nv, [PIECES, ROWS, DIM], TILE)
    k_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BK, DIM], TILE)
    scales = gl.allocate_shared_memory(gl.float32, [STAGES, BK], SCALES)
    come = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(come, count=1)
    for j in gl.static_range(STAGES):
        mbarrier.init(full.index(j), count=1)
        mbarrier.init(free.index(j), count=GROUPS)
    for j in gl.static_range(GROUPS):
        mbarrier.init(turn.index(j), count=1)
    mbarrier.expect(come, QUERIES * HEADS * DIM)
    for j in gl.static_range(PIECES):
        tma.async_copy_global_to_shared(q_desc, [t0 * HEADS + j * ROWS, 0], come, q_tiles.index(j))
    mbarrier.wait(come, 0)
    return k_tiles, scales, q_tiles, full, free, turn


@gluon.jit
def tiles_seen(t0, chunk_first, chunk_last, start_ptr, end_ptr, T, S):
    """(first key, number) of the tiles that hold all that some query of the block sees of the chunk."""
    t = t0 + gl.arange(0, QUERIES, layout=gl.BlockedLayout([1], [32], [4], [0]))
    seen_first = gl.min(gl.load(start_ptr + t, t < T, S), 0)
    seen_last = gl.minimum(gl.max(gl.load(end_ptr + t, t < T, 0), 0), chunk_last)
    first = gl.minimum(gl.maximum(seen_first, chunk_first), chunk_last) // BK * BK
    return first, gl.maximum((seen_last - first + BK - 1) // BK, 0)


@gluon.jit
def _index_scores(
    q_desc, k_desc, scale_desc, w_ptr, start_ptr, end_ptr, out_ptr, T, S, chunk, VERSION: gl.constexpr
):  # fmt: skip
    t0 = gl.program_id(0) * QUERIES
    chunk_first = gl.program_id(1) * chunk
    chunk_last = gl.minimum(chunk_first + chunk, S)
    first, tiles = tiles_seen(t0, chunk_first, chunk_last, start_ptr, end_ptr, T, S)
    k_tiles, scales, q_tiles, full, free, turn = open_block(q_desc, t0)
    ranges = (first, tiles, t0, T, S)
    pointers = (w_ptr, start_ptr, end_ptr, out_ptr, chunk_first, chunk_last)
    args = (k_desc, scale_desc, k_tiles, scales, q_tiles, full, free, turn, ranges, pointers)
    gl.warp_specialize(
        [(_score, (0, args, VERSION)), (_score, (1, args, VERSION)), (fetch, (args,))], [4, 1], [232, 24]
    )


def descriptors(q_idx, k_idx, k_scale, version="halves"):
    """What TMA reads: queries [T · Hi, Di], keys [S, Di] and their scales [S], ones where there are none."""
    rows = aligned(q_idx).view(-1, DIM.value)
    k_scale = torch.ones(len(k_idx), device=k_idx.device) if k_scale is None else aligned(k_scale)
    queries = BQ.value if version == "whole" else BQ.value // 2
    return (
        TensorDescriptor.from_tensor(rows, [queries * HEADS.value, DIM.value], TILE.value),
        TensorDescriptor.from_tensor(aligned(k_idx), [BK.value, DIM.value], TILE.value),
        TensorDescriptor.from_tensor(k_scale, [BK.value], SCALES.value),
    )


def cannot_serve(q_idx, k_scale, S):
    """Why this variant cannot score these queries against S keys, or None."""
    if S >= 1 << 28:
        return f"needs fewer than {1 << 28} keys, so that 32 bits hold a place in the scores of a block, got {S}"
    if not q_idx.is_cuda or torch.cuda.get_device_capability(q_idx.device) != (9, 0):
        return "needs a GPU of compute capability 9.0"
    if q_idx.dtype != torch.float8_e4m3fn:
        return f"needs float8_e4m3fn, got {str(q_idx.dtype).removeprefix('torch.')}"
    if tuple(q_idx.shape[1:]) != (HEADS.value, DIM.value):
        return f"needs {HEADS.value} heads of {DIM.value}, got {q_idx.shape[1]} of {q_idx.shape[2]}"
    if k_scale is not None and k_scale.dtype != torch.float32:
        return f"needs float32 scales, got {str(k_scale.dtype).removeprefix('torch.')}"
    return None


def index_scores(q_idx, k_idx, w, k_scale, start, end, out, version="halves"):
    """Write the scores to out, fp32 [T, S]. `dsa_kernels.index_scores` has checked the arguments; T > 0.

    Raises ValueError for a version that is not one of VERSIONS.
    """
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}")
    T, S = out.shape
    multiprocessors = torch.cuda.get_device_properties(out.device).multi_processor_count
    blocks = triton.cdiv(T, QUERIES.value)
    # About four waves of blocks, but chunks of at least 32 tiles to pay for fetching the queries.
    chunks = max(1, min(triton.cdiv(S, 32 * BK.value), 4 * multiprocessors // blocks))
    chunk = triton.cdiv(triton.cdiv(S, chunks), BK.value) * BK.value
    _index_scores[(blocks, triton.cdiv(S, chunk))](
        *descriptors(q_idx, k_idx, k_scale, version), w.float().contiguous(), start.contiguous(), end.contiguous(),
        out, T, S, chunk, VERSION=version, num_warps=4, maxnreg=168,
    )  # fmt: skip
