"""Top-k selection as a contract: which keys each query keeps, decided to the last tie.

Row t keeps exactly min(k, end[t] - start[t]) distinct indices of its range, then -1. Their scores are the k largest;
of equal scores at the threshold the smallest index wins; -0.0 equals 0.0; NaN is refused. So the selected *set* is a
function of the scores, and two implementations can be compared set by set.

Source: SPEC section 4 (ours). `torch.topk` does not promise the tie rule, so only its *values* are used here.
"""

import numpy as np
import torch

from .blocks import row_blocks, visible
from .contracts import check_select_topk


def select_topk_loops(scores, k, start=None, end=None):
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


def select_topk(scores, k, start=None, end=None):
    """Indices int32 [T, k] of each row's k largest scores, ascending, padded with -1 at the end.

    scores: float [T, S]; k: int >= 1, may exceed S; start, end: int32 [T], default causal with the queries last.

    Raises: ValueError for wrong shapes, devices or ranges, k < 1, or NaN in a visible place; TypeError for wrong types.
    """
    T, _, start, end = check_select_topk(scores, k, start, end)
    indices = torch.full((T, k), -1, dtype=torch.int32, device=scores.device)
    for rows, keys in row_blocks(start, end, per_pair=1):
        if keys.start == keys.stop:
            continue
        mask = visible(start, end, rows, keys)
        block = scores[rows, keys].detach().masked_fill(~mask, -torch.inf)
        if block.isnan().any():
            raise ValueError(f"scores must not be NaN, got NaN in rows {rows.start} to {rows.stop - 1}")
        wanted = (end[rows] - start[rows]).clamp(max=k)
        threshold = block.topk(min(k, block.shape[1])).values[:, -1:]
        above = block > threshold
        tied = (block == threshold) & mask  # the mask: a visible score may itself be -inf
        room = wanted[:, None] - above.sum(dim=1, keepdim=True)
        kept = above | (tied & (tied.cumsum(dim=1) <= room))  # smallest indices first
        row, column = kept.nonzero(as_tuple=True)
        place = kept.cumsum(dim=1)[row, column] - 1
        indices[rows][row, place] = (column + keys.start).to(torch.int32)
    return indices
