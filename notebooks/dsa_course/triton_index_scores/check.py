"""Notebook 08: first Triton kernels, up to the indexer's scores."""

import math
import numbers

import torch

from dsa_ref.index_scores import index_scores
from dsa_ref.testing import Failed

from .. import launching
from ..checking import NOT_WRITTEN, Check, expect, expect_close, normal, whole
from ..toy import toy

copy_kernel = Check("copy_kernel")  # (x_ptr, out_ptr, n, BLOCK), grid (cdiv(n, BLOCK),)
row_sum_kernel = Check("row_sum_kernel")  # (x_ptr, out_ptr, C, row_stride, col_stride, BLOCK), grid (R,)
tile_cost = Check("tile_cost")  # (BQ, BK, Hi, Di, value_bytes) -> flops, bytes
index_scores_kernel = Check("index_scores_kernel")  # see `_scores`, grid (T, cdiv(S, BK))
planted_bug_kernel = Check("planted_bug_kernel")  # (k_ptr, out_ptr, S, Di, row_stride, BK, DP), grid (cdiv(S, BK),)

SEEDS = (1, 2)


def _padded(n):
    """The power of two that a tile takes for n lanes; tl.dot wants at least 16."""
    return max(16, 1 << (n - 1).bit_length())


def _expect_clean(got, expected, axes, cause, suspects=None):
    """Exactly equal. A NaN was taken in from outside of a tensor, so `cause` explains it, not a missing store."""
    try:
        expect_close(got, expected, 0.0, axes, cause, suspects)
    except Failed as failure:
        if failure.cause == NOT_WRITTEN:
            failure.cause = cause
        raise


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
        got = _copy(kernel, x, 16)
        expect_close(got[:-1], x[:-1], 0.0, "i", "program p owns the elements from p · BLOCK on")


@copy_kernel.property("last element")
def copy_kernel_last_element(kernel):
    for n in (48, 37, 1, 33):
        x = normal(n, seed=n)
        expect_close(_copy(kernel, x, 16), x, 0.0, "i", "the mask is i < n: the elements are 0 to n - 1")


@copy_kernel.property("own block only")
def copy_kernel_own_block_only(kernel):
    x = normal(37, seed=3)
    for BLOCK in (16, 8):
        got = _copy(kernel, x, BLOCK, programs=1)
        expect_close(got[:BLOCK], x[:BLOCK], 0.0, "i", "one program alone must write the first block")
        expect(
            got[BLOCK:].isnan().all(),
            f"one program alone was launched, and elements past its block of {BLOCK} were written",
            "leave the other blocks to the other programs: no loop over them, and tiles of BLOCK, whatever it is",
        )
    launching.expect_reads_inside(kernel, (3,), launching.guarded(x), launching.output(37), 37, BLOCK=16)


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
        expect_close(got, x.sum(1), 0.0, "r", "program r adds up row r", suspects)


@row_sum_kernel.property("all tiles")
def row_sum_kernel_all_tiles(kernel):
    for seed, BLOCK in zip(SEEDS, (16, 32), strict=True):
        x = whole(5, 3 * BLOCK, seed=seed)
        suspects = {
            "only the first BLOCK elements of the row were added": x[:, :BLOCK].sum(1),
            "only the last tile was kept: add to the sum, do not replace it": x[:, -BLOCK:].sum(1),
        }
        got = _row_sum(kernel, launching.guarded(x), BLOCK=BLOCK)
        expect_close(got, x.sum(1), 0.0, "r", f"loop over the row in tiles of BLOCK, here {BLOCK}", suspects)


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
        _expect_clean(_row_sum(kernel, launching.guarded(x)), x.sum(1), "r", cause, suspects)


@row_sum_kernel.property("row stride")
def row_sum_kernel_row_stride(kernel):
    for seed in SEEDS:
        x = whole(5, 37, seed=seed)
        got = _row_sum(kernel, launching.guarded(x, row_gap=7))
        cause = "rows are row_stride apart, which need not be C: here 7 elements of NaN lie between two rows"
        _expect_clean(got, x.sum(1), "r", cause)


@row_sum_kernel.property("column stride")
def row_sum_kernel_column_stride(kernel):
    for seed in SEEDS:
        x = whole(37, 5, seed=seed)
        got = _row_sum(kernel, launching.guarded(x, row_gap=2).T)
        cause = "neighbours of a row are col_stride apart: here the matrix is a transposed view"
        _expect_clean(got, x.sum(0), "r", cause)
    _row_sum(kernel, launching.guarded(x, row_gap=2), launching.expect_reads_inside)


# -------------------------------------------------------------------------------------------------- cost of a tile

TILES = ((2, 64, 64, 128, 1), (1, 64, 64, 128, 4), (2, 32, 3, 12, 2))  # BQ, BK, Hi, Di, value_bytes: V3.2's first


def _cost(solution, case):
    answer = solution(*case)
    expect(
        isinstance(answer, (tuple, list)) and [isinstance(n, numbers.Real) for n in answer] == [True, True],
        f"got {answer!r}, expected two numbers (flops, bytes)",
        "a missing return, or only one of the two",
    )
    return [float(number) for number in answer]


def _expect_count(got, expected, case, cause, suspects):
    cause = next((why for why, answer in suspects.items() if got == answer != expected), cause)
    where = "BQ={}, BK={}, Hi={}, Di={}, value_bytes={}".format(*case)
    expect(got == expected, f"{where}: got {got:.0f}, expected {expected}", cause)


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


# ----------------------------------------------------------------------------------------------------- index scores


def _scores(kernel, q, k, w, gap=0, grid=None, launch=launching.launch, BK=16):
    """Scores [T, S] from the kernel, whose tiles are padded as tl.dot wants them."""
    (T, Hi, Di), S = q.shape, k.shape[0]
    q, k, w, out = (*(launching.guarded(x, gap) for x in (q, k, w)), launching.output(T, S, row_gap=gap))
    launch(
        kernel, grid or (T, math.ceil(S / BK)), q, k, w, out, T, S, Hi, Di,
        q.stride(0), q.stride(1), k.stride(0), w.stride(0), out.stride(0), HP=_padded(Hi), DP=_padded(Di), BK=BK,
    )  # fmt: skip
    return out.cpu()


def _positive(*shape, seed):
    return whole(*shape, seed=seed).abs() + 1


def _past(scores):
    """-inf but for the keys before the query's own: what else may be seen has properties of its own."""
    T, S = scores.shape
    return scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T), -torch.inf)


def _expect_past(kernel, q, k, w, cause, suspects=None):
    suspects = {why: _past(answer) for why, answer in (suspects or {}).items()}
    expect_close(_past(_scores(kernel, q, k, w)), _past(index_scores(q, k, w)), 0.0, "t s", cause, suspects)


@index_scores_kernel.property("dot products")
def index_scores_kernel_dot_products(kernel):
    for seed in SEEDS:
        q, k = _positive(16, 16, 16, seed=seed), _positive(16, 16, seed=seed + 10)
        w, cause = torch.ones(16, 16), "numbers positive, weights 1: the score is the sum over heads of q · k"
        suspects = {
            "the sum went over the keys of the tile, not over the heads": torch.einsum("thd,sd->th", q, k),
            "q has its heads on the rows: tl.dot(k, q) lacks a tl.trans": torch.einsum("tde,sd->ts", q, k),
            "every program took query 0": index_scores(q[:1].expand_as(q), k, w),
        }
        _expect_past(kernel, q, k, w, cause, suspects)


@index_scores_kernel.property("every tile")
def index_scores_kernel_every_tile(kernel):
    q, k, w = _positive(32, 16, 16, seed=1), _positive(32, 16, seed=2), torch.ones(32, 16)
    suspects = {"every program took the keys of tile 0": index_scores(q, k[:16].repeat(2, 1), w)}
    _expect_past(kernel, q, k, w, "program (t, j) owns query t and the keys from j · BK on", suspects)


@index_scores_kernel.property("own tile only")
def index_scores_kernel_own_tile_only(kernel):
    q, k, w = _positive(3, 16, 16, seed=1), _positive(32, 16, seed=2), torch.ones(3, 16)
    got = _scores(kernel, q, k, w, grid=(2, 1))
    got[:2, :16] = torch.nan
    expect(
        got.isnan().all(),
        "programs (0, 0) and (1, 0) alone were launched, and more than their 16 keys of queries 0 and 1 was written",
        "a program that loops over all queries, or all keys, does the others' work again: leave that to the grid",
    )


@index_scores_kernel.property("weights")
def index_scores_kernel_weights(kernel):
    for seed in SEEDS:
        q, k = _positive(16, 16, 16, seed=seed), _positive(16, 16, seed=seed + 10)
        w, plain = _positive(16, 16, seed=seed + 20), index_scores(q, k, torch.ones(16, 16))
        suspects = {
            "every row took the weights of row 0": index_scores(q, k, w[:1].expand(16, 16)),
            "the weights were left out": plain,
            "the weights lie along the keys: w[None, :] lays them along the heads": plain * w,
        }
        _expect_past(kernel, q, k, w, "I[t, s] = sum over h of w[t, h] · relu(q[t, h] · k[s])", suspects)


@index_scores_kernel.property("relu")
def index_scores_kernel_relu(kernel):
    for seed in SEEDS:
        q, k, w = whole(16, 16, 16, seed=seed), whole(16, 16, seed=seed + 10), _positive(16, 16, seed=seed + 20)
        q[:, 1:] = 0  # one head alone
        suspects = {"there is no relu": torch.einsum("thd,sd,th->ts", q, k, w)}
        _expect_past(kernel, q, k, w, "a negative dot product counts 0", suspects)


@index_scores_kernel.property("relu per head")
def index_scores_kernel_relu_per_head(kernel):
    for seed in SEEDS:
        q, k, w = whole(16, 16, 16, seed=seed), whole(16, 16, seed=seed + 10), whole(16, 16, seed=seed + 20)
        weighted = torch.einsum("thd,sd,th->ths", q, k, w)
        suspects = {
            "the relu came after the sum over heads": weighted.sum(1).relu(),
            "the relu came after the weight": weighted.relu().sum(1),
            "the sign of the weights got lost": index_scores(q, k, w.abs()),
        }
        _expect_past(kernel, q, k, w, "relu each head's dot product, then weight it, then sum", suspects)


@index_scores_kernel.property("future hidden")
def index_scores_kernel_future_hidden(kernel):
    for seed, T in zip(SEEDS, (16, 32), strict=True):
        _expect_causal(kernel, T, T, seed)


@index_scores_kernel.property("queries last")
def index_scores_kernel_queries_last(kernel):
    for seed, (T, S) in zip(SEEDS, ((5, 32), (1, 16)), strict=True):
        _expect_causal(kernel, T, S, seed)


def _expect_causal(kernel, T, S, seed):
    q, k, w = whole(T, 16, 16, seed=seed), whole(S, 16, seed=seed + 10), whole(T, 16, seed=seed + 20)
    free = index_scores(q, k, w, end=torch.full((T,), S, dtype=torch.int32))

    def shifted(by):  # what a row sees if its range ends `by` keys later
        end = (torch.arange(S - T + 1, S + 1, dtype=torch.int32) + by).clamp(0, S)
        return index_scores(q, k, w, end=end)

    suspects = {
        "the future is visible: every score is there": free,
        "each row sees one key too many: s <= S - T + t": shifted(1),
        "a query sees its own key too: s <= S - T + t": shifted(-1),
        "the queries are the last T of S positions: row t sees s <= S - T + t, not s <= t": shifted(T - S),
    }
    cause = "-inf where s > S - T + t, in tiles that are all future too"
    expect_close(_scores(kernel, q, k, w), index_scores(q, k, w), 0.0, "t s", cause, suspects)


def _expect_all(kernel, q, k, w, cause, gap=0, BK=16):
    _expect_clean(_scores(kernel, q, k, w, gap, BK=BK), index_scores(q, k, w), "t s", cause)


@index_scores_kernel.property("strides")
def index_scores_kernel_strides(kernel):
    for seed in SEEDS:
        q, k, w = whole(5, 16, 16, seed=seed), whole(32, 16, seed=seed + 10), whole(5, 16, seed=seed + 20)
        cause = "rows lie further apart than they are long (NaN between them): use the strides that were passed"
        _expect_all(kernel, q, k, w, cause, gap=3)


@index_scores_kernel.property("tails")
def index_scores_kernel_tails(kernel):
    for seed, (T, S, Hi, Di) in zip(SEEDS, ((5, 37, 3, 12), (2, 20, 1, 5)), strict=True):
        q, k, w = whole(T, Hi, Di, seed=seed), whole(S, Di, seed=seed + 10), whole(T, Hi, seed=seed + 20)
        cause = "lanes past Hi, Di or S must load 0: a mask with other=0.0, or they take in what lies behind"
        _expect_all(kernel, q, k, w, cause)
    x = toy()
    _expect_all(kernel, x.q_idx, x.k_idx, x.w, "the toy of this course: 2 heads of 4 numbers, follow it by hand")


@index_scores_kernel.property("larger tiles")
def index_scores_kernel_larger_tiles(kernel):
    q, k, w = whole(2, 20, 24, seed=1), whole(70, 24, seed=2), whole(2, 20, seed=3)
    _expect_all(kernel, q, k, w, "BK, HP and DP are 32 here: take the sizes of tiles from the arguments", BK=32)


@index_scores_kernel.property("full precision")
def index_scores_kernel_full_precision(kernel):
    expect(
        launching.dots_are_exact(kernel),
        'a tl.dot without input_precision="ieee"',
        "on a GPU, tl.dot cuts fp32 numbers to TF32's 10 bits unless told otherwise; the interpreter does not show it",
    )
    q, k, w = normal(3, 3, 12, seed=1), normal(37, 12, seed=2), normal(3, 3, seed=3)
    expect_close(_scores(kernel, q, k, w), index_scores(q, k, w), 1e-5, "t s", "sums in less than fp32")
    _scores(kernel, q, k, w, gap=3, launch=launching.expect_reads_inside)


# ------------------------------------------------------------------------------------------------------ planted bug


def _lengths(kernel, k, gap=0, launch=launching.launch):
    S, Di = k.shape
    k, out = launching.guarded(k, gap), launching.output(S)
    launch(kernel, (math.ceil(S / 16),), k, out, S, Di, k.stride(0), BK=16, DP=_padded(Di))
    return out


def _expect_lengths(kernel, k, cause, gap=0):
    square, pad = k.square(), _padded(k.shape[1]) - k.shape[1]
    suspects = {
        "the last number of each key is missing": square[:, :-1].sum(1),
        "lanes past Di must count 0: the `other` of the load": square.sum(1) + pad,
        "the last number of a key was counted again for every lane past Di: a clamped index is inside the tensor, "
        "but still too many": square.sum(1) + pad * square[:, -1],
        "the numbers were added without squaring": k.sum(1),
    }
    _expect_clean(_lengths(kernel, k, gap), square.sum(1), "s", cause, suspects)


@planted_bug_kernel.property("full tiles")
def planted_bug_kernel_full_tiles(kernel):
    for seed in SEEDS:
        _expect_lengths(kernel, whole(32, 16, seed=seed), "what the given kernel did right must stay right")


@planted_bug_kernel.property("last keys")
def planted_bug_kernel_last_keys(kernel):
    for seed, S in zip(SEEDS, (37, 1), strict=True):
        _expect_lengths(kernel, whole(S, 16, seed=seed), "S is no multiple of BK: the last tile is partly filled")


@planted_bug_kernel.property("narrow keys")
def planted_bug_kernel_narrow_keys(kernel):
    cause = "Di is no power of two: the lanes from Di on must count 0, but took in what lies behind the key"
    _expect_lengths(kernel, whole(37, 12, seed=1), cause)
    strangers = "between two keys lie 4 numbers that are nobody's: step by row_stride, mask by Di"
    _expect_lengths(kernel, whole(37, 20, seed=2), strangers, gap=4)
    _lengths(kernel, whole(37, 12, seed=3), 4, launching.expect_reads_inside)
