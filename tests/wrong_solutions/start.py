"""Notebook 00."""

import torch

import dsa_ref

from . import wrong


@wrong("three_lines", "selection")
def topk_of_all_keys(q_idx, k_idx, w, q, kv, k, scale, v_dim):
    scores = dsa_ref.index_scores(q_idx, k_idx, w)
    indices = scores.topk(min(k, scores.shape[1])).indices.to(torch.int32)
    return indices, dsa_ref.sparse_attention(q, kv, indices, scale, v_dim)[0]


@wrong("three_lines", "negative weights")
def magnitudes_of_the_weights(q_idx, k_idx, w, q, kv, k, scale, v_dim):
    indices = dsa_ref.select_topk(dsa_ref.index_scores(q_idx, k_idx, w.abs()), k)
    return indices, dsa_ref.sparse_attention(q, kv, indices, scale, v_dim)[0]


@wrong("three_lines", "value")
def the_whole_row_as_value(q_idx, k_idx, w, q, kv, k, scale, v_dim):
    indices = dsa_ref.select_topk(dsa_ref.index_scores(q_idx, k_idx, w), k)
    return indices, dsa_ref.sparse_attention(q, kv, indices, scale, kv.shape[1])[0]


@wrong("three_lines", "value")
def everything_attended(q_idx, k_idx, w, q, kv, k, scale, v_dim):
    indices = dsa_ref.select_topk(dsa_ref.index_scores(q_idx, k_idx, w), k)
    return indices, dsa_ref.dense_attention(q, kv, scale, v_dim)[0]


@wrong("three_lines", "ties")
def of_equal_scores_the_later_key(q_idx, k_idx, w, q, kv, k, scale, v_dim):
    scores = dsa_ref.index_scores(q_idx, k_idx, w)  # the future is -inf here, so that only ties are wrong
    S = scores.shape[1]
    best, place = scores.flip(1).sort(dim=1, descending=True, stable=True)
    indices = (S - 1 - place).masked_fill(best == -torch.inf, -1)[:, :k]
    indices = torch.nn.functional.pad(indices, (0, k - indices.shape[1]), value=-1).to(torch.int32)
    return indices, dsa_ref.sparse_attention(q, kv, indices, scale, v_dim)[0]


@wrong("three_lines", "selection")
def weights_not_used(q_idx, k_idx, w, q, kv, k, scale, v_dim):
    indices = dsa_ref.select_topk(dsa_ref.index_scores(q_idx, k_idx, torch.ones_like(w)), k)
    return indices, dsa_ref.sparse_attention(q, kv, indices, scale, v_dim)[0]


@wrong("three_lines", "selection")
def nothing_returned(q_idx, k_idx, w, q, kv, k, scale, v_dim):
    dsa_ref.select_topk(dsa_ref.index_scores(q_idx, k_idx, w), k)


@wrong("three_lines", "selection")
def out_and_lse_as_one(q_idx, k_idx, w, q, kv, k, scale, v_dim):
    indices = dsa_ref.select_topk(dsa_ref.index_scores(q_idx, k_idx, w), k)
    return indices, dsa_ref.sparse_attention(q, kv, indices, scale, v_dim)


@wrong("three_lines", "value")
def scale_forgotten(q_idx, k_idx, w, q, kv, k, scale, v_dim):
    indices = dsa_ref.select_topk(dsa_ref.index_scores(q_idx, k_idx, w), k)
    return indices, dsa_ref.sparse_attention(q, kv, indices, 1.0, v_dim)[0]
