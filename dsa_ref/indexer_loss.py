"""Teach the indexer to point where attention looks: equations 3 and 4 of the report.

    p[t]  = mean over heads of the attention probabilities of row t (sums to 1)
    loss  = mean over rows t of  KL(p[t] || softmax(I[t])) = sum_s p[t, s] · (ln p[t, s] - ln softmax(I[t])[s])

In the dense warm-up (equation 3) both sides live on every visible key, in the sparse stage (equation 4) on the selected
keys S_t alone. The gradient with respect to I is softmax(I) - p, so I must not carry a stray factor: its scale is the
softmax temperature. The target is a constant: q and kv are detached here. The indexer's own *inputs* are detached in
`nn.layer`, so this loss moves nothing but the indexer.

The report does not say how rows are averaged; ours is the mean over rows with at least one key.

Source: DeepSeek-V3.2-Exp report, equations 3 and 4; SPEC section 5.
"""

import numpy as np
import torch

from .blocks import at_least_one, pairs_at_once, row_blocks, visible
from .contracts import (
    FLOATS,
    check_attention,
    check_dtype,
    check_index_scores,
    check_shapes,
    check_sparse_attention,
)
from .dense_attention import dense_attention_loops
from .index_scores import index_scores_loops
from .sparse_attention import masked_softmax


def indexer_loss_loops(q_idx, k_idx, w, q, kv, scale, indices=None, start=None, end=None):
    """Both equations as loops over arrays, float64 -> the loss, a float."""
    T, H, _ = q.shape
    scores = index_scores_loops(q_idx, k_idx, w, None, start, end)
    total, rows = 0.0, 0
    for t in range(T):
        keys = [s for s in range(kv.shape[0]) if scores[t, s] > -np.inf]
        if indices is not None:
            keys = [s for s in keys if s in indices[t]]
        if not keys:
            continue
        p = np.zeros(len(keys))
        for h in range(H):
            _, lse = dense_attention_loops(q[t : t + 1, h : h + 1], kv[keys], scale, 1, [0], [len(keys)])
            p += [np.exp(scale * np.dot(q[t, h], kv[s]) - lse[0, 0]) / H for s in keys]
        log_normaliser = np.log(np.sum(np.exp(scores[t, keys] - scores[t, keys].max()))) + scores[t, keys].max()
        for i, s in enumerate(keys):
            if p[i] > 0:
                total += p[i] * (np.log(p[i]) - (scores[t, s] - log_normaliser))
        rows += 1
    return total / max(rows, 1)


def indexer_loss(q_idx, k_idx, w, q, kv, scale, indices=None, start=None, end=None):
    """The indexer's KL loss, a scalar. Differentiable in q_idx, k_idx and w alone.

    q_idx [T, Hi, Di], k_idx [S, Di], w [T, Hi]: the indexer's side, as for `index_scores`, unquantised.
    q [T, H, D], kv [S, D], scale: attention's side, as for `sparse_attention`.
    indices: None for the warm-up (equation 3), int32 [T, k] for the sparse stage (equation 4).
    start, end: int32 [T], default causal; a selected key outside a row's range is left out of that row. With no
    row that has a key the loss is 0. Computed in fp32, also for fp64 inputs.

    Raises: ValueError for wrong shapes, devices, ranges or indices; TypeError for wrong dtypes.
    """
    check_shapes(q_idx=(q_idx, "T Hi Di"), k_idx=(k_idx, "S Di"), q=(q, "T H D"), kv=(kv, "S D"))
    T, S, start, end = check_index_scores(q_idx, k_idx, w, None, start, end)
    check_dtype("q_idx", q_idx, FLOATS)  # FP8 values have a scale, for which there is no argument
    check_attention(q, kv, scale, 1)
    q, kv = q.detach().float(), kv.detach().float()
    Hi, H = q_idx.shape[1], q.shape[1]
    total = q_idx.new_zeros((), dtype=torch.float32)
    if indices is None:
        for rows, keys in row_blocks(start, end, per_pair=Hi + H):
            keys = at_least_one(keys, S)
            mask = visible(start, end, rows, keys)
            dots = torch.einsum("thd,sd->ths", q_idx[rows].float(), k_idx[keys].float())
            logits = torch.einsum("thd,sd->ths", q[rows], kv[keys]) * scale
            total = total + _kl(dots, w[rows], logits, mask)
        alive = end > start
    else:
        D, k = check_sparse_attention(q, kv, indices, scale, 1)[2:]
        inside = (indices >= start[:, None]) & (indices < end[:, None])
        block = max(1, pairs_at_once(q) // (k * (D + k_idx.shape[1] + Hi + H)))
        for first in range(0, T, block):
            rows = slice(first, first + block)
            picked = indices[rows].clamp(min=0)
            dots = torch.einsum("thd,tkd->thk", q_idx[rows].float(), k_idx[picked].float())
            logits = torch.einsum("thd,tkd->thk", q[rows], kv[picked]) * scale
            total = total + _kl(dots, w[rows], logits, inside[rows])
        alive = inside.any(dim=1)
    return total / alive.sum().clamp(min=1)


def _kl(dots, w, logits, mask):
    """Sum over rows of KL(target || indexer), from q_idx·k_idx [t, Hi, s] and attention logits [t, H, s]."""
    p = masked_softmax(logits, mask[:, None])[0].mean(dim=1)
    scores = torch.einsum("ths,th->ts", dots.relu(), w.float()).masked_fill(~mask, -torch.inf)
    _, lse = masked_softmax(scores, mask)
    log_guess = torch.where(mask, scores - torch.where(lse == -torch.inf, 0.0, lse)[:, None], 0.0)
    return (torch.xlogy(p, p) - p * log_guess).sum()
