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
merges them. What a row of the result holds depends on its own q, list and `splits` alone.

Measured 2026-11-26 on one H200, triton 3.6.0, microseconds a call in a CUDA graph, k = 2048, with the study's merge;
beside it FlashMLA (few heads padded to 64) and shared/studies/decode.py, which reads NaN as 480, reads row 0 for -1 and
takes powers of two alone: 256 queries of 128 heads, one part 408 / 339 / 389, 128 queries 209 / 173 / 200; one query of
16 heads, 16 parts 14.8 / 17.1 / 12.4, 8 queries 15.7 / 19.5 / 14.1. So it passes FlashMLA where few heads meet few
queries, and not elsewhere; the study's speed is not kept.
Tried, 256 queries, and slower: two pieces ahead 440, without the test for NaN 422, without that and the L2 457; a
branch for each row instead of one for two 435, without NaN 412, without the L2 470; `convert` as a loop over 128
columns 528 to 636; hi and lo products for every scale with the maximum of all magnitudes for NaN 471.

Read `sparse_shared` first: the buffers, and how warpgroups wait for each other. `sparse_tiles` has the softmax.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..cards import on_hopper
from ..runtime import aligned, multiprocessors
from .aggregate import aggregate
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
    copy_columns,
    message,
    next_turn,
)
from .sparse_tiles import (
    LN_2,
    LOG2_E,
    NEVER,
    RESCALE,
    RESCALE_TYPES,
    ROWS,
    WIDE,
    Softmax,
    exp2,
    for_wide_stores,
    masked,
    multiply_quarter,
    multiply_rope,
    opaque_zero,
    raised,
)

D, V = 576, 512
AHEAD = gl.constexpr(1)  # pieces between a load and its use; two make 3.6.0 spill some 60 registers, and are 8 % slower
# As `sparse_tiles.OUTPUT`, but products of 128 columns: with four warpgroups a program starts with 128 registers a
# thread, and for 256 columns the compiler wants more than that, although `left` and `right` get more later.
OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
P_REGISTERS = gl.constexpr(gl.DotOperandLayout(0, OUTPUT.value, 2))
# A piece as it is loaded: [64, 16] words of four values. Four lanes share a row, 16 bytes each; a thread has two rows.
RAW = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))
RAW_ROWS = gl.constexpr(gl.SliceLayout(1, RAW.value))
ROPE = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0]))  # [64, 64] bf16; rows lie in threads as in RAW
LINES = gl.constexpr(gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0]))  # [64, 4] stretches of 64 bytes, likewise
WORDS = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))  # the bytes of SWIZZLED, written as pairs of bf16


@gluon.jit
def rescale(acc, factor):
    """`sparse_tiles.rescale` for this OUTPUT, whose values lie in the same order."""
    factor = gl.convert_layout(factor, gl.SliceLayout(1, OUTPUT))[:, None]
    acc, factor = gl.broadcast(acc, factor)
    return gl.inline_asm_elementwise(RESCALE, RESCALE_TYPES, [acc, factor], dtype=gl.float32, is_pure=True, pack=128)


@gluon.jit
def as_operand(p):
    """`sparse_tiles.as_operand` for this OUTPUT."""
    return gl.convert_layout(p.to(gl.bfloat16), P_REGISTERS)


@gluon.jit
def nothing_yet():
    """`sparse_tiles.nothing_yet` for this OUTPUT."""
    m = gl.full([64], NEVER, gl.float32, layout=ROWS)
    total = gl.full([64], 0.0, gl.float32, layout=ROWS)
    return Softmax(m=m, total=total, acc=gl.zeros([64, 256], gl.float32, layout=OUTPUT))


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


# From bytes to bf16 --------------------------------------------------------------------------------------------------


def _to_bf16():
    """PTX for the eight words of a thread's piece, four of each of two rows, to sixteen pairs of bf16: their values
    times the row's scale. And its constraints: first and second pair of each word, words, scales.

    e4m3 is s eeee mmm. Moved to bf16's places, s 0000eeee mmm0000, it reads as the value times 2^-120, subnormals too.
    `prmt` puts a byte into the low half of 16 bits and copies of its sign into the high half; a shift by four, a mask
    and a product with 2^120 · scale do the rest. For powers of two below 2^7 that is exact. A branch leads to the rest:

    Other scales come as hi + lo, two bf16 numbers that hold 16 of its bits. lo · x is rounded to bf16, 2^-17 of the
    result, then hi · x is added to it exactly and the sum rounded once. From 2^7 on 2^120 is a product of its own.
    And 1111 111, which is NaN, would read as 480: it gets its exponent filled up. Adding 1 to the seven bits shows it.
    """
    rows, pairs = (0, 1), {(i, j): f"${8 * j + i}" for i in range(8) for j in range(2)}
    word, scale = (lambda i: f"${16 + i}"), (lambda row: f"${24 + 4 * row}")
    lines = [".reg .pred rare, large; .reg .b32 t, any; .reg .f32 f<2>, g; .reg .b16 h, l; .reg .b32 hi<2>, lo, power;"]
    for row in rows:
        lines += [f"mul.rn.f32 f{row}, {scale(row)}, 0f7B800000;"]  # 2^120
    lines += ["{ .reg .b32 b<2>; mov.b32 b0, f0; mov.b32 b1, f1; or.b32 t, b0, b1; and.b32 t, t, 0xFFFF;"]
    lines += ["prmt.b32 hi0, b0, 0, 0x3232; prmt.b32 hi1, b1, 0, 0x3232; setp.ne.u32 rare, t, 0; }"]
    lines += ["abs.f32 g, f0; abs.f32 f1, f1; max.NaN.f32 g, g, f1; setp.geu.or.f32 rare, g, 0f7F800000, rare;"]
    lines += ["mov.b32 any, 0;"]
    for i in range(8):
        lines += [f"and.b32 t, {word(i)}, 0x7F7F7F7F; add.u32 t, t, 0x01010101; or.b32 any, any, t;"]
    lines += ["and.b32 any, any, 0x80808080; setp.ne.or.u32 rare, any, 0, rare;"]

    def place(i, j):
        x, signs_and_bytes = pairs[i, j], ("0x9180", "0xB3A2")[j]
        return f"prmt.b32 {x}, {word(i)}, 0, {signs_and_bytes}; shl.b32 {x}, {x}, 4; and.b32 {x}, {x}, 0x87F087F0;"

    lines += ["@rare bra RARE;"]
    for i in range(8):
        for j in range(2):
            lines += [f"{place(i, j)} mul.rn.bf16x2 {pairs[i, j]}, {pairs[i, j]}, hi{i // 4};"]
    lines += ["bra DONE; RARE:"]
    for row in rows:
        s = scale(row)
        lines += [f"abs.f32 g, {s}; setp.ge.f32 large, g, 0f43000000; selp.b32 power, 0x7B807B80, 0x3F803F80, large;"]
        lines += [f"mul.rn.f32 g, {s}, 0f7B800000; selp.f32 g, {s}, g, large; cvt.rn.bf16.f32 h, g;"]
        lines += ["mov.b32 hi0, {h, h}; shl.b32 t, hi0, 16; { .reg .f32 r; mov.b32 r, t; sub.rn.f32 g, g, r; }"]
        lines += ["cvt.rn.bf16.f32 l, g; mov.b32 lo, {l, l};"]
        for i in range(4 * row, 4 * row + 4):
            for j in range(2):
                x = pairs[i, j]
                lines += [
                    f"{place(i, j)} add.u32 t, {x}, 0x00100010; and.b32 t, t, 0x08000800; mad.lo.u32 {x}, t, 15, {x};"
                ]
                lines += [f"mul.rn.bf16x2 t, {x}, lo; fma.rn.bf16x2 {x}, {x}, hi0, t; mul.rn.bf16x2 {x}, {x}, power;"]
    lines += ["DONE:"]
    types = ["=&r"] * 16 + ["r"] * 8 + ["f"] * 8
    return gl.constexpr("{ " + " ".join(lines) + " }"), gl.constexpr(",".join(types))


TO_BF16, TO_BF16_TYPES = _to_bf16()


@gluon.jit
def load_piece(row_ptr, there, COLUMN: gl.constexpr):
    """64 columns of 64 rows as they lie in the cache: words [64, 16]; zeros where there is no row."""
    words = gl.arange(0, 16, layout=gl.SliceLayout(0, RAW))
    return gl.load(row_ptr[:, None] + (COLUMN // 4 + words)[None, :], there[:, None], 0)


@gluon.jit
def load_scale(row_ptr, there, COLUMN: gl.constexpr):
    """The scales, fp32 [64], of the 128 columns in which COLUMN lies."""
    return gl.load((row_ptr + (128 + COLUMN // 128)).to(gl.pointer_type(gl.float32)), there, 0.0)


@gluon.jit
def store_piece(columns, COLUMN: gl.constexpr, words, scale):
    """Store a piece as bf16 at columns COLUMN to COLUMN + 63 of a quarter."""
    scale, words = gl.broadcast(scale[:, None], words)
    first, second = gl.inline_asm_elementwise(
        TO_BF16, TO_BF16_TYPES, [words, scale], dtype=(gl.int32, gl.int32), is_pure=True, pack=8
    )
    pairs = gl.reshape(gl.join(first, second), [64, 32])
    columns._reinterpret(gl.int32, [64, 128], WORDS).slice(COLUMN // 2, 32, 1).store(pairs)


@gluon.jit
def ask_for(kv_ptr, s):
    """Ask the L2 for rows s, in stretches of 64 bytes; nobody waits for them. Registers hold too few pieces in flight
    to hide the memory's latency."""
    s = gl.convert_layout(s, gl.SliceLayout(1, LINES))[:, None]
    for i in gl.static_range(3):
        word = (i * 4 + gl.arange(0, 4, layout=gl.SliceLayout(0, LINES)))[None, :] * 16
        wanted = ((s >= 0) & (word < 164)).to(gl.int32)
        address = (kv_ptr + (s.to(gl.int64) * 164 + word)).to(gl.int64)
        gl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
            "=r,l,r", [address, wanted], dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def selected(slots_ptr, number, step, work, TILES: gl.constexpr, SPLITS: gl.constexpr, BLOCK: gl.constexpr):
    """The slots of a block, -1 where there is no key: [64], each thread's two rows in RAW."""
    tile = tile_at(number, work, TILES, SPLITS)
    j = (step * 2 + BLOCK) * BK + gl.arange(0, 64, layout=RAW_ROWS)
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
    row_ptr = kv_ptr + s.to(gl.int64) * 164
    pieces, scales = (), ()
    for p in gl.static_range(AHEAD):
        if p % 2 == 0:
            scales = scales + (load_scale(row_ptr, s >= 0, (FIRST + p * 64) % 512),)
        pieces = pieces + (load_piece(row_ptr, s >= 0, (FIRST + p * 64) % 512),)
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
                    row_ptr = kv_ptr + s_next.to(gl.int64) * 164
                    there = s_next >= 0
                if (p + AHEAD) % 2 == 0:
                    scales = scales + (load_scale(row_ptr, there, (FIRST + (p + AHEAD) * 64) % 512),)
                following = load_piece(row_ptr, there, (FIRST + (p + AHEAD) * 64) % 512)
                quarter = early if p < 4 else late
                if p % 4 == 0:
                    quarter.acquire_free(turn)
                    if p == 0:
                        block.valid.store(gl.where(s >= 0, 0.0, float("-inf")))
                    if p == 4 - 4 * BLOCK:  # the right quarter, with which the rope columns come
                        copy_rope(block.rope.index(0), kv_ptr, s)
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


@gluon.jit
def copy_rope(rope, kv_ptr, s):
    """Start the copies of the rope columns of rows s, zeros where there is none."""
    s = gl.convert_layout(s, gl.SliceLayout(1, ROPE))
    columns = gl.arange(0, 64, layout=gl.SliceLayout(0, ROPE))
    source = (kv_ptr + (s.to(gl.int64) * 164 + 132)).to(gl.pointer_type(gl.bfloat16))
    copy_columns(rope, source[:, None] + columns[None, :], (s >= 0)[:, None])


# Products ------------------------------------------------------------------------------------------------------------


@gluon.jit
def left_step(state, logits, shared, zero, turn, scale, LAST: gl.constexpr):
    """Softmax of block 0, P0 · V0 and P1 · V1 for columns 0 to 255, and unless LAST the next step's logits."""
    q, k0, k1 = shared.q, shared.k0, shared.k1
    logits = masked(logits, scale, k0.valid, 0, False)
    m0 = raised(state.m, gl.max(logits, 1))
    shared.left_max.send(m0)
    factor = exp2(state.m - m0)
    p = exp2(logits - m0[:, None])
    total = state.total * factor + gl.sum(p, 1)
    acc = rescale(state.acc, factor)
    p0v0 = warpgroup_mma(as_operand(p), k0.left.columns.index(zero), acc, is_async=True)

    # While that runs: what is relative to m0 becomes relative to m, the maximum after both blocks.
    m = shared.right_max.receive(turn, ROWS)
    factor = exp2(m0 - m)
    total = total * factor
    shared.p0.write(p * factor[:, None])
    shared.p0.release_full()
    acc = warpgroup_mma_wait(0, deps=(p0v0,))
    k0.left.release_free()

    shared.p1.acquire_full(turn)
    acc = rescale(acc, factor)
    p1v1 = warpgroup_mma(shared.p1.operand.index(zero), k1.left.columns.index(zero), acc, is_async=True)
    if LAST:
        acc = warpgroup_mma_wait(0, deps=(p1v1,))
        k1.left.release_free()
        return Softmax(m=m, total=total, acc=acc), logits  # which nobody reads
    else:
        turn = next_turn(turn)
        s = multiply_quarter(None, q.left, k0.left, turn, zero)
        acc = warpgroup_mma_wait(2, deps=(p1v1,))  # all but the two products of the line above
        k1.left.release_free()
        s = multiply_quarter(s, q.right, k0.right, turn, zero)
        s = multiply_rope(s, q.rope, k0.rope, zero)
        return Softmax(m=m, total=total, acc=acc), warpgroup_mma_wait(0, deps=(s,))


@gluon.jit
def left(shared, out_ptr, lse_ptr, work, scale, TILES: gl.constexpr, SPLITS: gl.constexpr):
    """All tiles: the first step's logits, the steps, the sums; columns 0 to 255 of out, and lse."""
    q, k0 = shared.q, shared.k0
    r = gl.arange(0, 64, layout=ROWS)
    turn = 0
    tile_turn = 0
    number = q.acquire_full(tile_turn)
    while number < work.tiles:
        state = nothing_yet()
        zero = opaque_zero(number)
        s = multiply_quarter(None, q.left, k0.left, turn, zero)
        s = multiply_quarter(s, q.right, k0.right, turn, zero)
        s = multiply_rope(s, q.rope, k0.rope, zero)
        s = warpgroup_mma_wait(0, deps=(s,))
        for step in range(work.steps - 1):
            state, s = left_step(state, s, shared, opaque_zero(step), turn, scale, False)
            turn = next_turn(turn)
        q.release_free()
        state, s = left_step(state, s, shared, zero, turn, scale, True)
        turn = next_turn(turn)
        tile = tile_at(number, work, TILES, SPLITS)
        shared.left_sum.send(state.total)
        total = state.total + shared.right_sum.receive(tile_turn, ROWS)
        lse = (state.m + gl.log2(gl.where(total == 0.0, 1.0, total))) * LN_2
        row0 = tile.row0 if SPLITS == 1 else tile.part0
        gl.store(lse_ptr + row0 + r, gl.where(total == 0.0, float("-inf"), lse), mask=r < tile.n_rows)
        store_output(state.acc, total, out_ptr, row0, tile.n_rows, 0, SPLITS > 1)
        tile_turn = next_turn(tile_turn)
        number = q.acquire_full(tile_turn)


@gluon.jit
def right_step(state, shared, zero, last, turn, scale):
    """Logits and softmax of block 1, P1 · V1 and P0 · V0 for columns 256 to 511. last: is it the tile's last step?"""
    q, k0, k1 = shared.q, shared.k0, shared.k1
    s = multiply_quarter(None, q.right, k1.right, turn, zero)
    s = multiply_rope(s, q.rope, k1.rope, zero)
    s = multiply_quarter(s, q.left, k1.left, turn, zero)
    logits = warpgroup_mma_wait(0, deps=(s,))
    q.release_free(pred=last)

    logits = masked(logits, scale, k1.valid, 0, False)
    largest = gl.max(logits, 1)
    m = raised(shared.left_max.receive(turn, ROWS), largest)
    shared.right_max.send(m)
    factor = exp2(state.m - m)
    p = exp2(logits - m[:, None])
    total = state.total * factor + gl.sum(p, 1)
    acc = rescale(state.acc, factor)
    shared.p1.write(p)
    p1v1 = warpgroup_mma(as_operand(p), k1.right.columns.index(zero), acc, is_async=True)
    shared.p1.release_full()

    shared.p0.acquire_full(turn)
    p0v0 = warpgroup_mma(shared.p0.operand.index(zero), k0.right.columns.index(zero), p1v1, is_async=True)
    p0v0 = warpgroup_mma_wait(1, deps=(p0v0,))
    k1.right.release_free()
    acc = warpgroup_mma_wait(0, deps=(p0v0,))
    k0.right.release_free()
    return Softmax(m=m, total=total, acc=acc)


@gluon.jit
def right(shared, out_ptr, work, scale, TILES: gl.constexpr, SPLITS: gl.constexpr):
    """All tiles: the steps, the sums, columns 256 to 511 of out."""
    q = shared.q
    turn = 0
    tile_turn = 0
    number = q.acquire_full(tile_turn)
    while number < work.tiles:
        state = nothing_yet()
        for step in range(work.steps):
            last = step == work.steps - 1
            state = right_step(state, shared, opaque_zero(step), last, turn, scale)
            turn = next_turn(turn)
        tile = tile_at(number, work, TILES, SPLITS)
        shared.right_sum.send(state.total)
        total = state.total + shared.left_sum.receive(tile_turn, ROWS)
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
    tiles = T * splits * tiles_of_query
    q, slots = aligned(q), slots.contiguous()
    q256, q64 = (TensorDescriptor(q, [T * H, D], [D, 1], [64, columns], SWIZZLED.value) for columns in (256, 64))
    _paged_sparse_attention[(min(tiles, multiprocessors(q)),)](
        q256, q64, kv_pages.view(torch.int32), slots, parts if splits > 1 else out, part_lse if splits > 1 else lse,
        scale * LOG2_E.value, H, k, places, triton.cdiv(places, 2 * BK.value), tiles,
        TILES=tiles_of_query, SPLITS=splits,
        num_warps=4, maxnreg=128,
    )  # fmt: skip
