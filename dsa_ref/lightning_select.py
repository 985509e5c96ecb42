"""Score and select together, some rows at a time, so that the score matrix [T, S] never exists as a whole."""

import torch

from .blocks import row_blocks
from .contracts import check_count, check_index_scores
from .index_scores import index_scores, index_scores_loops
from .select_topk import select_topk, select_topk_loops


def lightning_select_loops(q_idx, k_idx, w, k, k_scale=None, start=None, end=None):
    """The two loop forms one after the other. Arrays in, int32 array [T, k] out."""
    return select_topk_loops(index_scores_loops(q_idx, k_idx, w, k_scale, start, end), k, start, end)


@torch.no_grad()
def lightning_select(q_idx, k_idx, w, k, k_scale=None, start=None, end=None):
    """`select_topk(index_scores(...), k)`: int32 [T, k], without gradient, since a choice has none.

    Arguments and errors as there. Peak memory is that of one block of rows: at least one row, so
    Hi · S numbers, but never T · S.
    """
    T, S, start, end = check_index_scores(q_idx, k_idx, w, k_scale, start, end)
    check_count("k", k)
    indices = torch.full((T, k), -1, dtype=torch.int32, device=q_idx.device)
    for rows, keys in row_blocks(start, end, per_pair=q_idx.shape[1]):
        if keys.start == keys.stop:
            continue
        ranges = {"start": start[rows] - keys.start, "end": end[rows] - keys.start}
        scale = None if k_scale is None else k_scale[keys]
        local = select_topk(index_scores(q_idx[rows], k_idx[keys], w[rows], scale, **ranges), k, **ranges)
        indices[rows] = torch.where(local >= 0, local + keys.start, -1)
    return indices
