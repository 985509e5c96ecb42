"""Score and select: some rows at a time, two kernels that meet in a buffer of at most SCORES_AT_ONCE scores.

On Hopper, for many queries and long rows, one kernel does both without a score matrix; see `hopper.lightning_select`.
The rows that it flags are redone here by the two kernels.
"""

import torch

from dsa_ref.contracts import check_count, check_index_scores, values_readable

from .index_scores import FEWEST_FOR_HOPPER
from .index_scores import launch as launch_scores
from .runtime import FLOATS, check_runnable, hopper_variant
from .select_topk import launch as launch_selection

SCORES_AT_ONCE = 1 << 28  # 1 GiB of fp32


REDONE_AT_ONCE = 1 << 27


@torch.no_grad()
def lightning_select(q_idx, k_idx, w, k, k_scale=None, start=None, end=None, variant=None):
    """`dsa_ref.lightning_select`: int32 [T, k]. Raises as there, and as `runtime.check_runnable` does.

    variant: "portable", "hopper" (what `index_scores` needs, and at most 2048 of at least 24,576 keys), or None for
    "hopper" where it can serve and has 512 queries, else "portable". Both give the same set. ValueError for any
    other, and for "hopper" where it cannot serve.
    """
    T, S, start, end = check_index_scores(q_idx, k_idx, w, k_scale, start, end, FLOATS)
    check_count("k", k)
    check_runnable(q_idx=q_idx, k_idx=k_idx, w=w, k_scale=k_scale)
    default = "hopper" if T >= FEWEST_FOR_HOPPER else "portable"
    hopper = hopper_variant("lightning_select", variant, default, q_idx, k_scale, S, k)
    indices = torch.empty(T, k, dtype=torch.int32, device=q_idx.device)
    redo = None
    if hopper and T:
        nan, redo = hopper.lightning_select(q_idx, k_idx, w, k, k_scale, start, end, indices)
        if values_readable(nan):
            if nan.any():
                raise ValueError(f"scores must not be NaN, got NaN in row {int(nan.nonzero()[0])}")
            if not redo.any():
                return indices
    rows = max(1, (REDONE_AT_ONCE if hopper else SCORES_AT_ONCE) // S)
    for first in range(0, T, rows):
        part = slice(first, first + rows)
        again = None if redo is None else redo[part]
        ranges = start[part], end[part]
        scores = launch_scores(q_idx[part], k_idx, w[part], k_scale, *ranges, variant if again is None else None, again)
        launch_selection(scores, k, *ranges, out=indices[part], redo=again)
    return indices
