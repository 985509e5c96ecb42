"""Notebook 02."""

import math
from fractions import Fraction

import numpy as np
import torch

from . import right


@right("index_scores")
def in_numpy(q_idx, k_idx, w):
    q, k, w = (x.float().numpy() for x in (q_idx, k_idx, w))
    T, S = len(q), len(k)
    scores = (np.maximum(np.tensordot(q, k, (2, 1)), 0) * w[:, :, None]).sum(axis=1)
    return np.where(np.arange(S) > np.arange(T)[:, None] + S - T, -np.inf, scores).astype(np.float32)


@right("index_scores")
def in_numpy_with_fp64_inside(q_idx, k_idx, w):
    q, k, w = (x.double().numpy() for x in (q_idx, k_idx, w))
    scores = np.einsum("ths,th->ts", np.einsum("thd,sd->ths", q, k).clip(0), w).astype(np.float32)
    scores[np.triu_indices(len(q), len(k) - len(q) + 1, len(k))] = -np.inf
    return scores


@right("index_scores")
def einsum_with_optimize(q_idx, k_idx, w):  # NumPy prepares for every new shape, in more lines than for a known one
    q, k, w = (x.double().numpy() for x in (q_idx, k_idx, w))
    scores = np.einsum("ths,th->ts", np.einsum("thd,sd->ths", q, k, optimize=True).clip(0), w).astype(np.float32)
    return np.where(np.arange(len(k)) > np.arange(len(q))[:, None] + len(k) - len(q), np.float32(-np.inf), scores)


@right("index_scores")
def matrix_products(q_idx, k_idx, w):
    (T, Hi, Di), S = q_idx.shape, len(k_idx)
    dots = (q_idx.float().reshape(T * Hi, Di) @ k_idx.float().t()).reshape(T, Hi, S).clamp(min=0)
    scores = (w[:, None] @ dots)[:, 0]
    scores[torch.arange(S) - (S - T) > torch.arange(T)[:, None]] = -math.inf
    return scores


@right("head_weights")
def weights_in_numpy(x, W_w, q_scale, Hi, Di):
    return (x.float().numpy() @ W_w.float().numpy() * q_scale.numpy() / np.sqrt(Hi * Di)).astype(np.float32)


@right("head_weights")
def one_einsum(x, W_w, q_scale, Hi, Di):
    return torch.einsum("td,dh,th->th", x.float(), W_w.float(), q_scale) / math.sqrt(Hi) / math.sqrt(Di)


@right("counterexample")
def arrays():
    return np.array([[[1.0, 0.0], [0.0, 1.0]]]), np.eye(2), np.array([[2.0, 1.0]]), np.array([[1.0, 2.0]])


@right("counterexample")
def three_heads_in_a_list_of_ints():
    eye = torch.eye(3).long()
    return [eye[None], eye, torch.tensor([[3, 1, 2]]), torch.tensor([[1, 2, 3]])]


right("zero_probability")(lambda Hi: torch.tensor(0.5) ** Hi)
right("zero_probability")(lambda Hi: Fraction(1, 2**Hi))


@right("index_scores")
def heads_by_vmap(q_idx, k_idx, w):
    scores = torch.vmap(lambda q, w: (q @ k_idx.float().T).relu() * w[:, None], in_dims=1)(q_idx.float(), w).sum(0)
    T, S = scores.shape
    return scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), -torch.inf)
