"""Notebook 01."""

import math

import numpy as np
import torch

from dsa_ref import mha_attention

from . import wrong


def scores_of(q, k):
    return torch.einsum("thd,shd->hts", q, k) * q.shape[2] ** -0.5


def future(T):
    return torch.ones(T, T, dtype=torch.bool).triu(1)


def mix(weights, v):
    return torch.einsum("hts,shd->thd", weights, v)


@wrong("dense_attention", "shape")
def heads_first(q, k, v):
    weights = scores_of(q, k).masked_fill(future(len(q)), -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->htd", weights, v)


@wrong("dense_attention", "weights sum to 1")
def mask_after_softmax(q, k, v):
    return mix(scores_of(q, k).softmax(-1).masked_fill(future(len(q)), 0.0), v)


@wrong("dense_attention", "weights sum to 1")
def softmax_over_the_queries(q, k, v):
    return mix(scores_of(q, k).masked_fill(future(len(q)), -torch.inf).softmax(-2), v)


@wrong("dense_attention", "weights sum to 1")
def softmax_over_the_heads(q, k, v):
    return mix(scores_of(q, k).softmax(0).masked_fill(future(len(q)), 0.0), v)


@wrong("dense_attention", "weights sum to 1")
def masked_with_zero(q, k, v):
    exponentials = scores_of(q, k).masked_fill(future(len(q)), 0.0).exp()
    return mix((exponentials / exponentials.sum(-1, keepdim=True)).masked_fill(future(len(q)), 0.0), v)


@wrong("dense_attention", "weights sum to 1")
def not_divided_by_the_sum(q, k, v):
    return mix(scores_of(q, k).masked_fill(future(len(q)), -torch.inf).exp(), v)


@wrong("dense_attention", "future hidden")
def no_mask(q, k, v):
    return mix(scores_of(q, k).softmax(-1), v)


@wrong("dense_attention", "future hidden")
def the_past_hidden(q, k, v):
    return mix(scores_of(q, k).masked_fill(future(len(q)).T, -torch.inf).softmax(-1), v)


@wrong("dense_attention", "future hidden")
def masked_with_zero_only(q, k, v):
    return mix(scores_of(q, k).masked_fill(future(len(q)), 0.0).softmax(-1), v)


@wrong("dense_attention", "future hidden")
def one_token_too_many(q, k, v):
    return mix(scores_of(q, k).masked_fill(future(len(q)).triu(2), -torch.inf).softmax(-1), v)


@wrong("dense_attention", "sees itself")
def diagonal_hidden(q, k, v):
    itself_too = torch.ones(len(q), len(q), dtype=torch.bool).triu(0)
    return mix(scores_of(q, k).masked_fill(itself_too, -torch.inf).softmax(-1), v)


@wrong("dense_attention", "heads apart")
def one_softmax_for_all_heads(q, k, v):
    weights = scores_of(q, k).mean(0, keepdim=True).masked_fill(future(len(q)), -torch.inf).softmax(-1)
    return mix(weights.expand(q.shape[1], -1, -1), v)


@wrong("dense_attention", "heads apart")
def shared_weights(q, k, v):
    weights = scores_of(q, k).masked_fill(future(len(q)), -torch.inf).softmax(-1).mean(0, keepdim=True)
    return mix(weights.expand(q.shape[1], -1, -1), v)


@wrong("dense_attention", "heads apart")
def reshaped_instead_of_transposed(q, k, v):
    T, H, D = q.shape
    q, k, v = (x.reshape(H, T, D) for x in (q, k, v))
    weights = (q @ k.transpose(1, 2) * D**-0.5).masked_fill(future(T), -torch.inf).softmax(-1)
    return (weights @ v).reshape(T, H, D)


@wrong("dense_attention", "values")
def unscaled(q, k, v):
    return mha_attention(q, k, v, 1.0, None)[0]


@wrong("dense_attention", "values")
def divided_by_d(q, k, v):
    return mha_attention(q, k, v, 1 / q.shape[2], None)[0]


@wrong("dense_attention", "values")
def scale_of_the_wrong_axis(q, k, v):
    return mha_attention(q, k, v, q.shape[1] ** -0.5, None)[0]


@wrong("dense_attention", "values")
def uniform_mean(q, k, v):
    return v.cumsum(0) / torch.arange(1, len(v) + 1)[:, None, None]


@wrong("dense_attention", "large scores")
def not_shifted(q, k, v):
    exponentials = scores_of(q, k).masked_fill(future(len(q)), -torch.inf).exp()
    return mix(exponentials / exponentials.sum(-1, keepdim=True), v)


@wrong("dense_attention", "large scores")
def shifted_by_the_largest_of_all(q, k, v):
    scores = scores_of(q, k).masked_fill(future(len(q)), -torch.inf)
    exponentials = (scores - scores.max()).exp()
    return mix(exponentials / exponentials.sum(-1, keepdim=True), v)


@wrong("dense_attention", "large scores")
def clamped(q, k, v):
    exponentials = scores_of(q, k).clamp(max=80).masked_fill(future(len(q)), -torch.inf).exp()
    return mix(exponentials / exponentials.sum(-1, keepdim=True), v)


@wrong("dense_attention", "no loop over tokens")
def a_loop_over_t(q, k, v):
    rows = []
    for t in range(len(q)):
        weights = (torch.einsum("hd,shd->hs", q[t], k[: t + 1]) * q.shape[2] ** -0.5).softmax(-1)
        rows.append(torch.einsum("hs,shd->hd", weights, v[: t + 1]))
    return torch.stack(rows)


@wrong("dense_attention", "no loop over tokens")
def a_loop_in_numpy(q, k, v):
    T, H, D = q.shape
    q, k, v = (x.double().numpy() for x in (q, k, v))
    u = np.zeros((T, H, D))
    for t in range(T):
        scores = (q[t] * k[: t + 1]).sum(2) / math.sqrt(D)
        exponentials = np.exp(scores - scores.max(0))
        u[t] = ((exponentials / exponentials.sum(0))[..., None] * v[: t + 1]).sum(0)
    return torch.from_numpy(u).float()


@wrong("dense_attention", "no loop over tokens")
def torchs_own(q, k, v):
    heads_first = (x.transpose(0, 1) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(0, 1)


@wrong("dense_attention", "heads apart")
def keys_of_all_heads_added(q, k, v):
    return mha_attention(q, k.sum(1, keepdim=True).expand_as(k).contiguous(), v, q.shape[2] ** -0.5, None)[0]


@wrong("dense_attention", "weights sum to 1")
def values_of_all_heads_added(q, k, v):
    weights = scores_of(q, k).masked_fill(future(len(q)), -torch.inf).softmax(-1)
    return torch.einsum("hts,sgd->thd", weights, v)


@wrong("dense_attention", "large scores")
def future_at_minus_100(q, k, v):
    return mix(scores_of(q, k).masked_fill(future(len(q)), -100.0).softmax(-1), v)


@wrong("dense_attention", "inputs")
def scaled_in_place(q, k, v):
    q *= q.shape[2] ** -0.5
    return mix(torch.einsum("thd,shd->hts", q, k).masked_fill(future(len(q)), -torch.inf).softmax(-1), v)


wrong("attention_flops", "growth with T")(lambda T, H, D: 4 * H * D * T)
wrong("attention_flops", "growth with T")(lambda T, H, D: 4 * H * D * T**3)
wrong("attention_flops", "growth with T")(lambda T, H, D: None)
wrong("attention_flops", "growth with T")(lambda T, H, D: 4 * H * D * T * math.log2(T))
wrong("attention_flops", "heads and width")(lambda T, H, D: 2 * D * T * (T + 1))
wrong("attention_flops", "heads and width")(lambda T, H, D: 2 * H * T * (T + 1))
wrong("attention_flops", "heads and width")(lambda T, H, D: 2 * H * D * D * T * (T + 1))
wrong("attention_flops", "amount")(lambda T, H, D: 4 * H * D * T * T)
wrong("attention_flops", "amount")(lambda T, H, D: H * D * T * (T + 1))
wrong("attention_flops", "amount")(lambda T, H, D: H * D * T * (T + 1) // 2)
wrong("attention_flops", "amount")(lambda T, H, D: 2 * H * D * T * T * 2 - T)
wrong("attention_flops", "short texts")(lambda T, H, D: 2 * H * D * T * T)
wrong("attention_flops", "short texts")(lambda T, H, D: 2 * H * D * T * (T - 1))

wrong("attention_bytes", "two ints")(lambda T, H, D, n: 2 * T * H * D * n + H * T * T * n)
wrong("attention_bytes", "two ints")(lambda T, H, D, n: None)
wrong("attention_bytes", "cache")(lambda T, H, D, n: (T * H * D * n, H * T * T * n))
wrong("attention_bytes", "cache")(lambda T, H, D, n: (2 * T * D * n, H * T * T * n))
wrong("attention_bytes", "cache")(lambda T, H, D, n: (2 * T * H * D, H * T * T))
wrong("attention_bytes", "cache")(lambda T, H, D, n: (2 * T * H * D * n * 8, H * T * T * n * 8))
wrong("attention_bytes", "cache")(lambda T, H, D, n: (H * T * T * n, 2 * T * H * D * n))
wrong("attention_bytes", "cache")(lambda T, H, D, n: (3 * T * H * D * n, H * T * T * n))
wrong("attention_bytes", "score matrix")(lambda T, H, D, n: (2 * T * H * D * n, H * T * (T + 1) // 2 * n))
wrong("attention_bytes", "score matrix")(lambda T, H, D, n: (2 * T * H * D * n, T * T * n))
wrong("attention_bytes", "score matrix")(lambda T, H, D, n: (2 * T * H * D * n, H * T * T * D * n))
wrong("attention_bytes", "two ints")(lambda T, H, D, n: (2 * T * H * D * n, "a lot"))
wrong("attention_bytes", "score matrix")(lambda T, H, D, n: (2 * T * H * D * n, H * T * T * 4))
wrong("attention_bytes", "score matrix")(lambda T, H, D, n: (2 * T * H * D * n, H * T * (T - 1) // 2 * n))


def growth(**changed):
    """The right answer but for the entries given, each a function of short and long."""
    right = {
        "whole text": lambda a, b: b * (b + 1) / (a * (a + 1)),
        "next token": lambda a, b: b / a,
        "cache": lambda a, b: b / a,
        "score matrix": lambda a, b: (b / a) ** 2,
    } | {name.replace("_", " "): factor for name, factor in changed.items()}
    return lambda short, long: {name: factor(short, long) for name, factor in right.items()}


wrong("bill_growth", "whole text")(growth(whole_text=lambda a, b: b / a))
wrong("bill_growth", "whole text")(growth(whole_text=lambda a, b: a * a / b / b))
wrong("bill_growth", "whole text")(lambda short, long: (long / short) ** 2)
wrong("bill_growth", "next token")(growth(next_token=lambda a, b: (b / a) ** 2))
wrong("bill_growth", "whole text")(growth(whole_text=lambda a, b: (b // a) ** 2))
wrong("bill_growth", "next token")(growth(next_token=lambda a, b: 1))
wrong("bill_growth", "next token")(growth(next_token=lambda a, b: b // a))
wrong("bill_growth", "cache")(growth(cache=lambda a, b: b // a))
wrong("bill_growth", "score matrix")(growth(score_matrix=lambda a, b: (b // a) ** 2))
wrong("bill_growth", "cache")(growth(cache=lambda a, b: (b / a) ** 2))
wrong("bill_growth", "cache")(growth(cache=lambda a, b: b - a))
wrong("bill_growth", "score matrix")(growth(score_matrix=lambda a, b: b / a))
wrong("bill_growth", "score matrix")(growth(score_matrix=lambda a, b: (b / a) ** 2 / 2))
