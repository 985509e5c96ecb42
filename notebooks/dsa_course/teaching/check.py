"""Notebook 13: the target that the indexer imitates, and how far a guess is from it. `check_gradients` has the rest."""

import functools

import torch

from dsa_ref.index_scores import index_scores
from dsa_ref.nn import load_small_model
from dsa_ref.select_topk import select_topk

from ..checking import Check, expect_close, expect_number, normal, strided
from .lesson import TEXT

kl_target = Check("kl_target")  # (q [T, H, D], kv [S, D], scale) -> p [T, S]
kl_loss = Check("kl_loss")  # (scores [T, S], p [T, S], indices [T, k]) -> float


def causal(T, S):
    """What each of the last T of S positions sees, bool [T, S]."""
    return torch.ones(T, S, dtype=torch.bool).tril(S - T)


@functools.cache
def trained(count=96):
    """One recorded dense step of the trained model, layer 2, on real text, with an indexer that is not quantised."""
    model, record = load_small_model(index_fp8=False), []
    with torch.no_grad():
        model(torch.tensor(list(TEXT[:count])), attention="dense", record=record)
    return record[2], model.config.attention.softmax_scale


# --------------------------------------------------------------------------------------------------------- kl_target


def _logits(q, kv, scale):
    return torch.einsum("thd,sd->ths", q.double(), kv.double()) * scale


def _target(q, kv, scale):
    logits = _logits(q, kv, scale).masked_fill(~causal(len(q), len(kv))[:, None], -torch.inf)
    return logits.softmax(dim=-1).mean(dim=1)


def _expect_target(solution, q, kv, scale, cause, suspects=None, tolerance=1e-5):
    """suspects: {cause: function of (q, kv, scale) that gives what this mistake gives}."""
    answers = {why: wrong(q, kv, scale) for why, wrong in (suspects or {}).items()}
    expect_close(solution(q, kv, scale), _target(q, kv, scale), tolerance, "t s", cause, answers)


def _queries_and_keys(seed, T, S, H, D, size=1.0):
    return size * normal(T, H, D, seed=seed), normal(S, D, seed=seed + 10)


def _head_softmax(q, kv, scale):
    return _logits(q, kv, scale).softmax(dim=1).mean(dim=1).masked_fill(~causal(len(q), len(kv)), 0.0)


def _sees_the_future(q, kv, scale):
    return _logits(q, kv, scale).softmax(dim=-1).mean(dim=1)


def _query_softmax(q, kv, scale):
    seen = causal(len(q), len(kv))[:, None]
    return _logits(q, kv, scale).masked_fill(~seen, -torch.inf).softmax(dim=0).nan_to_num().mean(dim=1)


@kl_target.property("future hidden")
def kl_target_future_hidden(solution):
    suspects = {
        "future tokens are in the target: the indexer would learn to look where attention may not": _sees_the_future,
        "the future was hidden after the softmax, so a row no longer sums to 1": lambda *given: _sees_the_future(
            *given
        ).masked_fill(~causal(len(given[0]), len(given[1])), 0.0),
        "the softmax ran over the heads: it runs over the keys": _head_softmax,
        "the softmax ran over the queries: it runs over the keys": _query_softmax,
        "the logits themselves, without a softmax": lambda *given: (
            _logits(*given).mean(dim=1).masked_fill(~causal(len(given[0]), len(given[1])), 0.0)
        ),
    }
    for seed, T in ((1, 6), (2, 9)):
        q, kv = _queries_and_keys(seed, T, T, 1, 4)
        cause = "with one head and scale 1: not the softmax of q · kv over the keys up to the query's own"
        _expect_target(solution, q, kv, 1.0, cause, suspects)


@kl_target.property("scale")
def kl_target_scale(solution):
    suspects = {
        "the scale was left out of the logits": lambda q, kv, scale: _target(q, kv, 1.0),
        "the scale was applied after the softmax": lambda q, kv, scale: _target(q, kv, 1.0) * scale,
        "divided by the scale": lambda q, kv, scale: _target(q, kv, 1 / scale),
        "D^-0.5 in place of the scale that was given": lambda q, kv, scale: _target(q, kv, q.shape[2] ** -0.5),
    }
    for seed, scale in ((3, 0.125), (4, 0.3)):
        q, kv = _queries_and_keys(seed, 7, 7, 1, 5)
        _expect_target(solution, q, kv, scale, "with one head: not the softmax of scale · q · kv", suspects)


@kl_target.property("mean over heads")
def kl_target_mean_over_heads(solution):
    def of_mean_logits(q, kv, scale):
        return _target(q.mean(dim=1, keepdim=True), kv, scale)

    suspects = {
        "the sum over heads: a row sums to H, and must sum to 1": lambda *given: _target(*given) * given[0].shape[1],
        "the heads' logits were averaged, then one softmax: each head has its own": of_mean_logits,
        "the heads' logits were added, then one softmax: each head has its own": lambda q, kv, scale: of_mean_logits(
            q * q.shape[1], kv, scale
        ),
        "the softmax ran over the heads: it runs over the keys": _head_softmax,
        "the first head alone": lambda q, kv, scale: _target(q[:, :1], kv, scale),
        "one softmax over heads and keys together: a head with large logits then counts more": lambda q, kv, scale: (
            _logits(q, kv, scale)
            .masked_fill(~causal(len(q), len(kv))[:, None], -torch.inf)
            .flatten(1)
            .softmax(dim=1)
            .unflatten(1, (q.shape[1], len(kv)))
            .sum(dim=1)
        ),
    }
    for seed, T, H in ((5, 6, 3), (6, 8, 4)):
        q, kv = _queries_and_keys(seed, T, T, H, 4, size=2.0)
        cause = "right with one head: with several, each has a softmax, and their mean is the target"
        _expect_target(solution, q, kv, 0.5, cause, suspects)


def _query_t_at_position_t(q, kv, scale):
    seen = torch.ones(len(q), len(kv), dtype=torch.bool).tril()[:, None]
    return _logits(q, kv, scale).masked_fill(~seen, -torch.inf).softmax(dim=-1).mean(dim=1)


@kl_target.property("queries come last")
def kl_target_queries_come_last(solution):
    why = "query t was taken for position t: the queries are the last T of S, so t sees S - T + t + 1 keys"
    for seed, T, S, H in ((7, 4, 9, 2), (8, 1, 5, 3), (9, 5, 37, 1), (10, 6, 7, 2)):
        q, kv = _queries_and_keys(seed, T, S, H, 4)
        cause = "right where T = S: with fewer queries than keys they are the last T of the S positions"
        _expect_target(solution, q, kv, 0.5, cause, {why: _query_t_at_position_t})
        _expect_target(solution, strided(q), strided(kv), 0.5, "wrong for tensors that are not contiguous")


@kl_target.property("large logits")
def kl_target_large_logits(solution):
    cause = (
        "exp of a large number is infinite, and inf / inf is NaN: subtract each row's largest visible logit first, and "
        "hide later keys with -inf, not with a number below which a logit may lie"
    )
    for seed in (10, 11):
        q, kv = _queries_and_keys(seed, 5, 5, 2, 4, size=1000.0)
        _expect_target(solution, q, kv, 1.0, cause)
        q = q / 1000.0
        q[:, 1] -= 1e4 * kv.mean(dim=0)  # one head's logits far below the other's
        _expect_target(solution, q, kv, 1.0, f"{cause}. Each row and head has its own largest")


@kl_target.property("trained model")
def kl_target_trained_model(solution):
    step, scale = trained()
    cause = "right on random numbers, wrong on the trained model's: more heads, more keys, logits of its own size"
    _expect_target(solution, step["q"], step["kv"], scale, cause)


# ----------------------------------------------------------------------------------------------------------- kl_loss


def _chosen(indices, S):
    """bool [T, S]: the keys that each row names."""
    mask = torch.zeros(len(indices), S + 1, dtype=torch.bool)
    return mask.scatter(1, torch.where(indices < 0, S, indices).long(), True)[:, :S]


def _sides(scores, p, mask):
    """(p, ln p, ln softmax(scores)), each [T, S], both renormalised on the mask and 0 elsewhere."""
    p = p.masked_fill(~mask, 0.0)
    p = p / p.sum(dim=1, keepdim=True).clamp(min=1e-300)
    log_p = torch.where(p > 0, p, 1.0).log()
    log_guess = scores.masked_fill(~mask, -torch.inf).log_softmax(dim=1).masked_fill(~mask, 0.0)
    return p, log_p, log_guess


def loss_of(scores, p, mask, rows=None):
    """The right loss, on a mask [T, S]."""
    p, log_p, log_guess = _sides(scores, p, mask)
    rows = int(mask.any(dim=1).sum()) if rows is None else rows
    return (p * (log_p - log_guess)).sum() / max(1, rows)


def _given_loss(seed, T=7, S=None, k=4, full=False, size=2.0):
    """Scores with -inf in the future, a target, and a selection: all visible keys (full), or k of them, -1 behind."""
    S = S or T
    seen = causal(T, S)
    scores = (size * normal(T, S, seed=seed, dtype=torch.float64)).masked_fill(~seen, -torch.inf)
    p = normal(T, S, seed=seed + 1, dtype=torch.float64).mul(1.5).masked_fill(~seen, -torch.inf).softmax(dim=1)
    order = normal(T, S, seed=seed + 2).masked_fill(~seen, -torch.inf).sort(dim=1, descending=True).indices
    k = S if full else k
    places = torch.where(torch.arange(S) < seen.sum(dim=1, keepdim=True), order, -1)[:, :k]
    return scores, p, places.int()


def _expect_loss(solution, given, cause, suspects=None):
    """suspects: {cause: function of (scores, p, mask) that gives what this mistake gives}."""
    scores, p, indices = given
    mask = _chosen(indices, scores.shape[1])
    answers = {why: wrong(scores, p, mask) for why, wrong in (suspects or {}).items()}
    got = expect_number(solution(scores, p, indices))
    expect_close(got, loss_of(scores, p, mask), 1e-7, "", cause, answers)


def _reversed(scores, p, mask):
    p, log_p, log_guess = _sides(scores, p, mask)
    guess = log_guess.exp().masked_fill(~mask, 0.0)
    return (guess * (log_guess - log_p)).sum() / len(p)


@kl_loss.property("every key")
def kl_loss_every_key(solution):
    suspects = {
        "KL the wrong way round: p, the target, is what the logarithms are weighed by": _reversed,
        "the cross-entropy: the part Σ p · ln p is missing": lambda scores, p, mask: (
            -(p * _sides(scores, p, mask)[2]).sum() / len(p)
        ),
        "the sign: ln p - ln softmax(I), and not the other way": lambda *given: -loss_of(*given),
        "the sum over the rows, and not their mean": lambda scores, p, mask: loss_of(scores, p, mask) * len(p),
        "logarithms to base 2: nats have natural ones": lambda *given: loss_of(*given) / torch.tensor(2.0).log(),
        "the mean over all places of [T, S]: a row's terms are added, and rows are averaged": lambda scores, p, mask: (
            loss_of(scores, p, mask) / scores.shape[1]
        ),
    }
    for seed, T in ((1, 6), (2, 9)):
        cause = "with every visible key selected: not the mean over rows of Σ p · (ln p - ln softmax(I)); -1 names none"
        _expect_loss(solution, _given_loss(seed, T, full=True), cause, suspects)


@kl_loss.property("selected keys alone")
def kl_loss_selected_keys_alone(solution):
    def p_as_it_is(scores, p, mask):
        _, _, log_guess = _sides(scores, p, mask)
        return (p * (p.clamp(min=1e-300).log() - log_guess)).masked_fill(~mask, 0.0).sum() / len(p)

    def guess_as_it_is(scores, p, mask):
        p, log_p, _ = _sides(scores, p, mask)
        return (p * (log_p - scores.log_softmax(dim=1)).masked_fill(~mask, 0.0)).sum() / len(p)

    def neither(scores, p, mask):
        terms = p * (p.clamp(min=1e-300).log() - scores.log_softmax(dim=1).masked_fill(scores.isinf(), 0.0))
        return terms.masked_fill(~mask, 0.0).sum() / len(p)

    def all_visible(scores, p, mask):
        return loss_of(scores, p, ~scores.isinf())

    suspects = {
        "every visible key counts: in the sparse stage the loss lives on the selected keys S_t alone": all_visible,
        "p was not renormalised on S_t: it has to sum to 1 there": p_as_it_is,
        "softmax(I) was not renormalised on S_t: its denominator has selected keys alone": guess_as_it_is,
        "neither side was renormalised on S_t: both sum to 1 there": neither,
    }
    for seed, T, S in ((3, 6, 6), (4, 5, 12)):
        cause = "right where everything is selected: with fewer keys, both sides are cut to S_t and sum to 1 there"
        scores, p, indices = _given_loss(seed, T, S, k=3)
        _expect_loss(solution, (scores, p, indices), cause, suspects)
        cause = "-1 is no key, wherever it stands: as an index it is the last one"
        for row, place in ((-1, 0), (-2, 1)):  # rows that see the last key, and select fewer than they could
            indices[row, place] = -1
            _expect_loss(solution, (scores, p, indices), cause)
    scores, p, indices = _given_loss(5, 2, 40_000, k=3)
    indices[:, 0] = 39_998  # more than 15 bits
    cause = "right with few keys: with 40,000, the indices need more bits than they got"
    _expect_loss(solution, (scores, p, indices), cause)


@kl_loss.property("zero in the target")
def kl_loss_zero_in_the_target(solution):
    for seed in (5, 6):
        scores, p, indices = _given_loss(seed, 7, full=True)
        p[3:, 1] = 0.0
        p = p / p.sum(dim=1, keepdim=True)
        cause = "where p is 0 the term is 0: 0 · ln 0 is NaN for a computer, and a small number added to p is an error"
        _expect_loss(solution, (scores, p, indices), cause)


@kl_loss.property("empty rows")
def kl_loss_empty_rows(solution):
    suspects = {
        "divided by T: rows that select nothing are padding, and have no part in the mean": lambda scores, p, mask: (
            loss_of(scores, p, mask, len(p))
        )
    }
    for seed, T in ((7, 6), (8, 9)):
        scores, p, indices = _given_loss(seed, T)
        cause = "a row that selects nothing counts neither above nor below the line, and the rows after it still count"
        for empty in (slice(T // 2, T), slice(1, 3), slice(1)):  # behind, between and before the others
            these = [x.clone() for x in (scores, p, indices)]
            these[2][empty] = -1
            _expect_loss(solution, these, cause, suspects)
            these[0][empty], these[1][empty] = -torch.inf, 0.0  # a row that does not see anything, either
            _expect_loss(solution, these, cause, suspects)
    scores, p, indices = _given_loss(9)
    _expect_loss(solution, (scores, p, torch.full_like(indices, -1)), "with no row at all the loss is 0, not 0 / 0")


@kl_loss.property("large scores")
def kl_loss_large_scores(solution):
    cause = "exp(1000) is infinite: take ln softmax(I) as I - its log-sum-exp, the row's largest subtracted first"
    for seed in (10, 11):
        scores, p, indices = _given_loss(seed)
        for moved in (scores + 1000.0, scores - 1000.0, 500.0 * scores):
            _expect_loss(solution, (moved, p, indices), cause)


@kl_loss.property("trained model")
def kl_loss_trained_model(solution):
    step, scale = trained()
    scores = index_scores(step["q_idx"], step["k_idx"], step["w"]).double()
    p = _target(step["q"], step["kv"], scale)
    for k in (16, 96):
        cause = f"right on random numbers, wrong on the trained model's scores, k = {k}"
        _expect_loss(solution, (scores, p, select_topk(scores.float(), k)), cause)
