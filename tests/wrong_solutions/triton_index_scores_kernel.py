"""Notebook 08's largest kernel, the indexer's scores. What most of them do right is said once, in helpers."""

from . import wrong
from ._triton import INTERPRETED, jit, tl


@jit
def _keys(k_ptr, s, S, Di, k_row, DP: tl.constexpr):
    d = tl.arange(0, DP)
    return tl.load(k_ptr + s[:, None] * k_row + d[None, :], (s < S)[:, None] & (d < Di)[None, :], 0.0)


@jit
def _heads(q_ptr, t, Hi, Di, q_row, q_head, HP: tl.constexpr, DP: tl.constexpr):
    h, d = tl.arange(0, HP), tl.arange(0, DP)
    mask = (h < Hi)[:, None] & (d < Di)[None, :]
    return tl.trans(tl.load(q_ptr + t * q_row + h[:, None] * q_head + d[None, :], mask, 0.0))


@jit
def _weights(w_ptr, t, Hi, w_row, HP: tl.constexpr):
    h = tl.arange(0, HP)
    return tl.load(w_ptr + t * w_row + h, h < Hi, 0.0)[None, :]


@jit
def _store(out_ptr, scores, t, s, last, S, out_row):
    tl.store(out_ptr + t * out_row + s, tl.where(s <= last, scores, float("-inf")), s < S)


@wrong("index_scores_kernel", "dot products")
@jit
def best_head_only(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    k = _keys(k_ptr, s, S, Di, k_row, DP)
    q = _heads(q_ptr, t, Hi, Di, q_row, q_head, HP, DP)
    dots = tl.dot(k, q, input_precision="ieee")
    scores = tl.max(tl.maximum(dots, 0.0) * _weights(w_ptr, t, Hi, w_row, HP), axis=1)
    _store(out_ptr, scores, t, s, S - T + t, S, out_row)


@wrong("index_scores_kernel", "dot products")
@jit
def heads_averaged(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    k = _keys(k_ptr, s, S, Di, k_row, DP)
    q = _heads(q_ptr, t, Hi, Di, q_row, q_head, HP, DP)
    dots = tl.dot(k, q, input_precision="ieee")
    scores = tl.sum(tl.maximum(dots, 0.0) * _weights(w_ptr, t, Hi, w_row, HP), axis=1) / Hi
    _store(out_ptr, scores, t, s, S - T + t, S, out_row)


@wrong("index_scores_kernel", "every tile")
@jit
def first_tile_for_everyone(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    k = _keys(k_ptr, tl.arange(0, BK), S, Di, k_row, DP)
    q = _heads(q_ptr, t, Hi, Di, q_row, q_head, HP, DP)
    dots = tl.dot(k, q, input_precision="ieee")
    scores = tl.sum(tl.maximum(dots, 0.0) * _weights(w_ptr, t, Hi, w_row, HP), axis=1)
    _store(out_ptr, scores, t, s, S - T + t, S, out_row)


@wrong("index_scores_kernel", "own tile only")
@jit
def every_program_does_all_queries(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1) * BK + tl.arange(0, BK)
    k = _keys(k_ptr, s, S, Di, k_row, DP)
    for t in range(T):
        q = _heads(q_ptr, t, Hi, Di, q_row, q_head, HP, DP)
        dots = tl.dot(k, q, input_precision="ieee")
        scores = tl.sum(tl.maximum(dots, 0.0) * _weights(w_ptr, t, Hi, w_row, HP), axis=1)
        _store(out_ptr, scores, t, s, S - T + t, S, out_row)


@wrong("index_scores_kernel", "weights")
@jit
def weights_of_row_0(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    k = _keys(k_ptr, s, S, Di, k_row, DP)
    q = _heads(q_ptr, t, Hi, Di, q_row, q_head, HP, DP)
    dots = tl.dot(k, q, input_precision="ieee")
    scores = tl.sum(tl.maximum(dots, 0.0) * _weights(w_ptr, 0, Hi, w_row, HP), axis=1)
    _store(out_ptr, scores, t, s, S - T + t, S, out_row)


@wrong("index_scores_kernel", "weights")
@jit
def no_weights(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    k = _keys(k_ptr, s, S, Di, k_row, DP)
    q = _heads(q_ptr, t, Hi, Di, q_row, q_head, HP, DP)
    dots = tl.dot(k, q, input_precision="ieee")
    _store(out_ptr, tl.sum(tl.maximum(dots, 0.0), axis=1), t, s, S - T + t, S, out_row)


@wrong("index_scores_kernel", "relu")
@jit
def no_relu(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    k = _keys(k_ptr, s, S, Di, k_row, DP)
    q = _heads(q_ptr, t, Hi, Di, q_row, q_head, HP, DP)
    dots = tl.dot(k, q, input_precision="ieee")
    scores = tl.sum(dots * _weights(w_ptr, t, Hi, w_row, HP), axis=1)
    _store(out_ptr, scores, t, s, S - T + t, S, out_row)


@wrong("index_scores_kernel", "relu per head")
@jit
def relu_after_the_sum(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    k = _keys(k_ptr, s, S, Di, k_row, DP)
    q = _heads(q_ptr, t, Hi, Di, q_row, q_head, HP, DP)
    dots = tl.dot(k, q, input_precision="ieee")
    scores = tl.maximum(tl.sum(dots * _weights(w_ptr, t, Hi, w_row, HP), axis=1), 0.0)
    _store(out_ptr, scores, t, s, S - T + t, S, out_row)


@wrong("index_scores_kernel", "relu per head")
@jit
def relu_after_the_weight(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    k = _keys(k_ptr, s, S, Di, k_row, DP)
    q = _heads(q_ptr, t, Hi, Di, q_row, q_head, HP, DP)
    dots = tl.dot(k, q, input_precision="ieee")
    scores = tl.sum(tl.maximum(dots * _weights(w_ptr, t, Hi, w_row, HP), 0.0), axis=1)
    _store(out_ptr, scores, t, s, S - T + t, S, out_row)


@wrong("index_scores_kernel", "future hidden")
@jit
def no_causal_mask(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    k = _keys(k_ptr, s, S, Di, k_row, DP)
    q = _heads(q_ptr, t, Hi, Di, q_row, q_head, HP, DP)
    dots = tl.dot(k, q, input_precision="ieee")
    scores = tl.sum(tl.maximum(dots, 0.0) * _weights(w_ptr, t, Hi, w_row, HP), axis=1)
    _store(out_ptr, scores, t, s, S, S, out_row)


@wrong("index_scores_kernel", "future hidden")
@jit
def own_key_hidden(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    k = _keys(k_ptr, s, S, Di, k_row, DP)
    q = _heads(q_ptr, t, Hi, Di, q_row, q_head, HP, DP)
    dots = tl.dot(k, q, input_precision="ieee")
    scores = tl.sum(tl.maximum(dots, 0.0) * _weights(w_ptr, t, Hi, w_row, HP), axis=1)
    _store(out_ptr, scores, t, s, S - T + t - 1, S, out_row)


@wrong("index_scores_kernel", "future hidden")
@jit
def one_key_too_many(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    k = _keys(k_ptr, s, S, Di, k_row, DP)
    q = _heads(q_ptr, t, Hi, Di, q_row, q_head, HP, DP)
    dots = tl.dot(k, q, input_precision="ieee")
    scores = tl.sum(tl.maximum(dots, 0.0) * _weights(w_ptr, t, Hi, w_row, HP), axis=1)
    _store(out_ptr, scores, t, s, S - T + t + 1, S, out_row)


@wrong("index_scores_kernel", "future hidden")
@jit
def tiles_of_the_future_never_written(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    if tl.program_id(1) * BK <= S - T + t:
        k = _keys(k_ptr, s, S, Di, k_row, DP)
        q = _heads(q_ptr, t, Hi, Di, q_row, q_head, HP, DP)
        dots = tl.dot(k, q, input_precision="ieee")
        scores = tl.sum(tl.maximum(dots, 0.0) * _weights(w_ptr, t, Hi, w_row, HP), axis=1)
        _store(out_ptr, scores, t, s, S - T + t, S, out_row)


@wrong("index_scores_kernel", "queries last")
@jit
def first_queries_instead_of_last(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    k = _keys(k_ptr, s, S, Di, k_row, DP)
    q = _heads(q_ptr, t, Hi, Di, q_row, q_head, HP, DP)
    dots = tl.dot(k, q, input_precision="ieee")
    scores = tl.sum(tl.maximum(dots, 0.0) * _weights(w_ptr, t, Hi, w_row, HP), axis=1)
    _store(out_ptr, scores, t, s, t, S, out_row)


@wrong("index_scores_kernel", "strides")
@jit
def queries_taken_for_dense(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    k = _keys(k_ptr, s, S, Di, k_row, DP)
    q = _heads(q_ptr, t, Hi, Di, Hi * Di, Di, HP, DP)
    dots = tl.dot(k, q, input_precision="ieee")
    scores = tl.sum(tl.maximum(dots, 0.0) * _weights(w_ptr, t, Hi, w_row, HP), axis=1)
    _store(out_ptr, scores, t, s, S - T + t, S, out_row)


@wrong("index_scores_kernel", "strides")
@jit
def keys_taken_for_dense(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    k = _keys(k_ptr, s, S, Di, Di, DP)
    q = _heads(q_ptr, t, Hi, Di, q_row, q_head, HP, DP)
    dots = tl.dot(k, q, input_precision="ieee")
    scores = tl.sum(tl.maximum(dots, 0.0) * _weights(w_ptr, t, Hi, w_row, HP), axis=1)
    _store(out_ptr, scores, t, s, S - T + t, S, out_row)


@wrong("index_scores_kernel", "strides")
@jit
def weights_taken_for_dense(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    k = _keys(k_ptr, s, S, Di, k_row, DP)
    q = _heads(q_ptr, t, Hi, Di, q_row, q_head, HP, DP)
    dots = tl.dot(k, q, input_precision="ieee")
    scores = tl.sum(tl.maximum(dots, 0.0) * _weights(w_ptr, t, Hi, Hi, HP), axis=1)
    _store(out_ptr, scores, t, s, S - T + t, S, out_row)


@wrong("index_scores_kernel", "bounds")
@jit
def output_taken_for_dense(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    k = _keys(k_ptr, s, S, Di, k_row, DP)
    q = _heads(q_ptr, t, Hi, Di, q_row, q_head, HP, DP)
    dots = tl.dot(k, q, input_precision="ieee")
    scores = tl.sum(tl.maximum(dots, 0.0) * _weights(w_ptr, t, Hi, w_row, HP), axis=1)
    _store(out_ptr, scores, t, s, S - T + t, S, S)


@wrong("index_scores_kernel", "tails")
@jit
def dims_not_masked(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    k = _keys(k_ptr, s, S, DP, k_row, DP)
    q = _heads(q_ptr, t, Hi, DP, q_row, q_head, HP, DP)
    dots = tl.dot(k, q, input_precision="ieee")
    scores = tl.sum(tl.maximum(dots, 0.0) * _weights(w_ptr, t, Hi, w_row, HP), axis=1)
    _store(out_ptr, scores, t, s, S - T + t, S, out_row)


@wrong("index_scores_kernel", "tails")
@jit
def heads_not_masked(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    k = _keys(k_ptr, s, S, Di, k_row, DP)
    q = _heads(q_ptr, t, HP, Di, q_row, q_head, HP, DP)
    dots = tl.dot(k, q, input_precision="ieee")
    scores = tl.sum(tl.maximum(dots, 0.0) * _weights(w_ptr, t, HP, w_row, HP), axis=1)
    _store(out_ptr, scores, t, s, S - T + t, S, out_row)


@wrong("index_scores_kernel", "bounds")
@jit
def store_not_masked(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    k = _keys(k_ptr, s, S, Di, k_row, DP)
    q = _heads(q_ptr, t, Hi, Di, q_row, q_head, HP, DP)
    dots = tl.dot(k, q, input_precision="ieee")
    scores = tl.sum(tl.maximum(dots, 0.0) * _weights(w_ptr, t, Hi, w_row, HP), axis=1)
    _store(out_ptr, scores, t, s, S - T + t, S + BK, out_row)


@wrong("index_scores_kernel", "larger tiles")
@jit
def tiles_of_16(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * 16 + tl.arange(0, 16)
    k = _keys(k_ptr, s, S, Di, k_row, 16)
    q = _heads(q_ptr, t, Hi, Di, q_row, q_head, 16, 16)
    dots = tl.dot(k, q, input_precision="ieee")
    scores = tl.sum(tl.maximum(dots, 0.0) * _weights(w_ptr, t, Hi, w_row, 16), axis=1)
    _store(out_ptr, scores, t, s, S - T + t, S, out_row)


@wrong("index_scores_kernel", "full precision")
@jit
def rounded_to_tf32(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    k = _keys(k_ptr, s, S, Di, k_row, DP)
    q = _heads(q_ptr, t, Hi, Di, q_row, q_head, HP, DP)
    dots = tl.dot(k, q)
    scores = tl.sum(tl.maximum(dots, 0.0) * _weights(w_ptr, t, Hi, w_row, HP), axis=1)
    _store(out_ptr, scores, t, s, S - T + t, S, out_row)


@wrong("index_scores_kernel", "full precision")
@jit
def rounded_to_fp16(
    q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
    HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    k = _keys(k_ptr, s, S, Di, k_row, DP)
    q = _heads(q_ptr, t, Hi, Di, q_row, q_head, HP, DP)
    dots = tl.dot(k.to(tl.float16), q.to(tl.float16), input_precision="ieee")
    scores = tl.sum(tl.maximum(dots, 0.0) * _weights(w_ptr, t, Hi, w_row, HP), axis=1)
    _store(out_ptr, scores, t, s, S - T + t, S, out_row)


if INTERPRETED:  # a read that no result shows is seen by the interpreter alone

    @wrong("index_scores_kernel", "bounds")
    @jit
    def keys_not_masked(
        q_ptr, k_ptr, w_ptr, out_ptr, T, S, Hi, Di, q_row, q_head, k_row, w_row, out_row,
        HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        t, s = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
        k = _keys(k_ptr, s, S + BK, Di, k_row, DP)
        q = _heads(q_ptr, t, Hi, Di, q_row, q_head, HP, DP)
        dots = tl.dot(k, q, input_precision="ieee")
        scores = tl.sum(tl.maximum(dots, 0.0) * _weights(w_ptr, t, Hi, w_row, HP), axis=1)
        _store(out_ptr, scores, t, s, S - T + t, S, out_row)
