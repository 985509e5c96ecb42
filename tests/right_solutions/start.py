"""Notebooks 00 and 04b."""

import itertools

import torch

import dsa_ref

from . import right

right("keep_last")(lambda t, k: list(range(t + 1))[-k:])
right("keep_last")(lambda t, k: list(itertools.islice(itertools.count(max(0, t - k + 1)), min(k, t + 1))))
right("keep_last")(lambda t, k: torch.arange(t + 1)[-k:].tolist())


@right("three_lines")
def arrays_of_numpy(q_idx, k_idx, w, q, kv, k, scale, v_dim):
    indices = dsa_ref.select_topk(dsa_ref.index_scores(q_idx, k_idx, w), k)
    return indices.numpy(), dsa_ref.sparse_attention(q, kv, indices, scale, v_dim)[0].numpy()


@right("three_lines")
def best_first(q_idx, k_idx, w, q, kv, k, scale, v_dim):
    scores = dsa_ref.index_scores(q_idx, k_idx, w)
    indices = dsa_ref.select_topk(scores, k)
    kept = scores.gather(1, indices.clamp(min=0).long()).masked_fill(indices < 0, -torch.inf)
    indices = indices.gather(1, kept.argsort(dim=1, descending=True, stable=True))
    return indices, dsa_ref.sparse_attention(q, kv, indices, scale, v_dim)[0]
