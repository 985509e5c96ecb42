"""Notebook 08: first Triton kernels, and what a tile costs. `check_kernel` has the indexer's scores."""

import math

import torch

from dsa_ref.testing import Failed

from .. import launching
from ..checking import FORGOTTEN, Check, bits, expect, expect_int, normal, whole
from ..launching import LONG, NARROW

copy_kernel = Check("copy_kernel")  # (x_ptr, out_ptr, n, BLOCK), grid (cdiv(n, BLOCK),)
row_sum_kernel = Check("row_sum_kernel")  # (x_ptr, out_ptr, C, row_stride, col_stride, BLOCK), grid (R,)
tile_cost = Check("tile_cost")  # (BQ, BK, Hi, Di, value_bytes) -> flops, bytes
planted_bug_kernel = Check("planted_bug_kernel")  # (k_ptr, out_ptr, S, Di, row_stride, BK, DP), grid (cdiv(S, BK),)

SEEDS = (1, 2)


def padded(n):
    """The power of two that a tile takes for n lanes; tl.dot wants at least 16."""
    return max(16, 1 << (n - 1).bit_length())


# ------------------------------------------------------------------------------------------------------------- copy


def _copy(kernel, values, BLOCK, programs=None):
    n, out = values.shape[0], launching.output(values.shape[0], dtype=values.dtype)
    grid = (math.ceil(n / BLOCK) if programs is None else programs,)
    launching.launch(kernel, grid, launching.guarded(values), out, n, BLOCK=BLOCK)
    return out


@copy_kernel.property("every block")
def copy_kernel_every_block(kernel):
    for seed in SEEDS:
        x = normal(48, seed=seed)
        got = _copy(kernel, x, 16).cpu()
        launching.expect_result(got[:-1], x[:-1], 0.0, "i", "program p owns the elements from p · BLOCK on")


@copy_kernel.property("last element")
def copy_kernel_last_element(kernel):
    for n in (48, 37, 1, 33):
        x = normal(n, seed=n)
        launching.expect_result(_copy(kernel, x, 16), x, 0.0, "i", "the mask is i < n: the elements are 0 to n - 1")


@copy_kernel.property("own block only")
def copy_kernel_own_block_only(kernel):
    x = normal(37, seed=3)
    for BLOCK in (16, 8):
        got = _copy(kernel, x, BLOCK, programs=1)
        launching.expect_result(got[:BLOCK], x[:BLOCK], 0.0, "i", "one program alone must write the first block")
        expect(
            got[BLOCK:].isnan().all(),
            f"one program alone was launched, and elements past its block of {BLOCK} were written",
            "leave the other blocks to the other programs: no loop over them, and tiles of BLOCK, whatever it is",
        )
    launching.expect_reads_inside(kernel, (3,), launching.guarded(x), launching.output(37), 37, BLOCK=16)
    out = launching.output(37)
    launching.expect_own_places(
        kernel, (3,), launching.guarded(x), out, 37, BLOCK=16, own=lambda p, *_: out[16 * p : 16 * p + 16],
        cause="program p copies the elements from p · BLOCK on, a block of neighbours: memory is read in whole runs",
    )  # fmt: skip


@copy_kernel.property("bit by bit")
def copy_kernel_bit_by_bit(kernel):
    floats = torch.tensor([-0.0, math.inf, -math.inf, math.nan, 1e-45, 1 / 3, 16_777_217.0, 70_000.1, -1e38])
    ints = torch.tensor([2**53 + 1, -(2**62) - 1, 2**24 + 1, 0])  # more digits than a float of the same size holds
    for x in (floats, floats.double() / 3, ints, ints[2:].to(torch.int32)):
        got = _copy(kernel, x, 16).cpu()
        wrong = (bits(got) != bits(x)).nonzero().flatten().tolist()
        if wrong:
            i = wrong[0]
            what = f"{x.dtype}, i={i}: got {got[i].item()!r}, expected {x[i].item()!r}, with the same bits"
            raise Failed(what, "a copy changes nothing: nothing is added, cut off or converted on the way")
    x = normal(LONG, seed=2)
    launching.expect_result(_copy(kernel, x, 8192), x, 0.0, "i", f"right for short tensors alone: {NARROW}")


# ---------------------------------------------------------------------------------------------------------- row sum


def _row_sum(kernel, x, launch=launching.launch, BLOCK=16):
    """x [R, C] is a view of guarded memory."""
    out = launching.output(x.shape[0])
    launch(kernel, (x.shape[0],), x, out, x.shape[1], x.stride(0), x.stride(1), BLOCK=BLOCK)
    return out


@row_sum_kernel.property("sum of a row")
def row_sum_kernel_sum_of_a_row(kernel):
    for seed in SEEDS:
        x = whole(16, 16, seed=seed, largest=1000) / 8
        suspects = {"that is the mean": x.mean(1), "those are the sums of the columns": x.sum(0)}
        got = _row_sum(kernel, launching.guarded(x))
        launching.expect_result(got, x.sum(1), 0.0, "r", "program r adds up row r", suspects)


@row_sum_kernel.property("all tiles")
def row_sum_kernel_all_tiles(kernel):
    for seed, BLOCK in zip(SEEDS, (16, 32), strict=True):
        x = whole(5, 3 * BLOCK, seed=seed)
        suspects = {
            "only the first BLOCK elements of the row were added": x[:, :BLOCK].sum(1),
            "only the last tile was kept: add to the sum, do not replace it": x[:, -BLOCK:].sum(1),
        }
        got = _row_sum(kernel, launching.guarded(x), BLOCK=BLOCK)
        launching.expect_result(got, x.sum(1), 0.0, "r", f"loop over the row in tiles of BLOCK, here {BLOCK}", suspects)
    x = whole(1, 70 * 16, seed=4)
    got = _row_sum(kernel, launching.guarded(x))
    launching.expect_result(got, x.sum(1), 0.0, "r", "70 tiles: right for a few tiles alone")
    x = whole(1, LONG, seed=3)
    got = _row_sum(kernel, launching.guarded(x), BLOCK=8192)
    launching.expect_result(got, x.sum(1), 0.0, "r", f"right for short rows alone: {NARROW}")


@row_sum_kernel.property("tail")
def row_sum_kernel_tail(kernel):
    for seed, C in zip(SEEDS, (37, 3), strict=True):
        x = whole(5, C, seed=seed)
        suspects = {
            "masked places must count 0, not 1: the `other` of the load": x.sum(1) + -C % 16,
            "the last element of each row is missing: the mask is c < C": x[:, :-1].sum(1),
            "the last, partly filled tile is missing": x[:, : C // 16 * 16].sum(1),
        }
        cause = "the last tile reaches past the row, or its masked lanes hold no 0: mask the load, with other=0.0"
        launching.expect_result(_row_sum(kernel, launching.guarded(x)), x.sum(1), 0.0, "r", cause, suspects)


@row_sum_kernel.property("row stride")
def row_sum_kernel_row_stride(kernel):
    for seed in SEEDS:
        x = whole(5, 37, seed=seed)
        got = _row_sum(kernel, launching.guarded(x, row_gap=7))
        cause = "rows are row_stride apart, which need not be C: here 7 elements of NaN lie between two rows"
        launching.expect_result(got, x.sum(1), 0.0, "r", cause)


@row_sum_kernel.property("full precision")
def row_sum_kernel_full_precision(kernel):
    x = 3e4 * normal(5, 70, seed=1).abs()
    cause = "the numbers, or the running sum, were rounded to 16 bits (or cut at a limit): stay with fp32"
    launching.expect_result(_row_sum(kernel, launching.guarded(x)), x.double().sum(1), 1e-5, "r", cause)
    got = _row_sum(kernel, launching.guarded(torch.tensor([[1.0, math.nan, 2.0], [math.inf, 1.0, 2.0]])))
    expect(got[0].isnan(), f"1 + NaN + 2: got {float(got[0])}, expected NaN", "a NaN in the row is not to be hidden")
    expect(got[1] == math.inf, f"inf + 1 + 2: got {float(got[1])}, expected inf", cause)


@row_sum_kernel.property("own row only")
def row_sum_kernel_own_row_only(kernel):
    x, out = launching.guarded(whole(5, 37, seed=1)), launching.output(5)
    launching.expect_own_places(
        kernel, (5,), x, out, 37, x.stride(0), 1, BLOCK=16, own=lambda r, *_: out[r : r + 1],
        cause="program r stores one sum, that of row r: a place that two programs write holds whatever comes last",
    )  # fmt: skip


@row_sum_kernel.property("column stride")
def row_sum_kernel_column_stride(kernel):
    for seed in SEEDS:
        x = whole(37, 5, seed=seed)
        got = _row_sum(kernel, launching.guarded(x, row_gap=2).T)
        cause = "neighbours of a row are col_stride apart: here the matrix is a transposed view"
        launching.expect_result(got, x.sum(0), 0.0, "r", cause)
    _row_sum(kernel, launching.guarded(x, row_gap=2), launching.expect_reads_inside)


# -------------------------------------------------------------------------------------------------- cost of a tile

# BQ, BK, Hi, Di, value_bytes. In the first every mistake gives another number; V3.2's is the second, large the last.
TILES = ((3, 32, 5, 20, 2), (2, 64, 64, 128, 1), (1, 64, 64, 128, 4), (64, 4096, 128, 128, 2))


def _cost(solution, case):
    answer = solution(*case)
    pair = isinstance(answer, (tuple, list)) and len(answer) == 2
    cause = FORGOTTEN if answer is None else "return flops, bytes"
    expect(pair, f"got {answer!r}, expected two ints (flops, bytes)", cause)
    return [expect_int(n, name) for n, name in zip(answer, ("flops", "bytes"), strict=True)]


def _expect_count(got, expected, case, cause, suspects):
    cause = next((why for why, answer in suspects.items() if got == answer != expected), cause)
    where = "BQ={}, BK={}, Hi={}, Di={}, value_bytes={}".format(*case)
    expect(got == expected, f"{where}: got {got}, expected {expected}", cause)


@tile_cost.property("flops")
def tile_cost_flops(solution):
    for case in TILES:
        BQ, BK, Hi, Di, size = case
        pairs = BQ * BK * Hi * Di
        suspects = {
            "a multiply and an add are two FLOPs": pairs,
            "that is one query's share: there are BQ of them": 2 * pairs // BQ,
            "that is one head's share: there are Hi of them": 2 * pairs // Hi,
            "only the product counts here: no relu, no weights, no sum over heads": 2 * pairs + 3 * BQ * BK * Hi,
            "those are the bytes: the FLOPs come first": BK * Di * size + 4 * BQ * BK,
        }
        _expect_count(_cost(solution, case)[0], 2 * pairs, case, "[BK, Di] x [Di, BQ · Hi], two a step", suspects)


@tile_cost.property("bytes")
def tile_cost_bytes(solution):
    for case in TILES:
        BQ, BK, Hi, Di, size = case
        keys, scores = BK * Di * size, 4 * BQ * BK
        suspects = {
            "the scores that are written are missing": keys,
            "the scores are fp32, 4 bytes each, whatever the keys are": keys + size * BQ * BK,
            "one number of a key takes value_bytes bytes": BK * Di + scores,
            "scores for one query only: there are BQ of them": keys + 4 * BK,
            "one score a pair: the heads were summed": keys + scores * Hi,
            "the keys are read once for all BQ queries: that is what the tile is for": keys * BQ + scores,
            "all heads share one key: Hi does not enter": keys * Hi + scores,
            "the queries are not read again for each tile: the program holds them": keys + scores + BQ * Hi * Di * size,
        }
        _expect_count(_cost(solution, case)[1], keys + scores, case, "keys in, scores out, nothing else", suspects)


# ------------------------------------------------------------------------------------------------------ planted bug


def _lengths(kernel, k, gap=0, launch=launching.launch, BK=16):
    S, Di = k.shape
    k, out = launching.guarded(k, gap), launching.output(S)
    launch(kernel, (math.ceil(S / BK),), k, out, S, Di, k.stride(0), BK=BK, DP=padded(Di))
    return out


def _expect_lengths(kernel, k, cause, gap=0, BK=16):
    square, pad = k.square(), padded(k.shape[1]) - k.shape[1]
    suspects = {
        "the last number of each key is missing": square[:, :-1].sum(1),
        "lanes past Di must count 0: the `other` of the load": square.sum(1) + pad,
        "the last number of a key was counted again for every lane past Di: a clamped index is inside the tensor, "
        "but still too many": square.sum(1) + pad * square[:, -1],
        "the numbers were added without squaring": k.sum(1),
    }
    launching.expect_result(_lengths(kernel, k, gap, BK=BK), square.sum(1), 0.0, "s", cause, suspects)


@planted_bug_kernel.property("full tiles")
def planted_bug_kernel_full_tiles(kernel):
    for seed in SEEDS:
        _expect_lengths(kernel, whole(32, 16, seed=seed), "what the given kernel did right must stay right")


@planted_bug_kernel.property("last keys")
def planted_bug_kernel_last_keys(kernel):
    for seed, S in zip(SEEDS, (37, 1), strict=True):
        _expect_lengths(kernel, whole(S, 16, seed=seed), "S is no multiple of BK: the last tile is partly filled")
    _expect_lengths(kernel, whole(LONG, 16, seed=3), f"right for few keys alone: {NARROW}", BK=8192)


@planted_bug_kernel.property("narrow keys")
def planted_bug_kernel_narrow_keys(kernel):
    cause = "Di is no power of two: the lanes from Di on must count 0, but took in what lies behind the key"
    _expect_lengths(kernel, whole(37, 12, seed=1), cause)
    strangers = "between two keys lie 4 numbers that are nobody's: step by row_stride, mask by Di"
    _expect_lengths(kernel, whole(37, 20, seed=2), strangers, gap=4)
    for Di in (12, 13):
        _lengths(kernel, whole(37, Di, seed=3), 4, launching.expect_reads_inside)


@planted_bug_kernel.property("full precision")
def planted_bug_kernel_full_precision(kernel):
    k = 300 * normal(37, 12, seed=4)
    cause = "the numbers, their squares or the sum were rounded to 16 bits: stay with fp32"
    launching.expect_result(_lengths(kernel, k), k.double().square().sum(1), 1e-6, "s", cause)
    small, cause = _lengths(kernel, k * 2**-20) * 2**40, "right for numbers near 1 alone: nothing is cut to 0"
    launching.expect_result(small, k.double().square().sum(1), 1e-6, "s", cause)


@planted_bug_kernel.property("same tiles")
def planted_bug_kernel_same_tiles(kernel):
    k, out = launching.guarded(whole(37, 12, seed=5)), launching.output(37)
    launching.expect_own_places(
        kernel, (3,), k, out, 37, 12, 12, BK=16, DP=16, own=lambda j, *_: out[16 * j : 16 * j + 16],
        cause="program j does the BK keys from j · BK on, as the given kernel did",
    )  # fmt: skip
