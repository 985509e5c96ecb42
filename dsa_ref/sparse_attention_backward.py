"""The gradient of attention over the selected keys, written out, and the mean of its probabilities over the heads.

With P the probabilities of equation 2 and `dout`, `dlse` the gradients of what `sparse_attention` returned:

    delta[t, h]  = sum over v of out[t, h, v] · dout[t, h, v]  -  dlse[t, h]
    dS[t, h, s]  = P[t, h, s] · (dout[t, h] · kv[s, :v_dim] - delta[t, h]) · scale
    dq[t, h]     = sum over s in S_t of  dS[t, h, s] · kv[s]
    dkv[s]       = sum over t with s in S_t, and h, of  dS[t, h, s] · q[t, h], and P[t, h, s] · dout[t, h] in the value
    target[t, j] = mean over h of P[t, h, indices[t, j]]

`delta` is what a softmax's gradient subtracts: the mean of dP under P. It is known from out before any P is, which is
why the forward pass keeps out and the log-sum-exp and nothing of size T · k: P = exp(scale · q · kv[s] - lse).

`target` is what the indexer learns from (equation 4). P is there anyway, so it comes with this pass at no price.

Cost: 2 · H · (3 · D + 2 · v_dim) FLOPs a selected pair, 704,512 in V3.2: 2.5 times the forward pass.

Source: the derivative of DeepSeek-V3.2-Exp's equation 2; delta by FlashAttention, arXiv 2205.14135; SPEC section 3.
"""

import numpy as np
import torch
from torch import Tensor

from .blocks import list_blocks
from .contracts import Array, check_sparse_attention_backward
from .products import gather_rows, masked_einsum


def sparse_attention_backward_loops(
    q: Array, kv: Array, indices: Array, scale: float, v_dim: int, out: Array, lse: Array, dout: Array,
    dlse: Array | None = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """The equations as loops over arrays, float64 -> (dq [T, H, D], dkv [S, D], target [T, k])."""
    T, H, _ = q.shape
    dq, dkv, target = np.zeros(q.shape), np.zeros(kv.shape), np.zeros(indices.shape)
    for t in range(T):
        for h in range(H):
            if lse[t, h] == -np.inf:  # nothing selected, or logits of -inf alone
                continue
            delta = np.dot(out[t, h], dout[t, h]) - (0.0 if dlse is None else dlse[t, h])
            for j, s in enumerate(indices[t]):
                if s < 0:
                    continue
                p = np.exp(scale * np.dot(q[t, h], kv[s]) - lse[t, h])
                ds = p * (np.dot(dout[t, h], kv[s, :v_dim]) - delta) * scale
                dq[t, h] += ds * kv[s]
                dkv[s] += ds * q[t, h]
                dkv[s, :v_dim] += p * dout[t, h]
                target[t, j] += p / H
    return dq, dkv, target


def sparse_attention_backward(
    q: Tensor, kv: Tensor, indices: Tensor, scale: float, v_dim: int, out: Tensor, lse: Tensor, dout: Tensor,
    dlse: Tensor | None = None, sums: str = "sorted",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of `sparse_attention` from the gradients of its results, and the mean of P over the heads.

    q float [T, H, D], kv [S, D], indices int32 [T, k], scale, v_dim: as `sparse_attention` was given them.
    out [T, H, v_dim] in q.dtype and lse fp32 [T, H]: as it returned them. dout, like out, and dlse, like lse, or None
    for zeros: gradients of these. sums: "sorted" or "atomic", the kernels' ways to sum dkv; here both are the same, and
    the same bits each time.
    Returns (dq [T, H, D] and dkv [S, D] in q.dtype; target fp32 [T, k], 0 where indices has -1: a row sums to 1, or to
    0 where nothing is selected). Computed in fp32 (fp64, and lse and target too, for fp64). A row and head with an lse
    of -inf has no gradient, and passes none on. Not differentiable itself. Memory: a block's rows of kv and of
    gradients, whatever T · k is.

    Raises: ValueError for wrong shapes, devices, indices outside [-1, S) or named twice in a row, scale, v_dim or sums;
    TypeError for wrong dtypes.
    """
    check_sparse_attention_backward(q, kv, indices, scale, v_dim, out, lse, dout, dlse, sums)
    with torch.no_grad():
        return _backward(q, kv, indices, scale, v_dim, out, lse, dout, dlse)


def _backward(q, kv, indices, scale, v_dim, out, lse, dout, dlse):
    (_, H, D), dtype = q.shape, lse.dtype
    dq, dkv = torch.zeros_like(q), torch.zeros(kv.shape, dtype=dtype, device=kv.device)
    target = torch.zeros(indices.shape, dtype=dtype, device=q.device)
    for rows, lists in list_blocks(indices, per_index=2 * D + 3 * H):
        there = lists >= 0
        some = (lse[rows] != -torch.inf)[:, :, None]
        keys, queries, douts = gather_rows(kv, lists, there).to(dtype), q[rows].to(dtype), dout[rows].to(dtype)
        delta = (out[rows].to(dtype) * douts).sum(dim=-1)
        if dlse is not None:
            delta = delta - dlse[rows]
        hidden = ~(there[:, None] & some)
        logits = masked_einsum("thd,tsd->ths", queries, keys, there) * scale
        p = (logits - lse[rows][:, :, None]).exp().masked_fill(hidden, 0.0)
        dp = masked_einsum("thv,tsv->ths", douts, keys[..., :v_dim], there)
        ds = (p * (dp - delta[:, :, None]) * scale).masked_fill(hidden, 0.0)
        dq[rows] = masked_einsum("ths,tsd->thd", ds, keys, there).masked_fill(~some, 0.0).to(q.dtype)
        shares = masked_einsum("ths,thd->tsd", ds, queries, there)
        shares[..., :v_dim] += masked_einsum("ths,thv->tsv", p, douts, there)
        _add_rows(dkv, lists[there], shares[there])
        target[rows].masked_scatter_(indices[rows] >= 0, p.mean(dim=1)[there])  # both masks in the lists' order
    return dq, dkv.to(kv.dtype), target


def _add_rows(total, places, rows):
    """Add each of rows [n, D] to the row of total [S, D] that places [n] names, in an order that they alone decide."""
    if total.is_cuda:
        total.index_put_((places.long(),), rows, accumulate=True)  # sorts the places first; index_add_ is atomic there
    else:
        total.index_add_(0, places, rows)  # one after the other
