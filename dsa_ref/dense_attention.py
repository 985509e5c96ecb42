"""The dense oracle: attention over every visible key, in MQA mode, and MLA's decompressed MHA mode.

Sparse attention with k >= S must equal `dense_attention`; the masked `mha_attention` must equal the sparse MQA path.
Both cost O(T · S). MHA mode needs 2 · H · (192 + 128) FLOPs a pair in V3.2, less than a third of MQA mode's, but one
key and one value for every head and token.

Source: SPEC section 3; DeepSeek-V2 report (MLA), section 2.1.
"""

import numpy as np
import torch

from .blocks import at_least_one, join, row_blocks, visible
from .contracts import FLOATS, check_attention, check_dtype, check_indices, check_scale, check_shapes, row_ranges
from .sparse_attention import masked_softmax


def dense_attention_loops(q, kv, scale, v_dim, start=None, end=None):
    """Attention over each row's range as loops over arrays, float64 -> (out [T, H, v_dim], lse [T, H])."""
    T, H, _ = q.shape
    S = kv.shape[0]
    out, lse = np.zeros((T, H, v_dim)), np.full((T, H), -np.inf)
    for t in range(T):
        first = 0 if start is None else start[t]
        last = S - T + t + 1 if end is None else end[t]
        for h in range(H):
            logits = np.array([scale * float(np.dot(q[t, h], kv[s])) for s in range(first, last)])
            if logits.size:
                weights = np.exp(logits - logits.max())
                out[t, h] = weights @ kv[first:last, :v_dim] / weights.sum()
                lse[t, h] = logits.max() + np.log(weights.sum())
    return out, lse


def dense_attention(q, kv, scale, v_dim, start=None, end=None):
    """Attend from each query to its whole range. As `sparse_attention`, with ranges in place of indices.

    q: float [T, H, D]; kv: [S, D] of that dtype; start, end: int32 [T], default causal with the queries last.
    Returns (out [T, H, v_dim] in q.dtype, lse [T, H]); an empty range gives 0 and -inf. Differentiable.

    Raises: ValueError for wrong shapes, devices, ranges, scale or v_dim; TypeError for wrong dtypes.
    """
    sizes = check_shapes(q=(q, "T H D"), kv=(kv, "S D"))
    check_attention(q, kv, scale, v_dim)
    start, end = row_ranges(sizes["T"], sizes["S"], q.device, start, end)
    dtype = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [], []
    for rows, keys in row_blocks(start, end, per_pair=sizes["H"]):
        keys = at_least_one(keys, sizes["S"])
        seen, mask = kv[keys].to(dtype), visible(start, end, rows, keys)
        logits = torch.einsum("thd,sd->ths", q[rows].to(dtype), seen) * scale
        weights, lse = masked_softmax(logits, mask[:, None])
        outs.append(torch.einsum("ths,sv->thv", weights, seen[:, :v_dim]).to(q.dtype))
        lses.append(lse)
    return join(outs, lses, q.new_empty(0, sizes["H"], v_dim))


def mha_attention(q, k, v, scale, indices, start=None, end=None):
    """MHA mode with the selection as a mask: per-head keys and values, every pair computed, few kept.

    q: float [T, H, Dq]; k: [S, H, Dq]; v: [S, H, Dv]; indices: int32 [T, k] as for `sparse_attention`, or None for all
    visible keys; a row
    sees the selected keys that also lie in its range.
    Returns (out [T, H, Dv] in q.dtype, lse [T, H]). Raises as `dense_attention` does.
    """
    arguments = {"q": (q, "T H Dq"), "k": (k, "S H Dq"), "v": (v, "S H Dv")}
    if indices is not None:
        arguments["indices"] = (indices, "T k")
    sizes = check_shapes(**arguments)
    for name, tensor in (("k", k), ("v", v)):
        check_dtype(name, tensor, (q.dtype,))
    check_dtype("q", q, FLOATS)
    check_scale(scale)
    if indices is not None:
        check_indices(indices, sizes["S"])
    start, end = row_ranges(sizes["T"], sizes["S"], q.device, start, end)
    dtype = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [], []
    for rows, keys in row_blocks(start, end, per_pair=sizes["H"]):
        keys = at_least_one(keys, sizes["S"])
        mask = visible(start, end, rows, keys)
        if indices is not None:
            mask &= _selected(indices[rows], sizes["S"])[:, keys]
        logits = torch.einsum("thd,shd->ths", q[rows].to(dtype), k[keys].to(dtype)) * scale
        weights, lse = masked_softmax(logits, mask[:, None])
        outs.append(torch.einsum("ths,shv->thv", weights, v[keys].to(dtype)).to(q.dtype))
        lses.append(lse)
    return join(outs, lses, q.new_empty(0, sizes["H"], v.shape[2]))


def _selected(indices, S):
    """Membership mask [T, S] of index lists; -1 goes to an extra column that is cut off again."""
    mask = torch.zeros(indices.shape[0], S + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(1, torch.where(indices < 0, S, indices).long(), True)[:, :S]
