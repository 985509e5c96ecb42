"""Score and select, some rows at a time: two kernels that meet in a buffer of at most SCORES_AT_ONCE scores."""

import torch

from dsa_ref.contracts import check_count, check_index_scores

from .index_scores import launch as launch_scores
from .runtime import FLOATS, check_runnable
from .select_topk import launch as launch_selection

SCORES_AT_ONCE = 1 << 28  # 1 GiB of fp32


@torch.no_grad()
def lightning_select(q_idx, k_idx, w, k, k_scale=None, start=None, end=None):
    """`dsa_ref.lightning_select`: int32 [T, k]. Raises as there, and as `runtime.check_runnable` does."""
    T, S, start, end = check_index_scores(q_idx, k_idx, w, k_scale, start, end, FLOATS)
    check_count("k", k)
    check_runnable(q_idx=q_idx, k_idx=k_idx, w=w, k_scale=k_scale)
    rows = max(1, SCORES_AT_ONCE // S)
    indices = torch.empty(T, k, dtype=torch.int32, device=q_idx.device)
    for first in range(0, T, rows):
        part = slice(first, first + rows)
        ranges = start[part], end[part]
        scores = launch_scores(q_idx[part], k_idx, w[part], k_scale, *ranges)
        indices[part] = launch_selection(scores, k, *ranges)
    return indices
