"""The lightning indexer's score of every visible (query, key) pair: equation 1 of the report.

    I[t, s] = k_scale[s] · sum over h of  w[t, h] · relu(q_idx[t, h] · k_idx[s])

The head weights w may be negative, so scores may be; w already holds Hi^-0.5, Di^-0.5 and the query's FP8 scale
(a positive scale can cross the relu). Cost: 2 · Hi · Di FLOPs a pair, 16,384 in V3.2.

Source: DeepSeek-V3.2-Exp report, equation 1; SPEC section 2 steps 6 to 8.
"""

import numpy as np
import torch
from torch import Tensor

from .blocks import row_blocks, visible
from .contracts import Array, Bound, check_index_scores, row_ranges
from .products import masked_einsum


def index_scores_loops(
    q_idx: Array, k_idx: Array, w: Array, k_scale: Array | None = None, start: Bound = None, end: Bound = None
) -> Array:
    """Equation 1 as four nested loops over arrays, float64. Returns [T, S], -inf where key s is not visible."""
    T, Hi, Di = q_idx.shape
    S = k_idx.shape[0]
    scores = np.full((T, S), -np.inf)
    for t in range(T):
        first = 0 if start is None else start[t]
        last = S - T + t + 1 if end is None else end[t]
        for s in range(first, last):
            total = 0.0
            for h in range(Hi):
                dot = 0.0
                for d in range(Di):
                    dot += float(q_idx[t, h, d]) * float(k_idx[s, d])
                total += float(w[t, h]) * max(dot, 0.0)
            scores[t, s] = total if k_scale is None else total * float(k_scale[s])
    return scores


def index_scores(
    q_idx: Tensor, k_idx: Tensor, w: Tensor, k_scale: Tensor | None = None, start: Bound = None, end: Bound = None
) -> Tensor:
    """Scores [T, S] of all visible pairs, -inf elsewhere. Differentiable in q_idx, k_idx, w and k_scale.

    q_idx: [T, Hi, Di] and k_idx: [S, Di], both float8_e4m3fn or both one wider float type; w: float [T, Hi]; k_scale:
    float [S] or None for 1; start, end: int32 [T], key range of each row, default causal with the queries last.
    Returns fp32 (fp64 where an input is fp64); products and sums in that precision.

    Raises: ValueError for wrong shapes, devices or ranges, TypeError for wrong dtypes.
    """
    check_index_scores(q_idx, k_idx, w, k_scale, start, end)
    S = len(k_idx)
    start, end = row_ranges(len(q_idx), S, q_idx.device, start, end)
    dtype, rows_of_scores = score_dtype(q_idx, k_idx, w, k_scale), []
    for rows, keys in row_blocks(start, end, per_pair=w.shape[1]):
        scale = None if k_scale is None else k_scale[keys]
        mask = visible(start, end, rows, keys)
        block = score_block(q_idx[rows], k_idx[keys], w[rows], scale, dtype, mask=mask).masked_fill(~mask, -torch.inf)
        outside = (keys.start, S - keys.stop)
        rows_of_scores.append(torch.nn.functional.pad(block, outside, value=-torch.inf))
    return torch.cat(rows_of_scores)


def score_dtype(*inputs: Tensor | None) -> torch.dtype:
    """What scores are computed and returned in: fp64 where an input is fp64, else fp32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in inputs) else torch.float32


def score_block(q_idx, k_idx, w, k_scale, dtype: torch.dtype, dims: str = "sd", mask: Tensor | None = None) -> Tensor:
    """Equation 1 on unchecked arguments for the pairs of a block: [T, S] in `dtype`.

    dims: k_idx's, "sd", or "tsd" where each query has keys of its own. mask: bool [T, S]; the caller replaces the score
    of a hidden pair, and no gradient comes from there. None where no gradient is taken.
    """
    dots = masked_einsum(f"thd,{dims}->ths", q_idx.to(dtype), k_idx.to(dtype), mask)
    scores = masked_einsum("ths,th->ts", dots.relu(), w.to(dtype), mask)
    return scores if k_scale is None else scores * k_scale.to(dtype)
