"""Notebook 04."""

from fractions import Fraction

import numpy as np
import torch

from . import right


@right("gather_rows")
def in_numpy(kv, indices):
    kv, indices = kv.numpy(), indices.numpy()
    there = indices >= 0
    return np.where(there[..., None], kv[np.maximum(indices, 0)], np.float32(0)), there


@right("gather_rows")
def a_row_of_zeros_behind(kv, indices):
    return [torch.cat((kv, torch.zeros(1, kv.shape[1])))[indices.long()], indices != -1]


@right("gathered_attention")
def one_query_at_a_time_in_numpy(q, kv, indices, scale, v_dim):
    q, kv, indices = q.numpy(), kv.numpy(), indices.numpy()
    out, lse = np.zeros((*q.shape[:2], v_dim), np.float32), np.full(q.shape[:2], -np.inf, np.float32)
    for t, row in enumerate(indices):
        rows = kv[row[row >= 0]]
        if len(rows):
            scores = q[t] @ rows.T * scale
            m = scores.max(axis=1, keepdims=True)
            p = np.exp(scores - m)
            out[t] = p / p.sum(axis=1, keepdims=True) @ rows[:, :v_dim]
            lse[t] = m[:, 0] + np.log(p.sum(axis=1))
    return out, lse


@right("gathered_attention")
def one_head_at_a_time_in_fp64(q, kv, indices, scale, v_dim):
    q, kv = q.numpy(), kv.numpy().astype(np.float64)
    out, lse = np.zeros((*q.shape[:2], v_dim), np.float32), np.full(q.shape[:2], -np.inf, np.float32)
    for t, row in enumerate(indices.tolist()):
        keys = [s for s in row if s >= 0]
        for h in range(q.shape[1]):
            if keys:
                scores = np.array([kv[s] @ q[t, h] * scale for s in keys])
                p = np.exp(scores - scores.max())
                out[t, h] = sum(weight * kv[s, :v_dim] for weight, s in zip(p, keys, strict=True)) / p.sum()
                lse[t, h] = scores.max() + np.log(p.sum())
    return out, lse


@right("gathered_attention")
def one_query_at_a_time_without_padding(q, kv, indices, scale, v_dim):
    out, lse = q.new_zeros(*q.shape[:2], v_dim), q.new_full(q.shape[:2], -torch.inf)
    for t, row in enumerate(indices):
        rows = kv[row[row >= 0].long()]
        if len(rows):
            scores = q[t] @ rows.T * scale
            out[t], lse[t] = scores.softmax(1) @ rows[:, :v_dim], scores.logsumexp(1)
    return out, lse


@right("gathered_attention")
def heads_into_buffers(q, kv, indices, scale, v_dim):
    """np.empty for the results, which is counted, and filled whole."""
    there = (indices >= 0).numpy()
    rows = np.where(there[..., None], kv.numpy()[indices.clamp(min=0).numpy()], np.float32(0))
    out, lse = np.empty((*q.shape[:2], v_dim), np.float32), np.empty(q.shape[:2], np.float32)
    for h in range(q.shape[1]):
        scores = np.where(there, np.einsum("td,tkd->tk", q[:, h].numpy(), rows) * scale, -np.inf)
        largest = np.where(there.any(axis=1), scores.max(axis=1), 0.0)
        p = np.exp(scores - largest[:, None])
        total = p.sum(axis=1)
        out[:, h] = np.einsum("tk,tkv->tv", p, rows[..., :v_dim]) / np.maximum(total, 1e-30)[:, None]
        with np.errstate(divide="ignore"):
            lse[:, h] = largest + np.log(total)
    return out, lse


@right("gathered_attention")
def other_names_of_the_parameters(queries, cache, chosen, factor, width):
    rows = torch.cat((cache, torch.zeros(1, cache.shape[1])))[chosen.long()]
    scores = queries @ rows.transpose(1, 2) * factor
    scores = torch.where((chosen >= 0)[:, None], scores, torch.tensor(-torch.inf))
    return (scores.softmax(dim=2).nan_to_num() @ rows)[..., :width], scores.logsumexp(dim=2)


right("attended_pairs")(lambda T, S, k: np.minimum(k, np.arange(S - T + 1, S + 1, dtype=np.int64)).sum())
right("attended_pairs")(lambda T, S, k: torch.arange(S - T + 1, S + 1).clamp(max=k).sum())
right("pays_from")(lambda i, a, k: k / (1 - i / a) if i < a else float("inf"))
right("pays_from")(lambda i, a, k: Fraction(a * k, a - i) if i < a else np.inf)
