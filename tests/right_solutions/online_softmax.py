"""Notebook 05."""

import math

import numpy as np
import torch

from . import right


@right("log_sum_exp")
def one_number_at_a_time(x):
    result = np.empty(x.shape[:-1])
    for place in np.ndindex(*x.shape[:-1]):
        m = max(x[place], default=-math.inf)
        result[place] = m if m == -math.inf else m + math.log(sum(math.exp(logit - m) for logit in x[place]))
    return result


@right("log_sum_exp")
def numpys_own(x):
    return np.logaddexp.reduce(x, axis=-1, initial=-np.inf)


@right("online_update")
def one_key_at_a_time(m, l, acc, logits, values):  # noqa: E741
    m, l, acc = m.copy(), l.copy(), acc.copy()  # noqa: E741
    for h, j in np.ndindex(*logits.shape):
        if logits[h, j] > -np.inf:
            new_m = max(m[h], logits[h, j])
            rescale, p = math.exp(m[h] - new_m), math.exp(logits[h, j] - new_m)
            l[h] = l[h] * rescale + p
            acc[h] = acc[h] * rescale + p * values[j]
            m[h] = new_m
    return m, l, acc


@right("online_update")
def in_torch(m, l, acc, logits, values):  # noqa: E741
    m, l, acc, logits, values = (torch.from_numpy(x) for x in (m, l, acc, logits, values))  # noqa: E741
    new_m = torch.maximum(m, logits.amax(dim=1))
    finite_m = new_m.masked_fill(new_m == -torch.inf, 0.0)
    rescale, p = (m - finite_m).exp(), (logits - finite_m[:, None]).exp()
    return new_m, l * rescale + p.sum(dim=1), acc * rescale[:, None] + p @ values


@right("block_attention")
def padding_dropped_inside_the_loop(q, kv, indices, scale, v_dim, block):
    H = len(q)
    m, l, acc = np.full(H, -np.inf), np.zeros(H), np.zeros((H, v_dim))  # noqa: E741
    for j in range(math.ceil(len(indices) / block)):
        chosen = indices[j * block : (j + 1) * block]
        rows = kv[chosen[chosen != -1]]
        if len(rows):
            logits = scale * (q @ rows.T)
            new_m = np.maximum(m, logits.max(axis=1))
            rescale, p = np.exp(m - new_m), np.exp(logits - new_m[:, None])
            l = rescale * l + p.sum(axis=1)  # noqa: E741
            acc, m = rescale[:, None] * acc + p @ rows[:, :v_dim], new_m
    return (acc / l[:, None], m + np.log(l)) if l.any() else (acc, m)


@right("block_attention")
def a_key_a_step_whatever_the_block(q, kv, indices, scale, v_dim, block):
    H = len(q)
    m, l, acc = np.full(H, -np.inf), np.zeros(H), np.zeros((H, v_dim))  # noqa: E741
    for s in indices.tolist():
        if s >= 0:
            logits = q * scale @ kv[s]
            new_m = np.maximum(m, logits)
            rescale, p = np.exp(m - new_m), np.exp(logits - new_m)
            l, acc, m = l * rescale + p, acc * rescale[:, None] + p[:, None] * kv[s, :v_dim], new_m  # noqa: E741
    with np.errstate(divide="ignore"):
        return acc / np.maximum(l, 1e-300)[:, None], m + np.log(l)


@right("merge_parts")
def by_logaddexp(out_a, lse_a, out_b, lse_b):
    lse = np.logaddexp(lse_a, lse_b)
    finite = np.where(lse == -np.inf, 0.0, lse)
    return out_a * np.exp(lse_a - finite)[:, None] + out_b * np.exp(lse_b - finite)[:, None], lse


@right("merge_parts")
def one_head_at_a_time(out_a, lse_a, out_b, lse_b):
    out, lse = np.zeros_like(out_a), np.full_like(lse_a, -np.inf)
    for h, (a, b) in enumerate(zip(lse_a, lse_b, strict=True)):
        m = max(a, b)
        if m > -np.inf:
            lse[h] = m + math.log(math.exp(a - m) + math.exp(b - m))
            out[h] = math.exp(a - lse[h]) * out_a[h] + math.exp(b - lse[h]) * out_b[h]
    return out, lse


@right("block_attention")
def row_0_looked_up_for_padding(q, kv, indices, scale, v_dim, block):
    H = len(q)
    out, lse = np.zeros((H, v_dim)), np.full(H, -np.inf)
    for first in range(0, len(indices), block):
        s = indices[first : first + block]
        rows = kv[np.maximum(s, 0)]
        logits = np.where(s >= 0, q @ rows.T * scale, -np.inf)
        new = np.logaddexp(lse, np.logaddexp.reduce(logits, axis=1))
        shift = np.where(new == -np.inf, 0.0, new)[:, None]
        out = out * np.exp(lse[:, None] - shift) + np.exp(logits - shift) @ rows[:, :v_dim]
        lse = new
    return out, lse
