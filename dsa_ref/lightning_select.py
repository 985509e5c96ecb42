"""Score and select together, some rows at a time, so that the score matrix [T, S] never exists as a whole.

Source: SPEC sections 2 and 4.
"""

import torch
from torch import Tensor

from .blocks import row_blocks
from .contracts import Array, Bound, check_count, check_index_scores, row_ranges
from .index_scores import index_scores_loops, score_block, score_dtype
from .select_topk import select_block, select_topk_loops


def lightning_select_loops(
    q_idx: Array, k_idx: Array, w: Array, k: int, k_scale: Array | None = None, start: Bound = None, end: Bound = None
) -> Array:
    """The two loop forms one after the other. Arrays in, int32 array [T, k] out."""
    return select_topk_loops(index_scores_loops(q_idx, k_idx, w, k_scale, start, end), k, start, end)


@torch.no_grad()
def lightning_select(
    q_idx: Tensor, k_idx: Tensor, w: Tensor, k: int, k_scale: Tensor | None = None,
    start: Bound = None, end: Bound = None,
) -> Tensor:  # fmt: skip
    """`select_topk(index_scores(...), k)`: int32 [T, k], without gradient, since a choice has none.

    Arguments and errors as there. Peak memory is that of one block of rows: at least one row, so
    Hi · S numbers, but never T · S.
    """
    check_index_scores(q_idx, k_idx, w, k_scale, start, end)
    check_count("k", k)
    start, end = row_ranges(len(q_idx), len(k_idx), q_idx.device, start, end)
    dtype = score_dtype(q_idx, k_idx, w, k_scale)
    indices = torch.full((len(q_idx), k), -1, dtype=torch.int32, device=q_idx.device)
    for rows, keys in row_blocks(start, end, per_pair=w.shape[1]):
        scale = None if k_scale is None else k_scale[keys]
        scores = score_block(q_idx[rows], k_idx[keys], w[rows], scale, dtype)
        chosen = select_block(scores, k, start, end, rows, keys)
        indices[rows, : chosen.shape[1]] = chosen
    return indices
