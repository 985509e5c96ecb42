"""Notebook 07: where the scales go in the scores, and what a selection loses."""

import collections

import numpy as np
import torch

from dsa_ref.index_scores import index_scores
from dsa_ref.quantize import quantize
from dsa_ref.testing import overlap

from ..checking import Check, expect_close, expect_number, normal, strided, tensor, whole

scores_from_fp8 = Check("scores_from_fp8")  # (q8 [T, Hi, D], q_scale [T, Hi], k8 [S, D], k_scale [S], w) -> [T, S]
flips = Check("flips")  # flips(selected [T, k], reference [T, k]) -> float


# --------------------------------------------------------------------------------------------------- scores_from_fp8

SQUARE = ((1, 6, 6, 3), (2, 7, 7, 1))  # seed, T, S, Hi
OTHER = ((3, 5, 37, 2), (4, 9, 4, 1))
Given = collections.namedtuple("Given", "q8 q_scale k8 k_scale w")


def _given(seed, T, S, Hi, positive_w=False, q_scale=True, k_scale=True):
    """Whole numbers and powers of two, so that every sum is exact in any order."""
    rng = np.random.default_rng(seed)
    q_scales, k_scales = (torch.from_numpy(2.0 ** rng.integers(-12, 3, shape)).float() for shape in ((T, Hi), (S,)))
    weights = whole(T, Hi, seed=seed + 30)
    return Given(
        whole(T, Hi, 8, seed=seed + 10).to(torch.float8_e4m3fn),
        q_scales if q_scale else torch.ones(T, Hi),
        whole(S, 8, seed=seed + 20).to(torch.float8_e4m3fn),
        k_scales if k_scale else torch.ones(S),
        weights.abs() + 1.0 if positive_w else weights,
    )


def _scores(given, **changed):
    """The right scores of all pairs, of these inputs or of `changed` ones."""
    q8, q_scale, k8, k_scale, w = given._replace(**changed)
    T, S = len(q8), len(k8)
    everything = {"start": torch.zeros(T, dtype=torch.int32), "end": torch.full((T,), S, dtype=torch.int32)}
    return index_scores(q8, k8, w * q_scale, k_scale, **everything)


def _compare_scores(solution, cause, suspects, sizes=SQUARE, **which):
    """suspects: {cause: function of the inputs that gives the scores of this mistake}."""
    for size in sizes:
        given = _given(*size, **which)
        answers = {why: wrong(given) for why, wrong in suspects.items()}
        expect_close(solution(*given), _scores(given), 1e-6, "t s", cause, answers)


def _weighted_dots(given):
    """w · (q8 · k8) [T, Hi, S], without any relu."""
    return torch.einsum("thd,sd,th->ths", given.q8.float(), given.k8.float(), given.w)


@scores_from_fp8.property("relu per head")
def scores_from_fp8_relu_per_head(solution):
    suspects = {
        "no relu: a head that dislikes a key may then cancel one that likes it": lambda g: _weighted_dots(g).sum(dim=1),
        "the relu came after the sum over heads": lambda g: _weighted_dots(g).sum(dim=1).relu(),
        "the future was hidden: this exercise scores every pair": lambda g: index_scores(g.q8, g.k8, g.w),
    }
    cause = "with all scales 1 and positive weights: not the sum over heads of w · relu(q8 · k8)"
    _compare_scores(solution, cause, suspects, positive_w=True, q_scale=False, k_scale=False)


@scores_from_fp8.property("weights keep their sign")
def scores_from_fp8_weights_keep_their_sign(solution):
    suspects = {
        "the weight went inside the relu: only a positive factor may": lambda g: _weighted_dots(g).relu().sum(dim=1),
        "the sign of the weights got lost": lambda g: _scores(g, w=g.w.abs()),
    }
    cause = "right for positive weights, wrong for negative ones"
    _compare_scores(solution, cause, suspects, q_scale=False, k_scale=False)


@scores_from_fp8.property("k_scale")
def scores_from_fp8_k_scale(solution):
    suspects = {
        "k_scale was left out": lambda g: _scores(g, k_scale=torch.ones_like(g.k_scale)),
        "divided by k_scale: the value is k8 · k_scale": lambda g: _scores(g, k_scale=1 / g.k_scale),
        "k_scale was applied twice": lambda g: _scores(g, k_scale=g.k_scale**2),
        "k_scale went along the queries: it has one entry a key, so it scales columns": lambda g: (
            _scores(g, k_scale=torch.ones_like(g.k_scale)) * g.k_scale[:, None]
        ),
    }
    _compare_scores(solution, "score (t, s) is not proportional to k_scale[s]", suspects, q_scale=False)


@scores_from_fp8.property("q_scale")
def scores_from_fp8_q_scale(solution):
    suspects = {
        "q_scale was left out": lambda g: _scores(g, q_scale=torch.ones_like(g.q_scale)),
        "q_scale was applied twice, in the relu and in the weight": lambda g: _scores(g, q_scale=g.q_scale**2),
        "divided by q_scale: the value is q8 · q_scale": lambda g: _scores(g, q_scale=1 / g.q_scale),
        "one q_scale for all heads: each head's vector has its own": lambda g: _scores(
            g, q_scale=g.q_scale.mean(dim=1, keepdim=True)
        ),
    }
    _compare_scores(solution, "head h of query t is not proportional to q_scale[t, h]", suspects)


@scores_from_fp8.property("T is not S")
def scores_from_fp8_t_is_not_s(solution):
    _compare_scores(solution, "right where there are as many queries as keys, wrong elsewhere", {}, OTHER)


def _real(seed, T, S, Hi, D):
    """What a trained layer would hand over: normal vectors, quantised, scales that are any fp32 number."""
    (q8, _), (k8, _) = (quantize(normal(*shape, seed=seed + i)) for i, shape in enumerate(((T, Hi, D), (S, D))))
    q_scale, k_scale = (normal(*shape, seed=seed + 5).abs() + 0.1 for shape in ((T, Hi), (S,)))
    return Given(q8, q_scale, k8, k_scale, normal(T, Hi, seed=seed + 6))


@scores_from_fp8.property("fp32 throughout")
def scores_from_fp8_fp32_throughout(solution):
    for seed, T, S, Hi, D in ((5, 9, 9, 16, 128), (6, 1, 1, 1, 1), (7, 4, 30, 3, 64), (8, 8, 8, 8, 8)):
        given = _real(seed, T, S, Hi, D)
        q8, q_scale, k8, k_scale, w = (x.double() for x in given)
        expected = torch.einsum("ths,th->ts", torch.einsum("thd,sd->ths", q8, k8).relu(), w * q_scale) * k_scale
        cause = (
            "right for small whole numbers only. Dot products of bytes can reach 10^7: fp16 ends at 65504, and bf16 "
            "keeps two or three digits. Convert q8 and k8 to float32, and round nothing"
        )
        for tensors in (given, tuple(strided(x) for x in given)):
            expect_close(solution(*tensors), expected, 1e-5, "t s", cause)
            cause = "wrong for tensors that are not contiguous, as after a transpose: reshape, do not view"
        small = solution(*given[:1], given[1] * 2**-40, *given[2:])  # all but the scale stays, so no digit changes
        cause = "right for queries near 1: relu cuts at 0, and at no other number"
        expect_close(tensor(small) * 2**40, expected, 1e-5, "t s", cause)


# ------------------------------------------------------------------------------------------------------------- flips


def _selections(seed, T, k, S=40):
    """Two selections as the contract has them: row t keeps min(k, t + 1) keys, the rest is -1."""
    rng = np.random.default_rng(seed)
    rows = np.full((2, T, k), -1, dtype=np.int32)
    for side in rows:
        for t, row in enumerate(side):
            n = min(k, t + 1)
            row[:n] = np.sort(rng.choice(max(n, min(S, 2 * n)), n, replace=False))
    return torch.from_numpy(rows[0]), torch.from_numpy(rows[1])


def _expect_flips(solution, selected, reference, cause, suspects=None):
    got, expected = expect_number(solution(selected, reference)), 1.0 - overlap(reference, selected)
    expect_close(got, torch.tensor(expected, dtype=torch.float64), 1e-6, "", cause, suspects)


@flips.property("nothing changed")
def flips_nothing_changed(solution):
    for seed, T, k in ((1, 9, 3), (2, 5, 8)):
        one, _ = _selections(seed, T, k)
        suspects = {"got the share that stayed, not the share that changed": torch.tensor(1.0)}
        _expect_flips(solution, one, one, "the two selections are equal, so nothing changed", suspects)


@flips.property("order is free")
def flips_order_is_free(solution):
    for seed, T, k in ((3, 9, 5), (4, 7, 6)):
        one, other = _selections(seed, T, k)
        one, other = one[k - 1 :], other[k - 1 :]  # full rows: no padding yet
        _expect_flips(solution, one.flip(1), one, "the same keys in another order: compare sets, not places")


@flips.property("share of the keys")
def flips_share_of_the_keys(solution):
    for seed, T, k in ((5, 12, 5), (6, 9, 4)):
        one, other = _selections(seed, T, k)
        one, other = one[k - 1 :], other[k - 1 :]
        share = 1.0 - overlap(other, one)
        suspects = {
            "each exchange was counted twice, as one key gone and one key come": torch.tensor(2 * share),
            "got the number of keys, not their share": torch.tensor(share * k),
            "got the share that stayed, not the share that changed": torch.tensor(1.0 - share),
            "got the sum over the rows, not their mean": torch.tensor(share * len(one)),
        }
        _expect_flips(solution, one, other, "not the mean over rows of (changed keys) / (keys)", suspects)


@flips.property("-1 ignored")
def flips_1_ignored(solution):
    for seed, T, keys, k in ((7, 9, 3, 9), (8, 4, 2, 37)):  # every row holds the same number of keys, then -1
        one, other = (
            torch.nn.functional.pad(side[keys - 1 :], (0, k - keys), value=-1) for side in _selections(seed, T, keys)
        )
        share = 1.0 - overlap(other, one)
        suspects = {
            "divided by k: a row that sees few keys holds fewer": torch.tensor(share * keys / k),
            "-1 was counted as a key, once a row": torch.tensor(share * keys / (keys + 1)),
        }
        _expect_flips(solution, one, other, "-1 fills a row up and is no key: leave it out on both sides", suspects)


@flips.property("mean over rows")
def flips_mean_over_rows(solution):
    for seed, T, k in ((9, 16, 12), (10, 7, 3)):  # short rows and long ones
        one, other = _selections(seed, T, k)
        one[-1] = other[-1]
        _expect_flips(solution, one, other, "every row counts the same, however many keys it holds")
        for name, far in (("65,536 apart", lambda key: key << 16), ("above 2^24", lambda key: key + (1 << 24))):
            cause = f"right for small keys, wrong for keys {name}: a key is any number from 0 up, as int32 holds it"
            _expect_flips(solution, *(torch.where(side >= 0, far(side), -1) for side in (one, other)), cause)
    for seed, T, k in ((12, 1, 1), (13, 9, 5)):
        one, other = (strided(side) for side in _selections(seed, T, k))
        _expect_flips(solution, one, other, "wrong for this shape, or for tensors that are not contiguous")


@flips.property("empty row")
def flips_empty_row(solution):
    one, other = _selections(11, 6, 4)
    one[0], other[0] = -1, -1
    _expect_flips(solution, one, other, "a row without keys has nothing that could change: it counts 0, not 0 / 0")
