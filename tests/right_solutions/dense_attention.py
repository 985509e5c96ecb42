"""Notebook 01."""

from fractions import Fraction

import numpy as np
import torch

from . import right


@right("dense_attention")
def in_numpy(q, k, v):
    q, k, v = (x.numpy() for x in (q, k, v))
    T, _, D = q.shape
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(D)
    scores = np.where(np.triu(np.ones((T, T), dtype=bool), 1), -np.inf, scores)
    exponentials = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights = exponentials / exponentials.sum(axis=2, keepdims=True)
    return np.einsum("hts,shd->thd", weights, v).astype(np.float32)


@right("dense_attention")
def a_loop_over_heads_and_a_finite_mask(q, k, v):
    """Heads may be looped over, and -1e9 is far below scores in the hundreds."""
    T, H, D = q.shape
    out = torch.empty_like(q)
    for h in range(H):
        scores = q[:, h] @ k[:, h].T * D**-0.5
        scores[torch.arange(T)[:, None] < torch.arange(T)] = -1e9
        out[:, h] = scores.softmax(dim=-1) @ v[:, h]
    return out


@right("dense_attention")
def batched_products(q, k, v):
    q, k, v = (x.permute(1, 0, 2) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)) / q.shape[2] ** 0.5
    scores = scores + torch.full(scores.shape[1:], -torch.inf).triu(1)
    return torch.bmm(scores.softmax(dim=2), v).permute(1, 0, 2)


right("attention_flops")(lambda T, H, D: sum(4 * H * D * (t + 1) for t in range(T)))
right("attention_flops")(lambda T, H, D: torch.tensor(2.0 * H * D * T * (T + 1)))
right("attention_bytes")(lambda T, H, D, n: [np.int64(2) * T * H * D * n, H * T**2 * n])
right("attention_bytes")(lambda T, H, D, n: np.array([2 * T * H * D * n, H * T * T * n]))


@right("bill_growth")
def fractions(short, long):
    f = Fraction(long, short)
    return {"whole text": f * f, "next token": f, "cache": f, "score matrix": f**2}


@right("bill_growth")
def fp32(short, long):
    f = np.float32(long) / np.float32(short)
    return dict.fromkeys(("next token", "cache"), f) | dict.fromkeys(("whole text", "score matrix"), f * f)


@right("dense_attention")
def heads_by_vmap(q, k, v):
    def head(q, k, v):
        scores = q @ k.T / q.shape[1] ** 0.5
        return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf).softmax(1) @ v

    return torch.vmap(head, in_dims=1, out_dims=1)(q, k, v)


right("attention_bytes")(lambda T, H, D, n: (torch.tensor(2 * T) * H * D * n, torch.tensor(T) * T * H * n))
