"""Both equations of the indexer's loss with their gradients, in blocks of rows: nothing of size [T, S] is ever held.

A block of rows goes through four kernels: p, attention's mean probability of each pair, unless it is given
(`teach.attention`); the rows' scores, losses and log-sum-exps; by dI = softmax(I) - p dq_idx and w's gradient; dk_idx
(`teach.kl` over ranges of keys, `teach.listed` over lists). The forward pass computes the gradients too where they are
wanted, so that p is computed once; the backward pass multiplies them by what comes from above. No float atomics:
repeats give the same bits.
"""

import torch
from torch import Tensor

from dsa_ref.contracts import check_indexer_loss, row_ranges, values_readable

from . import runtime
from .key_sums import sum_rows
from .runtime import FLOATS, cdiv, check_runnable, dispatched, wants_gradient
from .sparse_attention import check_scale_in_base_2
from .teach import attention, kl, listed
from .teach.walk import ALIGN


def indexer_loss(
    q_idx: Tensor, k_idx: Tensor, w: Tensor, q: Tensor | None, kv: Tensor | None, scale: float | None,
    indices: Tensor | None = None, start: Tensor | None = None, end: Tensor | None = None, lse: Tensor | None = None,
    target: Tensor | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """`dsa_ref.indexer_loss` on tensor cores, a scalar in fp32. Differentiable in q_idx, k_idx and w alone, once.

    q_idx [T, Hi, Di] and k_idx [S, Di], one dtype of bf16, fp16 and fp32; w: float [T, Hi]: the indexer's side.
    q [T, H, D], kv [S, D], scale: attention's side, likewise; lse: fp32 [T, H] over the same keys, or None.
    indices: None for the warm-up, int32 [T, k], distinct within a row, for the sparse stage.
    start, end: int32 [T], default causal; a selected key outside a row's range is left out of that row.
    target: fp32 [T, k] (needs indices), p itself; q, kv, scale and lse are None then.
    reduction: "mean" over the rows with at least one key, or the "sum" over them. With no such row the loss is 0.
    Products of bf16 and fp16 inputs use those types, their gradients bf16; fp32 goes without TF32; sums are fp32. The
    same inputs give the same bits, gradients included. Memory beyond inputs and gradients: 0.5 GiB in the warm-up, some
    1 to 2 GiB in the sparse stage, whatever T and S are.
    NaN in a key reaches the gradients of rows that cannot see it where a query close by can; so does NaN in a query.

    Raises: as the reference does (fp64 is a TypeError here); ValueError as `runtime.check_runnable` does. Source:
    DeepSeek-V3.2-Exp report, equations 3 and 4; SPEC section 5.
    """
    traced = dispatched()
    if not traced:
        check_indexer_loss(q_idx, k_idx, w, q, kv, scale, indices, start, end, lse, target, reduction, FLOATS)
        if scale is not None:
            check_scale_in_base_2(scale)
    q, kv, lse, target = (None if x is None else x.detach() for x in (q, kv, lse, target))
    learning, others = (q_idx, k_idx, w), (q, kv, scale, indices, start, end, lse, target)
    wanted = wants_gradient(*learning)
    if not traced:
        check_runnable(True, q_idx=q_idx, k_idx=k_idx, w=w, q=q, kv=kv, lse=lse, target=target)
    if traced or wanted:
        total, rows, *_ = torch.ops.dsa_kernels.indexer_loss(*learning, *others, wanted, reduction if traced else None)
    else:
        start, end = row_ranges(len(q_idx), len(k_idx), q_idx.device, start, end)
        total, rows, *_ = loss_and_gradients(*learning, *others[:4], start, end, lse, target, False)
    return total if reduction == "sum" else total / rows.clamp(min=1)


@torch.no_grad()
def loss_and_gradients(q_idx, k_idx, w, q, kv, scale, indices, start, end, lse, target, wanted):
    """(sum of the rows' losses, number of rows with a key, dq_idx, dk_idx, dw), the last three None unless `wanted`.

    Arguments are checked, start and end are there. Gradients are those of the sum, in the types of their inputs.
    """
    q_idx, k_idx, w, start, end = (x.contiguous() for x in (q_idx, k_idx, w, start, end))
    q, kv, lse, target, indices = (None if x is None else x.contiguous() for x in (q, kv, lse, target, indices))
    (T, _, Di), S = q_idx.shape, len(k_idx)
    if indices is not None and indices.shape[1] > S:
        indices, target = _without_gaps(indices, target, S)
    kl_of_rows = torch.empty(T, dtype=torch.float32, device=q_idx.device)
    alive = torch.empty(T, dtype=torch.int32, device=q_idx.device)
    dq, dw = (torch.empty_like(q_idx), torch.empty_like(w)) if wanted else (None, None)
    dk = torch.zeros(S, Di, dtype=torch.float32, device=q_idx.device) if wanted else None
    if indices is None:
        width = _width(start, end, S)
        at_once = runtime.PAIRS_AT_ONCE // width
    else:
        width = indices.shape[1]
        at_once = min(runtime.PAIRS_AT_ONCE, runtime.SHARES_AT_ONCE // Di) // width
    at_once = max(1, at_once)
    for first in range(0, T, at_once):
        part = slice(first, first + at_once)
        here = q_idx[part], k_idx, w[part], None if indices is None else indices[part], start[part], end[part]
        p = _target(q, kv, scale, *here[3:], lse, part, width) if target is None else target[part]
        gradients = (dq[part], dw[part], dk) if wanted else None
        learn = _over_ranges if indices is None else _over_lists
        kl_of_rows[part], alive[part] = learn(here, p, gradients)
    dk = None if dk is None else dk.to(k_idx.dtype)
    return kl_of_rows.sum(), alive.sum(), dq, dk, dw


def _width(start, end, S):
    """Columns of a buffer that holds each row's range (see `teach.walk`): of all S keys where ranges cannot be read."""
    longest = S
    if len(start) and values_readable(start):
        longest = int((end - start // ALIGN * ALIGN).amax())
    return max(1, cdiv(longest, ALIGN)) * ALIGN


def _target(q, kv, scale, indices, start, end, lse, part, width):
    """p of the rows `part`, [rows, width]."""
    q = q[part]
    if lse is None:
        lse = attention.log_sum_exp(q, kv, scale, indices, start, end)
    else:
        lse = lse[part]
    p = torch.empty(len(q), width, dtype=torch.float32, device=q.device)
    attention.mean_probability(q, kv, scale, indices, start, end, lse, p)
    return p


def _over_ranges(here, p, gradients):
    """(KL, whether it sees a key) of each row of a block. Writes dq and dw, and adds what its rows give to dk."""
    q_idx, k_idx, w, _, start, end = here
    scores = None if gradients is None else torch.empty_like(p)
    kl_of_rows, *sums, alive = kl.rows(q_idx, k_idx, w, start, end, p, scores)
    if gradients is not None:
        dq, dw, dk = gradients
        kl.queries(q_idx, k_idx, w, start, end, p, scores, *sums, dq, dw)
        kl.keys(q_idx, k_idx, w, start, end, p, scores, *sums, dk)
    return kl_of_rows, alive


def _over_lists(here, p, gradients):
    """As `_over_ranges`."""
    q_idx, indices = here[0], here[3]
    kl_of_rows, alive, of_scores, marks = listed.rows(*here, p, gradients is not None)
    if gradients is not None:
        dq, dw, dk = gradients
        share = torch.float32 if q_idx.dtype == torch.float32 else torch.bfloat16
        shares = torch.empty(indices.numel(), dk.shape[1], dtype=share, device=dk.device)
        places = listed.gradients(*here, of_scores, marks, dq, dw, shares)
        sum_rows(shares, *places, dk, dk, False, False)
    return kl_of_rows, alive


def _without_gaps(indices, target, width):
    """Lists of more places than there are keys, and their targets, in `width` places."""
    places = (indices < 0).byte().argsort(dim=1, stable=True)[:, :width]
    return indices.gather(1, places), None if target is None else target.gather(1, places)
