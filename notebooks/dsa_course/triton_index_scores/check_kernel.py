"""Notebook 08: the indexer's scores as a Triton kernel."""

import math

import torch

from dsa_ref.index_scores import index_scores

from .. import launching
from ..checking import Check, expect, normal, whole
from ..launching import LONG, NARROW
from ..toy import toy
from .check import SEEDS, padded

index_scores_kernel = Check("index_scores_kernel")  # see `_scores`, grid (T, cdiv(S, BK))


def _scores(kernel, q, k, w, gap=0, grid=None, launch=launching.launch, BK=16):
    """Scores [T, S] from the kernel, whose tiles are padded as tl.dot wants them."""
    (T, Hi, Di), S = q.shape, k.shape[0]
    q, k, w, out = (*(launching.guarded(x, gap) for x in (q, k, w)), launching.output(T, S, row_gap=gap))
    launch(
        kernel, grid or (T, math.ceil(S / BK)), q, k, w, out, T, S, Hi, Di,
        q.stride(0), q.stride(1), k.stride(0), w.stride(0), out.stride(0), HP=padded(Hi), DP=padded(Di), BK=BK,
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
    launching.expect_result(_past(_scores(kernel, q, k, w)), _past(index_scores(q, k, w)), 0.0, "t s", cause, suspects)


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

    def launch(kernel, grid, *args, **constants):
        def own(t, j, _):
            return args[3][t : t + 1, 16 * j : 16 * j + 16]

        cause = "program (t, j) writes the scores of query t and the BK keys from j · BK on, and no others"
        launching.expect_own_places(kernel, grid, *args, own=own, cause=cause, **constants)

    _scores(kernel, q, k, w, launch=launch)


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
    launching.expect_result(_scores(kernel, q, k, w), index_scores(q, k, w), 0.0, "t s", cause, suspects)


def _expect_all(kernel, q, k, w, cause, gap=0, BK=16):
    launching.expect_result(_scores(kernel, q, k, w, gap, BK=BK), index_scores(q, k, w), 0.0, "t s", cause)


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
    q, k, w = whole(2, 20, 40, seed=1), whole(70, 40, seed=2), whole(2, 20, seed=3)
    _expect_all(kernel, q, k, w, "BK, HP are 32 and DP is 64 here: take the sizes of tiles from the arguments", BK=32)
    q, k, w = whole(1, 1, 2, seed=4), whole(LONG, 2, seed=5), whole(1, 1, seed=6)
    _expect_all(kernel, q, k, w, f"right for few keys alone: {NARROW}", BK=8192)


@index_scores_kernel.property("full precision")
def index_scores_kernel_full_precision(kernel):
    q, k, w = normal(3, 3, 12, seed=1), normal(37, 12, seed=2), normal(3, 3, seed=3)
    _scores(kernel, q, k, w, launch=launching.expect_full_precision)
    for size in (1.0, 1e-3, 1e4):
        cause = "q, k, w, a product or a sum in less than fp32, or a relu that does not turn at 0, or is cut above"
        launching.expect_result(_scores(kernel, size * q, k, w), index_scores(size * q, k, w), 1e-5, "t s", cause)
    _scores(kernel, q, k, w, gap=3, launch=launching.expect_reads_inside)
