"""The query pass of `sparse_attention_backward`: S, P, dP, dS and dq of 64 heads of a query, three warpgroups.

- `gather` fetches the selected rows of kv, a tile of 64 keys at a time, in five parts: each is refilled as soon as the
  products that read it last have read it.
- `first` multiplies q by the keys, makes P of S and the log-sum-exp, and owns dq's columns 0 to 255 and 512 to 543.
- `second` multiplies dout by the values, makes dS of P and dP, and owns dq's columns 256 to 511 and 544 to 575.

    first   | q · kᵀ    | P |  waits for dS   | dS · k left  | q · kᵀ of the next tile
    second  | dout · vᵀ |  waits for P  | dS  | dS · k right | dout · vᵀ of the next tile

P and dS go through shared memory to the other warpgroup, and by TMA from there to memory, as tiles [64 heads, 64 keys]
for `backward_keys`.

q and dout, 136 KiB, stay for the whole list, and the key tile has 72, so that there is no room for a second one: the
next tile's first part can only come when dS · k has begun. This is what the pass waits for most.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma, warpgroup_mma_wait

from .backward_shared import allocate_query_pass, descriptor
from .sparse_shared import BK, next_turn
from .sparse_tiles import COPY, KEYS, LOG2_E, LOGITS, ROWS, exp2, opaque_zero

OF_128 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))  # sums [64, 128]
OF_32 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16]))  # sums [64, 32]
COPY_32 = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0]))  # [64, 32] with 16 bytes a copy


@gluon.jit
def gather(shared, kv_ptr, list_ptr, tiles):
    """Fills the key tile's parts, in the order in which they come free."""
    places = gl.arange(0, BK, layout=gl.SliceLayout(1, COPY))
    columns = gl.arange(0, 64, layout=gl.SliceLayout(0, COPY))
    rope_places = gl.arange(0, BK, layout=gl.SliceLayout(1, COPY_32))
    rope_columns = gl.arange(0, 32, layout=gl.SliceLayout(0, COPY_32))
    turn = 0
    s = gl.load(list_ptr + places)
    for tile in range(tiles):
        there = (s >= 0)[:, None]
        source = kv_ptr + (s.to(gl.int64) * 576)[:, None] + columns[None, :]
        rope_s = gl.load(list_ptr + tile * BK + rope_places)
        rope_source = kv_ptr + 512 + (rope_s.to(gl.int64) * 576)[:, None] + rope_columns[None, :]
        s = gl.load(list_ptr + gl.minimum(tile + 1, tiles - 1) * BK + places)  # the next tile's, in good time

        shared.rope.acquire_free(turn)
        shared.rope.fill_rope(rope_source, (rope_s >= 0)[:, None])
        shared.left0.acquire_free(turn)
        shared.left0.fill(source, there)
        shared.right0.acquire_free(turn)
        shared.right0.fill(source + 256, there)
        shared.left1.acquire_free(turn)
        shared.left1.fill(source + 128, there)
        shared.right1.acquire_free(turn)
        shared.right1.fill(source + 384, there)
        turn = next_turn(turn)


@gluon.jit
def multiply_part(acc, x, part, COLUMN: gl.constexpr, turn, zero, BEGINS: gl.constexpr):
    """acc + x · kᵀ over a part's 128 columns, x's from COLUMN on; acc is nothing where BEGINS. Asynchronous."""
    part.acquire_full(turn)
    columns = part.columns.index(zero).permute((1, 0))
    return warpgroup_mma(x.index(zero).slice(COLUMN, 128, 1), columns, acc, use_acc=not BEGINS, is_async=True)


@gluon.jit
def multiply_values(acc, left, right, shared, turn, zero, BEGINS: gl.constexpr):
    """acc + x · vᵀ over the 512 columns, in the order in which they come. Asynchronous."""
    acc = multiply_part(acc, left, shared.left0, 0, turn, zero, BEGINS)
    acc = multiply_part(acc, right, shared.right0, 0, turn, zero, False)
    acc = multiply_part(acc, left, shared.left1, 128, turn, zero, False)
    return multiply_part(acc, right, shared.right1, 128, turn, zero, False)


@gluon.jit
def first(shared, p_tiles, dq256, dq32, lse_ptr, sums_ptr, row0, tile0, tiles, scale, H: gl.constexpr):
    """S and P, P's sums over the heads, and its share of dq. scale: in base 2. tile0: this block's first row of P."""
    rows = shared.rows
    lse = gl.load(lse_ptr + row0 + gl.arange(0, 64, layout=ROWS))
    lse = gl.where(lse == float("-inf"), float("inf"), lse) * LOG2_E  # a row without keys: P is 0
    columns = gl.arange(0, BK, layout=KEYS)
    dq0 = gl.zeros([64, 128], gl.float32, layout=OF_128)
    dq1 = gl.zeros([64, 128], gl.float32, layout=OF_128)
    dq_rope = gl.zeros([64, 32], gl.float32, layout=OF_32)
    rows.acquire_full()
    turn = 0
    for tile in range(tiles):
        zero = opaque_zero(tile)
        s = gl.zeros([64, BK], gl.float32, layout=LOGITS)
        shared.rope.acquire_full(turn)
        rope = shared.rope.columns
        s = warpgroup_mma(rows.q_rope.index(zero), rope.index(zero).permute((1, 0)), s, use_acc=False, is_async=True)
        s = warpgroup_mma(rows.q_rope.index(1 + zero), rope.index(1 + zero).permute((1, 0)), s, is_async=True)
        s = multiply_values(s, rows.q_left, rows.q_right, shared, turn, zero, False)
        s = warpgroup_mma_wait(0, deps=(s,))

        # P is at most 1, but for rounding. Without a key S is 0 and P means nothing, and the bound keeps it finite.
        exponent = s * scale - lse[:, None]
        p = exp2(gl.where(exponent > 0.5, 0.5, exponent))
        tma.store_wait(0)  # the last P has gone to memory
        shared.p.write(p)
        shared.p.release_full()
        tma.async_copy_shared_to_global(p_tiles, [tile0 + tile * H, 0], shared.p.operand.index(0))
        gl.store(sums_ptr + tile * BK + columns, gl.sum(p, 0))

        shared.ds.acquire_full(turn)
        ds = shared.ds.operand.index(zero)
        of_rope = warpgroup_mma(ds, rope.index(zero), dq_rope, is_async=True)
        of_0 = warpgroup_mma(ds, shared.left0.columns.index(zero), dq0, is_async=True)
        of_1 = warpgroup_mma(ds, shared.left1.columns.index(zero), dq1, is_async=True)
        of_0, of_1, of_rope = warpgroup_mma_wait(2, deps=(of_0, of_1, of_rope))
        shared.rope.release_free()
        of_0, of_1, of_rope = warpgroup_mma_wait(1, deps=(of_0, of_1, of_rope))
        shared.left0.release_free()
        dq0, dq1, dq_rope = warpgroup_mma_wait(0, deps=(of_0, of_1, of_rope))
        shared.left1.release_free()
        turn = next_turn(turn)
    # Nobody else reads q: its place takes dq, on its way to memory.
    rows.q_left.index(0).slice(0, 128, 1).store(dq0.to(gl.bfloat16))
    rows.q_left.index(0).slice(128, 128, 1).store(dq1.to(gl.bfloat16))
    rows.q_rope.index(0).store(dq_rope.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(dq256, [row0, 0], rows.q_left.index(0))
    tma.async_copy_shared_to_global(dq32, [row0, 512], rows.q_rope.index(0))
    tma.store_wait(0)


@gluon.jit
def second(shared, ds_tiles, dq256, dq32, delta_ptr, row0, tile0, tiles, scale, H: gl.constexpr):
    """dP and dS, and its share of dq."""
    rows = shared.rows
    delta = gl.load(delta_ptr + row0 + gl.arange(0, 64, layout=ROWS))
    dq0 = gl.zeros([64, 128], gl.float32, layout=OF_128)
    dq1 = gl.zeros([64, 128], gl.float32, layout=OF_128)
    dq_rope = gl.zeros([64, 32], gl.float32, layout=OF_32)
    rows.acquire_full()
    turn = 0
    for tile in range(tiles):
        zero = opaque_zero(tile)
        dp = gl.zeros([64, BK], gl.float32, layout=LOGITS)
        dp = multiply_values(dp, rows.dout_left, rows.dout_right, shared, turn, zero, True)
        dp = warpgroup_mma_wait(0, deps=(dp,))

        shared.p.acquire_full(turn)
        p = shared.p.operand.index(0).load(LOGITS).to(gl.float32)
        ds = (p * (dp - delta[:, None]) * scale).to(gl.bfloat16)
        tma.store_wait(0)  # the last dS has gone to memory
        shared.ds.write(ds)
        shared.ds.release_full()
        weights = gl.convert_layout(ds, gl.DotOperandLayout(0, OF_128, 2))
        rope_weights = gl.convert_layout(ds, gl.DotOperandLayout(0, OF_32, 2))
        of_rope = warpgroup_mma(rope_weights, shared.rope.columns.index(1 + zero), dq_rope, is_async=True)
        of_0 = warpgroup_mma(weights, shared.right0.columns.index(zero), dq0, is_async=True)
        of_1 = warpgroup_mma(weights, shared.right1.columns.index(zero), dq1, is_async=True)
        tma.async_copy_shared_to_global(ds_tiles, [tile0 + tile * H, 0], shared.ds.operand.index(0))
        of_0, of_1, of_rope = warpgroup_mma_wait(2, deps=(of_0, of_1, of_rope))
        shared.rope.release_free()
        of_0, of_1, of_rope = warpgroup_mma_wait(1, deps=(of_0, of_1, of_rope))
        shared.right0.release_free()
        dq0, dq1, dq_rope = warpgroup_mma_wait(0, deps=(of_0, of_1, of_rope))
        shared.right1.release_free()
        turn = next_turn(turn)
    # Nobody else reads this half of dout, and nobody the rope columns of the last tile.
    rows.dout_right.index(0).slice(0, 128, 1).store(dq0.to(gl.bfloat16))
    rows.dout_right.index(0).slice(128, 128, 1).store(dq1.to(gl.bfloat16))
    shared.rope.columns.index(1).store(dq_rope.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(dq256, [row0, 256], rows.dout_right.index(0))
    tma.async_copy_shared_to_global(dq32, [row0, 544], shared.rope.columns.index(1))
    tma.store_wait(0)


@gluon.jit
def _query_pass(
    q256, q32, dout256, dq256, dq32, p_tiles, ds_tiles, kv_ptr, lists_ptr, lse_ptr, delta_ptr, sums_ptr, scale, k,
    H: gl.constexpr,
):  # fmt: skip
    """A program: 64 of the H heads of a query. k: a multiple of 64. sums: fp32 [T, H / 64, k], P over the 64 heads."""
    BLOCKS: gl.constexpr = H // 64
    t = gl.program_id(0) // BLOCKS
    tiles = k // BK
    row0 = gl.program_id(0) * 64
    tile0 = t * tiles * H + gl.program_id(0) % BLOCKS * 64
    list_ptr = lists_ptr + t.to(gl.int64) * k
    sums_ptr += gl.program_id(0).to(gl.int64) * k
    shared = allocate_query_pass()
    fence_async_shared()  # the barriers are seen by TMA, too
    shared.rows.fill(q256, q32, dout256, row0)
    gl.warp_specialize(
        [
            (first, (shared, p_tiles, dq256, dq32, lse_ptr, sums_ptr, row0, tile0, tiles, scale * LOG2_E, H)),
            (second, (shared, ds_tiles, dq256, dq32, delta_ptr, row0, tile0, tiles, scale, H)),
            (gather, (shared, kv_ptr, list_ptr, tiles)),
        ],
        [4, 4],  # warps of second and gather; first is what the launch's num_warps are for
        [224, 56],  # and their registers a thread; first gets what is left of 3 · maxnreg
    )


def query_pass(q, dout, kv, lists, lse, delta, scale, dq, p, ds, sums):
    """Launch it: writes dq, P and dS as rows of 64 keys (see `backward_keys`), and sums [T, H / 64, k]."""
    (T, H, _), k = q.shape, lists.shape[1]
    _query_pass[(T * H // 64,)](
        descriptor(q, 64, 256), descriptor(q, 64, 32), descriptor(dout, 64, 256),
        descriptor(dq, 64, 256), descriptor(dq, 64, 32), descriptor(p, 64, BK.value), descriptor(ds, 64, BK.value),
        kv, lists, lse, delta, sums, scale, k, H=H, num_warps=4, maxnreg=168,
    )  # fmt: skip
