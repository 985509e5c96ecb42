"""The dense oracle: attention over every visible key, in MQA mode, and MLA's decompressed MHA mode.

Sparse attention with k >= S must equal `dense_attention`; the masked `mha_attention` must equal the sparse MQA path.
Both cost O(T · S). MHA mode needs 2 · H · (192 + 128) FLOPs a pair in V3.2, less than a third of MQA mode's, but one
key and one value for every head and token.

Source: SPEC section 3; DeepSeek-V2 report (MLA), section 2.1.
"""

import torch
from torch import Tensor

from .blocks import compact, masked_blocks
from .contracts import Array, Bound, check_dense_attention, check_mha_attention, row_ranges
from .sparse_attention import attend, sparse_attention_loops


def dense_attention_loops(
    q: Array, kv: Array, scale: float, v_dim: int, start: Bound = None, end: Bound = None
) -> tuple[Array, Array]:
    """Equation 2 with every key of the row's range selected, float64 -> (out [T, H, v_dim], lse [T, H])."""
    T, S, ranges = q.shape[0], kv.shape[0], []
    for t in range(T):
        first = 0 if start is None else start[t]
        last = S - T + t + 1 if end is None else end[t]
        ranges.append(range(first, last))
    return sparse_attention_loops(q, kv, ranges, scale, v_dim)


def dense_attention(
    q: Tensor, kv: Tensor, scale: float, v_dim: int, start: Bound = None, end: Bound = None
) -> tuple[Tensor, Tensor]:
    """Attend from each query to its whole range. As `sparse_attention`, with ranges in place of indices.

    q: float [T, H, D]; kv: [S, D] of that dtype; start, end: int32 [T], default causal with the queries last.
    Returns (out [T, H, v_dim] in q.dtype, lse [T, H]); an empty range gives 0 and -inf. Differentiable.

    Raises: ValueError for wrong shapes, devices, ranges, scale or v_dim; TypeError for wrong dtypes.
    """
    check_dense_attention(q, kv, scale, v_dim, start, end)
    start, end = row_ranges(len(q), len(kv), q.device, start, end)
    dtype = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [], []
    for rows, keys, mask in masked_blocks(start, end, len(kv), per_pair=q.shape[1]):
        seen = kv[keys].to(dtype)
        out, lse = attend(q[rows].to(dtype), seen, seen[:, :v_dim], scale, mask, "sd")
        outs.append(out.to(q.dtype))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def mha_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, indices: Tensor | None, start: Bound = None, end: Bound = None
) -> tuple[Tensor, Tensor]:
    """MHA mode with the selection as a mask: per-head keys and values, every pair computed, few kept.

    q: float [T, H, Dq]; k: [S, H, Dq]; v: [S, H, Dv]; indices: int32 [T, k], distinct within a row, as for
    `sparse_attention`, or None for all visible keys; a row sees the selected keys that also lie in its range.
    Returns (out [T, H, Dv] in q.dtype, lse [T, H]). Raises as `dense_attention` and `sparse_attention` do.
    """
    check_mha_attention(q, k, v, scale, indices, start, end)
    start, end = row_ranges(len(q), len(k), q.device, start, end)
    dtype = torch.promote_types(q.dtype, torch.float32)
    lists = None if indices is None else compact(indices)
    outs, lses = [], []
    for rows, keys, mask in masked_blocks(start, end, len(k), per_pair=q.shape[1]):
        if lists is not None:
            mask &= _selected(lists[rows], len(k))[:, keys]
        out, lse = attend(q[rows].to(dtype), k[keys].to(dtype), v[keys].to(dtype), scale, mask, "shd")
        outs.append(out.to(q.dtype))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def _selected(indices: Tensor, S: int) -> Tensor:
    """Membership mask [T, S] of index lists; -1 goes to an extra column that is cut off again."""
    mask = torch.zeros(indices.shape[0], S + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(1, torch.where(indices < 0, S, indices).long(), True)[:, :S]
