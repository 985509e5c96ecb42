"""Notebook 16: the layer with a cache."""

import functools

import torch

import dsa_ref

from ..checking import Check, expect, expect_shape, tensor
from .check import FLIPPED, expect_rows, odd_layer, reference, trained_layer
from .layer import attend, project

cached = Check("cached")  # (x [T, dim], cache, weights, config) -> (y [T, dim], cache)


def _fed(solution, given, sizes, cache=None):
    """The rows of y, the tokens fed in parts of these sizes, and the last cache."""
    x, weights, config = given
    rows = []
    for part in x.split(sizes):
        got = solution(part, cache, weights, config)
        pair = isinstance(got, tuple) and len(got) == 2 and isinstance(got[1], tuple)
        kinds = ", ".join(type(item).__name__ for item in got) if isinstance(got, tuple) else type(got).__name__
        expect(pair, f"got {kinds}, expected a pair of y and a tuple", "return y, (kv, k_idx, k_scale)")
        y, cache = got
        expect_shape(y, part.shape, torch.float32, name="y")
        rows.append(tensor(y).double())
    return torch.cat(rows), cache


def _mistaken(given, sizes, restart=False, alone=False, early=False, peek=False, unturned=False):
    """`my_cached` with one mistake, as an answer to compare with."""
    x, weights, config = given
    kept, rows, before = None, [], 0
    for part in x.split(sizes):
        T = len(part)
        new = project(part, torch.arange(T) + (0 if restart else before), weights, config)
        names = ("kv", "k_idx", "k_scale")
        if unturned:  # stored as they were before RoPE, and used so
            still = project(part, torch.zeros(T, dtype=torch.int64), weights, config)
        old = (
            [torch.cat((held, new[n])) for held, n in zip(kept, names, strict=True)]
            if kept
            else [new[n] for n in names]
        )
        kv, k_idx, k_scale = [new[n] for n in names] if alone else old
        end = torch.full((T,), len(kv), dtype=torch.int32) if peek else None
        scores = dsa_ref.index_scores(new["q_idx"], k_idx, new["w"], k_scale, None, end)
        indices = dsa_ref.select_topk(scores, config.index_topk, None, end)
        rows.append(attend(new["q"], kv, indices, weights, config))
        if early:  # only what the last row selected is kept
            left = indices[-1][indices[-1] >= 0].long()
            old = [held[left] for held in old]
        elif unturned:
            old = (
                [torch.cat((held, still[n])) for held, n in zip(kept, names, strict=True)]
                if kept
                else [still[n] for n in names]
            )
        kept, before = old, before + T
    return torch.cat(rows).double()


CACHED = {  # cause: the mistake's name in `_mistaken`
    "only the new tokens were selected from: score all rows, the cache's and the new ones": "alone",
    "positions restart with each call: the first new token's position is the number of rows in the cache": "restart",
    "rows from before RoPE were stored: store them turned, since their positions never change": "unturned",
    "the future was visible within a call: row t of T new ones sees S - T + t + 1 of S rows": "peek",
    "what was not selected was thrown away: another query may need it, so store all and select anew": "early",
}


def _judge_cached(solution, given, sizes, cause, flipped=0.0):
    x, weights, config = given
    got, _ = _fed(solution, given, sizes)
    suspects = {why: functools.partial(_mistaken, given, sizes, **{mistake: True}) for why, mistake in CACHED.items()}
    first = sizes[0]  # the rows before are the first call's
    suspects = {why: lambda answer=answer: answer()[first:] for why, answer in suspects.items()}
    expect_rows(got[first:], reference(x, weights, config)[first:].double(), cause, suspects, flipped, first)


@cached.property("first call")
def cached_first_call(solution):
    for seed in (0, 1):
        x, weights, config = given = trained_layer(seed, 60, k=16)
        got, _ = _fed(solution, given, [60])
        cause = "without a cache it is the layer of exercise 16.1"
        expect_rows(got, reference(x, weights, config).double(), cause, {}, FLIPPED)


@cached.property("positions")
def cached_positions(solution):
    for seed in (0, 1):  # at most k tokens: all are kept
        cause = "wrong where every key is kept: do all rows reach attention, each turned by its own position?"
        _judge_cached(solution, trained_layer(seed, 40, k=64), [33, *[1] * 7], cause)


@cached.property("future")
def cached_future(solution):
    for seed in (0, 1):
        cause = "right for one new token a call, wrong for several: which rows may each of them see?"
        _judge_cached(solution, trained_layer(seed, 48, k=64), [20, 13, 15], cause)


@cached.property("k < T")
def cached_k_below_t(solution):
    for seed in (0, 1):
        cause = "right where every key is kept, wrong where k are: select anew in each call, from all rows so far"
        _judge_cached(solution, trained_layer(seed, 100, k=16), [84, *[1] * 12, 4], cause, FLIPPED)


@cached.property("branches")
def cached_branches(solution):
    for seed in (0, 1):
        x, weights, config = trained_layer(seed, 40, k=64)
        _, cache = _fed(solution, (x[:35], weights, config), [35])
        ways = {rest: ([], cache) for rest in (x[35:], x[35:].flip(0))}  # two ways on from one cache, turn by turn
        for t in range(5):
            for rest, (rows, last) in ways.items():
                row, last = _fed(solution, (rest[t : t + 1], weights, config), [1], last)
                ways[rest] = [*rows, row], last
        for rest, (rows, _) in ways.items():
            got = torch.cat(rows)
            expected = reference(torch.cat((x[:35], rest)), weights, config)[35:].double()
            cause = (
                "the cache that went in was changed, or something is kept elsewhere: return a new tuple of new tensors"
            )
            expect_rows(got, expected, cause, {}, 0.0, 35)


@cached.property("other sizes")
def cached_other_sizes(solution):
    for seed in (1, 2):
        cause = "right for the small model alone: take sizes and k from config"
        _judge_cached(solution, odd_layer(seed, 40), [28, *[1] * 8, 4], cause, FLIPPED)
