"""Notebook 17: attention over keys on several ranks, and the gradient of a weight that all of them have."""

import torch

from dsa_ref import select_topk, sparse_attention
from dsa_ref.nn import load_small_model
from dsa_ref.parallel import Zigzag

from ..checking import Check, expect_close, expect_shape, normal
from .check import expect_pair
from .lesson import TEXT, read_alone

rank_attention = Check("rank_attention")  # (q, kv, places, indices, scale, v_dim) -> (out, lse)
group_gradient = Check("group_gradient")  # (gathered, x, rows) -> the gradient of W

CLOSE = 1e-5  # of numbers around 1 that were computed in fp32

# ---------------------------------------------------------------------------------------------------- rank_attention


def _expect_attention(solution, q, kv, shares, indices, scale, v_dim, cause):
    """kv [S, D] is the whole text's; shares: the places of each rank."""
    whole_out, whole_lse = sparse_attention(q, kv, indices, scale, v_dim)
    given = [kv[own] for own in shares], list(shares)
    out, lse = expect_pair(solution(q, *given, indices, scale, v_dim), "out, lse")
    expect_shape(out, whole_out.shape, name="out")
    expect_shape(lse, whole_lse.shape, name="lse")
    outs, lses = parts(q, kv, shares, indices, scale, v_dim)
    counts = torch.stack([torch.isin(indices, own).sum(dim=1) for own in shares]).float()[..., None, None]
    suspects = {
        "the mean of the ranks' outputs: each counts by exp(lse), its share of the sum": outs.mean(dim=0),
        "the sum of the ranks' outputs: their weights must add up to 1": outs.sum(dim=0),
        "weighted by how many keys a rank holds: by exp(lse), their share of the sum": (
            (counts * outs).sum(dim=0) / counts.sum(dim=0)
        ),
    }
    expect_close(out, whole_out, CLOSE, "t h v", cause, suspects)
    log_sums = {
        "the mean of the log-sum-exps: denominators add, they are not averaged": lses.mean(dim=0),
        "the log-sum-exps were added: it is their exp that adds up": lses.sum(dim=0),
        "the largest lse was taken for the sum": lses.amax(dim=0),
    }
    expect_close(lse, whole_lse, CLOSE, "t h", cause, log_sums)


def parts(q, kv, shares, indices, scale, v_dim):
    """(outs [N, T, H, v_dim], lses [N, T, H]): what each rank's own selected keys give."""
    made = [sparse_attention(q, kv, own_of(indices, own), scale, v_dim) for own in shares]
    return (torch.stack(each) for each in zip(*made, strict=True))


def own_of(indices, own):
    """The selected places that are the rank's, -1 for the others."""
    return indices.masked_fill(~torch.isin(indices, own), -1)


def _case(T, S, k, seed, factor=1.0):
    """q, kv, and a selection of k of S keys for each of T rows, ascending."""
    q, kv = factor * normal(T, 2, 6, seed=seed), normal(S, 6, seed=seed + 1)
    return q, kv, select_topk(normal(T, S, seed=seed + 2), k, *_whole(T, S))


def _whole(T, S):
    return torch.zeros(T, dtype=torch.int32), torch.full((T,), S, dtype=torch.int32)


def _shares(S, size):
    return [Zigzag(S, size).rows(rank) for rank in range(size)]


@rank_attention.property("one rank")
def rank_attention_one_rank(solution):
    q, kv, indices = _case(3, 20, 8, seed=1)
    cause = "one rank with all keys: `dsa_ref.sparse_attention` itself"
    _expect_attention(solution, q, kv, [torch.arange(20)], indices, 0.4, 4, cause)


@rank_attention.property("places are looked up")
def rank_attention_places_are_looked_up(solution):
    """One rank still, but it does not hold the beginning of the text, of which nothing is selected."""
    for first, stride, seed in ((7, 1, 4), (3, 2, 7)):
        q, kv, indices = _case(4, 16, 6, seed=seed)
        own = first + stride * torch.arange(16)
        spread = normal(int(own[-1]) + 1, 6, seed=seed + 3)
        spread[own] = kv
        there = own[indices.long()].to(torch.int32)
        cause = "indices are places in the text: look up which row of the rank's kv each is"
        _expect_attention(solution, q, spread, [own], there, 0.4, 4, cause)


@rank_attention.property("merged by log-sum-exp")
def rank_attention_merged_by_log_sum_exp(solution):
    for T, S, k, size, seed in ((3, 24, 20, 2, 10), (5, 31, 24, 3, 13), (2, 40, 36, 4, 16)):
        q, kv, indices = _case(T, S, k, seed=seed)
        cause = "merge the ranks' outputs by exp(lse); -1 where a selected place is not the rank's"
        _expect_attention(solution, q, kv, _shares(S, size), indices, 0.4, 4, cause)


@rank_attention.property("a rank without a key")
def rank_attention_a_rank_without_a_key(solution):
    cause = "a rank that holds none of a row's selected keys has lse = -inf, and counts for nothing"
    for size, k, seed in ((3, 2, 20), (4, 1, 23)):
        q, kv, indices = _case(6, 24, k, seed=seed)
        _expect_attention(solution, q, kv, _shares(24, size), indices, 0.4, 4, cause)
    q, kv, indices = _case(2, 9, 4, seed=26)
    indices[0] = -1
    _expect_attention(solution, q, kv, _shares(9, 2), indices, 0.4, 4, "a row that selects nothing gives 0 and -inf")


@rank_attention.property("large logits")
def rank_attention_large_logits(solution):
    for factor, seed in ((400.0, 30), (2000.0, 33)):
        q, kv, indices = _case(3, 24, 12, seed=seed, factor=factor)
        cause = "exp(lse) overflows: subtract the largest lse first, as `merge_parts` does"
        _expect_attention(solution, q, kv, _shares(24, 3), indices, 0.4, 4, cause)


@rank_attention.property("trained model")
def rank_attention_trained_model(solution):
    config = load_small_model().config.attention
    for layer, size in ((0, 2), (2, 3)):
        read = read_alone()[layer]
        given = read["q"][-3:], read["kv"], _shares(len(TEXT), size), read["indices"][-3:]
        cause = f"layer {layer}, three bytes' queries, {size} ranks: what one rank alone computes"
        _expect_attention(solution, *given, config.softmax_scale, config.kv_lora_rank, cause)


# ---------------------------------------------------------------------------------------------------- group_gradient


def _group(shares, seed, only_others=False):
    """(gathered, x, W's gradient) by autograd: row t's loss looks at all keys, or only at those of other ranks."""
    T = sum(len(own) for own in shares)
    f64 = {"dtype": torch.float64}
    x, queries = normal(T, 5, seed=seed, **f64), normal(T, 3, seed=seed + 1, **f64)
    W = normal(3, 5, seed=seed + 2, **f64).requires_grad_()
    seen = torch.ones(T, T, **f64)
    if only_others:
        for own in shares:
            seen[own[:, None], own] = 0.0

    def losses(keys):
        return ((queries @ keys.T).sin() * seen).sum(dim=1)

    (expected,) = torch.autograd.grad(losses(x @ W.T).mean(), W)
    keys = (x @ W.T).detach().requires_grad_()
    gathered = [torch.autograd.grad(losses(keys)[own].sum(), keys)[0] for own in shares]
    return gathered, [x[own] for own in shares], expected


def _expect_gradient(solution, shares, seed, cause, only_others=False):
    gathered, x, expected = _group(shares, seed, only_others)
    got = solution(gathered, x, list(shares))
    expect_shape(got, expected.shape)
    size, total = len(shares), sum(gathered)
    own = sum(g[rows].T @ mine for g, rows, mine in zip(gathered, shares, x, strict=True)) / len(total)
    suspects = {
        "what a rank's own losses give to its own keys was counted twice: the sum over ranks has it already": (
            expected + own
        ),
        f"counted {size} times, once for each rank": size * expected,
        "the mean over ranks: each rank has a share of one loss, and shares add up": expected / size,
        "the other ranks' losses depend on this rank's keys too: sum over ranks before you take a rank's rows": own,
        "divide by the rows of the group: that is the gradient of the sum": len(total) * expected,
    }
    expect_close(got, expected, CLOSE, "d i", cause, suspects)


def _contiguous(*counts):
    return list(torch.arange(sum(counts)).split(counts))


@group_gradient.property("others' losses")
def group_gradient_others_losses(solution):
    for counts, seed in (((4, 4), 4), ((3, 3, 3), 7)):
        cause = "keys = x · Wᵀ, so W's gradient is dkeysᵀ · x; and every rank's losses depend on all keys"
        _expect_gradient(solution, _contiguous(*counts), seed, cause, only_others=True)


@group_gradient.property("counted once")
def group_gradient_counted_once(solution):
    for counts, seed in (((4, 4), 10), ((2, 2, 2, 2), 13), ((6,), 1)):
        _expect_gradient(solution, _contiguous(*counts), seed, "each pair of a loss and a key counts once")


@group_gradient.property("mean over all rows")
def group_gradient_mean_over_all_rows(solution):
    for counts, seed in (((5, 2), 16), ((3, 0, 4), 19)):
        cause = "a mean over all rows of the group: divide by their number, not by a rank's own"
        _expect_gradient(solution, _contiguous(*counts), seed, cause)


@group_gradient.property("zigzag")
def group_gradient_zigzag(solution):
    for T, size, seed in ((8, 2, 22), (13, 3, 25)):
        cause = "a rank's rows need not lie together: take total[rows]"
        _expect_gradient(solution, _shares(T, size), seed, cause)
