"""Rows of 656 bytes in registers: loaded in pieces of 64 columns, widened to bf16, stored for the tensor cores.

A row is 164 words of 32 bits: 128 with four e4m3 values each, four fp32 scales of 128 values each, and the 64 bf16 rope
columns.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .sparse_shared import copy_columns

ROW = gl.constexpr(164)  # words
WORDS = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))  # the bytes of `sparse_shared.SWIZZLED`, as pairs of bf16


def piece_layout(warps):
    """A piece of 16 · `warps` rows, [rows, 16] words. Four lanes share a row, 16 bytes each; a thread has two rows."""
    return gl.BlockedLayout([1, 4], [8, 4], [warps, 1], [1, 0])


def rope_layout(warps):
    """[rows, 64] bf16, 16 bytes at a time, the rows in the threads that have them in a piece."""
    return gl.BlockedLayout([1, 8], [8, 4], [warps, 1], [1, 0])


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
def load_piece(row_ptr, there, COLUMN: gl.constexpr, LAYOUT: gl.constexpr):
    """64 columns as they lie in the cache: words [rows, 16]; zeros where there is no row."""
    words = gl.arange(0, 16, layout=gl.SliceLayout(0, LAYOUT))
    return gl.load(row_ptr[:, None] + (COLUMN // 4 + words)[None, :], there[:, None], 0)


@gluon.jit
def load_scale(row_ptr, there, COLUMN: gl.constexpr):
    """The scales, fp32 [rows], of the 128 columns in which COLUMN lies."""
    return gl.load((row_ptr + (128 + COLUMN // 128)).to(gl.pointer_type(gl.float32)), there, 0.0)


@gluon.jit
def store_piece(keys, COLUMN: gl.constexpr, words, scale):
    """Store a piece as bf16 at columns COLUMN to COLUMN + 63 of keys."""
    ROWS: gl.constexpr = keys.shape[0]
    scale, words = gl.broadcast(scale[:, None], words)
    first, second = gl.inline_asm_elementwise(
        TO_BF16, TO_BF16_TYPES, [words, scale], dtype=(gl.int32, gl.int32), is_pure=True, pack=8
    )
    pairs = gl.reshape(gl.join(first, second), [ROWS, 32])
    keys._reinterpret(gl.int32, [ROWS, keys.shape[1] // 2], WORDS).slice(COLUMN // 2, 32, 1).store(pairs)


@gluon.jit
def copy_rope(rope, kv_ptr, s, LAYOUT: gl.constexpr):
    """Start the copies of the rope columns of rows s, zeros where there is none."""
    s = gl.convert_layout(s, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, 64, layout=gl.SliceLayout(0, LAYOUT))
    source = (kv_ptr + (s.to(gl.int64) * ROW + 132)).to(gl.pointer_type(gl.bfloat16))
    copy_columns(rope, source[:, None] + columns[None, :], (s >= 0)[:, None])
