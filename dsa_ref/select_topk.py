"""Top-k selection as a contract: which keys each query keeps, decided to the last tie.

Row t keeps exactly min(k, end[t] - start[t]) distinct indices of its range, then -1. Their scores are the k largest;
of equal scores at the threshold the smallest index wins; -0.0 equals 0.0; NaN is refused. So the selected *set* is a
function of the scores, and two implementations can be compared set by set.

Source: SPEC section 4 (ours). `torch.topk` does not promise the tie rule, so only its *values* are used here.
"""

import numpy as np
import torch
from torch import Tensor

from .blocks import row_blocks, visible
from .contracts import Array, Bound, check_select_topk, row_ranges


def select_topk_loops(scores: Array, k: int, start: Bound = None, end: Bound = None) -> Array:
    """The oracle: a stable descending sort of each row's range. scores [T, S] array -> int32 array [T, k]."""
    T, S = scores.shape
    indices = np.full((T, k), -1, dtype=np.int32)
    for t in range(T):
        first = 0 if start is None else start[t]
        last = S - T + t + 1 if end is None else end[t]
        ranked = sorted(range(first, last), key=lambda s: -scores[t, s])  # Python's sort is stable, and -0.0 == 0.0
        chosen = sorted(ranked[:k])
        indices[t, : len(chosen)] = chosen
    return indices


def select_topk(scores: Tensor, k: int, start: Bound = None, end: Bound = None) -> Tensor:
    """Indices int32 [T, k] of each row's k largest scores, ascending, padded with -1 at the end.

    scores: float [T, S]; k: int >= 1, may exceed S; start, end: int32 [T], default causal with the queries last.

    Raises: ValueError for wrong shapes, devices or ranges, k < 1, or NaN in a visible place; TypeError for wrong types.
    """
    check_select_topk(scores, k, start, end)
    start, end = row_ranges(*scores.shape, scores.device, start, end)
    indices = torch.full((len(scores), k), -1, dtype=torch.int32, device=scores.device)
    for rows, keys in row_blocks(start, end, per_pair=1):
        chosen = select_block(scores[rows, keys].detach(), k, start, end, rows, keys)
        indices[rows, : chosen.shape[1]] = chosen
    return indices


def select_block(scores: Tensor, k: int, start: Tensor, end: Tensor, rows: slice, keys: slice) -> Tensor:
    """The selection of a block's rows from its scores [rows, keys], int32 [rows, width] with width = min(k, keys).

    No check but the one for NaN.
    """
    mask = visible(start, end, rows, keys)
    scores = scores.masked_fill(~mask, -torch.inf)
    bad = scores.isnan()
    if bad.any():
        t, s = bad.nonzero()[0].tolist()
        raise ValueError(f"scores must not be NaN, got NaN in row {rows.start + t} for key {keys.start + s}")
    width = min(k, scores.shape[1])
    wanted = (end[rows] - start[rows]).clamp(max=width)
    threshold = scores.topk(width).values[:, -1:]
    above = scores > threshold
    tied = (scores == threshold) & mask  # the mask: a visible score may itself be -inf
    room = wanted[:, None] - above.sum(dim=1, keepdim=True)
    kept = above | (tied & (tied.cumsum(dim=1) <= room))  # smallest indices first
    row, column = kept.nonzero(as_tuple=True)
    indices = torch.full((len(scores), width), -1, dtype=torch.int32, device=scores.device)
    indices[row, kept.cumsum(dim=1)[row, column] - 1] = (column + keys.start).to(torch.int32)
    return indices
