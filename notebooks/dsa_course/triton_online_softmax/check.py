"""Notebook 09, the two kernels without a gather: the log-sum-exp of a row in blocks, and the merge of parts."""

import math

import torch

from dsa_ref.sparse_attention import masked_softmax

from .. import interpreting, launching
from ..checking import Check, expect, normal
from ..triton_sparse_attention.check import CLOSE, SEEDS, padded

row_lse_kernel = Check("row_lse_kernel")  # (x_ptr, lse_ptr, n, x_row, BLOCK), grid (R,)
merge_kernel = Check("merge_kernel")  # (outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP), grid (R,)

BASE_2 = "that is the log-sum-exp in base 2: exp and log are asked for, or exp2 and log2 with the factor log(2)"

# ---------------------------------------------------------------------------------------------------------- row lse


def _row_lse(kernel, x, gap=0, launch=launching.launch):
    x, lse = launching.guarded(x, gap), launching.output(x.shape[0])
    launch(kernel, (x.shape[0],), x, lse, x.shape[1], x.stride(0), BLOCK=16)
    return lse


def _lse(x):
    return masked_softmax(x, x > -torch.inf)[1]


def _expect_lse(kernel, x, cause, suspects=None, gap=0):
    expected = _lse(x)
    suspects = {BASE_2: expected / math.log(2), **(suspects or {})}
    launching.expect_result(_row_lse(kernel, x, gap), expected, CLOSE, "r", cause, suspects)


@row_lse_kernel.property("one block")
def row_lse_kernel_one_block(kernel):
    for seed in SEEDS:
        x = normal(3, 16, seed=seed)
        suspects = {"that is the maximum: the sum is missing": x.amax(1), "m was not added again": _lse(x) - x.amax(1)}
        _expect_lse(kernel, x, "m + log of the sum of exp(x - m)", suspects)


def _slope(n, step):
    return torch.arange(n) // 16 * step


@row_lse_kernel.property("rising blocks")
def row_lse_kernel_rising_blocks(kernel):
    for seed in SEEDS:
        x = normal(3, 48, seed=seed) + _slope(48, 2.0)
        cause = "when m rises, the old l must shrink: l · exp(m - new_m)"
        _expect_lse(kernel, x, cause, {"only the last block counts: add to l, do not replace it": _lse(x[:, 32:])})
    with interpreting.accesses() as seen:
        _row_lse(kernel, x)
    read = sum(len(access.addresses) for access in seen if not access.store)
    cause = "one pass is asked for: read each number once, and rescale l when m rises"
    expect(read <= x.numel(), f"{read} numbers were read, the rows have {x.numel()}", cause)


@row_lse_kernel.property("falling blocks")
def row_lse_kernel_falling_blocks(kernel):
    for seed in SEEDS:
        for step in (2.0, 100.0):  # by 100, exp(m - a block's own maximum) is more than fp32 holds
            x = normal(3, 48, seed=seed) - _slope(48, step)
            suspects = {"only the first block was read": _lse(x[:, :16])} if step < 100 else {}
            cause = "new_m is the larger of m and the block's maximum, and exp(x - new_m) is summed"
            _expect_lse(kernel, x, cause, suspects)


@row_lse_kernel.property("large logits")
def row_lse_kernel_large_logits(kernel):
    for seed, shift in zip((*SEEDS, 3), (500.0, -500.0, -20000.0), strict=True):
        cause = "fp32's exp overflows at 88 and vanishes below -104: m starts at -inf, and is subtracted before exp"
        _expect_lse(kernel, normal(3, 32, seed=seed) + shift, cause)
    cause = "exp(x - the first block's maximum) is more than fp32 holds here: m follows the larger one in each block"
    _expect_lse(kernel, normal(3, 48, seed=4) + _slope(48, 100.0), cause)


@row_lse_kernel.property("tail")
def row_lse_kernel_tail(kernel):
    for seed, n in zip((*SEEDS, 3), (37, 3, 1), strict=True):
        x = normal(3, n, seed=seed) - 4.0
        zeros = torch.cat([x, torch.zeros(3, -n % 16)], 1)
        suspects = {"masked places were loaded as 0, and exp(0 - m) was summed: `other` is -inf": _lse(zeros)}
        cause = "the last block reaches past the row: mask the load with i < n, and -inf as `other`"
        _expect_lse(kernel, x, cause, suspects)


@row_lse_kernel.property("row stride")
def row_lse_kernel_row_stride(kernel):
    for seed in SEEDS:
        cause = "rows are x_row apart, which need not be n: here 7 elements of NaN lie between two rows"
        _expect_lse(kernel, normal(5, 37, seed=seed), cause, gap=7)
    _row_lse(kernel, normal(5, 37, seed=3), 7, launching.expect_reads_inside)


@row_lse_kernel.property("empty blocks")
def row_lse_kernel_empty_blocks(kernel):
    for seed in SEEDS:
        x = normal(4, 37, seed=seed)
        x[0] = -torch.inf
        x[1, :16] = x[2, 16:32] = x[3, 20:] = -torch.inf
        cause = (
            "a block of nothing but -inf changes neither m nor l, wherever it stands; where new_m is -inf subtract 0, "
            "for -inf minus -inf is NaN; a row of nothing gives -inf, no number near it"
        )
        _expect_lse(kernel, x, cause)


@row_lse_kernel.property("long row")
def row_lse_kernel_long_row(kernel):
    x = normal(1, 1000, seed=1) - 16.0
    x[0, 500] = 0.0
    _expect_lse(kernel, x, "many small numbers weigh something together: none is left out, however long the row is")


# ------------------------------------------------------------------------------------------------------------ merge


def _merge(kernel, outs, lses, launch=launching.launch):
    P, R, V = outs.shape
    out, lse = launching.output(R, V), launching.output(R)
    launch(
        kernel, (R,), launching.guarded(outs), launching.guarded(lses), out, lse, P, R, V, VP=padded(V)
    )  # fmt: skip
    return out, lse


def _parts(seed, P, R, V, spread=2.0, shift=0.0, empty=()):
    """outs [P, R, V] and lses [P, R] of parts, in part p without keys for row r where (p, r) is in `empty`."""
    outs, lses = normal(P, R, V, seed=seed), spread * normal(P, R, seed=seed + 10) + shift
    for p, r in empty:
        outs[p, r], lses[p, r] = 0.0, -torch.inf
    return outs, lses


def _expect_merged(kernel, outs, lses, cause, which="out lse"):
    weights, lse = masked_softmax(lses.T, lses.T > -torch.inf)
    out = torch.einsum("rp,prv->rv", weights, outs)
    got_out, got_lse = _merge(kernel, outs, lses)
    weights_2, lse_2 = masked_softmax(lses.T * math.log(2), lses.T > -torch.inf)
    finite = lses.masked_fill(lses == -torch.inf, 0.0)
    if "out" in which:
        suspects = {
            "the plain mean of the parts: each counts by exp(lse), its share of the sum": outs.mean(0),
            "weighted by lse itself, not by exp(lse)": (finite[:, :, None] * outs).sum(0) / finite.sum(0)[:, None],
            "2 to the power of lse instead of e": torch.einsum("rp,prv->rv", weights_2, outs),
            "only the first two parts were merged: there are P": torch.einsum(
                "rp,prv->rv", lses[:2].T.softmax(1), outs[:2]
            ),
        }
        launching.expect_result(got_out, out, CLOSE, "r v", cause, suspects)
    if "lse" in which:
        suspects = {
            "2 to the power of lse instead of e": lse_2 / math.log(2),
            "the largest lse was handed on: the merged one is m + log(l)": lses.amax(0),
        }
        launching.expect_result(got_lse, lse, CLOSE, "r", cause, suspects)


@merge_kernel.property("out")
def merge_kernel_out(kernel):
    for seed in SEEDS:
        _expect_merged(kernel, *_parts(seed, 2, 3, 16), "a part weighs exp(lse_p - lse)", "out")


@merge_kernel.property("lse")
def merge_kernel_lse(kernel):
    for seed in SEEDS:
        _expect_merged(kernel, *_parts(seed, 2, 3, 16), "the merged lse is log of the sum of exp(lse_p)", "lse")


@merge_kernel.property("many parts")
def merge_kernel_many_parts(kernel):
    for seed, P in zip(SEEDS, (7, 1), strict=True):
        outs, lses = _parts(seed, P, 3, 16)
        for order in (lses[:, 0].argsort(), lses[:, 0].argsort(descending=True)):
            cause = "P parts, in any order: when a later lse is larger, what was summed before must shrink"
            _expect_merged(kernel, outs[order], lses[order], cause)
    outs, lses = _parts(3, 60, 3, 16, spread=0.1, shift=-13.0)
    lses[20], outs[:20], outs[21:] = 0.0, 100 * outs[:20] + 50, 100 * outs[21:] + 50
    cause = "many parts of little weight weigh something together: none is left out, and nothing is rounded"
    _expect_merged(kernel, outs, lses, cause)


@merge_kernel.property("large lse")
def merge_kernel_large_lse(kernel):
    for seed, shift in zip((*SEEDS, 3), (500.0, -500.0, -20000.0), strict=True):
        cause = "exp(lse) overflows at 88 and vanishes below -104: m starts at -inf, and is subtracted before exp"
        _expect_merged(kernel, *_parts(seed, 3, 3, 16, shift=shift), cause)


@merge_kernel.property("narrow values")
def merge_kernel_narrow_values(kernel):
    for seed, V in zip(SEEDS, (12, 5), strict=True):
        _expect_merged(kernel, *_parts(seed, 3, 4, V), "V is smaller than VP: mask the lanes, rows are V apart")
    _merge(kernel, *_parts(3, 3, 4, 5), launching.expect_reads_inside)


@merge_kernel.property("empty parts")
def merge_kernel_empty_parts(kernel):
    for seed in SEEDS:
        empty = [(0, 0), (2, 1), (0, 2), (1, 2), (2, 2)]
        cause = (
            "a part without keys has lse -inf and weighs 0: it changes nothing, wherever it stands, and m stays the "
            "largest so far; where all are empty the result is 0 and -inf, not NaN"
        )
        _expect_merged(kernel, *_parts(seed, 3, 4, 16, empty=empty), cause)
