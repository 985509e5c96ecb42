"""MHA mode, for rows that see few keys: cuDNN's attention, through torch, with a mask where "causal" is not enough.

Schedule: cuDNN's. Every pair is computed, at 81,920 FLOPs each in V3.2's sizes against 278,528 for a selected one in
MQA mode; so a row that selects all of its few keys is cheaper so, and needs no scores. A key and a value for every
head are 82 KB a token, which is why a long context is not attended to like this.

What cuDNN cannot serve (a CPU, fp32, an older card) is computed by torch, a block of rows at a time, in fp64, which
neither autocast nor TF32 shortens.
"""

import torch

from dsa_ref.contracts import check_mha_attention, row_ranges

from .runtime import FLOATS, check_runnable

LOGITS_AT_ONCE = 1 << 24


@torch.no_grad()
def mha_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    indices: torch.Tensor | None,
    start: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dsa_ref.mha_attention` by cuDNN: (out [T, H, Dv] in q.dtype, lse fp32 [T, H]). No gradient.

    q: bf16, fp16 or fp32 [T, H, Dq]; k: [S, H, Dq] and v: [S, H, Dv] of that dtype; indices: int32 [T, k], distinct
    within a row, or None for all visible keys; start, end: int32 [T], default causal with the queries last. As many
    queries as keys, with neither indices nor ranges, take cuDNN's causal mode, which skips what lies above the
    diagonal; others a mask of T · S numbers. A row that sees nothing gives 0 and -inf.
    NaN or infinity in a key or value reaches every row of the call, also those that may not see it.

    Raises: as the reference does (fp64 is a TypeError here); ValueError as `runtime.check_runnable` does. Source: SPEC
    section 3.
    """
    check_mha_attention(q, k, v, scale, indices, start, end, FLOATS)
    check_runnable(q=q, k=k, v=v)
    T, S = len(q), len(k)
    causal = indices is None and start is None and end is None and T == S
    if T == 0:
        return q.new_empty(0, q.shape[1], v.shape[2]), q.new_empty(0, q.shape[1], dtype=torch.float32)
    mask = None if causal else visible(T, S, q.device, indices, start, end)
    heads_first = [x[None].transpose(1, 2) for x in (q, k, v)]
    bias = None if mask is None else bias_of(mask, q.dtype)
    if not served_by_cudnn(*heads_first, bias, causal):
        return in_fp64(q, k, v, scale, torch.ones(T, S, dtype=torch.bool, device=q.device).tril_() if causal else mask)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads_first, bias, True, is_causal=causal, scale=scale
    )
    out, lse = out[0].transpose(0, 1), lse.reshape(-1, T).T
    if mask is not None:
        blind = ~mask.any(dim=1, keepdim=True)
        out, lse = out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -torch.inf)
    return out.contiguous(), lse.contiguous()


def visible(T, S, device, indices, start, end):
    """The boolean mask [T, S] of the pairs that ranges and index lists allow."""
    start, end = row_ranges(T, S, device, start, end)
    s = torch.arange(S, device=device)
    mask = (s >= start[:, None]) & (s < end[:, None])
    if indices is not None:
        chosen = torch.zeros(T, S + 1, dtype=torch.bool, device=device)  # -1 goes to the last column
        mask &= chosen.scatter_(1, torch.where(indices < 0, S, indices).long(), True)[:, :S]
    return mask


def bias_of(mask, dtype):
    """What is added to logits, [1, 1, T, S]: finite, since a tile of -inf alone has a softmax of NaN."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min / 2)[None, None]


def served_by_cudnn(q, k, v, bias, causal):
    """Whether cuDNN takes these [1, H, T or S, width], by what torch knows of it."""
    if not (q.is_cuda and torch.backends.cudnn.is_available()):
        return False
    parameters = torch.backends.cuda.SDPAParams(q, k, v, bias, 0.0, causal, False)
    return torch.backends.cuda.can_use_cudnn_attention(parameters)


def in_fp64(q, k, v, scale, mask):
    """Equation 2 over the pairs of mask [T, S], a block of rows at a time."""
    T, H, S = len(q), q.shape[1], len(k)
    out, lse = q.new_empty(T, H, v.shape[2]), q.new_empty(T, H, dtype=torch.float32)
    keys, values, rows = k.double(), v.double(), max(1, LOGITS_AT_ONCE // (H * S))
    for first in range(0, T, rows):
        part = slice(first, first + rows)
        logits = torch.einsum("thd,shd->hts", q[part].double(), keys) * scale
        logits.masked_fill_(~mask[part], -torch.inf)
        total = logits.logsumexp(dim=2, keepdim=True)
        weights = (logits - total.masked_fill(total == -torch.inf, 0.0)).exp()
        out[part] = torch.einsum("hts,shd->thd", weights, values).to(q.dtype)
        lse[part] = total[..., 0].T.float()
    return out, lse
