"""Equation 1 on Hopper's FP8 tensor cores, V3.2's sizes: 64 index heads of 128 numbers.

A block owns QUERIES queries and walks over a chunk of the keys in tiles of BK. One warp, `fetch`, brings the tiles by
TMA into a ring of STAGES; two warpgroups share each tile and run the consumer `score` on four queries each. As in the
portable kernel, keys are the rows of the product and (query, head) pairs its columns, so the sum over heads stays in a
thread's registers but for two shuffles. A tile is read from L2 once for eight queries, half of what the portable kernel
reads, and while one warpgroup does its relus the other one multiplies.

A tile of 64 keys and eight queries takes 2 · 64 · 8 · 64 · 128 FLOPs, 1024 clocks of the tensor cores, and 8448 bytes.
What it has to hide under them are the relus and weights, two instructions a product. A relu is x + |x| here, twice the
maximum with 0: the addition runs at twice the maximum's rate, keeps NaN, and is exact; the key's scale takes half back.
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
DOTS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BQ.value * HEADS.value, 32]))
TILE = gl.constexpr(gl.NVMMASharedLayout(128, 8, 2))
SCALES = gl.constexpr(gl.NVMMASharedLayout(0, 32, 1))


@gluon.jit
def fetch(args):
    k_desc, scale_desc, k_tiles, scales, q_tiles, full, free, ranges, pointers = args
    first, last = ranges[2], ranges[3]
    for i in range((last - first) // BK):
        stage = i & (STAGES - 1)
        mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), BK * (DIM + 4))
        tma.async_copy_global_to_shared(k_desc, [first + i * BK, 0], full.index(stage), k_tiles.index(stage))
        tma.async_copy_global_to_shared(scale_desc, [first + i * BK], full.index(stage), scales.index(stage))


@gluon.jit
def score_tile(i, group, args, w):
    """Scores [BK, BQ] of tile i for this warpgroup's queries, in the layout in which the sum over heads arrives."""
    k_desc, scale_desc, k_tiles, scales, q_tiles, full, free, ranges, pointers = args
    zeros = gl.zeros([BK, BQ * HEADS], gl.float32, layout=DOTS)
    SCORES: gl.constexpr = gl.sum(gl.reshape(zeros, [BK, BQ, HEADS]), 2).type.layout
    stage = i & (STAGES - 1)
    mbarrier.wait(full.index(stage), (i // STAGES) & 1)
    # i >> 28 is 0, but the compiler does not know: the queries' descriptor is not hoisted into registers
    q_tile = q_tiles.index(group + (i >> 28)).permute((1, 0))
    dots = warpgroup_mma(k_tiles.index(stage), q_tile, zeros, use_acc=False, is_async=True)
    k_scale = scales.index(stage).load(gl.SliceLayout(1, SCORES))
    dots = warpgroup_mma_wait(0, deps=(dots,))
    mbarrier.arrive(free.index(stage), count=1)
    weighted = (dots + gl.abs(dots)) * w[None, :]
    return gl.sum(gl.reshape(weighted, [BK, BQ, HEADS]), 2) * (0.5 * k_scale)[:, None]


@gluon.jit
def rows_of(group, args):
    """What a consumer needs about its queries: (w, t [BQ], start, end, key [BK], whole_first, whole_last)."""
    k_desc, scale_desc, k_tiles, scales, q_tiles, full, free, ranges, pointers = args
    chunk_first, chunk_last, first, last, t0, T, S = ranges
    w_ptr, start_ptr, end_ptr = pointers[0], pointers[1], pointers[2]
    t0 = t0 + group * BQ
    column = gl.arange(0, BQ * HEADS, layout=gl.SliceLayout(0, DOTS))
    w = gl.load(w_ptr + t0.to(gl.int64) * HEADS + column, t0 + column // HEADS < T, 0.0)
    zeros = gl.zeros([BK, BQ * HEADS], gl.float32, layout=DOTS)
    SCORES: gl.constexpr = gl.sum(gl.reshape(zeros, [BK, BQ, HEADS]), 2).type.layout
    t = t0 + gl.arange(0, BQ, layout=gl.SliceLayout(0, SCORES))
    key = gl.arange(0, BK, layout=gl.SliceLayout(1, SCORES))
    start, end = gl.load(start_ptr + t, t < T, S), gl.load(end_ptr + t, t < T, 0)
    # Between these two every row sees every key of a tile, and nothing is masked. Rows past T see nothing.
    whole_first = (gl.max(start, 0) + BK - 1) // BK * BK
    whole_last = gl.minimum(gl.min(end, 0), chunk_last) // BK * BK
    return w, t, start, end, key, whole_first, whole_last


@gluon.jit
def score(group, args):
    k_desc, scale_desc, k_tiles, scales, q_tiles, full, free, ranges, pointers = args
    chunk_first, chunk_last, first, last, t0, T, S = ranges
    w, t, start, end, key, whole_first, whole_last = rows_of(group, args)
    out = pointers[3] + (t0 + group * BQ).to(gl.int64) * S  # the rest of an address fits into 32 bits
    place = (t - t0 - group * BQ)[None, :] * S + key[:, None]
    nothing = gl.full([BK, BQ], float("-inf"), gl.float32, layout=place.type.layout)

    for s0 in range(chunk_first, first, BK):
        gl.store(out + s0 + place, nothing, (t < T)[None, :] & (s0 + key < first)[:, None])
    for i in range((last - first) // BK):
        s0 = first + i * BK
        scores = score_tile(i, group, args, w)
        if (s0 >= whole_first) & (s0 < whole_last):
            gl.store(out + s0 + place, scores)
        else:
            s = (s0 + key)[:, None]
            seen = (s >= start[None, :]) & (s < end[None, :])
            gl.store(out + s0 + place, gl.where(seen, scores, nothing), (t < T)[None, :] & (s < chunk_last))
    for s0 in range(last, chunk_last, BK):
        gl.store(out + s0 + place, nothing, (t < T)[None, :] & (s0 + key < chunk_last)[:, None])


@gluon.jit
def open_block(q_desc, t0):
    """Shared memory and barriers of a block whose queries start at t0, which have arrived when this returns."""
    q_tiles = gl.allocate_shared_memory(gl.float8e4nv, [GROUPS, BQ * HEADS, DIM], TILE)
    k_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BK, DIM], TILE)
    scales = gl.allocate_shared_memory(gl.float32, [STAGES, BK], SCALES)
    come = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(come, count=1)
    for j in gl.static_range(STAGES):
        mbarrier.init(full.index(j), count=1)
        mbarrier.init(free.index(j), count=GROUPS)
    mbarrier.expect(come, QUERIES * HEADS * DIM)
    for j in gl.static_range(GROUPS):
        tma.async_copy_global_to_shared(q_desc, [(t0 + j * BQ) * HEADS, 0], come, q_tiles.index(j))
    mbarrier.wait(come, 0)
    return k_tiles, scales, q_tiles, full, free


@gluon.jit
def tiles_seen(t0, chunk_first, chunk_last, start_ptr, end_ptr, T, S):
    """First and last key, in whole tiles, that some query of the block sees in the chunk."""
    t = t0 + gl.arange(0, QUERIES, layout=gl.BlockedLayout([1], [32], [4], [0]))
    seen_first = gl.min(gl.load(start_ptr + t, t < T, S), 0)
    seen_last = gl.max(gl.load(end_ptr + t, t < T, 0), 0)
    first = gl.minimum(gl.maximum(seen_first // BK * BK, chunk_first), chunk_last)
    last = gl.minimum((seen_last + BK - 1) // BK * BK, (chunk_last + BK - 1) // BK * BK)
    return first, gl.maximum(last, first)


@gluon.jit
def _index_scores(
    q_desc, k_desc, scale_desc, w_ptr, start_ptr, end_ptr, out_ptr, T, S, chunk
):  # fmt: skip
    t0 = gl.program_id(0) * QUERIES
    chunk_first = gl.program_id(1) * chunk
    chunk_last = gl.minimum(chunk_first + chunk, S)
    first, last = tiles_seen(t0, chunk_first, chunk_last, start_ptr, end_ptr, T, S)
    k_tiles, scales, q_tiles, full, free = open_block(q_desc, t0)
    ranges = (chunk_first, chunk_last, first, last, t0, T, S)
    pointers = (w_ptr, start_ptr, end_ptr, out_ptr)
    args = (k_desc, scale_desc, k_tiles, scales, q_tiles, full, free, ranges, pointers)
    gl.warp_specialize([(score, (0, args)), (score, (1, args)), (fetch, (args,))], [4, 1], [232, 24])


def descriptors(q_idx, k_idx, k_scale):
    """What TMA reads: queries [T · Hi, Di], keys [S, Di] and their scales [S], ones where there are none."""
    rows = aligned(q_idx).view(-1, DIM.value)
    k_scale = torch.ones(len(k_idx), device=k_idx.device) if k_scale is None else aligned(k_scale)
    return (
        TensorDescriptor.from_tensor(rows, [BQ.value * HEADS.value, DIM.value], TILE.value),
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


def index_scores(q_idx, k_idx, w, k_scale, start, end, out):
    """Write the scores to out, fp32 [T, S]. `kernels.index_scores` has checked the arguments; T > 0."""
    T, S = out.shape
    multiprocessors = torch.cuda.get_device_properties(out.device).multi_processor_count
    blocks = triton.cdiv(T, QUERIES.value)
    # About four waves of blocks, but chunks of at least 32 tiles to pay for fetching the queries.
    chunks = max(1, min(triton.cdiv(S, 32 * BK.value), 4 * multiprocessors // blocks))
    chunk = triton.cdiv(triton.cdiv(S, chunks), BK.value) * BK.value
    _index_scores[(blocks, triton.cdiv(S, chunk))](
        *descriptors(q_idx, k_idx, k_scale), w.float().contiguous(), start.contiguous(), end.contiguous(), out,
        T, S, chunk, num_warps=4, maxnreg=168,
    )  # fmt: skip
