"""The key pass of `sparse_attention_backward`: rows Pᵀ · dout + dSᵀ · q of a query, one for each place of its list.

A program takes a query, half of the columns, and all heads. Its q and dout stay in shared memory; `load` brings P and
dS of 64 keys at a time, [H, 64], into a ring. Two consumers take the key tiles in turn: while one stores a tile's rows,
the other multiplies.

    consumer 0  | Pᵀ · dout, dSᵀ · q of tile 0 | rows 0 | tile 2 ...
    consumer 1                                 | tile 1 | rows 1 ...
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .backward_shared import allocate_key_pass, descriptor
from .sparse_shared import BK
from .sparse_tiles import HALF_WAY, OUTPUT, WIDE, opaque_zero

OF_32 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16]))  # sums [64, 32]
# `sparse_tiles.HALF_WAY` and `WIDE` for 32 columns: 4 and 8 neighbouring ones in a thread.
HALF_WAY_32 = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], [0, 16]],
        lane_bases=[[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 32],
    )
)
WIDE_32 = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 32],
    )
)


@gluon.jit
def emit(rows, out_ptr, list_ptr, j0, column, HALF: gl.constexpr, WHOLE: gl.constexpr, ATOMIC: gl.constexpr):
    """Rows of 64 places: added to the rows of fp32 dkv that the list names at j0, or stored as bf16 rows j0, j0 + 1 ...

    In WHOLE 8 neighbouring columns are in a thread, for 16-byte stores, in HALF 4, for 16-byte additions. `HALF_WAY`
    says why this goes by way of HALF."""
    if ATOMIC:
        r = gl.arange(0, BK, layout=gl.SliceLayout(1, HALF))
        c = column + gl.arange(0, rows.shape[1], layout=gl.SliceLayout(0, HALF))
        s = gl.load(list_ptr + j0 + r)
        place = out_ptr + (s.to(gl.int64) * 576)[:, None] + c[None, :]
        gl.atomic_add(place, gl.convert_layout(rows, HALF), mask=(s >= 0)[:, None], sem="relaxed")
    else:
        r = gl.arange(0, BK, layout=gl.SliceLayout(1, WHOLE))
        c = column + gl.arange(0, rows.shape[1], layout=gl.SliceLayout(0, WHOLE))
        place = out_ptr + (j0 + r)[:, None] * 576 + c[None, :]
        gl.store(place, gl.convert_layout(gl.convert_layout(rows.to(gl.bfloat16), HALF), WHOLE))


@gluon.jit
def consume(
    shared, out_ptr, list_ptr, half, tiles,
    FIRST: gl.constexpr, PLACES: gl.constexpr, ATOMIC: gl.constexpr,
):  # fmt: skip
    """Every second key tile from FIRST on: products and rows."""
    heads, ring = shared.heads, shared.ring
    heads.acquire_full()
    for tile in range(FIRST, tiles, 2):
        zero = opaque_zero(tile)
        rows = gl.zeros([BK, 256], gl.float32, layout=OUTPUT)
        rope = gl.zeros([BK, 32], gl.float32, layout=OF_32)
        p = ring.acquire_full(2 * tile, PLACES)
        of_value = warpgroup_mma(p, heads.dout.index(zero), rows, use_acc=False, is_async=True)
        ds = ring.acquire_full(2 * tile + 1, PLACES)
        of_value = warpgroup_mma(ds, heads.q.index(zero), of_value, is_async=True)
        of_rope = warpgroup_mma(ds, heads.rope.index(zero), rope, use_acc=False, is_async=True)
        of_value, of_rope = warpgroup_mma_wait(2, deps=(of_value, of_rope))
        ring.release_free(2 * tile, PLACES)
        rows, rope = warpgroup_mma_wait(0, deps=(of_value, of_rope))
        ring.release_free(2 * tile + 1, PLACES)
        emit(rows, out_ptr, list_ptr, tile * BK, half * 256, HALF_WAY, WIDE, ATOMIC)
        emit(rope, out_ptr, list_ptr, tile * BK, 512 + half * 32, HALF_WAY_32, WIDE_32, ATOMIC)


@gluon.jit
def load(shared, q256, q32, dout256, p_tiles, ds_tiles, t, half, tiles, H: gl.constexpr, PLACES: gl.constexpr):
    """The query's q and dout, and P and dS of each key tile."""
    shared.heads.fill(q256, q32, dout256, t * H, half, H)
    for tile in range(tiles):
        row = (t * tiles + tile) * H
        shared.ring.fill(2 * tile, p_tiles, row, H, PLACES)
        shared.ring.fill(2 * tile + 1, ds_tiles, row, H, PLACES)


@gluon.jit
def _key_pass(
    q256, q32, dout256, p_tiles, ds_tiles, lists_ptr, out_ptr, k,
    H: gl.constexpr, PLACES: gl.constexpr, ATOMIC: gl.constexpr,
):  # fmt: skip
    """A program: a query and half of the columns. k: a multiple of 64. out: bf16 rows [T · k, 576], or fp32 dkv."""
    t = gl.program_id(0) // 2
    half = gl.program_id(0) % 2
    tiles = k // BK
    list_ptr = lists_ptr + t.to(gl.int64) * k
    if not ATOMIC:
        out_ptr += t.to(gl.int64) * k * 576
    shared = allocate_key_pass(H, PLACES)
    fence_async_shared()  # the barriers are seen by TMA, too
    gl.warp_specialize(
        [
            (consume, (shared, out_ptr, list_ptr, half, tiles, 0, PLACES, ATOMIC)),
            (consume, (shared, out_ptr, list_ptr, half, tiles, 1, PLACES, ATOMIC)),
            (load, (shared, q256, q32, dout256, p_tiles, ds_tiles, t, half, tiles, H, PLACES)),
        ],
        [4, 1],  # warps of the second consumer and of load
        [216, 24],  # and their registers a thread
    )


def key_pass(q, dout, lists, p, ds, out, atomic):
    """Launch it: writes the rows [T · k, 576], or adds them to dkv [S, 576] in fp32."""
    (T, H, _), k = q.shape, lists.shape[1]
    _key_pass[(2 * T,)](
        descriptor(q, H, 256), descriptor(q, H, 32), descriptor(dout, H, 256),
        descriptor(p, H, BK.value), descriptor(ds, H, BK.value), lists, out, k,
        H=H, PLACES=4 if H == 128 else 12, ATOMIC=atomic, num_warps=4, maxnreg=168,
    )  # fmt: skip
