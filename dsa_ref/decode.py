"""A decode step over paged caches: B sequences of different lengths, each with its N newest tokens as queries.

    scores     equation 1 over the positions that a query sees, read through its sequence's page table
    selection  SPEC section 4, as positions in the sequence and as physical slots page · (tokens a page) + place
    attention  equation 2 over the rows at those slots, in parts that are merged in a fixed order

lengths count the N new tokens, whose keys are stored already: query n of sequence b sees the positions below
lengths[b] - N + 1 + n, none where that is not positive. What lies behind is never looked at. A row's results follow
from that row and from k, to the bit, whatever else is in the batch.

Source: DeepSeek-V3.2-Exp report, equations 1 and 2; SPEC sections 4, 6 and 10.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .blocks import row_blocks, visible
from .contracts import (
    Array,
    check_merge_parts,
    check_paged_index_scores,
    check_paged_select,
    check_paged_sparse_attention,
    page_tokens,
    part_length,
    splits_of,
)
from .index_scores import index_scores_loops, score_block
from .paged import read_index, read_kv, unpack_index_loops, unpack_kv_loops
from .select_topk import select_block, select_topk_loops
from .sparse_attention import attend, sparse_attention_loops


def paged_index_scores_loops(q_idx: Array, index_pages: Array, w: Array, page_table: Array, lengths: Array) -> Array:
    """Equation 1 for one sequence after the other, its keys brought together page by page. float64 [B, N, P · page]."""
    B, N, _, Di = q_idx.shape
    page_size = index_pages.shape[1] // (Di + 4)
    scores = np.full((B, N, page_table.shape[1] * page_size), -np.inf)
    for b in range(B):
        pages = page_table[b, : -(-lengths[b] // page_size)]
        k_idx, k_scale = unpack_index_loops(index_pages[pages], Di)
        seen = [max(0, lengths[b] - N + 1 + n) for n in range(N)]
        scores[b, :, : len(k_idx)] = index_scores_loops(q_idx[b], k_idx, w[b], k_scale, [0] * N, seen)
    return scores


def paged_select_loops(
    q_idx: Array, index_pages: Array, w: Array, k: int, page_table: Array, lengths: Array
) -> tuple[Array, Array]:
    """The contract of SPEC section 4 for each query -> (positions int32 [B, N, k], slots int32 [B, N, k])."""
    B, N, _, Di = q_idx.shape
    page_size = index_pages.shape[1] // (Di + 4)
    scores = paged_index_scores_loops(q_idx, index_pages, w, page_table, lengths)
    positions, slots = np.full((B, N, k), -1, dtype=np.int32), np.full((B, N, k), -1, dtype=np.int32)
    for b in range(B):
        seen = [max(0, lengths[b] - N + 1 + n) for n in range(N)]
        positions[b] = select_topk_loops(scores[b], k, [0] * N, seen)
        for n in range(N):
            for i, s in enumerate(positions[b, n]):
                if s >= 0:
                    slots[b, n, i] = page_table[b, s // page_size] * page_size + s % page_size
    return positions, slots


def paged_sparse_attention_loops(
    q: Array, kv_pages: Array, slots: Array, scale: float, v_dim: int
) -> tuple[Array, Array]:
    """Equation 2 for one query after the other, float64 -> (out [B, N, H, v_dim], lse [B, N, H]).

    kv_pages: uint8 [pages, page, row] for FP8 rows, else numbers [pages, page, D].
    """
    B, N, H, D = q.shape
    out, lse = np.zeros((B, N, H, v_dim)), np.full((B, N, H), -np.inf)
    page_size = kv_pages.shape[1]
    for b in range(B):
        for n in range(N):
            rows = [kv_pages[slot // page_size, slot % page_size] for slot in slots[b, n] if slot >= 0]
            kv = np.array(rows).reshape(len(rows), kv_pages.shape[2])
            if kv_pages.dtype == np.uint8:
                kv = unpack_kv_loops(kv.astype(np.uint8), v_dim)
            every = np.arange(len(rows))[None]
            out[b, n], lse[b, n] = (x[0] for x in sparse_attention_loops(q[b, n][None], kv, every, scale, v_dim))
    return out, lse


def merge_parts_loops(outs: Array, lses: Array) -> tuple[Array, Array]:
    """One softmax from those of disjoint parts: each part's output counts by its share of the exponentials. float64."""
    out, lse = np.zeros(outs.shape[1:]), np.full(lses.shape[1:], -np.inf)
    for place in np.ndindex(lses.shape[1:]):
        largest = max(lses[(i, *place)] for i in range(len(lses)))
        if largest > -np.inf:
            total = 0.0
            for i in range(len(lses)):  # in ascending order
                share = np.exp(lses[(i, *place)] - largest)
                if share > 0:
                    total += share
                    out[place] += share * outs[(i, *place)]
            out[place] /= total
            lse[place] = largest + np.log(total)
    return out, lse


@torch.no_grad()
def paged_index_scores(q_idx: Tensor, index_pages: Tensor, w: Tensor, page_table: Tensor, lengths: Tensor) -> Tensor:
    """Scores fp32 [B, N, P · page] of what each query sees, by position in its sequence, -inf elsewhere.

    q_idx: float8_e4m3fn [B, N, Hi, Di], N at most 4; index_pages: uint8 [pages, page · (Di + 4)]; w: fp32 [B, N, Hi],
    with the query's scale in it; page_table: int32 [B, P], of which sequence b uses the first ceil(lengths[b] / page)
    entries; lengths: int32 [B], with the N new tokens. Without gradient.

    Raises: ValueError for other shapes or devices, lengths outside of [0, P · page], used entries of page_table outside
    of [0, pages) or twice in a row; TypeError for other dtypes.
    """
    check_paged_index_scores(q_idx, index_pages, w, page_table, lengths)
    B, N, _, Di = q_idx.shape
    scores = torch.full((B * N, page_table.shape[1] * page_tokens(index_pages, Di)), -torch.inf, device=q_idx.device)
    ends = seen_by(lengths, N)
    for rows, keys, block in _score_blocks(q_idx, index_pages, w, page_table, ends):
        scores[rows, keys] = block.masked_fill(~visible(torch.zeros_like(ends), ends, rows, keys), -torch.inf)
    return scores.unflatten(0, (B, N))


@torch.no_grad()
def paged_select(
    q_idx: Tensor, index_pages: Tensor, w: Tensor, k: int, page_table: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """The k best positions of each query and their physical slots: two int32 tensors [B, N, k] in the same order.

    Arguments as for `paged_index_scores`; k may exceed what a query sees. Ascending positions, then -1 in both.

    Raises: as there, and ValueError for k < 1 or NaN among the scores of a row that sees it.
    """
    check_paged_select(q_idx, index_pages, w, k, page_table, lengths)
    B, N, _, Di = q_idx.shape
    positions = torch.full((B * N, k), -1, dtype=torch.int32, device=q_idx.device)
    ends = seen_by(lengths, N)
    for rows, keys, block in _score_blocks(q_idx, index_pages, w, page_table, ends):
        chosen = select_block(block, k, torch.zeros_like(ends), ends, rows, keys)
        positions[rows, : chosen.shape[1]] = chosen
    positions = positions.unflatten(0, (B, N))
    return positions, slots_of(positions, page_table, page_tokens(index_pages, Di))


def seen_by(lengths: Tensor, N: int) -> Tensor:
    """How many positions each query sees: int32 [B · N]. lengths: int32 [B]."""
    new = torch.arange(1 - N, 1, dtype=torch.int32, device=lengths.device)
    return (lengths[:, None] + new).clamp(min=0).flatten()


def slots_of(positions: Tensor, page_table: Tensor, page_size: int) -> Tensor:
    """The physical slots int32 [B, N, k] of positions in the sequences; -1 stays -1."""
    there = positions.clamp(min=0).long().flatten(1)
    pages = page_table.gather(1, there // page_size)  # the first entry, which may be anything, where nothing is there
    slots = pages * page_size + (there % page_size).to(torch.int32)
    return slots.view_as(positions).masked_fill(positions < 0, -1)


def _score_blocks(q_idx, index_pages, w, page_table, ends) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (rows, keys, scores [rows, keys]): rows of [B · N], of one sequence at a time, and all that they see."""
    N, Di = q_idx.shape[1], q_idx.shape[3]
    page_size = page_tokens(index_pages, Di)
    for b in range(len(q_idx)):
        seen = ends[b * N : (b + 1) * N]
        for rows, keys in row_blocks(torch.zeros_like(seen), seen, per_pair=w.shape[2]):
            if keys.stop:
                pages = index_pages[page_table[b, : -(-keys.stop // page_size)].long()]
                k_idx, k_scale = (x[: keys.stop] for x in read_index(pages, Di))
                block = score_block(q_idx[b, rows], k_idx, w[b, rows], k_scale, torch.float32)
                yield slice(b * N + rows.start, b * N + rows.stop), keys, block


def paged_sparse_attention(
    q: Tensor, kv_pages: Tensor, slots: Tensor, scale: float, v_dim: int, splits: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attend from each query to the rows at its slots: (out [B, N, H, v_dim] in q.dtype, lse fp32 [B, N, H]).

    q: float [B, N, H, D], N at most 4; kv_pages: FP8 rows uint8 [pages, page, row] or [pages, page, D] in q's dtype;
    slots: int32 [B, N, k], distinct within a row, -1 (nothing) anywhere; scale > 0; v_dim: the first v_dim columns are
    the value. splits: a row's k places are cut into this many parts of whole 64s, and the parts merged in ascending
    order; None: `default_splits(k)`. Another number gives other bits, the batch never does. lse: natural logarithm. A
    row with nothing gives 0 and -inf. Computed in fp32 (fp64 for fp64, lse too).

    Raises: ValueError for other shapes or devices, rows of another width, slots outside of [-1, pages · page) or twice
    in a row; TypeError for other dtypes.
    """
    check_paged_sparse_attention(q, kv_pages, slots, scale, v_dim, splits)
    B, N, H, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    places = cut(slots.flatten(0, 1), splits_of(slots.shape[2], splits))
    out, lse = q.new_empty(B * N, H, v_dim), q.new_empty(B * N, H, dtype=dtype)
    for row, parts in enumerate(places):
        kv = rows_at(kv_pages, parts, v_dim, dtype)
        query = q[row // N, row % N].to(dtype).expand(len(parts), -1, -1)
        merged, lse[row] = merge(*attend(query, kv, kv[..., :v_dim], scale, parts >= 0, "tsd"))
        out[row] = merged.to(q.dtype)
    return out.unflatten(0, (B, N)), lse.unflatten(0, (B, N))


def cut(slots: Tensor, splits: int) -> Tensor:
    """Lists [rows, k] -> [rows, splits, part], the last parts filled with -1."""
    part = part_length(slots.shape[1], splits)
    return torch.nn.functional.pad(slots, (0, splits * part - slots.shape[1]), value=-1).unflatten(1, (splits, part))


def rows_at(kv_pages: Tensor, slots: Tensor, v_dim: int, dtype: torch.dtype) -> Tensor:
    """The rows [..., D] at slots [...] in dtype, and zeros where there is -1: no row is read for that."""
    page_size, there = kv_pages.shape[1], slots >= 0
    taken = slots[there].long()
    rows = kv_pages[taken // page_size, taken % page_size]
    rows = read_kv(rows, v_dim, dtype) if kv_pages.dtype == torch.uint8 else rows.to(dtype)
    out = rows.new_zeros(*slots.shape, rows.shape[-1])
    out[there] = rows
    return out


def merge_parts(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax from those of disjoint parts: (out [..., v], lse [...]), both in the inputs' dtype.

    outs: fp32 or fp64 [splits, ..., v]; lses: the same dtype [splits, ...], natural logarithm. Summed in ascending
    order. A part whose lse is -inf counts for nothing, whatever its out holds; a row without another gives 0 and -inf.

    Raises: ValueError for other shapes or devices, TypeError for other dtypes.
    """
    check_merge_parts(outs, lses)
    return merge(outs, lses)


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_parts` on checked arguments."""
    nothing = lses == -torch.inf
    outs = outs.masked_fill(nothing[..., None], 0.0)
    largest = lses.detach().amax(dim=0).clamp(min=torch.finfo(lses.dtype).min)
    total, out = torch.zeros_like(lses[0]), torch.zeros_like(outs[0])
    for part, part_lse in zip(outs, lses, strict=True):
        share = (part_lse - largest).exp()
        total = total + share
        out = out + share[..., None] * part
    empty = total == 0
    safe = total.masked_fill(empty, 1.0)
    return out / safe[..., None], (largest + safe.log()).masked_fill(empty, -torch.inf)
