"""Teach the indexer to point where attention looks: equations 3 and 4 of the report.

    p[t]  = mean over heads of the attention probabilities of row t (sums to 1)
    loss  = mean over rows t of  KL(p[t] || softmax(I[t])) = sum_s p[t, s] · (ln p[t, s] - ln softmax(I[t])[s])

In the dense warm-up (equation 3) both sides live on every visible key, in the sparse stage (equation 4) on the selected
keys S_t alone. The gradient with respect to I is softmax(I) - p, so I must not carry a stray factor: its scale is the
softmax temperature. The target is a constant: q and kv are detached here. The indexer's own *inputs* are detached in
`nn.layer`, so this loss moves nothing but the indexer.

The report does not say how rows are averaged; ours is the mean over rows with at least one key. reduction="sum" leaves
the division to the caller, who has the rows of several micro-batches to count.

What attention computed anyway need not be computed again: its log-sum-exp (`lse`) makes p a product and an exp, and the
backward pass of sparse attention knows p itself (`target`).

Source: DeepSeek-V3.2-Exp report, equations 3 and 4; SPEC section 5.
"""

import numpy as np
import torch
from torch import Tensor

from .blocks import list_blocks, masked_blocks
from .contracts import Array, Bound, check_indexer_loss, row_ranges
from .index_scores import index_scores_loops, score_block
from .products import masked_einsum
from .sparse_attention import attention_weights, gather_rows, masked_softmax


def indexer_loss_loops(
    q_idx: Array, k_idx: Array, w: Array, q: Array | None, kv: Array | None, scale: float | None,
    indices: Array | None = None, start: Bound = None, end: Bound = None, lse: Array | None = None,
    target: Array | None = None, reduction: str = "mean",
) -> float:  # fmt: skip
    """Both equations as loops over arrays, float64 -> the loss, a float. S_t is a set: a key counts once."""
    T, S = len(q_idx), len(k_idx)
    scores = index_scores_loops(q_idx, k_idx, w, None, start, end)
    total, rows = 0.0, 0
    for t in range(T):
        first = 0 if start is None else start[t]
        last = S - T + t + 1 if end is None else end[t]
        keys = [s for s in range(first, last) if indices is None or s in indices[t]]
        if not keys:
            continue
        p = np.zeros(len(keys))
        if target is not None:
            places = indices[t].tolist()
            p[:] = [target[t, places.index(s)] for s in keys]
        for h in range(q.shape[1] if target is None else 0):
            logits = np.array([scale * np.dot(q[t, h], kv[s]) for s in keys])
            if logits.max() == -np.inf or (lse is not None and lse[t, h] == -np.inf):  # a head that looks at nothing
                continue
            exponentials = np.exp(logits - logits.max())
            total_of_head = exponentials.sum() if lse is None else np.exp(lse[t, h] - logits.max())
            p += exponentials / total_of_head / q.shape[1]
        largest = scores[t, keys].max()
        log_guess = scores[t, keys] - largest - np.log(np.sum(np.exp(scores[t, keys] - largest)))
        for i in range(len(keys)):
            if p[i] != 0:
                total += p[i] * (np.log(p[i]) - log_guess[i])
        rows += 1
    return total if reduction == "sum" else total / max(rows, 1)


def indexer_loss(
    q_idx: Tensor, k_idx: Tensor, w: Tensor, q: Tensor | None, kv: Tensor | None, scale: float | None,
    indices: Tensor | None = None, start: Bound = None, end: Bound = None, lse: Tensor | None = None,
    target: Tensor | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The indexer's KL loss, a scalar. Differentiable in q_idx, k_idx and w alone.

    q_idx [T, Hi, Di], k_idx [S, Di], w [T, Hi]: the indexer's side, as for `index_scores`, unquantised.
    q [T, H, D], kv [S, D], scale: attention's side, as for `sparse_attention`.
    indices: None for the warm-up (equation 3), int32 [T, k], distinct within a row, for the sparse stage (equation 4).
    start, end: int32 [T], default causal; a selected key outside a row's range is left out of that row.
    lse: fp32 [T, H], attention's log-sum-exp over the same keys, or None to compute it.
    target: fp32 [T, k] (needs indices), p itself in the places of indices, as it stands: it is not normalised again.
    q, kv, scale and lse are None then.
    reduction: "mean" over the rows with at least one key, or the "sum" over them. With no such row the loss is 0.
    Computed in fp32, also for fp64 inputs. Memory: one number for each pair, and one for each pair and head of a
    single block.

    Raises: ValueError for wrong shapes, devices or ranges, indices outside [-1, S) or named twice in a row, an unknown
    reduction, a target without indices or beside what it replaces, neither it nor q, kv and scale; TypeError for wrong
    dtypes.
    """
    check_indexer_loss(q_idx, k_idx, w, q, kv, scale, indices, start, end, lse, target, reduction)
    (T, Hi, Di), S = q_idx.shape, len(k_idx)
    H, D = (0, 0) if q is None else q.shape[1:]
    start, end = row_ranges(T, S, q_idx.device, start, end)
    q, kv, lse, target = (None if x is None else x.detach().float() for x in (q, kv, lse, target))
    total, alive = torch.zeros((), dtype=torch.float32, device=q_idx.device), 0
    per_pair, per_index = 4 * (Hi + H), 4 * (D + Di + Hi + H)  # four of them live at once in the backward pass
    for rows, keys, lists, mask, given in _blocks(indices, start, end, S, per_pair, per_index, target):
        p = given
        if p is None:
            seen, dims = (kv[keys], "sd") if lists is None else (gather_rows(kv, lists, mask), "tsd")
            p = _target(q[rows], seen, scale, mask, dims, None if lse is None else lse[rows])
        total = total + _RecomputedKL.apply(q_idx[rows], k_idx[keys], w[rows], p, lists, mask)
        alive = alive + mask.any(dim=1).sum()
    return total if reduction == "sum" else total / alive.clamp(min=1)


def _target(q, keys, scale, mask, dims, lse) -> Tensor:
    """p [T, S]: the mean over heads of attention's probabilities where mask holds, 0 elsewhere."""
    if lse is None:
        return attention_weights(q, keys, scale, mask, dims)[0].mean(dim=1)
    nothing = lse == -torch.inf  # a head with logits of -inf alone
    logits = masked_einsum(f"thd,{dims}->ths", q, keys, mask) * scale - lse.masked_fill(nothing, 0.0)[:, :, None]
    return logits.masked_fill(~mask[:, None] | nothing[:, :, None], -torch.inf).exp().mean(dim=1)


def _blocks(indices, start, end, S, per_pair, per_index, target):
    """(rows, keys, lists, mask, p or None) of each block: it sees the range `keys`, or in the sparse stage what `lists`
    name, whose p is known where `target` is given."""
    if indices is None:
        for rows, keys, mask in masked_blocks(start, end, S, per_pair):
            yield rows, keys, None, mask, None
        return
    for rows, lists in list_blocks(indices, per_index):
        mask, p = (lists >= start[rows, None]) & (lists < end[rows, None]), None
        if target is not None:  # `lists` has the indices in their order, without the -1 between them
            places = (indices[rows] < 0).byte().argsort(dim=1, stable=True)[:, : lists.shape[1]]
            p = target[rows].gather(1, places).masked_fill(~mask, 0.0)
        yield rows, slice(S), lists, mask, p


class _RecomputedKL(torch.autograd.Function):
    """`_kl`, whose derivatives compute the block again: otherwise all blocks would be kept for the backward pass."""

    @staticmethod
    def forward(*block):
        return _kl(*block)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return *_kl_gradients(gradient, *ctx.saved_tensors), None, None, None

    @staticmethod
    def jvp(ctx, *changes):
        gradients = _kl_gradients(1.0, *ctx.saved_tensors)  # p is a constant, whatever its change
        return sum((a * b).sum() for a, b in zip(gradients, changes[:3], strict=True) if b is not None)


def _kl_gradients(gradient, q_idx, k_idx, w, p, lists, mask) -> tuple[Tensor, Tensor, Tensor]:
    """`gradient` times those of `_kl` with respect to q_idx, k_idx and w, written out to be differentiable again."""
    keys, dims = (k_idx, "sd") if lists is None else (gather_rows(k_idx, lists, mask), "tsd")
    q, keys, weights = q_idx.float(), keys.float(), w.float()
    active = masked_einsum(f"thd,{dims}->ths", q, keys, mask).relu()
    guess, _ = masked_softmax(masked_einsum("ths,th->ts", active, weights, mask), mask)
    of_scores = gradient * (guess * p.sum(dim=1, keepdim=True) - p).masked_fill(~mask, 0.0)
    of_dots = masked_einsum("ts,th->ths", of_scores, weights, mask).masked_fill(active <= 0, 0.0)
    of_keys = masked_einsum(f"ths,thd->{dims}", of_dots, q, mask)
    if lists is not None:  # a key gets a share from every row that has it in its list
        shares, of_keys = of_keys, torch.zeros_like(k_idx, dtype=torch.float32)
        of_keys = of_keys.index_put((lists.clamp(min=0),), shares, accumulate=True)
    of_q = masked_einsum(f"ths,{dims}->thd", of_dots, keys, mask)
    of_w = masked_einsum("ts,ths->th", of_scores, active, mask)
    return of_q.to(q_idx.dtype), of_keys.to(k_idx.dtype), of_w.to(w.dtype)


def _kl(q_idx, k_idx, w, p, lists, mask) -> Tensor:
    """Sum over a block's rows of KL(p || softmax(I)) on the keys in mask [T, S]."""
    keys, dims = (k_idx, "sd") if lists is None else (gather_rows(k_idx, lists, mask), "tsd")
    scores = score_block(q_idx, keys, w, None, torch.float32, dims, mask)
    _, lse = masked_softmax(scores, mask)
    log_guess = torch.where(mask, scores - torch.where(lse == -torch.inf, 0.0, lse)[:, None], 0.0)
    return (torch.xlogy(p, p) - p * log_guess.masked_fill(p == 0, 0.0)).sum()  # 0 · ln 0 is 0 on either side
