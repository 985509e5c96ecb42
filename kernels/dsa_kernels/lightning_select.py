"""Score and select: some rows at a time, two kernels that meet in a buffer of at most `runtime.SCORES_AT_ONCE` scores.

On Hopper, for many queries and long rows, one kernel does both without a score matrix; see `hopper.lightning_select`.
The rows that it flags are redone by `flagged.select_again`, which needs no luck.
"""

import torch

from dsa_ref.contracts import check_count, check_index_scores, row_ranges

from . import flagged, runtime
from .index_scores import launch as launch_scores
from .runtime import FLOATS, check_runnable, dispatched, hopper_variant
from .select_topk import launch as launch_selection
from .select_topk import padded, refuse_nan


@torch.no_grad()
def lightning_select(
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    w: torch.Tensor,
    k: int,
    k_scale: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
    variant: str | None = None,
) -> torch.Tensor:
    """`dsa_ref.lightning_select`: the k best keys of each query, int32 [T, k], in no specified order, -1 after them.

    q_idx [T, Hi, Di], k_idx [S, Di], w [T, Hi], k_scale [S], start and end int32 [T]: as in `index_scores`; k >= 1, may
    exceed S. No gradient.
    variant: "hopper" (what `index_scores` needs, and at most 2048 of at least 24,576 keys) is the fused kernel;
    "portable" is portable `index_scores`, then portable `select_topk`; "widened" is its scores, and then portable, too;
    None is "hopper" where it can serve and has `runtime.FEWEST_FOR_HOPPER` queries, else the two steps, each as it
    chooses by itself. All give the same set.

    Raises: as the reference does (fp64 is a TypeError here); ValueError as `runtime.check_runnable` does, and for a
    variant that is unknown or cannot serve these inputs. Source: SPEC sections 2 and 4.
    """
    if dispatched():
        scored = q_idx.detach(), k_idx.detach(), w.detach()
        k_scale = None if k_scale is None else k_scale.detach()
        return torch.ops.dsa_kernels.lightning_select(*scored, k, k_scale, start, end, variant)
    check_index_scores(q_idx, k_idx, w, k_scale, start, end, FLOATS)
    check_count("k", k)
    T, S = len(q_idx), len(k_idx)
    width = min(k, S)
    start, end = row_ranges(T, S, q_idx.device, start, end)
    q_idx, k_idx, w = q_idx.detach(), k_idx.detach(), w.detach()  # a choice has no derivative, in forward mode neither
    k_scale = None if k_scale is None else k_scale.detach()
    check_runnable(q_idx=q_idx, k_idx=k_idx, w=w, k_scale=k_scale)
    default = "hopper" if T >= runtime.FEWEST_FOR_HOPPER else "portable"
    hopper = hopper_variant("lightning_select", variant, default, q_idx, k_scale, S, width)
    out = torch.empty(T, width, dtype=torch.int32, device=q_idx.device)
    if hopper and T:
        start, end = start.contiguous(), end.contiguous()
        nan, redo = hopper.lightning_select(q_idx, k_idx, w, width, k_scale, start, end, out)
        flagged.select_again(q_idx, k_idx, w, width, k_scale, start, end, redo, out, nan)
    else:
        nan = torch.zeros(T, dtype=torch.int32, device=q_idx.device)
        for part in _parts(T, runtime.SCORES_AT_ONCE // S):
            ranges = start[part], end[part]
            scores = launch_scores(q_idx[part], k_idx, w[part], k_scale, *ranges, variant)
            launch_selection(
                scores, width, *ranges, out[part], nan[part], "portable" if variant == "widened" else variant
            )
    refuse_nan(nan)
    return padded(out, k)


def _parts(T, rows):
    """Slices of at least one row, `rows` each, that cover T rows."""
    rows = max(1, rows)
    return [slice(first, first + rows) for first in range(0, T, rows)]
