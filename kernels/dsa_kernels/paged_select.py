"""Score and select in a decode step: scores in a buffer, then the best positions and their physical slots.

Three launches: `paged_index_scores`, which also sets the counters of the next two to zero; `topk.decode._select`; and
`topk.decode._tournament`, which ends at once unless a row's list did not fit. Scores that no query sees are never
written, and never read. Rows are taken some at a time where their scores would need more than
`runtime.SCORES_AT_ONCE`.

Bytes: 132 of the cache a key for all queries of a sequence, and 4 written and read a score, which mostly stay in L2.
"""

import torch

from dsa_ref.contracts import check_paged_select, page_tokens

from . import runtime
from .paged_index_scores import choose
from .paged_index_scores import launch as launch_scores
from .runtime import check_runnable
from .topk import decode


@torch.no_grad()
def paged_select(
    q_idx: torch.Tensor,
    index_pages: torch.Tensor,
    w: torch.Tensor,
    k: int,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    variant: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dsa_ref.paged_select`: the k best positions of each query and their slots, two int32 tensors [B, N, k].

    q_idx, index_pages, w, page_table, lengths and variant: as in `paged_index_scores`; k >= 1, may exceed what a query
    sees. Both results stand in ascending order of position, -1 after them, and are exact whatever the scores are: the
    same bits in every call and in any batch. Nothing waits for the GPU: NaN in a visible score is not refused, but
    counts as larger than +inf (or smaller than -inf if its sign bit is set).

    k up to `topk.decode.LARGEST_LISTED_K` takes one read of the scores, up to `LARGEST_K` a tournament of chunks,
    beyond that `topk.radix` selects, a program a row.

    Raises: as the reference does, but for NaN; ValueError as `runtime.check_runnable` does, and for a variant that is
    unknown or cannot serve these inputs. Source: SPEC sections 2, 4 and 10.
    """
    check_paged_select(q_idx, index_pages, w, k, page_table, lengths)
    check_runnable(q_idx=q_idx, index_pages=index_pages, w=w)
    hopper = choose(variant, q_idx, index_pages, page_table)
    B, N, _, Di = q_idx.shape
    page, device = page_tokens(index_pages, Di), q_idx.device
    S = page_table.shape[1] * page
    positions = torch.empty(B, N, k, dtype=torch.int32, device=device)
    slots = torch.empty_like(positions)
    stride = decode.row_stride(S)
    at_once = max(1, runtime.SCORES_AT_ONCE // (N * stride))
    for first in range(0, B, at_once):
        part = slice(first, min(first + at_once, B))
        rows = (part.stop - first) * N
        scores = torch.empty(part.stop - first, N, stride, dtype=torch.float32, device=device)
        zeros = torch.empty(decode.counters(rows, S), dtype=torch.int32, device=device)
        table, ends = page_table[part].contiguous(), lengths[part].contiguous()
        launch_scores(
            q_idx[part], index_pages, w[part], table, ends, scores, zeros, widened=variant == "widened", hopper=hopper
        )
        decode.launch(
            scores.view(rows, stride), table, ends, N, S, page, min(k, S), positions[part].view(rows, k),
            slots[part].view(rows, k), zeros,
        )  # fmt: skip
    return positions, slots
