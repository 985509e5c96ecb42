"""Notebook 09's two kernels without a gather, each right but for the one FAULT that its wrong answers name."""

from . import wrong
from ._triton import INTERPRETED, jit, tl

# ---------------------------------------------------------------------------------------------------------- row lse


@jit
def _row_lse(x_ptr, lse_ptr, n, x_row, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    r = tl.program_id(0)
    m = float("-inf")
    if FAULT == "m starts at 0":
        m = 0.0
    if FAULT == "m starts at -10000":
        m = -10000.0
    l = 0.0  # noqa: E741 (l is the field's name for it)
    stop = n
    if FAULT == "first block alone":
        stop = tl.minimum(n, BLOCK)
    if FAULT == "whole blocks only":
        stop = tl.maximum(n // BLOCK * BLOCK, tl.minimum(n, BLOCK))
    for i0 in range(0, stop, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        other = float("-inf")
        if FAULT == "zeros past the row":
            other = 0.0
        if FAULT == "tail read":
            x = tl.load(x_ptr + r * x_row + i)
        elif FAULT == "dense rows":
            x = tl.load(x_ptr + r * n + i, i < n, other)
        elif FAULT == "no other":
            x = tl.load(x_ptr + r * x_row + i, i < n)
        else:
            x = tl.load(x_ptr + r * x_row + i, i < n, other)
        new_m = tl.maximum(m, tl.max(x, axis=0))
        if FAULT == "block's own maximum":
            new_m = tl.max(x, axis=0)
        if FAULT == "no shift":
            new_m = tl.where(new_m == float("-inf"), new_m, 0.0)
        finite_m = tl.where(new_m == float("-inf"), 0.0, new_m)
        if FAULT == "NaN of empty blocks":
            finite_m = new_m
        rescale = tl.exp(m - finite_m)
        p = tl.exp(x - finite_m)
        if FAULT == "base 2":
            rescale, p = tl.exp2(m - finite_m), tl.exp2(x - finite_m)
        if FAULT == "not rescaled":
            rescale = 1.0
        if FAULT == "last block alone":
            rescale = 0.0
        if FAULT == "block shifted by itself":
            own = tl.max(x, axis=0)
            p = tl.exp(x - tl.where(own == float("-inf"), 0.0, own))
        l = l * rescale + tl.sum(p, axis=0)  # noqa: E741
        m = new_m
    lse = tl.where(l > 0, m + tl.log(tl.where(l > 0, l, 1.0)), float("-inf"))
    if FAULT == "base 2":
        lse = m + tl.log2(l)
    if FAULT == "m forgotten":
        lse = tl.log(l)
    if FAULT == "zero for empty rows":
        lse = tl.where(l > 0, lse, 0.0)
    if FAULT == "NaN of empty blocks":
        lse = m + tl.log(l)
    if FAULT == "one row for all":
        r = 0
    tl.store(lse_ptr + r, lse)


@wrong("row_lse_kernel", "one block")
@jit
def lse_in_base_2(x_ptr, lse_ptr, n, x_row, BLOCK: tl.constexpr):
    _row_lse(x_ptr, lse_ptr, n, x_row, BLOCK, "base 2")


@wrong("row_lse_kernel", "one block")
@jit
def m_not_added_again(x_ptr, lse_ptr, n, x_row, BLOCK: tl.constexpr):
    _row_lse(x_ptr, lse_ptr, n, x_row, BLOCK, "m forgotten")


@wrong("row_lse_kernel", "one block")
@jit
def all_write_row_0(x_ptr, lse_ptr, n, x_row, BLOCK: tl.constexpr):
    _row_lse(x_ptr, lse_ptr, n, x_row, BLOCK, "one row for all")


@wrong("row_lse_kernel", "rising blocks")
@jit
def l_not_rescaled(x_ptr, lse_ptr, n, x_row, BLOCK: tl.constexpr):
    _row_lse(x_ptr, lse_ptr, n, x_row, BLOCK, "not rescaled")


@wrong("row_lse_kernel", "rising blocks")
@jit
def l_replaced(x_ptr, lse_ptr, n, x_row, BLOCK: tl.constexpr):
    _row_lse(x_ptr, lse_ptr, n, x_row, BLOCK, "last block alone")


@wrong("row_lse_kernel", "rising blocks")
@jit
def first_block_alone(x_ptr, lse_ptr, n, x_row, BLOCK: tl.constexpr):
    _row_lse(x_ptr, lse_ptr, n, x_row, BLOCK, "first block alone")


@wrong("row_lse_kernel", "falling blocks")
@jit
def new_block_shifted_by_its_own_maximum(x_ptr, lse_ptr, n, x_row, BLOCK: tl.constexpr):
    _row_lse(x_ptr, lse_ptr, n, x_row, BLOCK, "block shifted by itself")


@wrong("row_lse_kernel", "large logits")
@jit
def no_shift(x_ptr, lse_ptr, n, x_row, BLOCK: tl.constexpr):
    _row_lse(x_ptr, lse_ptr, n, x_row, BLOCK, "no shift")


@wrong("row_lse_kernel", "large logits")
@jit
def m_starts_at_0(x_ptr, lse_ptr, n, x_row, BLOCK: tl.constexpr):
    _row_lse(x_ptr, lse_ptr, n, x_row, BLOCK, "m starts at 0")


@wrong("row_lse_kernel", "large logits")
@jit
def m_starts_at_minus_10000(x_ptr, lse_ptr, n, x_row, BLOCK: tl.constexpr):
    _row_lse(x_ptr, lse_ptr, n, x_row, BLOCK, "m starts at -10000")


@wrong("row_lse_kernel", "tail")
@jit
def zeros_past_the_row(x_ptr, lse_ptr, n, x_row, BLOCK: tl.constexpr):
    _row_lse(x_ptr, lse_ptr, n, x_row, BLOCK, "zeros past the row")


@wrong("row_lse_kernel", "tail")
@jit
def tail_of_the_row_read(x_ptr, lse_ptr, n, x_row, BLOCK: tl.constexpr):
    _row_lse(x_ptr, lse_ptr, n, x_row, BLOCK, "tail read")


@wrong("row_lse_kernel", "tail")
@jit
def whole_blocks_only(x_ptr, lse_ptr, n, x_row, BLOCK: tl.constexpr):
    _row_lse(x_ptr, lse_ptr, n, x_row, BLOCK, "whole blocks only")


@wrong("row_lse_kernel", "row stride")
@jit
def rows_taken_for_dense(x_ptr, lse_ptr, n, x_row, BLOCK: tl.constexpr):
    _row_lse(x_ptr, lse_ptr, n, x_row, BLOCK, "dense rows")


@wrong("row_lse_kernel", "empty blocks")
@jit
def nan_of_an_empty_block(x_ptr, lse_ptr, n, x_row, BLOCK: tl.constexpr):
    _row_lse(x_ptr, lse_ptr, n, x_row, BLOCK, "NaN of empty blocks")


@wrong("row_lse_kernel", "empty blocks")
@jit
def zero_for_an_empty_row(x_ptr, lse_ptr, n, x_row, BLOCK: tl.constexpr):
    _row_lse(x_ptr, lse_ptr, n, x_row, BLOCK, "zero for empty rows")


# ------------------------------------------------------------------------------------------------------------ merge


@jit
def _merge(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP: tl.constexpr, FAULT: tl.constexpr):
    r, v = tl.program_id(0), tl.arange(0, VP)
    in_v, width, parts = v < V, V, P
    if FAULT == "lanes past V":
        in_v = v < VP
    if FAULT == "rows VP apart":
        width = VP
    if FAULT == "two parts":
        parts = tl.minimum(P, 2)
    m = float("-inf")
    l = 0.0  # noqa: E741 (l is the field's name for it)
    acc = tl.zeros([VP], tl.float32)
    for part in range(parts):
        logit = tl.load(lses_ptr + part * R + r)
        value = tl.load(outs_ptr + (part * R + r) * V + v, in_v, 0.0)
        if FAULT == "parts read VP apart":
            value = tl.load(outs_ptr + (part * R + r) * VP + v, in_v, 0.0)
        if FAULT == "parts and rows exchanged":
            logit = tl.load(lses_ptr + r * P + part)
        new_m = tl.maximum(m, logit)
        if FAULT == "no shift":
            new_m = tl.where(new_m == float("-inf"), new_m, 0.0)
        finite_m = tl.where(new_m == float("-inf"), 0.0, new_m)
        if FAULT == "NaN of empty parts":
            finite_m = new_m
        rescale, p = tl.exp(m - finite_m), tl.exp(logit - finite_m)
        if FAULT == "base 2":
            rescale, p = tl.exp2(m - finite_m), tl.exp2(logit - finite_m)
        if FAULT == "plain mean":
            acc += value / P
        elif FAULT == "weighted by lse":
            acc += value * logit
        elif FAULT == "acc not rescaled":
            acc += p * value
        else:
            acc = acc * rescale + p * value
        if FAULT == "l not rescaled":
            l += p  # noqa: E741
        else:
            l = l * rescale + p  # noqa: E741
        m = new_m
    safe_l = tl.where(l > 0, l, 1.0)
    out = acc / safe_l
    if FAULT == "plain mean":
        out = acc
    if FAULT == "NaN of an empty row":
        out = acc / l
    lse = tl.where(l > 0, m + tl.log(safe_l), float("-inf"))
    if FAULT == "base 2":
        lse = m + tl.log2(l)
    if FAULT == "largest lse":
        lse = m
    if FAULT == "lse without m":
        lse = tl.log(safe_l)
    tl.store(out_ptr + r * width + v, out, v < V)
    if FAULT == "lanes stored":
        tl.store(out_ptr + r * V + v, out)
    tl.store(lse_ptr + r, lse)


@wrong("merge_kernel", "out")
@jit
def plain_mean(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP: tl.constexpr):
    _merge(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP, "plain mean")


@wrong("merge_kernel", "out")
@jit
def weighted_by_lse(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP: tl.constexpr):
    _merge(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP, "weighted by lse")


@wrong("merge_kernel", "out")
@jit
def merged_in_base_2(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP: tl.constexpr):
    _merge(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP, "base 2")


@wrong("merge_kernel", "out")
@jit
def parts_and_rows_exchanged(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP: tl.constexpr):
    _merge(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP, "parts and rows exchanged")


@wrong("merge_kernel", "lse")
@jit
def largest_lse_handed_on(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP: tl.constexpr):
    _merge(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP, "largest lse")


@wrong("merge_kernel", "lse")
@jit
def lse_without_m(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP: tl.constexpr):
    _merge(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP, "lse without m")


@wrong("merge_kernel", "many parts")
@jit
def two_parts_only(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP: tl.constexpr):
    _merge(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP, "two parts")


@wrong("merge_kernel", "out")
@jit
def acc_of_parts_not_rescaled(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP: tl.constexpr):
    _merge(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP, "acc not rescaled")


@wrong("merge_kernel", "out")
@jit
def l_of_parts_not_rescaled(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP: tl.constexpr):
    _merge(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP, "l not rescaled")


@wrong("merge_kernel", "large lse")
@jit
def no_shift_of_the_lse(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP: tl.constexpr):
    _merge(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP, "no shift")


@wrong("merge_kernel", "bounds")
@jit
def rows_VP_apart(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP: tl.constexpr):
    _merge(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP, "rows VP apart")


@wrong("merge_kernel", "bounds")
@jit
def lanes_stored(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP: tl.constexpr):
    _merge(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP, "lanes stored")


@wrong("merge_kernel", "narrow values")
@jit
def rows_read_VP_apart(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP: tl.constexpr):
    _merge(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP, "parts read VP apart")


@wrong("merge_kernel", "empty parts")
@jit
def nan_of_empty_parts(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP: tl.constexpr):
    _merge(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP, "NaN of empty parts")


@wrong("merge_kernel", "empty parts")
@jit
def nan_of_an_empty_row(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP: tl.constexpr):
    _merge(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP, "NaN of an empty row")


if INTERPRETED:  # a read that no result shows, and an undefined lane, are seen by the interpreter alone

    @wrong("row_lse_kernel", "rising blocks")
    @jit
    def two_passes(x_ptr, lse_ptr, n, x_row, BLOCK: tl.constexpr):
        r = tl.program_id(0)
        m = -1e30
        for i0 in range(0, n, BLOCK):
            i = i0 + tl.arange(0, BLOCK)
            m = tl.maximum(m, tl.max(tl.load(x_ptr + r * x_row + i, i < n, float("-inf")), axis=0))
        l = 0.0  # noqa: E741 (l is the field's name for it)
        for i0 in range(0, n, BLOCK):
            i = i0 + tl.arange(0, BLOCK)
            l += tl.sum(tl.exp(tl.load(x_ptr + r * x_row + i, i < n, float("-inf")) - m), axis=0)  # noqa: E741
        tl.store(lse_ptr + r, tl.where(l > 0, m + tl.log(tl.where(l > 0, l, 1.0)), float("-inf")))

    @wrong("row_lse_kernel", "tail")
    @jit
    def lanes_past_the_row_undefined(x_ptr, lse_ptr, n, x_row, BLOCK: tl.constexpr):
        _row_lse(x_ptr, lse_ptr, n, x_row, BLOCK, "no other")

    @wrong("merge_kernel", "bounds")
    @jit
    def lanes_past_V_read(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP: tl.constexpr):
        _merge(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP, "lanes past V")
