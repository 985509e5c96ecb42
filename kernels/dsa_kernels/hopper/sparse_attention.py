"""Attention over gathered rows on Hopper's tensor cores, V3.2's sizes: rows of 576 columns, of which 512 are the value.

A tile is 64 rows of q: 64 heads of one query, or with fewer heads the G = 64 / H neighbouring queries that share the
union of their lists (`unions`). A block stays on its multiprocessor and takes the next tile from a counter when it has
done one. Three warpgroups work on a tile in steps of 128 keys, called key blocks 0 and 1:

- `gather` fetches q by TMA and the selected rows by 16-byte asynchronous copies into the tensor cores' swizzled layout.
  It waits until a quarter of the two blocks is free, refills it, and is at the next tile's keys while the other two
  still finish this one.
- `left` multiplies q by block 0 and owns output columns 0 to 255; `right` takes block 1 and columns 256 to 511. Each
  needs the probabilities P of both blocks for its half of the values V: its own come from registers, the other's
  through shared memory. So no logit is computed twice, and one's softmax hides behind the other's products.

    left   | q·k0 | softmax 0 | P0·V0 left | P1·V1 left | q·k0 of the next step
    right         | q·k1 | softmax 1 | P1·V1 right | P0·V0 right | q·k1 of the next step

The running maximum passes from left to right and back through `top`. It moves only when a logit exceeds it by more than
THRESHOLD in base 2: probabilities up to 2^8 instead of 1 cost no precision, and hardly ever are the accumulators
rescaled, which one branch then skips. If EARLY, left hands P0 over before its own product is done, and products begin
when half of their columns have come.

A step must move 128 · 1152 bytes, from L2 where it can, and takes 2 · 64 · 128 · (576 + 512) FLOPs, 4352 clocks of the
tensor cores. `python -m dsa_bench sparse_attention --peers` measures it; figures/ keeps the record.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..runtime import aligned
from .sparse_tiles import (
    BK,
    LOGITS,
    NEVER,
    OUTPUT,
    ROWS,
    SCALAR,
    WEIGHTS,
    copy_half,
    entries,
    exp2,
    finish,
    multiply,
    raised,
    rescale,
    scaled,
    tile_at,
)
from .unions import unions

D, V = 576, 512
LIST_ENTRIES = 1 << 25  # of unions in memory at a time: 256 MB
# What each version added. The default is the last; the others are kept for the bench.
VERSIONS = {
    "one tile a program": dict(persistent=False, THRESHOLD=0.0, EARLY=False),
    "persistent": dict(persistent=True, THRESHOLD=0.0, EARLY=False),
    "rare rescaling": dict(persistent=True, THRESHOLD=8.0, EARLY=False),
    "early hand-over": dict(persistent=True, THRESHOLD=8.0, EARLY=True),
}


@gluon.jit
def gather(a, GH: gl.constexpr, TILES: gl.constexpr, GROUPED: gl.constexpr, EARLY: gl.constexpr):
    q256, q64, kv_ptr, lists_ptr, lengths_ptr, counter_ptr, k, tiles, buffers, bars = a
    q_left, q_right, q_rope, k_left, k_right, k_rope, p1, top, sums, valid, current = buffers
    q_ready, q_free, left_ready, right_ready, left_free, right_free, top0, top1, p0_ready, p1_ready, sums_ready = bars
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, COPY))
    columns = gl.arange(0, 64, layout=gl.SliceLayout(0, COPY))
    parity = 1
    q_parity = 1
    tile = gl.program_id(0)
    while tile < tiles:
        group, row0, length, steps = tile_at(tile, lengths_ptr, k, GH, TILES, GROUPED)
        mbarrier.wait(q_free, q_parity)
        q_parity = q_parity ^ 1
        current.store(gl.full([1], tile, gl.int32, layout=SCALAR))
        mbarrier.expect(q_ready, 64 * 576 * 2)
        tma.async_copy_global_to_shared(q256, [row0, 0], q_ready, q_left.index(0))
        tma.async_copy_global_to_shared(q256, [row0, 256], q_ready, q_right.index(0))
        tma.async_copy_global_to_shared(q64, [row0, 512], q_ready, q_rope.index(0))
        my_list = lists_ptr + group.to(gl.int64) * k
        for step in range(steps):
            j = step * 2 * BK + rows
            s0, valid0 = entries(my_list, j, length, GROUPED)
            s1, valid1 = entries(my_list, j + BK, length, GROUPED)
            there0 = (s0 >= 0)[:, None]
            there1 = (s1 >= 0)[:, None]
            row_0 = kv_ptr + (s0.to(gl.int64) * 576)[:, None] + columns[None, :]
            row_1 = kv_ptr + (s1.to(gl.int64) * 576)[:, None] + columns[None, :]
            mbarrier.wait(left_free.index(0), parity)
            valid.index(0).store(valid0)
            mbarrier.arrive(left_ready.index(1), count=1)
            copy_half(k_left.index(0), k_rope.index(0), row_0, there0, left_ready, 0, False, EARLY)
            mbarrier.wait(right_free.index(1), parity)
            valid.index(1).store(valid1)
            mbarrier.arrive(right_ready.index(3), count=1)
            copy_half(k_right.index(1), k_rope.index(1), row_1 + 256, there1, right_ready, 2, True, EARLY)
            mbarrier.wait(right_free.index(0), parity)
            copy_half(k_right.index(0), k_rope.index(0), row_0 + 256, there0, right_ready, 0, True, EARLY)
            mbarrier.wait(left_free.index(1), parity)
            copy_half(k_left.index(1), k_rope.index(1), row_1, there1, left_ready, 2, False, EARLY)
            parity = parity ^ 1
        tile = gl.atomic_add(counter_ptr, 1, sem="relaxed") + gl.num_programs(0)
    mbarrier.wait(q_free, q_parity)
    current.store(gl.full([1], tiles, gl.int32, layout=SCALAR))  # no more
    mbarrier.arrive(q_ready, count=1)


@gluon.jit
def left_step(
    acc, m, total, logits, buffers, bars, bit, zero, parity, scale,
    GROUPED: gl.constexpr, THRESHOLD: gl.constexpr, EARLY: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """Softmax of block 0, the products with both left halves of the values, and the next step's logits.

    `zero` is 0, which the compiler cannot know: buffers at a constant place would fill registers with descriptors.
    """
    q_left, q_right, q_rope, k_left, k_right, k_rope, p1, top, sums, valid, current = buffers
    q_ready, q_free, left_ready, right_ready, left_free, right_free, top0, top1, p0_ready, p1_ready, sums_ready = bars
    logits = scaled(logits, scale, valid.index(0), bit, GROUPED)
    m_new = raised(m, gl.max(logits, 1), THRESHOLD)
    top.store(m_new)
    mbarrier.arrive(top0, count=1)
    factor = exp2(m - m_new)
    p = exp2(logits - m_new[:, None])
    total = total * factor + gl.sum(p, 1)
    acc = rescale(acc, factor, THRESHOLD)
    weights = gl.convert_layout(p.to(gl.bfloat16), WEIGHTS)
    mine = warpgroup_mma(weights, k_left.index(zero), acc, is_async=True)
    if not EARLY:
        acc = warpgroup_mma_wait(0, deps=(mine,))
        mbarrier.arrive(left_free.index(0), count=1)
    mbarrier.wait(top1, parity)
    m = top.load(ROWS)
    factor = exp2(m_new - m)
    total = total * factor
    k_rope.index(0).store((p * factor[:, None]).to(gl.bfloat16))  # k0's rope columns have had their turn
    fence_async_shared()
    mbarrier.arrive(p0_ready, count=1)
    if EARLY:
        acc = warpgroup_mma_wait(0, deps=(mine,))
        mbarrier.arrive(left_free.index(0), count=1)
    mbarrier.wait(p1_ready, parity)
    acc = rescale(acc, factor, THRESHOLD)
    other = warpgroup_mma(p1.index(zero), k_left.index(1 + zero), acc, is_async=True)
    empty = gl.zeros([64, BK], gl.float32, layout=LOGITS)
    if LAST:
        acc = warpgroup_mma_wait(0, deps=(other,))
        mbarrier.arrive(left_free.index(1), count=1)
        return acc, m, total, empty
    else:
        s = multiply(empty, q_left.index(zero), k_left.index(zero), left_ready, 0, parity ^ 1, True, EARLY)
        acc = warpgroup_mma_wait(2 if EARLY else 1, deps=(other,))
        mbarrier.arrive(left_free.index(1), count=1)
        s = multiply(s, q_right.index(zero), k_right.index(zero), right_ready, 0, parity ^ 1, False, EARLY)
        s = warpgroup_mma(q_rope.index(zero), k_rope.index(zero).permute((1, 0)), s, is_async=True)
        return acc, m, total, warpgroup_mma_wait(0, deps=(s,))


@gluon.jit
def left(
    a, G: gl.constexpr, GH: gl.constexpr, TILES: gl.constexpr, GROUPED: gl.constexpr,
    THRESHOLD: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    out_ptr, lse_ptr, lengths_ptr, k, tiles, all_rows, scale, buffers, bars = a
    q_left, q_right, q_rope, k_left, k_right, k_rope, p1, top, sums, valid, current = buffers
    q_ready, q_free, left_ready, right_ready, left_free, right_free, top0, top1, p0_ready, p1_ready, sums_ready = bars
    r = gl.arange(0, 64, layout=ROWS)
    bit = 1 << gl.minimum(r // (GH // G), 31)  # of each row's query
    parity = 0
    q_parity = 0
    mbarrier.wait(q_ready, q_parity)
    tile = gl.max(current.load(SCALAR), 0)
    while tile < tiles:
        group, row0, length, steps = tile_at(tile, lengths_ptr, k, GH, TILES, GROUPED)
        n_rows = gl.minimum(GH - tile % TILES * 64, all_rows - row0)
        m = gl.full([64], NEVER, gl.float32, layout=ROWS)
        total = gl.full([64], 0.0, gl.float32, layout=ROWS)
        acc = gl.zeros([64, 256], gl.float32, layout=OUTPUT)
        s = gl.zeros([64, BK], gl.float32, layout=LOGITS)
        zero = tile >> 30
        s = multiply(s, q_left.index(zero), k_left.index(zero), left_ready, 0, parity, True, EARLY)
        s = multiply(s, q_right.index(zero), k_right.index(zero), right_ready, 0, parity, False, EARLY)
        s = warpgroup_mma(q_rope.index(zero), k_rope.index(zero).permute((1, 0)), s, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        for step in range(steps - 1):
            acc, m, total, s = left_step(
                acc, m, total, s, buffers, bars, bit, step >> 28, parity, scale, GROUPED, THRESHOLD, EARLY, False
            )
            parity = parity ^ 1
        mbarrier.arrive(q_free, count=1)
        acc, m, total, s = left_step(
            acc, m, total, s, buffers, bars, bit, zero, parity, scale, GROUPED, THRESHOLD, EARLY, True
        )
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
def right(
    a, G: gl.constexpr, GH: gl.constexpr, TILES: gl.constexpr, GROUPED: gl.constexpr,
    THRESHOLD: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    out_ptr, lse_ptr, lengths_ptr, k, tiles, all_rows, scale, buffers, bars = a
    q_left, q_right, q_rope, k_left, k_right, k_rope, p1, top, sums, valid, current = buffers
    q_ready, q_free, left_ready, right_ready, left_free, right_free, top0, top1, p0_ready, p1_ready, sums_ready = bars
    bit = 1 << gl.minimum(gl.arange(0, 64, layout=ROWS) // (GH // G), 31)
    parity = 0
    q_parity = 0
    mbarrier.wait(q_ready, q_parity)
    tile = gl.max(current.load(SCALAR), 0)
    while tile < tiles:
        group, row0, length, steps = tile_at(tile, lengths_ptr, k, GH, TILES, GROUPED)
        n_rows = gl.minimum(GH - tile % TILES * 64, all_rows - row0)
        m = gl.full([64], NEVER, gl.float32, layout=ROWS)
        total = gl.full([64], 0.0, gl.float32, layout=ROWS)
        acc = gl.zeros([64, 256], gl.float32, layout=OUTPUT)
        for step in range(steps):
            zero = step >> 28
            s = gl.zeros([64, BK], gl.float32, layout=LOGITS)
            s = multiply(s, q_right.index(zero), k_right.index(1 + zero), right_ready, 2, parity, True, EARLY)
            s = warpgroup_mma(q_rope.index(zero), k_rope.index(1 + zero).permute((1, 0)), s, is_async=True)
            s = multiply(s, q_left.index(zero), k_left.index(1 + zero), left_ready, 2, parity, False, EARLY)
            logits = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(q_free, count=1, pred=step == steps - 1)
            logits = scaled(logits, scale, valid.index(1), bit, GROUPED)
            largest = gl.max(logits, 1)
            mbarrier.wait(top0, parity)
            m_new = raised(top.load(ROWS), largest, THRESHOLD)
            top.store(m_new)
            mbarrier.arrive(top1, count=1)
            factor = exp2(m - m_new)
            m = m_new
            p = exp2(logits - m[:, None])
            total = total * factor + gl.sum(p, 1)
            acc = rescale(acc, factor, THRESHOLD)
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
    q256, q64, kv_ptr, lists_ptr, lengths_ptr, counter_ptr, out_ptr, lse_ptr, scale, k, tiles, all_rows,
    G: gl.constexpr, GH: gl.constexpr, TILES: gl.constexpr, GROUPED: gl.constexpr,
    THRESHOLD: gl.constexpr, EARLY: gl.constexpr,
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
    valid = gl.allocate_shared_memory(gl.int32 if GROUPED else gl.float32, [2, BK], PLAIN)
    current = gl.allocate_shared_memory(gl.int32, [1], PLAIN)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_free = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    left_ready = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    right_ready = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    left_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    right_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    top0 = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    top1 = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    p0_ready = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    p1_ready = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    sums_ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mbarrier.init(q_ready, count=1)
    mbarrier.init(q_free, count=2)
    for j in gl.static_range(4):  # 128 threads' copies; one arrival more stands for `valid`
        mbarrier.init(left_ready.index(j), count=129 if j == 1 else 128)
        mbarrier.init(right_ready.index(j), count=129 if j == 3 else 128)
    for j in gl.static_range(2):
        mbarrier.init(left_free.index(j), count=1)
        mbarrier.init(right_free.index(j), count=1)
        mbarrier.init(sums_ready.index(j), count=1)
    mbarrier.init(top0, count=1)
    mbarrier.init(top1, count=1)
    mbarrier.init(p0_ready, count=1)
    mbarrier.init(p1_ready, count=1)
    buffers = (q_left, q_right, q_rope, k_left, k_right, k_rope, p1, top, sums, valid, current)
    bars = (q_ready, q_free, left_ready, right_ready, left_free, right_free, top0, top1, p0_ready, p1_ready, sums_ready)
    sources = (q256, q64, kv_ptr, lists_ptr, lengths_ptr, counter_ptr, k, tiles, buffers, bars)
    results = (out_ptr, lse_ptr, lengths_ptr, k, tiles, all_rows, scale, buffers, bars)
    gl.warp_specialize(
        [
            (left, (results, G, GH, TILES, GROUPED, THRESHOLD, EARLY)),
            (right, (results, G, GH, TILES, GROUPED, THRESHOLD, EARLY)),
            (gather, (sources, GH, TILES, GROUPED, EARLY)),
        ],
        [4, 4],
        [216, 72],
    )


def _worth_sharing(queries, k, S, multiprocessors):
    """Does it pay that the queries of a tile share the union of their lists? Decided by sizes alone: the host does not
    wait to learn how much the lists have in common.

    Building the unions takes time in proportion to S, at S = 128 · k a quarter of what attention over separate lists
    takes; lists with nothing in common lose that much. A few queries are better spread over the card.
    """
    return queries > 2 * multiprocessors and S <= 128 * k


def cannot_serve(q, v_dim):
    """Why this variant cannot attend with these queries, or None."""
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        return "needs a GPU of compute capability 9.0"
    if q.dtype != torch.bfloat16:
        return f"needs bfloat16, got {str(q.dtype).removeprefix('torch.')}"
    if (q.shape[-1], v_dim) != (D, V):
        return f"needs D = {D} and v_dim = {V}, got {q.shape[-1]} and {v_dim}"
    return None


def sparse_attention(q, kv, indices, scale, out, lse, version="early hand-over", share=None):
    """Write attention over the selected rows to out and lse. `dsa_kernels.sparse_attention` has checked the arguments.

    share: whether the queries of a tile share the union of their lists (fewer than 33 heads); None decides by size.
    Where they do, a key that a row holds twice counts once, and NaN or infinity in a row of kv reaches every query of
    the tile.
    """
    T, H, _ = q.shape
    S, k = kv.shape[0], indices.shape[1]
    multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
    if share is None:
        share = _worth_sharing(T, k, S, multiprocessors)
    G = min(32, max(1, 64 // H)) if share else 1  # 32: one bit each in an int32
    q, kv, indices = (aligned(x) for x in (q, kv, indices))
    chunk = T if G == 1 else max(1, LIST_ENTRIES // min(G * k, S)) * G
    for first in range(0, T, chunk):
        rows = slice(first, first + chunk)
        lists, lengths = (indices, indices) if G == 1 else unions(indices[rows], S, G)  # G = 1 reads no lengths
        _launch(q[rows], kv, lists, lengths, scale, out[rows], lse[rows], G, multiprocessors, **VERSIONS[version])


def _launch(q, kv, lists, lengths, scale, out, lse, G, multiprocessors, persistent, THRESHOLD, EARLY):
    T, H, _ = q.shape
    all_rows, tiles_of_group = T * H, triton.cdiv(H, 64)
    tiles = triton.cdiv(T, G) * tiles_of_group
    layout = gl.NVMMASharedLayout(128, 16, 2)
    q256, q64 = (TensorDescriptor(q, [all_rows, D], [D, 1], [64, columns], layout) for columns in (256, 64))
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    _sparse_attention[(min(tiles, multiprocessors) if persistent else tiles,)](
        q256, q64, kv, lists, lengths, counter, out, lse, scale * 1.4426950408889634, lists.shape[1], tiles, all_rows,
        G=G, GH=G * H, TILES=tiles_of_group, GROUPED=G > 1, THRESHOLD=THRESHOLD, EARLY=EARLY,
        num_warps=4, maxnreg=168,
    )  # fmt: skip
