"""Attention over the selected keys alone: equation 2 of the report, on MLA's shared latent rows (MQA mode).

    u[t, h] = sum over s in S_t of  softmax_s(scale · q[t, h] · kv[s]) · kv[s, :v_dim]

One latent row is key and value of every head. Work and memory grow with T · k, never with T · S: the rows are
gathered, not masked. Cost: 2 · H · (D + v_dim) FLOPs a selected pair, 278,528 in V3.2.

Source: DeepSeek-V3.2-Exp report, equation 2 and appendix A; SPEC section 3.
"""

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .blocks import list_blocks
from .contracts import Array, check_sparse_attention
from .products import gather_rows, masked_einsum
from .sparse_attention_backward import sparse_attention_backward


def sparse_attention_loops(q: Array, kv: Array, indices: Array, scale: float, v_dim: int) -> tuple[Array, Array]:
    """Equation 2 as loops over arrays, float64 -> (out [T, H, v_dim], lse [T, H]).

    S_t is a set: a key counts once. Subtracting the largest logit changes no weight and keeps exp from overflowing.
    """
    T, H, _ = q.shape
    out, lse = np.zeros((T, H, v_dim)), np.full((T, H), -np.inf)
    for t in range(T):
        keys = sorted({int(s) for s in indices[t] if s >= 0})
        for h in range(H):
            logits = np.array([scale * np.dot(q[t, h], kv[s]) for s in keys])
            if keys and logits.max() != -np.inf:
                exponentials = np.exp(logits - logits.max())
                out[t, h] = exponentials / exponentials.sum() @ kv[keys, :v_dim]
                lse[t, h] = logits.max() + np.log(exponentials.sum())
    return out, lse


def sparse_attention(
    q: Tensor, kv: Tensor, indices: Tensor, scale: float, v_dim: int, probe: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend from each query to its selected rows of kv. Differentiable in q and kv.

    q: float [T, H, D]; kv: [S, D] of the same dtype; indices: int32 [T, k], -1 where nothing is selected, distinct
    within a row; scale: float > 0; v_dim: the first v_dim columns of kv are the value.
    Returns (out [T, H, v_dim] in q.dtype, lse fp32 [T, H], natural logarithm); computed in fp32 (fp64 for fp64). A row
    with nothing selected, or with logits of -inf alone, gives 0 and -inf. Time and memory follow the selected keys, not
    k.

    probe: fp32 [T, k], whose values nobody reads, or None. If it requires a gradient, it receives in the place of one
    the mean over heads of the probabilities of each selected key, `target` of `sparse_attention_backward`, whatever the
    gradients of out and lse are: the indexer's loss needs it, and so the model's own backward pass yields it. With such
    a probe the gradients are `sparse_attention_backward`'s, which are not differentiable again, nor in forward mode.

    Raises: ValueError for wrong shapes, devices, indices outside [-1, S) or named twice in a row, scale or v_dim;
    TypeError for wrong dtypes.
    """
    check_sparse_attention(q, kv, indices, scale, v_dim, probe=probe)
    if probe is not None and torch.is_grad_enabled() and probe.requires_grad:
        return _Probed.apply(q, kv, indices, scale, v_dim, probe)
    return _forward(q, kv, indices, scale, v_dim)


def _forward(q, kv, indices, scale, v_dim):
    dtype = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [], []
    for rows, lists in list_blocks(indices, per_index=q.shape[1] + q.shape[2]):
        there = lists >= 0
        gathered = gather_rows(kv, lists, there).to(dtype)
        out, lse = attend(q[rows].to(dtype), gathered, gathered[..., :v_dim], scale, there, "tsd")
        outs.append(out.to(q.dtype))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


class _Probed(torch.autograd.Function):
    """Attention that hands its mean probabilities to the probe."""

    @staticmethod
    def forward(q, kv, indices, scale, v_dim, probe):
        return _forward(q, kv, indices, scale, v_dim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, kv, indices, ctx.scale, ctx.v_dim, _ = inputs
        ctx.save_for_backward(q, kv, indices, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, kv, indices, out, lse = ctx.saved_tensors
        dq, dkv, target = sparse_attention_backward(q, kv, indices, ctx.scale, ctx.v_dim, out, lse, dout, dlse)
        return dq, dkv, None, None, None, target.float()


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor, dims: str) -> tuple[Tensor, Tensor]:
    """Equation 2 on unchecked arguments where mask [T, S] holds: (out [T, H, v], log-sum-exp [T, H]).

    dims: k's and v's: "sd" for rows shared by all, "tsd" where each query has rows of its own, "shd" where each head.
    """
    weights, lse = attention_weights(q, k, scale, mask, dims)
    out = masked_einsum(f"ths,{dims}->thd", weights, v, mask)
    return out.masked_fill((lse == -torch.inf)[:, :, None], 0.0), lse  # logits of -inf alone: not 0 · an infinite value


def attention_weights(q: Tensor, k: Tensor, scale: float, mask: Tensor, dims: str) -> tuple[Tensor, Tensor]:
    """The softmax of equation 2: (weights [T, H, S], log-sum-exp [T, H]). Arguments as for `attend`."""
    return masked_softmax(masked_einsum(f"thd,{dims}->ths", q, k, mask) * scale, mask[:, None])


def masked_softmax(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
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
    weights = exponentials / safe
    if total.isnan().any():  # a row that sees NaN is NaN, but not for the keys that it does not see
        weights = weights.masked_fill(~mask, 0.0)
    return weights, lse.squeeze(-1)
