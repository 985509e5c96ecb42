"""Notebook 08, all but its largest kernel. The names say what is wrong."""

from . import wrong
from ._triton import INTERPRETED, jit, tl

# ------------------------------------------------------------------------------------------------------------- copy


@wrong("copy_kernel", "every block")
@jit
def same_block_for_every_program(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, i < n), i < n)


@wrong("copy_kernel", "every block")
@jit
def blocks_one_element_apart(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, i < n), i < n)


@wrong("copy_kernel", "bounds")
@jit
def copy_without_a_mask(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i))


@wrong("copy_kernel", "bounds")
@jit
def copies_one_too_many(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, i <= n), i <= n)


@wrong("copy_kernel", "last element")
@jit
def last_element_missed(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, i < n - 1), i < n - 1)


@wrong("copy_kernel", "last element")
@jit
def only_whole_blocks(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n // BLOCK * BLOCK
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask), mask)


@wrong("copy_kernel", "own block only")
@jit
def every_program_copies_all(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        tl.store(out_ptr + i, tl.load(x_ptr + i, i < n), i < n)


@wrong("copy_kernel", "own block only")
@jit
def blocks_of_16(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * 16 + tl.arange(0, 16)
    tl.store(out_ptr + i, tl.load(x_ptr + i, i < n), i < n)


if INTERPRETED:  # a read that no result shows is seen by the interpreter alone

    @wrong("copy_kernel", "bounds")
    @jit
    def only_the_store_masked(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + i, tl.load(x_ptr + i), i < n)


# ---------------------------------------------------------------------------------------------------------- row sum


@wrong("row_sum_kernel", "sum of a row")
@jit
def mean(x_ptr, out_ptr, C, row_stride, col_stride, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    total = 0.0
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(x_ptr + r * row_stride + c * col_stride, c < C, 0.0))
    tl.store(out_ptr + r, total / C)


@wrong("row_sum_kernel", "sum of a row")
@jit
def strides_swapped(x_ptr, out_ptr, C, row_stride, col_stride, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    total = 0.0
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(x_ptr + r * col_stride + c * row_stride, c < C, 0.0))
    tl.store(out_ptr + r, total)


@wrong("row_sum_kernel", "sum of a row")
@jit
def rounded_to_fp16(x_ptr, out_ptr, C, row_stride, col_stride, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    total = 0.0
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(x_ptr + r * row_stride + c * col_stride, c < C, 0.0).to(tl.float16))
    tl.store(out_ptr + r, total)


@wrong("row_sum_kernel", "sum of a row")
@jit
def rounded_to_whole_numbers(x_ptr, out_ptr, C, row_stride, col_stride, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    total = 0
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(x_ptr + r * row_stride + c * col_stride, c < C, 0.0)).to(tl.int32)
    tl.store(out_ptr + r, total)


@wrong("row_sum_kernel", "all tiles")
@jit
def lanes_of_16(x_ptr, out_ptr, C, row_stride, col_stride, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    total = 0.0
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, 16)
        total += tl.sum(tl.load(x_ptr + r * row_stride + c * col_stride, c < C, 0.0))
    tl.store(out_ptr + r, total)


@wrong("row_sum_kernel", "all tiles")
@jit
def first_tile_only(x_ptr, out_ptr, C, row_stride, col_stride, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    tl.store(out_ptr + r, tl.sum(tl.load(x_ptr + r * row_stride + c * col_stride, c < C, 0.0)))


@wrong("row_sum_kernel", "all tiles")
@jit
def last_tile_only(x_ptr, out_ptr, C, row_stride, col_stride, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    total = 0.0
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        total = tl.sum(tl.load(x_ptr + r * row_stride + c * col_stride, c < C, 0.0))
    tl.store(out_ptr + r, total)


@wrong("row_sum_kernel", "tail")
@jit
def sum_without_a_mask(x_ptr, out_ptr, C, row_stride, col_stride, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    total = 0.0
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(x_ptr + r * row_stride + c * col_stride))
    tl.store(out_ptr + r, total)


@wrong("row_sum_kernel", "tail")
@jit
def masked_places_count_one(x_ptr, out_ptr, C, row_stride, col_stride, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    total = 0.0
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(x_ptr + r * row_stride + c * col_stride, c < C, 1.0))
    tl.store(out_ptr + r, total)


@wrong("row_sum_kernel", "row stride")
@jit
def rows_taken_for_dense(x_ptr, out_ptr, C, row_stride, col_stride, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    total = 0.0
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(x_ptr + r * C + c * col_stride, c < C, 0.0))
    tl.store(out_ptr + r, total)


@wrong("row_sum_kernel", "column stride")
@jit
def columns_taken_for_neighbours(x_ptr, out_ptr, C, row_stride, col_stride, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    total = 0.0
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(x_ptr + r * row_stride + c, c < C, 0.0))
    tl.store(out_ptr + r, total)


if INTERPRETED:

    @wrong("row_sum_kernel", "tail")
    @jit
    def masked_places_undefined(x_ptr, out_ptr, C, row_stride, col_stride, BLOCK: tl.constexpr):
        r = tl.program_id(0)
        total = 0.0
        for first in range(0, C, BLOCK):
            c = first + tl.arange(0, BLOCK)
            total += tl.sum(tl.load(x_ptr + r * row_stride + c * col_stride, c < C))
        tl.store(out_ptr + r, total)

    @wrong("row_sum_kernel", "bounds")
    @jit
    def hides_what_it_read(x_ptr, out_ptr, C, row_stride, col_stride, BLOCK: tl.constexpr):
        r = tl.program_id(0)
        total = 0.0
        for first in range(0, C, BLOCK):
            c = first + tl.arange(0, BLOCK)
            total += tl.sum(tl.where(c < C, tl.load(x_ptr + r * row_stride + c * col_stride), 0.0))
        tl.store(out_ptr + r, total)


# -------------------------------------------------------------------------------------------------- cost of a tile


@wrong("tile_cost", "flops")
def multiply_and_add_as_one(BQ, BK, Hi, Di, value_bytes):
    return BQ * BK * Hi * Di, BK * Di * value_bytes + 4 * BQ * BK


@wrong("tile_cost", "flops")
def one_head(BQ, BK, Hi, Di, value_bytes):
    return 2 * BQ * BK * Di, BK * Di * value_bytes + 4 * BQ * BK


@wrong("tile_cost", "flops")
def bytes_first(BQ, BK, Hi, Di, value_bytes):
    return BK * Di * value_bytes + 4 * BQ * BK, 2 * BQ * BK * Hi * Di


@wrong("tile_cost", "flops")
def no_number(BQ, BK, Hi, Di, value_bytes):
    return 2 * BQ * BK * Hi * Di, None


@wrong("tile_cost", "bytes")
def scores_of_one_query(BQ, BK, Hi, Di, value_bytes):
    return 2 * BQ * BK * Hi * Di, BK * Di * value_bytes + 4 * BK


@wrong("tile_cost", "bytes")
def scores_forgotten(BQ, BK, Hi, Di, value_bytes):
    return 2 * BQ * BK * Hi * Di, BK * Di * value_bytes


@wrong("tile_cost", "bytes")
def keys_for_every_query(BQ, BK, Hi, Di, value_bytes):
    return 2 * BQ * BK * Hi * Di, BQ * BK * Di * value_bytes + 4 * BQ * BK


@wrong("tile_cost", "bytes")
def queries_read_again(BQ, BK, Hi, Di, value_bytes):
    return 2 * BQ * BK * Hi * Di, BK * Di * value_bytes + 4 * BQ * BK + BQ * Hi * Di * value_bytes


@wrong("tile_cost", "bytes")
def scores_as_narrow_as_keys(BQ, BK, Hi, Di, value_bytes):
    return 2 * BQ * BK * Hi * Di, BK * Di * value_bytes + value_bytes * BQ * BK


# ----------------------------------------------------------------------------------------------------- planted bug


@wrong("planted_bug_kernel", "narrow keys")
@jit
def the_planted_one(k_ptr, out_ptr, S, Di, row_stride, BK: tl.constexpr, DP: tl.constexpr):
    s = tl.program_id(0) * BK + tl.arange(0, BK)
    d = tl.arange(0, DP)
    k = tl.load(k_ptr + s[:, None] * row_stride + d[None, :], (s < S)[:, None], 0.0)
    tl.store(out_ptr + s, tl.sum(k * k, axis=1), s < S)


@wrong("planted_bug_kernel", "narrow keys")
@jit
def masks_the_store_only(k_ptr, out_ptr, S, Di, row_stride, BK: tl.constexpr, DP: tl.constexpr):
    s = tl.program_id(0) * BK + tl.arange(0, BK)
    d = tl.arange(0, DP)
    k = tl.load(k_ptr + s[:, None] * row_stride + d[None, :])
    tl.store(out_ptr + s, tl.sum(k * k, axis=1), s < S)


@wrong("planted_bug_kernel", "narrow keys")
@jit
def clamps_the_index(k_ptr, out_ptr, S, Di, row_stride, BK: tl.constexpr, DP: tl.constexpr):
    s = tl.program_id(0) * BK + tl.arange(0, BK)
    d = tl.minimum(tl.arange(0, DP), Di - 1)
    k = tl.load(k_ptr + s[:, None] * row_stride + d[None, :], (s < S)[:, None], 0.0)
    tl.store(out_ptr + s, tl.sum(k * k, axis=1), s < S)


@wrong("planted_bug_kernel", "narrow keys")
@jit
def fills_with_one(k_ptr, out_ptr, S, Di, row_stride, BK: tl.constexpr, DP: tl.constexpr):
    s = tl.program_id(0) * BK + tl.arange(0, BK)
    d = tl.arange(0, DP)
    k = tl.load(k_ptr + s[:, None] * row_stride + d[None, :], (s < S)[:, None] & (d < Di)[None, :], 1.0)
    tl.store(out_ptr + s, tl.sum(k * k, axis=1), s < S)


@wrong("planted_bug_kernel", "narrow keys")
@jit
def keys_taken_for_dense(k_ptr, out_ptr, S, Di, row_stride, BK: tl.constexpr, DP: tl.constexpr):
    s = tl.program_id(0) * BK + tl.arange(0, BK)
    d = tl.arange(0, DP)
    k = tl.load(k_ptr + s[:, None] * Di + d[None, :], (s < S)[:, None] & (d < Di)[None, :], 0.0)
    tl.store(out_ptr + s, tl.sum(k * k, axis=1), s < S)


@wrong("planted_bug_kernel", "full tiles")
@jit
def cuts_the_last_number(k_ptr, out_ptr, S, Di, row_stride, BK: tl.constexpr, DP: tl.constexpr):
    s = tl.program_id(0) * BK + tl.arange(0, BK)
    d = tl.arange(0, DP)
    k = tl.load(k_ptr + s[:, None] * row_stride + d[None, :], (s < S)[:, None] & (d < Di - 1)[None, :], 0.0)
    tl.store(out_ptr + s, tl.sum(k * k, axis=1), s < S)


@wrong("planted_bug_kernel", "last keys")
@jit
def only_whole_tiles_of_keys(k_ptr, out_ptr, S, Di, row_stride, BK: tl.constexpr, DP: tl.constexpr):
    s = tl.program_id(0) * BK + tl.arange(0, BK)
    d = tl.arange(0, DP)
    there = s < S // BK * BK
    k = tl.load(k_ptr + s[:, None] * row_stride + d[None, :], there[:, None] & (d < Di)[None, :], 0.0)
    tl.store(out_ptr + s, tl.sum(k * k, axis=1), there)


@wrong("planted_bug_kernel", "bounds")
@jit
def stores_without_a_mask(k_ptr, out_ptr, S, Di, row_stride, BK: tl.constexpr, DP: tl.constexpr):
    s = tl.program_id(0) * BK + tl.arange(0, BK)
    d = tl.arange(0, DP)
    k = tl.load(k_ptr + s[:, None] * row_stride + d[None, :], (s < S)[:, None] & (d < Di)[None, :], 0.0)
    tl.store(out_ptr + s, tl.sum(k * k, axis=1))


if INTERPRETED:

    @wrong("planted_bug_kernel", "bounds")
    @jit
    def masks_columns_only(k_ptr, out_ptr, S, Di, row_stride, BK: tl.constexpr, DP: tl.constexpr):
        s = tl.program_id(0) * BK + tl.arange(0, BK)
        d = tl.arange(0, DP)
        k = tl.load(k_ptr + s[:, None] * row_stride + d[None, :], (d < Di)[None, :], 0.0)
        tl.store(out_ptr + s, tl.sum(k * k, axis=1), s < S)
