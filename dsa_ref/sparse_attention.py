"""Attention over the selected keys alone: equation 2 of the report, on MLA's shared latent rows (MQA mode).

    u[t, h] = sum over s in S_t of  softmax_s(scale · q[t, h] · kv[s]) · kv[s, :v_dim]

One latent row is key and value of every head. Work and memory grow with T · k, never with T · S: the rows are
gathered, not masked. Cost: 2 · H · (D + v_dim) FLOPs a selected pair, 278,528 in V3.2.

Source: DeepSeek-V3.2-Exp report, equation 2 and appendix A; SPEC section 3.
"""

import math

import numpy as np
import torch

from .blocks import join, pairs_at_once
from .contracts import check_sparse_attention


def sparse_attention_loops(q, kv, indices, scale, v_dim):
    """Equation 2 as loops with an online softmax, float64: one key at a time, never two passes over them.

    q [T, H, D], kv [S, D], indices [T, k] arrays -> (out [T, H, v_dim], lse [T, H]).
    m is the largest logit so far, l the sum of exp(logit - m), acc the values weighted alike.
    """
    T, H, _ = q.shape
    out, lse = np.zeros((T, H, v_dim)), np.full((T, H), -np.inf)
    for t in range(T):
        for h in range(H):
            m, l, acc = -math.inf, 0.0, np.zeros(v_dim)  # noqa: E741 (l is the field's name for it)
            for s in indices[t]:
                if s < 0:
                    continue
                logit = scale * float(np.dot(q[t, h], kv[s]))
                new_m = max(m, logit)
                rescale, weight = math.exp(m - new_m), math.exp(logit - new_m)
                l = l * rescale + weight  # noqa: E741
                acc = acc * rescale + weight * kv[s, :v_dim]
                m = new_m
            if l > 0:
                out[t, h], lse[t, h] = acc / l, m + math.log(l)
    return out, lse


def sparse_attention(q, kv, indices, scale, v_dim):
    """Attend from each query to its selected rows of kv. Differentiable in q and kv.

    q: float [T, H, D]; kv: [S, D] of the same dtype; indices: int32 [T, k], -1 where nothing is selected, distinct
    within a row; scale: float > 0; v_dim: the first v_dim columns of kv are the value.
    Returns (out [T, H, v_dim] in q.dtype, lse fp32 [T, H], natural logarithm); computed in fp32 (fp64 for fp64). A row
    with nothing selected gives 0 and -inf.

    Raises: ValueError for wrong shapes, devices, indices outside [-1, S), scale or v_dim; TypeError for wrong dtypes.
    """
    T, H, D, k = check_sparse_attention(q, kv, indices, scale, v_dim)
    dtype = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [], []
    block = max(1, pairs_at_once(q) // (k * (D + H)))
    for first in range(0, T, block):
        rows = slice(first, first + block)
        missing = indices[rows] < 0
        gathered = kv[indices[rows].clamp(min=0)].to(dtype)
        if missing.any():  # a weight of 0 would not keep a NaN of row 0 out
            gathered = gathered.masked_fill(missing[:, :, None], 0.0)
        logits = torch.einsum("thd,tkd->thk", q[rows].to(dtype), gathered) * scale
        weights, lse = masked_softmax(logits, ~missing[:, None])
        outs.append(torch.einsum("thk,tkv->thv", weights, gathered[..., :v_dim]).to(q.dtype))
        lses.append(lse)
    return join(outs, lses, q.new_empty(0, H, v_dim))


def masked_softmax(logits, mask):
    """Softmax over the last dim where mask holds, 0 elsewhere, and the log-sum-exp. An empty row: zeros and -inf.

    Written so that neither the result nor the gradient of an empty row is NaN.
    """
    logits = logits.masked_fill(~mask, -torch.inf)
    largest = logits.detach().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    exponentials = (logits - largest).exp()
    total = exponentials.sum(dim=-1, keepdim=True)
    nothing = total == 0
    safe = total.masked_fill(nothing, 1.0)
    lse = (largest + safe.log()).masked_fill(nothing, -torch.inf)
    return exponentials / safe, lse.squeeze(-1)
