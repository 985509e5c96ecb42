"""Version "persistent": a program walks over many tiles and gathers the next one's keys while it finishes this one.

History: the second version of the Hopper kernel. Predicted 565 TFLOP/s, 3 % more than "one tile a program"; what was
measured stands in figures/ladder.json, step sparse_attention.

A copy as it was, without what the ladder does not measure (few heads that share the union of their lists).
`dsa_kernels/hopper/sparse_attention.py` is what came of it, with names for buffers and barriers; kernels/book/
explains it. Here buffers and barriers are positions of tuples, and barriers are waited for by bare parities.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dsa_kernels.runtime import aligned

BK = gl.constexpr(64)  # keys of a block; a step takes two
NEVER = gl.constexpr(-1e30)  # below every logit, and finite: a row that has seen nothing yields 0 and no NaN
LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, OUTPUT.value, 2))
ROWS = gl.constexpr(gl.SliceLayout(1, LOGITS.value))
KEYS = gl.constexpr(gl.SliceLayout(0, LOGITS.value))
SCALAR = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
# [64, 256] with 8 neighbouring columns in a thread, for 16-byte stores, and the layout half-way to it from OUTPUT:
# each of the two steps swaps one bit of the lane with one of the register, which is a shuffle and needs no memory.
HALF_WAY = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64], [0, 128]],
        lane_bases=[[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 256],
    )
)
WIDE = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], [0, 128]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 256],
    )
)


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def rescale(acc, factor):
    """acc · factor, a factor for each row."""
    factor = gl.convert_layout(factor, gl.SliceLayout(1, OUTPUT))[:, None]
    return acc * factor


@gluon.jit
def scaled(logits, scale, valid):
    """Logits in base 2; -inf where the key is none (valid = -inf instead of 0)."""
    return logits * scale + valid.load(KEYS)[None, :]


@gluon.jit
def tile_at(tile, k, H: gl.constexpr, TILES: gl.constexpr):
    """query, first row of q, steps"""
    query = tile // TILES
    return query, query * H + tile % TILES * 64, gl.maximum(1, gl.cdiv(k, 2 * BK))


@gluon.jit
def entries(list_ptr, j, k):
    """Places j of a list: the rows (-1 behind the end), and what `scaled` wants to know of them."""
    s = gl.load(list_ptr + j, j < k, -1)
    return s, gl.where(s >= 0, 0.0, float("-inf"))


@gluon.jit
def copy_half(half, rope, source, there, ready, block, ROPE: gl.constexpr):
    """Start the copies of 256 columns of 64 rows (zeros where there is no row), and of the 64 rope columns."""
    for j in gl.static_range(4):
        async_copy.async_copy_global_to_shared(half.slice(64 * j, 64, 1), source + 64 * j, mask=there)
    if ROPE:
        async_copy.async_copy_global_to_shared(rope, source + 256, mask=there)
    async_copy.mbarrier_arrive(ready.index(block), increment_count=False)


@gluon.jit
def multiply(acc, q, k, ready, block, parity, FIRST: gl.constexpr):
    """acc + q · kᵀ over 256 columns. Asynchronous."""
    mbarrier.wait(ready.index(block), parity)
    fence_async_shared()
    return warpgroup_mma(q, k.permute((1, 0)), acc, use_acc=not FIRST, is_async=True)


@gluon.jit
def finish(acc, total, out_ptr, row0, n_rows, COLUMN: gl.constexpr):
    """Divide by the sums and store 256 columns of the rows there are."""
    inverse = gl.convert_layout(1.0 / gl.where(total == 0.0, 1.0, total), gl.SliceLayout(1, OUTPUT))
    acc = (acc * inverse[:, None]).to(gl.bfloat16)
    r = gl.arange(0, 64, layout=gl.SliceLayout(1, WIDE))
    c = COLUMN + gl.arange(0, 256, layout=gl.SliceLayout(0, WIDE))
    place = out_ptr + ((row0 + r).to(gl.int64) * 512)[:, None] + c[None, :]
    gl.store(place, gl.convert_layout(gl.convert_layout(acc, HALF_WAY), WIDE), mask=(r < n_rows)[:, None])


@gluon.jit
def gather(a, H: gl.constexpr, TILES: gl.constexpr):
    q256, q64, kv_ptr, indices_ptr, counter_ptr, k, tiles, buffers, bars = a
    q_left, q_right, q_rope, k_left, k_right, k_rope, p1, top, sums, valid, current = buffers
    q_ready, q_free, left_ready, right_ready, left_free, right_free, top0, top1, p0_ready, p1_ready, sums_ready = bars
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, COPY))
    columns = gl.arange(0, 64, layout=gl.SliceLayout(0, COPY))
    parity = 1
    q_parity = 1
    tile = gl.program_id(0)
    while tile < tiles:
        query, row0, steps = tile_at(tile, k, H, TILES)
        mbarrier.wait(q_free, q_parity)
        q_parity = q_parity ^ 1
        current.store(gl.full([1], tile, gl.int32, layout=SCALAR))
        mbarrier.expect(q_ready, 64 * 576 * 2)
        tma.async_copy_global_to_shared(q256, [row0, 0], q_ready, q_left.index(0))
        tma.async_copy_global_to_shared(q256, [row0, 256], q_ready, q_right.index(0))
        tma.async_copy_global_to_shared(q64, [row0, 512], q_ready, q_rope.index(0))
        list_ptr = indices_ptr + query.to(gl.int64) * k
        for step in range(steps):
            j = step * 2 * BK + rows
            s0, valid0 = entries(list_ptr, j, k)
            s1, valid1 = entries(list_ptr, j + BK, k)
            there0 = (s0 >= 0)[:, None]
            there1 = (s1 >= 0)[:, None]
            row_0 = kv_ptr + (s0.to(gl.int64) * 576)[:, None] + columns[None, :]
            row_1 = kv_ptr + (s1.to(gl.int64) * 576)[:, None] + columns[None, :]
            mbarrier.wait(left_free.index(0), parity)
            valid.index(0).store(valid0)
            mbarrier.arrive(left_ready.index(0), count=1)
            copy_half(k_left.index(0), k_rope.index(0), row_0, there0, left_ready, 0, False)
            mbarrier.wait(right_free.index(1), parity)
            valid.index(1).store(valid1)
            mbarrier.arrive(right_ready.index(1), count=1)
            copy_half(k_right.index(1), k_rope.index(1), row_1 + 256, there1, right_ready, 1, True)
            mbarrier.wait(right_free.index(0), parity)
            copy_half(k_right.index(0), k_rope.index(0), row_0 + 256, there0, right_ready, 0, True)
            mbarrier.wait(left_free.index(1), parity)
            copy_half(k_left.index(1), k_rope.index(1), row_1, there1, left_ready, 1, False)
            parity = parity ^ 1
        tile = gl.atomic_add(counter_ptr, 1, sem="relaxed") + gl.num_programs(0)
    mbarrier.wait(q_free, q_parity)
    current.store(gl.full([1], tiles, gl.int32, layout=SCALAR))  # no more
    mbarrier.arrive(q_ready, count=1)


@gluon.jit
def left_step(
    acc, m, total, logits, buffers, bars, zero, parity, scale,
    LAST: gl.constexpr,
):  # fmt: skip
    """Softmax of block 0, the products with both left halves of the values, and the next step's logits.

    `zero` is 0, which the compiler cannot know: buffers at a constant place would fill registers with descriptors.
    """
    q_left, q_right, q_rope, k_left, k_right, k_rope, p1, top, sums, valid, current = buffers
    q_ready, q_free, left_ready, right_ready, left_free, right_free, top0, top1, p0_ready, p1_ready, sums_ready = bars
    logits = scaled(logits, scale, valid.index(0))
    m_new = gl.maximum(m, gl.max(logits, 1))
    top.store(m_new)
    mbarrier.arrive(top0, count=1)
    factor = exp2(m - m_new)
    p = exp2(logits - m_new[:, None])
    total = total * factor + gl.sum(p, 1)
    acc = rescale(acc, factor)
    weights = gl.convert_layout(p.to(gl.bfloat16), WEIGHTS)
    mine = warpgroup_mma(weights, k_left.index(zero), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(mine,))
    mbarrier.arrive(left_free.index(0), count=1)
    mbarrier.wait(top1, parity)
    m = top.load(ROWS)
    factor = exp2(m_new - m)
    total = total * factor
    k_rope.index(0).store((p * factor[:, None]).to(gl.bfloat16))  # k0's rope columns have had their turn
    fence_async_shared()
    mbarrier.arrive(p0_ready, count=1)
    mbarrier.wait(p1_ready, parity)
    acc = rescale(acc, factor)
    other = warpgroup_mma(p1.index(zero), k_left.index(1 + zero), acc, is_async=True)
    empty = gl.zeros([64, BK], gl.float32, layout=LOGITS)
    if LAST:
        acc = warpgroup_mma_wait(0, deps=(other,))
        mbarrier.arrive(left_free.index(1), count=1)
        return acc, m, total, empty
    else:
        s = multiply(empty, q_left.index(zero), k_left.index(zero), left_ready, 0, parity ^ 1, True)
        acc = warpgroup_mma_wait(1, deps=(other,))
        mbarrier.arrive(left_free.index(1), count=1)
        s = multiply(s, q_right.index(zero), k_right.index(zero), right_ready, 0, parity ^ 1, False)
        s = warpgroup_mma(q_rope.index(zero), k_rope.index(zero).permute((1, 0)), s, is_async=True)
        return acc, m, total, warpgroup_mma_wait(0, deps=(s,))


@gluon.jit
def left(a, H: gl.constexpr, TILES: gl.constexpr):
    out_ptr, lse_ptr, k, tiles, all_rows, scale, buffers, bars = a
    q_left, q_right, q_rope, k_left, k_right, k_rope, p1, top, sums, valid, current = buffers
    q_ready, q_free, left_ready, right_ready, left_free, right_free, top0, top1, p0_ready, p1_ready, sums_ready = bars
    r = gl.arange(0, 64, layout=ROWS)
    parity = 0
    q_parity = 0
    mbarrier.wait(q_ready, q_parity)
    tile = gl.max(current.load(SCALAR), 0)
    while tile < tiles:
        query, row0, steps = tile_at(tile, k, H, TILES)
        n_rows = gl.minimum(H - tile % TILES * 64, all_rows - row0)
        m = gl.full([64], NEVER, gl.float32, layout=ROWS)
        total = gl.full([64], 0.0, gl.float32, layout=ROWS)
        acc = gl.zeros([64, 256], gl.float32, layout=OUTPUT)
        s = gl.zeros([64, BK], gl.float32, layout=LOGITS)
        zero = tile >> 30
        s = multiply(s, q_left.index(zero), k_left.index(zero), left_ready, 0, parity, True)
        s = multiply(s, q_right.index(zero), k_right.index(zero), right_ready, 0, parity, False)
        s = warpgroup_mma(q_rope.index(zero), k_rope.index(zero).permute((1, 0)), s, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        for step in range(steps - 1):
            acc, m, total, s = left_step(acc, m, total, s, buffers, bars, step >> 28, parity, scale, False)
            parity = parity ^ 1
        mbarrier.arrive(q_free, count=1)
        acc, m, total, s = left_step(acc, m, total, s, buffers, bars, zero, parity, scale, True)
        parity = parity ^ 1
        sums.index(0).store(total)
        mbarrier.arrive(sums_ready.index(0), count=1)
        mbarrier.wait(sums_ready.index(1), q_parity)
        total += sums.index(1).load(ROWS)
        lse = (m + gl.log2(gl.where(total == 0.0, 1.0, total))) * 0.6931471805599453
        gl.store(lse_ptr + row0 + r, gl.where(total == 0.0, float("-inf"), lse), mask=r < n_rows)
        finish(acc, total, out_ptr, row0, n_rows, 0)
        q_parity = q_parity ^ 1
        mbarrier.wait(q_ready, q_parity)
        tile = gl.max(current.load(SCALAR), 0)


@gluon.jit
def right(a, H: gl.constexpr, TILES: gl.constexpr):
    out_ptr, lse_ptr, k, tiles, all_rows, scale, buffers, bars = a
    q_left, q_right, q_rope, k_left, k_right, k_rope, p1, top, sums, valid, current = buffers
    q_ready, q_free, left_ready, right_ready, left_free, right_free, top0, top1, p0_ready, p1_ready, sums_ready = bars
    parity = 0
    q_parity = 0
    mbarrier.wait(q_ready, q_parity)
    tile = gl.max(current.load(SCALAR), 0)
    while tile < tiles:
        query, row0, steps = tile_at(tile, k, H, TILES)
        n_rows = gl.minimum(H - tile % TILES * 64, all_rows - row0)
        m = gl.full([64], NEVER, gl.float32, layout=ROWS)
        total = gl.full([64], 0.0, gl.float32, layout=ROWS)
        acc = gl.zeros([64, 256], gl.float32, layout=OUTPUT)
        for step in range(steps):
            zero = step >> 28
            s = gl.zeros([64, BK], gl.float32, layout=LOGITS)
            s = multiply(s, q_right.index(zero), k_right.index(1 + zero), right_ready, 1, parity, True)
            s = warpgroup_mma(q_rope.index(zero), k_rope.index(1 + zero).permute((1, 0)), s, is_async=True)
            s = multiply(s, q_left.index(zero), k_left.index(1 + zero), left_ready, 1, parity, False)
            logits = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(q_free, count=1, pred=step == steps - 1)
            logits = scaled(logits, scale, valid.index(1))
            largest = gl.max(logits, 1)
            mbarrier.wait(top0, parity)
            m_new = gl.maximum(top.load(ROWS), largest)
            top.store(m_new)
            mbarrier.arrive(top1, count=1)
            factor = exp2(m - m_new)
            m = m_new
            p = exp2(logits - m[:, None])
            total = total * factor + gl.sum(p, 1)
            acc = rescale(acc, factor)
            p1.index(0).store(p.to(gl.bfloat16))
            fence_async_shared()
            weights = gl.convert_layout(p.to(gl.bfloat16), WEIGHTS)
            mine = warpgroup_mma(weights, k_right.index(1 + zero), acc, is_async=True)
            mbarrier.arrive(p1_ready, count=1)
            mbarrier.wait(p0_ready, parity)
            other = warpgroup_mma(k_rope.index(zero), k_right.index(zero), mine, is_async=True)
            other = warpgroup_mma_wait(1, deps=(other,))
            mbarrier.arrive(right_free.index(1), count=1)
            acc = warpgroup_mma_wait(0, deps=(other,))
            mbarrier.arrive(right_free.index(0), count=1)
            parity = parity ^ 1
        sums.index(1).store(total)
        mbarrier.arrive(sums_ready.index(1), count=1)
        mbarrier.wait(sums_ready.index(0), q_parity)
        total += sums.index(0).load(ROWS)
        finish(acc, total, out_ptr, row0, n_rows, 256)
        q_parity = q_parity ^ 1
        mbarrier.wait(q_ready, q_parity)
        tile = gl.max(current.load(SCALAR), 0)


@gluon.jit
def _sparse_attention(
    q256, q64, kv_ptr, indices_ptr, counter_ptr, out_ptr, lse_ptr, scale, k, tiles, all_rows,
    H: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_left = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 256], SWIZZLED)
    q_right = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 256], SWIZZLED)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 64], SWIZZLED)
    k_left = gl.allocate_shared_memory(gl.bfloat16, [2, BK, 256], SWIZZLED)
    k_right = gl.allocate_shared_memory(gl.bfloat16, [2, BK, 256], SWIZZLED)
    k_rope = gl.allocate_shared_memory(gl.bfloat16, [2, BK, 64], SWIZZLED)
    p1 = gl.allocate_shared_memory(gl.bfloat16, [1, 64, BK], SWIZZLED)
    top = gl.allocate_shared_memory(gl.float32, [64], PLAIN)
    sums = gl.allocate_shared_memory(gl.float32, [2, 64], PLAIN)
    valid = gl.allocate_shared_memory(gl.float32, [2, BK], PLAIN)
    current = gl.allocate_shared_memory(gl.int32, [1], PLAIN)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_free = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    left_ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    right_ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    left_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    right_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    top0 = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    top1 = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    p0_ready = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    p1_ready = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    sums_ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mbarrier.init(q_ready, count=1)
    mbarrier.init(q_free, count=2)
    for j in gl.static_range(2):  # 128 threads' copies; one arrival more stands for `valid`
        mbarrier.init(left_ready.index(j), count=129 if j == 0 else 128)
        mbarrier.init(right_ready.index(j), count=129 if j == 1 else 128)
        mbarrier.init(left_free.index(j), count=1)
        mbarrier.init(right_free.index(j), count=1)
        mbarrier.init(sums_ready.index(j), count=1)
    mbarrier.init(top0, count=1)
    mbarrier.init(top1, count=1)
    mbarrier.init(p0_ready, count=1)
    mbarrier.init(p1_ready, count=1)
    buffers = (q_left, q_right, q_rope, k_left, k_right, k_rope, p1, top, sums, valid, current)
    bars = (q_ready, q_free, left_ready, right_ready, left_free, right_free, top0, top1, p0_ready, p1_ready, sums_ready)
    sources = (q256, q64, kv_ptr, indices_ptr, counter_ptr, k, tiles, buffers, bars)
    results = (out_ptr, lse_ptr, k, tiles, all_rows, scale, buffers, bars)
    gl.warp_specialize(
        [
            (left, (results, H, TILES)),
            (right, (results, H, TILES)),
            (gather, (sources, H, TILES)),
        ],
        [4, 4],
        [216, 72],
    )


def sparse_attention(q, kv, indices, scale, v_dim, programs=None):
    """As `dsa_kernels.sparse_attention`, for bf16 and V3.2's sizes, on a GPU of compute capability 9.0.

    programs: how many share the tiles; None: one a multiprocessor.
    """
    T, H, D = q.shape
    out = torch.empty(T, H, v_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(T, H, dtype=torch.float32, device=q.device)
    q, kv, indices = (aligned(x) for x in (q, kv, indices))
    tiles_of_query = triton.cdiv(H, 64)
    tiles = T * tiles_of_query
    layout = gl.NVMMASharedLayout(128, 16, 2)
    q256, q64 = (TensorDescriptor(q, [T * H, D], [D, 1], [64, columns], layout) for columns in (256, 64))
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    if programs is None:
        programs = min(tiles, torch.cuda.get_device_properties(q.device).multi_processor_count)
    _sparse_attention[(programs,)](
        q256, q64, kv, indices, counter, out, lse, scale * 1.4426950408889634, indices.shape[1], tiles, T * H,
        H=H, TILES=tiles_of_query, num_warps=4, maxnreg=168,
    )  # fmt: skip
    return out, lse
