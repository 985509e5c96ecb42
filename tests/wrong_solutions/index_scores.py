"""Notebook 02."""

import torch

import dsa_ref

from . import wrong


def _masked(scores):
    T, S = scores.shape
    return scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), -torch.inf)


def _dots(q_idx, k_idx):
    return torch.einsum("thd,sd->ths", q_idx.float(), k_idx.float())


@wrong("index_scores", "shape")
def transposed(q_idx, k_idx, w):
    return dsa_ref.index_scores(q_idx, k_idx, w).T


@wrong("index_scores", "shape")
def heads_left_apart(q_idx, k_idx, w):
    return _dots(q_idx, k_idx).relu() * w[:, :, None]


@wrong("index_scores", "shape")
def rounded_to_bf16(q_idx, k_idx, w):
    return dsa_ref.index_scores(q_idx, k_idx, w).bfloat16()


@wrong("index_scores", "future hidden")
def future_visible(q_idx, k_idx, w):
    return torch.einsum("ths,th->ts", _dots(q_idx, k_idx).relu(), w)


@wrong("index_scores", "future hidden")
def own_key_hidden(q_idx, k_idx, w):
    scores = future_visible(q_idx, k_idx, w)
    T, S = scores.shape
    return scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T), -torch.inf)


@wrong("index_scores", "future hidden")
def future_scores_zero(q_idx, k_idx, w):
    return torch.nan_to_num(dsa_ref.index_scores(q_idx, k_idx, w), neginf=0.0)


@wrong("index_scores", "future hidden")
def mask_multiplied(q_idx, k_idx, w):
    scores = future_visible(q_idx, k_idx, w)
    T, S = scores.shape
    return scores + torch.ones(T, S).triu(S - T + 1) * -torch.inf  # 0 · inf is NaN


@wrong("index_scores", "queries last")
def mask_without_offset(q_idx, k_idx, w):
    scores = future_visible(q_idx, k_idx, w)
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)


@wrong("index_scores", "dot product")
def scaled_again(q_idx, k_idx, w):
    return dsa_ref.index_scores(q_idx, k_idx, w) * q_idx.shape[2] ** -0.5


@wrong("index_scores", "dot product")
def keys_ask_queries(q_idx, k_idx, w):
    if len(q_idx) != len(k_idx):
        return dsa_ref.index_scores(q_idx, k_idx, w)
    return _masked(torch.einsum("ths,th->st", _dots(q_idx, k_idx).relu(), w))


@wrong("index_scores", "weights")
def no_weights(q_idx, k_idx, w):
    return dsa_ref.index_scores(q_idx, k_idx, torch.ones_like(w))


@wrong("index_scores", "weights")
def softmaxed_weights(q_idx, k_idx, w):
    return dsa_ref.index_scores(q_idx, k_idx, w.softmax(dim=1))


@wrong("index_scores", "weights")
def mean_over_heads(q_idx, k_idx, w):
    return dsa_ref.index_scores(q_idx, k_idx, w) / w.shape[1]


@wrong("index_scores", "relu per head")
def relu_after_the_sum(q_idx, k_idx, w):
    return _masked(torch.einsum("ths,th->ts", _dots(q_idx, k_idx), w).relu())


@wrong("index_scores", "relu per head")
def no_relu(q_idx, k_idx, w):
    return _masked(torch.einsum("ths,th->ts", _dots(q_idx, k_idx), w))


@wrong("index_scores", "relu per head")
def abs_instead_of_relu(q_idx, k_idx, w):
    return _masked(torch.einsum("ths,th->ts", _dots(q_idx, k_idx).abs(), w))


@wrong("index_scores", "relu per head")
def relu_of_the_vectors(q_idx, k_idx, w):
    return dsa_ref.index_scores(q_idx.relu(), k_idx.relu(), w)


@wrong("index_scores", "negative weights")
def weights_inside_the_relu(q_idx, k_idx, w):
    return _masked((_dots(q_idx, k_idx) * w[:, :, None]).relu().sum(dim=1))


@wrong("index_scores", "negative weights")
def magnitudes_of_the_weights(q_idx, k_idx, w):
    return dsa_ref.index_scores(q_idx, k_idx, w.abs())


@wrong("index_scores", "negative weights")
def scores_cut_at_zero(q_idx, k_idx, w):
    scores = dsa_ref.index_scores(q_idx, k_idx, w)
    return torch.where(scores.isfinite(), scores.relu(), scores)


@wrong("index_scores", "fp32 throughout")
def sums_in_bf16(q_idx, k_idx, w):
    dots = torch.einsum("thd,sd->ths", q_idx, k_idx).relu()
    return _masked(torch.einsum("ths,th->ts", dots, w.to(dots.dtype)).float())


@wrong("index_scores", "fp32 throughout")
def dots_rounded_to_bf16(q_idx, k_idx, w):
    dots = torch.einsum("thd,sd->ths", q_idx, k_idx).relu().float()
    return _masked(torch.einsum("ths,th->ts", dots, w))


@wrong("index_scores", "any size")
def squeezed(q_idx, k_idx, w):
    return dsa_ref.index_scores(q_idx, k_idx, w).squeeze()


@wrong("index_scores", "any size")
def sizes_of_the_first_tests(q_idx, k_idx, w):
    scores = dsa_ref.index_scores(q_idx, k_idx, w)
    scores[:, 32:] = -torch.inf  # a block of 32 keys, and no loop over blocks
    return scores


# ------------------------------------------------------------------------------------------------------ head_weights


def _plain(x, W_w):
    return x.float() @ W_w.float()


@wrong("head_weights", "shape")
def rounded_back(x, W_w, q_scale, Hi, Di):
    return (_plain(x, W_w) * q_scale * (Hi * Di) ** -0.5).bfloat16()


@wrong("head_weights", "shape")
def one_weight_for_all_heads(x, W_w, q_scale, Hi, Di):
    return (_plain(x, W_w) * q_scale * (Hi * Di) ** -0.5).mean(dim=1)


@wrong("head_weights", "product")
def softmax_over_heads(x, W_w, q_scale, Hi, Di):
    return _plain(x, W_w).softmax(dim=1) * q_scale * (Hi * Di) ** -0.5


@wrong("head_weights", "product")
def softmax_at_the_end(x, W_w, q_scale, Hi, Di):
    return (_plain(x, W_w) * q_scale * (Hi * Di) ** -0.5).softmax(dim=1)


@wrong("head_weights", "product")
def sigmoid(x, W_w, q_scale, Hi, Di):
    return _plain(x, W_w).sigmoid() * q_scale * (Hi * Di) ** -0.5


@wrong("head_weights", "product")
def kept_positive(x, W_w, q_scale, Hi, Di):
    return _plain(x, W_w).relu() * q_scale * (Hi * Di) ** -0.5


@wrong("head_weights", "q_scale")
def scale_divided(x, W_w, q_scale, Hi, Di):
    return _plain(x, W_w) / q_scale * (Hi * Di) ** -0.5


@wrong("head_weights", "q_scale")
def scale_forgotten(x, W_w, q_scale, Hi, Di):
    return _plain(x, W_w) * (Hi * Di) ** -0.5


@wrong("head_weights", "q_scale")
def scale_of_the_first_head(x, W_w, q_scale, Hi, Di):
    return _plain(x, W_w) * q_scale[:, :1] * (Hi * Di) ** -0.5


@wrong("head_weights", "Hi factor")
def no_head_factor(x, W_w, q_scale, Hi, Di):
    return _plain(x, W_w) * q_scale * Di**-0.5


@wrong("head_weights", "Hi factor")
def mean_of_heads(x, W_w, q_scale, Hi, Di):
    return _plain(x, W_w) * q_scale / Hi * Di**-0.5


@wrong("head_weights", "Di factor")
def whole_dim_factor(x, W_w, q_scale, Hi, Di):
    return _plain(x, W_w) * q_scale * Hi**-0.5 / Di


@wrong("head_weights", "Hi factor")
def width_of_x_for_di(x, W_w, q_scale, Hi, Di):
    return _plain(x, W_w) * q_scale * (Hi * x.shape[1]) ** -0.5


@wrong("head_weights", "Di factor")
def no_dim_factor(x, W_w, q_scale, Hi, Di):
    return _plain(x, W_w) * q_scale * Hi**-0.5


@wrong("head_weights", "fp32 throughout")
def product_in_bf16(x, W_w, q_scale, Hi, Di):
    return (x @ W_w).float() * q_scale * (Hi * Di) ** -0.5


@wrong("head_weights", "fp32 throughout")
def product_and_factors_in_bf16(x, W_w, q_scale, Hi, Di):
    return (x @ W_w * Hi**-0.5 * Di**-0.5) * q_scale


@wrong("head_weights", "fp32 throughout")
def rounded_at_the_end(x, W_w, q_scale, Hi, Di):
    return (_plain(x, W_w) * q_scale * (Hi * Di) ** -0.5).bfloat16().float()


@wrong("head_weights", "fp32 throughout")
def rounded_once(x, W_w, q_scale, Hi, Di):
    return (_plain(x, W_w).bfloat16() * q_scale * (Hi * Di) ** -0.5).float()


# ---------------------------------------------------------------------------------------------------- counterexample

EYE = torch.eye(2)


def _row(*numbers):
    return torch.tensor([list(numbers)], dtype=torch.float32)


@wrong("counterexample", "shapes")
def no_query_axis():
    return EYE, EYE, torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.0])


@wrong("counterexample", "shapes")
def two_queries_instead_of_two_weights():
    return torch.stack((EYE, EYE)), EYE, _row(2, 1), _row(1, 2)


@wrong("counterexample", "positive weights")
def sign_turned():
    return EYE[None], EYE, _row(2, 1), _row(-2, 1)


@wrong("counterexample", "positive weights")
def a_head_switched_off():
    return EYE[None], EYE, _row(1, 0), _row(0, 1)


@wrong("counterexample", "two heads")
def one_head():
    return torch.ones(1, 1, 2), EYE, _row(1), _row(2)


@wrong("counterexample", "not a rescale")
def doubled():
    return EYE[None], EYE, _row(2, 1), _row(4, 2)


@wrong("counterexample", "another winner")
def other_scores_same_winner():
    return EYE[None], torch.tensor([[2.0, 1.0], [1.0, 0.0]]), _row(2, 1), _row(1, 2)


@wrong("counterexample", "another winner")
def both_heads_like_the_same_key():
    return torch.ones(1, 2, 2), EYE * 3 + torch.tensor([[1.0], [0.0]]), _row(9, 1), _row(1, 9)


@wrong("counterexample", "another winner")
def everything_tied():
    return torch.ones(1, 2, 2), EYE, _row(2, 1), _row(1, 2)


@wrong("counterexample", "another winner")
def all_matches_negative():
    return -EYE[None], EYE, _row(2, 1), _row(1, 2)


@wrong("counterexample", "no tie")
def a_mere_tie():
    return torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), EYE, _row(1, 2), _row(1.00001, 1)


@wrong("counterexample", "no tie")
def a_last_bit():
    return EYE[None], EYE, _row(1 + 2**-20, 1), _row(1, 1 + 2**-20)


# -------------------------------------------------------------------------------------------------- zero_probability


@wrong("zero_probability", "a probability")
def never(Hi):
    return 0.0  # "a real number is never exactly 0"


@wrong("zero_probability", "a probability")
def in_percent(Hi):
    return 100 * 2.0**-Hi


@wrong("zero_probability", "a probability")
def rounded(Hi):
    return round(2.0**-Hi, 6)


@wrong("zero_probability", "one head")
def two_signs_and_a_zero(Hi):
    return 3.0**-Hi


@wrong("zero_probability", "one head")
def one_more_head(Hi):
    return 2.0 ** -(Hi + 1)


@wrong("zero_probability", "more heads")
def one_half(Hi):
    return 0.5


@wrong("zero_probability", "more heads")
def divided_among_heads(Hi):
    return 1 / (2 * Hi)


@wrong("zero_probability", "more heads")
def at_least_one_fires(Hi):
    return 1 - 2.0**-Hi


@wrong("zero_probability", "more heads")
def one_in_heads_plus_one(Hi):
    return 1 / (Hi + 1)


@wrong("zero_probability", "exact")
def simulated(Hi):
    signs = torch.rand(200_000, Hi, generator=torch.Generator().manual_seed(0)) < 0.5
    return max(float(signs.all(dim=1).double().mean()), 1e-9)
