"""Attention over 656-byte FP8 rows of a paged cache on Hopper's tensor cores, for a decode step. V3.2's sizes.

A row holds 512 e4m3 values, four fp32 scales (one for 128 values each) and 64 bf16 rope columns. The tensor cores want
bf16 for the keys, so each row passes through registers. A tile is up to 64 heads of one query and one part of its list,
in steps of 128 places: key blocks 0 and 1. Program p of n serves tiles p, p + n, ... and four warpgroups work on one:

- `convert` runs twice, once for each block. It loads pieces of 64 rows and 64 columns as int32 words, each while the
  one before it is stored, makes bf16 of them and stores them where the block's quarter (half of its columns) has come
  free. Both go on to the next tile's keys while the other warpgroups still finish this one. Half a step before it loads
  a step's first piece, it asks the L2 for its rows. Block 0's also fetches q by TMA.
- `left` multiplies q by block 0 and owns output columns 0 to 255; `right` takes block 1 and columns 256 to 511. They
  are `sparse_attention`'s, and so is their timeline:

    convert 0 | k0.left          | k0.right            | k0.left of the next step
    convert 1 | k1.right         | k1.left             | k1.right of the next step
    left      |  q·k0 | softmax 0 | P0·V0 left | P1·V1 left | q·k0 of the next step
    right     |         q·k1 | softmax 1 | P1·V1 right | P0·V0 right | q·k1 of the next step

A quarter is refilled while its readers work on the other block's values: 16 KB become 32 KB of bf16 in that time. This,
and not the 4352 clocks of the tensor cores, sets the pace of a step.

-1 is no key, wherever it stands: nothing is read for it, and its columns are zeros of weight zero. With one part, `out`
and `lse` are final; with more, each part's output is normalised by itself and `dsa_kernels.paged_sparse_attention`
merges them. What a row of the result holds depends on its own q, list and `splits` alone. Up to 32 heads with parts of
up to 128 places, a single step, are left to `paged_sparse_part`.

Measured 2026-11-26 on one H200, triton 3.7.1, microseconds a call in a CUDA graph, k = 2048, beside FlashMLA: 256
queries of 128 heads, one part 400 / 329; one query of 128 heads, 16 parts and the merge 15.8 / 17.3, 8 queries 37.9 /
25.0. shared/studies/decode.py, which reads NaN as 480, reads row 0 for -1 and takes powers of two alone, takes 389 for
256 queries.
Tried, 256 queries, and slower, triton 3.6.0, 408 as it is: two pieces ahead 440, without the test for NaN 422, without
that and the L2 457; a branch for each row instead of one for two 435, without NaN 412, without the L2 470; `convert` as
a loop over 128 columns 528 to 636; hi and lo products for every scale with the maximum of all magnitudes for NaN 471.
And in one version together, no faster (400 as it is; 3.6.0: 406 against 395): each second piece through 4 KB of shared
memory by asynchronous copies, with P1 in k1's rope columns, so that two pieces are always under way without a register
more; and NaN noted for each row, whose logits then become NaN, instead of a branch. So the loads' latency is hardly all
that it waits for.

Read `sparse_shared` first: the buffers, and how warpgroups wait for each other. `sparse_products` has the steps of
`left` and `right`, `fp8_rows` the way from bytes to bf16.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..cards import on_hopper
from ..runtime import aligned, multiprocessors
from . import paged_sparse_part
from .aggregate import aggregate
from .fp8_rows import ROW, copy_rope, load_piece, load_scale, piece_layout, rope_layout, store_piece
from .sparse_products import left_steps, right_steps, store_lse, sum_of_both
from .sparse_shared import (
    BK,
    PLAIN,
    SWIZZLED,
    KeyBlock,
    KeyQuarter,
    Message,
    Probabilities,
    Queries,
    Shared,
    arrive_when_copied,
    barrier,
    message,
    next_turn,
)
from .sparse_tiles import LOG2_E, ROWS, WIDE, for_wide_stores

D, V = 576, 512
AHEAD = gl.constexpr(1)  # pieces between a load and its use; two make 3.6.0 spill some 60 registers, and are 8 % slower
# As `sparse_tiles.OUTPUT`, but products of 128 columns: with four warpgroups a program starts with 128 registers a
# thread, and for 256 columns the compiler wants more than that, although `left` and `right` get more later.
OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
PIECE = gl.constexpr(piece_layout(4))  # of 64 rows
ROPE = gl.constexpr(rope_layout(4))
LINES = gl.constexpr(gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0]))  # [64, 4] stretches of 64 bytes, likewise


# Tiles and parts -----------------------------------------------------------------------------------------------------


@aggregate
class Work:
    """What there is to do, the same for all tiles."""

    heads: gl.tensor
    k: gl.tensor  # places of a list
    places: gl.tensor  # of a part, a multiple of 64
    steps: gl.tensor  # of a part, at least one
    tiles: gl.tensor  # of all queries and parts


@aggregate
class Tile:
    """Up to 64 heads of one query, and one part of its list."""

    row0: gl.tensor  # its first row of q, and of out where there is one part
    n_rows: gl.tensor
    part0: gl.tensor  # its first row among the parts
    list0: gl.tensor  # where in `slots` its part begins, int64
    length: gl.tensor  # how many places its part has: none behind the last tile, and not even that behind the list


@gluon.jit
def tile_at(number, work, TILES: gl.constexpr, SPLITS: gl.constexpr):
    """The tile of this number. Those of one query, TILES times `splits`, are neighbours, for the L2's sake."""
    part = number % SPLITS
    group = number // SPLITS
    t = group // TILES
    head0 = group % TILES * 64
    first = part * work.places
    return Tile(
        row0=t * work.heads + head0,
        n_rows=gl.minimum(work.heads - head0, 64),
        part0=(t * SPLITS + part) * work.heads + head0,
        list0=t.to(gl.int64) * work.k + first,
        length=gl.where(number < work.tiles, gl.minimum(work.places, work.k - first), 0),
    )


@gluon.jit
def ask_for(kv_ptr, s):
    """Ask the L2 for rows s, in stretches of 64 bytes; nobody waits for them. Registers hold too few pieces in flight
    to hide the memory's latency."""
    s = gl.convert_layout(s, gl.SliceLayout(1, LINES))[:, None]
    for i in gl.static_range(3):
        word = (i * 4 + gl.arange(0, 4, layout=gl.SliceLayout(0, LINES)))[None, :] * 16
        wanted = ((s >= 0) & (word < ROW)).to(gl.int32)
        address = (kv_ptr + (s.to(gl.int64) * ROW + word)).to(gl.int64)
        gl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
            "=r,l,r", [address, wanted], dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def selected(slots_ptr, number, step, work, TILES: gl.constexpr, SPLITS: gl.constexpr, BLOCK: gl.constexpr):
    """The slots of a block, -1 where there is no key: [64], each thread's two rows of a piece."""
    tile = tile_at(number, work, TILES, SPLITS)
    j = (step * 2 + BLOCK) * BK + gl.arange(0, 64, layout=gl.SliceLayout(1, PIECE))
    return gl.load(slots_ptr + tile.list0 + j, j < tile.length, -1)


@gluon.jit
def convert(
    BLOCK: gl.constexpr, shared, q256, q64, kv_ptr, slots_ptr, work,
    TILES: gl.constexpr, SPLITS: gl.constexpr,
):  # fmt: skip
    """Fills one block's quarters in the order in which they are used and come free: block 0's left one first, block 1's
    right one. A piece is loaded while the one before it is stored."""
    FIRST: gl.constexpr = BLOCK * 256  # column of the first piece
    q = shared.q
    if BLOCK == 0:
        block, early, late = shared.k0, shared.k0.left, shared.k0.right
    else:
        block, early, late = shared.k1, shared.k1.right, shared.k1.left
    number = gl.program_id(0)
    if BLOCK == 0:
        q.fill(q256, q64, tile_at(number, work, TILES, SPLITS).row0, number)
    s = selected(slots_ptr, number, 0, work, TILES, SPLITS, BLOCK)
    ask_for(kv_ptr, s)
    row_ptr = kv_ptr + s.to(gl.int64) * ROW
    pieces, scales = (), ()
    for p in gl.static_range(AHEAD):
        if p % 2 == 0:
            scales = scales + (load_scale(row_ptr, s >= 0, (FIRST + p * 64) % 512),)
        pieces = pieces + (load_piece(row_ptr, s >= 0, (FIRST + p * 64) % 512, PIECE),)
    turn = 0
    q_turn = 1
    while number < work.tiles:
        for step in range(work.steps):
            ends = step == work.steps - 1  # the next step is the next tile's first
            s_next = selected(
                slots_ptr, gl.where(ends, number + gl.num_programs(0), number), gl.where(ends, 0, step + 1),
                work, TILES, SPLITS, BLOCK,
            )  # fmt: skip
            there = s >= 0
            for p in gl.static_range(8):
                if p + AHEAD == 8:
                    row_ptr = kv_ptr + s_next.to(gl.int64) * ROW
                    there = s_next >= 0
                if (p + AHEAD) % 2 == 0:
                    scales = scales + (load_scale(row_ptr, there, (FIRST + (p + AHEAD) * 64) % 512),)
                following = load_piece(row_ptr, there, (FIRST + (p + AHEAD) * 64) % 512, PIECE)
                quarter = early if p < 4 else late
                if p % 4 == 0:
                    quarter.acquire_free(turn)
                    if p == 0:
                        block.valid.store(gl.where(s >= 0, 0.0, float("-inf")))
                    if p == 4 - 4 * BLOCK:  # the right quarter, with which the rope columns come
                        copy_rope(block.rope.index(0), kv_ptr, s, ROPE)
                        arrive_when_copied(quarter.full)
                if p % 2 == 0:
                    scale = scales[0]
                    scales = scales[1:]
                store_piece(quarter.columns.index(0), p % 4 * 64, pieces[0], scale)
                pieces = pieces[1:] + (following,)
                if p % 4 == 1:
                    mbarrier.arrive(quarter.first_full, count=1)
                if p % 4 == 3:
                    mbarrier.arrive(quarter.full, count=1)
                if p == 3:
                    ask_for(kv_ptr, s_next)
            s = s_next
            turn = next_turn(turn)
        number += gl.num_programs(0)
        if BLOCK == 0:
            q.acquire_free(q_turn)
            q_turn = next_turn(q_turn)
            if number < work.tiles:
                q.fill(q256, q64, tile_at(number, work, TILES, SPLITS).row0, number)
            else:
                q.no_more(work.tiles)


# Products ------------------------------------------------------------------------------------------------------------


@gluon.jit
def left(shared, out_ptr, lse_ptr, work, scale, TILES: gl.constexpr, SPLITS: gl.constexpr):
    """All tiles: the first step's logits, the steps, the sums; columns 0 to 255 of out, and lse."""
    q = shared.q
    r = gl.arange(0, 64, layout=ROWS)
    turn = 0
    tile_turn = 0
    number = q.acquire_full(tile_turn)
    while number < work.tiles:
        state, turn = left_steps(shared, 0, number, work.steps, turn, scale, False, OUTPUT)
        tile = tile_at(number, work, TILES, SPLITS)
        total = sum_of_both(state, shared.left_sum, shared.right_sum, tile_turn)
        row0 = tile.row0 if SPLITS == 1 else tile.part0
        store_lse(state, total, lse_ptr, row0, tile.n_rows, r)
        store_output(state.acc, total, out_ptr, row0, tile.n_rows, 0, SPLITS > 1)
        tile_turn = next_turn(tile_turn)
        number = q.acquire_full(tile_turn)


@gluon.jit
def right(shared, out_ptr, work, scale, TILES: gl.constexpr, SPLITS: gl.constexpr):
    """All tiles: the steps, the sums, columns 256 to 511 of out."""
    q = shared.q
    turn = 0
    tile_turn = 0
    number = q.acquire_full(tile_turn)
    while number < work.tiles:
        state, turn = right_steps(shared, 0, work.steps, turn, scale, False, OUTPUT)
        tile = tile_at(number, work, TILES, SPLITS)
        total = sum_of_both(state, shared.right_sum, shared.left_sum, tile_turn)
        store_output(state.acc, total, out_ptr, tile.row0 if SPLITS == 1 else tile.part0, tile.n_rows, 256, SPLITS > 1)
        tile_turn = next_turn(tile_turn)
        number = q.acquire_full(tile_turn)


@gluon.jit
def store_output(acc, total, out_ptr, row0, n_rows, COLUMN: gl.constexpr, PARTS: gl.constexpr):
    """Divide by the sums and store 256 columns of the rows there are: bf16 of the result, fp32 of a part."""
    inverse = gl.convert_layout(1.0 / gl.where(total == 0.0, 1.0, total), gl.SliceLayout(1, OUTPUT))
    acc = acc * inverse[:, None]
    if PARTS:
        LAYOUT: gl.constexpr = OUTPUT
    else:
        LAYOUT: gl.constexpr = WIDE
        acc = for_wide_stores(acc.to(gl.bfloat16))
    r = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    c = COLUMN + gl.arange(0, 256, layout=gl.SliceLayout(0, LAYOUT))
    place = out_ptr + ((row0 + r).to(gl.int64) * 512)[:, None] + c[None, :]
    gl.store(place, acc, mask=(r < n_rows)[:, None])


# The program ---------------------------------------------------------------------------------------------------------


@gluon.jit
def key_quarter(FULL_COUNT: gl.constexpr):
    """A quarter whose first half is full with the one arrival of a warpgroup that has stored it, and the whole with
    FULL_COUNT arrivals."""
    return KeyQuarter(
        columns=gl.allocate_shared_memory(gl.bfloat16, [1, BK, 256], SWIZZLED),
        first_full=barrier(1),
        full=barrier(FULL_COUNT),
        free=barrier(1),
    )


@gluon.jit
def key_block():
    """Two quarters; with the right one come the rope columns, copied by each of 128 threads."""
    return KeyBlock(
        left=key_quarter(1),
        right=key_quarter(1 + 128),
        rope=gl.allocate_shared_memory(gl.bfloat16, [1, BK, 64], SWIZZLED),
        valid=gl.allocate_shared_memory(gl.float32, [BK], PLAIN),
    )


@gluon.jit
def allocate():
    """All buffers and barriers of a program. `sparse_shared.allocate` says who may overwrite what when, and why."""
    q = Queries(
        left=gl.allocate_shared_memory(gl.bfloat16, [1, 64, 256], SWIZZLED),
        right=gl.allocate_shared_memory(gl.bfloat16, [1, 64, 256], SWIZZLED),
        rope=gl.allocate_shared_memory(gl.bfloat16, [1, 64, 64], SWIZZLED),
        number=gl.allocate_shared_memory(gl.int32, [1], PLAIN),
        full=barrier(1),
        free=barrier(2),
    )
    k0 = key_block()
    k1 = key_block()
    p0 = Probabilities(operand=k0.rope, full=barrier(1))
    p1 = Probabilities(operand=gl.allocate_shared_memory(gl.bfloat16, [1, 64, BK], SWIZZLED), full=barrier(1))
    left_max = message()
    right_max = Message(buffer=left_max.buffer, sent=barrier(1))
    return Shared(
        q=q, k0=k0, k1=k1, p0=p0, p1=p1, left_max=left_max, right_max=right_max, left_sum=message(), right_sum=message()
    )


@gluon.jit(do_not_specialize=["steps"])  # one step made a constant spills 650 bytes, 76 as a number
def _paged_sparse_attention(
    q256, q64, kv_ptr, slots_ptr, out_ptr, lse_ptr, scale, heads, k, places, steps, tiles,
    TILES: gl.constexpr, SPLITS: gl.constexpr,
):  # fmt: skip
    """TILES: of 64 rows in a query's heads. SPLITS: if not 1, out_ptr and lse_ptr are those of the parts."""
    shared = allocate()
    work = Work(  # where one of these is 1, the launch has made it a constant
        heads=gl.to_tensor(heads),
        k=gl.to_tensor(k),
        places=gl.to_tensor(places),
        steps=gl.to_tensor(steps),
        tiles=gl.to_tensor(tiles),
    )
    gl.warp_specialize(
        [
            (left, (shared, out_ptr, lse_ptr, work, scale, TILES, SPLITS)),
            (right, (shared, out_ptr, work, scale, TILES, SPLITS)),
            (convert, (0, shared, q256, q64, kv_ptr, slots_ptr, work, TILES, SPLITS)),
            (convert, (1, shared, q256, q64, kv_ptr, slots_ptr, work, TILES, SPLITS)),
        ],
        [4, 4, 4],  # warps of right and of the two that convert; left is what the launch's num_warps are for
        [192, 64, 64],  # and their registers a thread; left gets what is left of 4 · maxnreg
    )


def cannot_serve(q, kv_pages, slots, v_dim, splits):
    """Why this variant cannot attend with these queries and pages, or None."""
    if not on_hopper(q):
        return "needs a GPU of compute capability 9.0"
    if kv_pages.dtype != torch.uint8:
        return f"needs FP8 rows in uint8, got {str(kv_pages.dtype).removeprefix('torch.')}"
    if q.dtype != torch.bfloat16:
        return f"needs q in bfloat16, got {str(q.dtype).removeprefix('torch.')}"
    if (q.shape[-1], v_dim) != (D, V):
        return f"needs D = {D} and v_dim = {V}, got {q.shape[-1]} and {v_dim}"
    if not kv_pages.is_contiguous() or kv_pages.data_ptr() % 16:
        return "needs contiguous kv_pages from a 16-byte boundary"
    return None


def launch(q, kv_pages, slots, scale, v_dim, splits, out, lse, parts, part_lse):
    """Write attention over the slots' rows: one launch, no host synchronisation. The caller has checked the arguments.

    q: bf16 [T, H, 576]; kv_pages: uint8, rows of 656 bytes; slots: int32 [T, k], -1 for none. splits = 1: writes out,
    bf16 [T, H, 512], and lse, fp32 [T, H]. Else parts, fp32 [T, splits, H, 512], each normalised by itself, and
    part_lse, fp32 [T, splits, H]: contiguous stretches of ceil(ceil(k / 64) / splits) · 64 places of the list.
    A part without a key gives 0 and -inf. lse is the natural logarithm.

    A value is e4m3 times its fp32 scale rounded to bf16, within 2^-17 of its size; NaN stays NaN.
    """
    T, H, _ = q.shape
    if T == 0:
        return
    k, tiles_of_query = slots.shape[1], triton.cdiv(H, 64)
    places = triton.cdiv(triton.cdiv(k, 64), splits) * 64
    if splits > 1:
        out, lse = parts, part_lse
    if places <= paged_sparse_part.KEYS.value and H <= paged_sparse_part.MOST_HEADS:
        paged_sparse_part.launch(q, kv_pages, slots, scale, splits, places, out, lse)
        return
    tiles = T * splits * tiles_of_query
    q, slots = aligned(q), slots.contiguous()
    q256, q64 = (TensorDescriptor(q, [T * H, D], [D, 1], [64, columns], SWIZZLED.value) for columns in (256, 64))
    _paged_sparse_attention[(min(tiles, multiprocessors(q)),)](
        q256, q64, kv_pages.view(torch.int32), slots, out, lse,
        scale * LOG2_E.value, H, k, places, triton.cdiv(places, 2 * BK.value), tiles,
        TILES=tiles_of_query, SPLITS=splits,
        num_warps=4, maxnreg=128,
    )  # fmt: skip
