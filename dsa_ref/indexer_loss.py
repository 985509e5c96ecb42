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
from torch import Tensor

from .blocks import list_blocks, masked_blocks
from .contracts import Array, Bound, check_indexer_loss, row_ranges
from .index_scores import index_scores_loops, score_block
from .products import masked_einsum
from .sparse_attention import attention_weights, gather_rows, masked_softmax


def indexer_loss_loops(
    q_idx: Array, k_idx: Array, w: Array, q: Array, kv: Array, scale: float, indices: Array | None = None,
    start: Bound = None, end: Bound = None,
) -> float:  # fmt: skip
    """Both equations as loops over arrays, float64 -> the loss, a float. S_t is a set: a key counts once."""
    T, H, _ = q.shape
    scores = index_scores_loops(q_idx, k_idx, w, None, start, end)
    total, rows = 0.0, 0
    for t in range(T):
        first = 0 if start is None else start[t]
        last = kv.shape[0] - T + t + 1 if end is None else end[t]
        keys = [s for s in range(first, last) if indices is None or s in indices[t]]
        if not keys:
            continue
        p = np.zeros(len(keys))
        for h in range(H):
            logits = np.array([scale * np.dot(q[t, h], kv[s]) for s in keys])
            if logits.max() != -np.inf:  # a head of logits of -inf alone looks at nothing
                exponentials = np.exp(logits - logits.max())
                p += exponentials / exponentials.sum() / H
        largest = scores[t, keys].max()
        log_guess = scores[t, keys] - largest - np.log(np.sum(np.exp(scores[t, keys] - largest)))
        for i in range(len(keys)):
            if p[i] != 0:
                total += p[i] * (np.log(p[i]) - log_guess[i])
        rows += 1
    return total / max(rows, 1)


def indexer_loss(
    q_idx: Tensor, k_idx: Tensor, w: Tensor, q: Tensor, kv: Tensor, scale: float, indices: Tensor | None = None,
    start: Bound = None, end: Bound = None,
) -> Tensor:  # fmt: skip
    """The indexer's KL loss, a scalar. Differentiable in q_idx, k_idx and w alone.

    q_idx [T, Hi, Di], k_idx [S, Di], w [T, Hi]: the indexer's side, as for `index_scores`, unquantised.
    q [T, H, D], kv [S, D], scale: attention's side, as for `sparse_attention`.
    indices: None for the warm-up (equation 3), int32 [T, k], distinct within a row, for the sparse stage (equation 4).
    start, end: int32 [T], default causal; a selected key outside a row's range is left out of that row. With no
    row that has a key the loss is 0. Computed in fp32, also for fp64 inputs. Memory: one number for each pair, and one
    for each pair and head of a single block.

    Raises: ValueError for wrong shapes, devices or ranges, indices outside [-1, S) or named twice in a row; TypeError
    for wrong dtypes.
    """
    check_indexer_loss(q_idx, k_idx, w, q, kv, scale, indices, start, end)
    (T, Hi, Di), S, (_, H, D) = q_idx.shape, len(kv), q.shape
    start, end = row_ranges(T, S, q.device, start, end)
    q, kv = q.detach().float(), kv.detach().float()
    total, alive = q.new_zeros(()), 0
    per_pair, per_index = 4 * (Hi + H), 4 * (D + Di + Hi + H)  # four of them live at once in the backward pass
    for rows, keys, lists, mask in _blocks(indices, start, end, S, per_pair, per_index):
        seen, dims = (kv[keys], "sd") if lists is None else (gather_rows(kv, lists, mask), "tsd")
        p = attention_weights(q[rows], seen, scale, mask, dims)[0].mean(dim=1)
        total = total + _RecomputedKL.apply(q_idx[rows], k_idx[keys], w[rows], p, lists, mask)
        alive = alive + mask.any(dim=1).sum()
    return total / alive.clamp(min=1)


def _blocks(indices, start, end, S, per_pair, per_index):
    """(rows, keys, lists, mask) of each block: it sees the range `keys`, or in the sparse stage what `lists` name."""
    if indices is None:
        for rows, keys, mask in masked_blocks(start, end, S, per_pair):
            yield rows, keys, None, mask
    else:
        for rows, lists in list_blocks(indices, per_index):
            yield rows, slice(S), lists, (lists >= start[rows, None]) & (lists < end[rows, None])


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
