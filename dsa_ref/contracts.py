"""Each step's argument checks, which return nothing: both packages refuse the same inputs alike.

They are made of the pieces in `arguments`, which says what is raised, and when values are looked at; whoever uses a
piece may import it from here. `floats` is what a package computes in: the reference takes fp64 too.
"""

import torch
from torch import Tensor

from .arguments import (  # noqa: F401 - for others
    E4M3,
    FLOATS,
    FP8_TILE,
    MAX_QUERIES,
    Array,
    Bound,
    check_count,
    check_distinct,
    check_dtype,
    check_eps,
    check_finite,
    check_fp8_v_dim,
    check_index_pages,
    check_indices,
    check_int,
    check_own_places,
    check_page_table,
    check_queries,
    check_ranges,
    check_row_width,
    check_scale,
    check_shapes,
    check_slots,
    check_slots_fit,
    default_splits,
    fp8_row_bytes,
    in_use,
    kind_of,
    page_tokens,
    part_length,
    row_ranges,
    splits_of,
    unchecked_values,
    values_readable,
)

LAYOUTS = ("interleaved", "half")
REDUCTIONS = ("mean", "sum")
SUMS = ("sorted", "atomic")  # how `sparse_attention_backward` sums dkv


def check_rope(x, positions, freqs, layout="half", floats=FLOATS) -> None:
    """Arguments of `rope` and `rotate_quantize`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor of shape [T, D] or [T, heads, D], got {kind_of(x)}")
    if x.dim() not in (2, 3):
        raise ValueError(f"x must have shape [T, D] or [T, heads, D], got {list(x.shape)}")
    check_shapes(x=(x, "T D" if x.dim() == 2 else "T heads D"), positions=(positions, "T"), freqs=(freqs, "R/2"))
    check_dtype("x", x, floats)
    check_dtype("positions", positions, (torch.int32, torch.int64))
    check_dtype("freqs", freqs, (torch.float32,))
    if 2 * freqs.shape[0] > x.shape[-1]:
        raise ValueError(f"freqs must have at most D/2 = {x.shape[-1] // 2} entries, got {freqs.shape[0]}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")


def check_vectors(x, floats=FLOATS, power_of_two=False) -> None:
    """The argument x [..., D] of `hadamard` (D a power of two) and `quantize`."""
    check_shapes(x=(x, "*... D"))
    check_dtype("x", x, floats)
    if power_of_two and x.shape[-1] & (x.shape[-1] - 1):
        raise ValueError(f"x must have a last dim that is a power of two, got {x.shape[-1]}")


def check_index_scores(q_idx, k_idx, w, k_scale, start, end, floats=FLOATS) -> None:
    """Arguments of `index_scores` and `lightning_select`."""
    check_shapes(q_idx=(q_idx, "T Hi Di"), k_idx=(k_idx, "S Di"), w=(w, "T Hi"), k_scale=(k_scale, "S | None"))
    check_dtype("q_idx", q_idx, (*floats, E4M3))
    check_dtype("k_idx", k_idx, (q_idx.dtype,))
    check_dtype("w", w, floats)
    if k_scale is not None:
        check_dtype("k_scale", k_scale, floats)
    check_ranges(len(q_idx), len(k_idx), q_idx.device, start, end)


def check_select_topk(scores, k, start, end, floats=FLOATS) -> None:
    """Arguments of `select_topk`."""
    check_shapes(scores=(scores, "T S"))
    check_dtype("scores", scores, floats)
    check_count("k", k)
    check_ranges(*scores.shape, scores.device, start, end)


def check_sparse_attention(q, kv, indices, scale, v_dim, floats=FLOATS, probe=None) -> None:
    """Arguments of `sparse_attention`."""
    check_shapes(q=(q, "T H D"), kv=(kv, "S D"), indices=(indices, "T k"), probe=(probe, "T k | None"))
    check_attention(q, kv, scale, v_dim, floats)
    if probe is not None:
        check_dtype("probe", probe, (torch.float32,))
    check_indices(indices, len(kv))
    check_distinct(indices)


def check_sparse_attention_backward(
    q, kv, indices, scale, v_dim, out, lse, dout, dlse, sums, floats=FLOATS
) -> None:  # fmt: skip
    """Arguments of `sparse_attention_backward`."""
    check_shapes(
        q=(q, "T H D"),
        kv=(kv, "S D"),
        indices=(indices, "T k"),
        out=(out, "T H v_dim"),
        lse=(lse, "T H"),
        dout=(dout, "T H v_dim"),
        dlse=(dlse, "T H | None"),
    )
    check_attention(q, kv, scale, v_dim, floats)
    if out.shape[2] != v_dim:
        raise ValueError(f"out must have shape [T, H, v_dim] with v_dim = {v_dim}, got {list(out.shape)}")
    for name, tensor in (("out", out), ("dout", dout)):
        check_dtype(name, tensor, (q.dtype,))
    for name, tensor in (("lse", lse), ("dlse", dlse)):
        if tensor is not None:
            check_dtype(name, tensor, (torch.promote_types(q.dtype, torch.float32),))
    if sums not in SUMS:
        raise ValueError(f"sums must be one of {SUMS}, got {sums!r}")
    check_indices(indices, len(kv))
    check_distinct(indices)


def check_dense_attention(q, kv, scale, v_dim, start, end) -> None:
    """Arguments of `dense_attention`."""
    check_shapes(q=(q, "T H D"), kv=(kv, "S D"))
    check_attention(q, kv, scale, v_dim)
    check_ranges(len(q), len(kv), q.device, start, end)


def check_mha_attention(q, k, v, scale, indices, start, end, floats=FLOATS) -> None:
    """Arguments of `mha_attention`."""
    check_shapes(q=(q, "T H Dq"), k=(k, "S H Dq"), v=(v, "S H Dv"), indices=(indices, "T k | None"))
    check_dtype("k", k, (q.dtype,))
    check_dtype("v", v, (q.dtype,))
    check_dtype("q", q, floats)
    check_scale(scale, q.dtype)
    if indices is not None:
        check_indices(indices, len(k))
        check_distinct(indices)
    check_ranges(len(q), len(k), q.device, start, end)


def check_indexer_loss(
    q_idx, k_idx, w, q, kv, scale, indices, start, end, lse=None, target=None, reduction="mean", floats=FLOATS
) -> None:
    """Arguments of `indexer_loss`: attention's side is q, kv and scale, or in the sparse stage `target` alone."""
    check_index_scores(q_idx, k_idx, w, None, start, end, floats)
    check_dtype("q_idx", q_idx, floats)  # FP8 values have a scale, for which there is no argument
    check_shapes(q_idx=(q_idx, "T Hi Di"), k_idx=(k_idx, "S Di"), indices=(indices, "T k | None"))
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if indices is not None:
        check_indices(indices, len(k_idx))
        check_distinct(indices)
    exact = tuple(dtype for dtype in (torch.float32, torch.float64) if dtype in floats)
    given = {name: x for name, x in {"q": q, "kv": kv, "scale": scale, "lse": lse}.items() if x is not None}
    if target is not None:
        if indices is None:
            raise ValueError("target must be None without indices, for whose places it is")
        if given:
            raise ValueError(f"{next(iter(given))} must be None with target, which is all that attention has to tell")
        check_shapes(indices=(indices, "T k"), target=(target, "T k"))
        check_dtype("target", target, exact)
        return
    for name in ("q", "kv", "scale"):
        if name not in given:
            raise ValueError(f"{name} must be given where target is not: the loss compares with attention")
    both = {"q_idx": (q_idx, "T Hi Di"), "k_idx": (k_idx, "S Di")}
    check_shapes(**both, q=(q, "T H D"), kv=(kv, "S D"), lse=(lse, "T H | None"))
    check_attention(q, kv, scale, v_dim=1, floats=floats)
    if lse is not None:
        check_dtype("lse", lse, exact)


def check_attention(q, kv, scale, v_dim, floats=FLOATS) -> None:
    """What the attention steps share."""
    check_dtype("q", q, floats)
    check_dtype("kv", kv, (q.dtype,))
    check_scale(scale, q.dtype)
    check_count("v_dim", v_dim)
    if v_dim > kv.shape[-1]:
        raise ValueError(f"v_dim must be at most D = {kv.shape[-1]}, got {v_dim}")


# Decode ---------------------------------------------------------------------------------------------------------------


def check_paged_index_scores(q_idx, index_pages, w, page_table, lengths) -> None:
    """Arguments of `paged_index_scores`."""
    check_shapes(
        q_idx=(q_idx, "B N Hi Di"),
        index_pages=(index_pages, "pages bytes"),
        w=(w, "B N Hi"),
        page_table=(page_table, "B P"),
        lengths=(lengths, "B"),
    )
    check_dtype("q_idx", q_idx, (E4M3,))
    check_dtype("w", w, (torch.float32,))
    check_queries("q_idx", q_idx)
    check_index_pages(index_pages, q_idx.shape[-1])
    check_page_table(page_table, lengths, len(index_pages), page_tokens(index_pages, q_idx.shape[-1]))


def check_paged_select(q_idx, index_pages, w, k, page_table, lengths) -> None:
    """Arguments of `paged_select`."""
    check_paged_index_scores(q_idx, index_pages, w, page_table, lengths)
    check_count("k", k)


def check_paged_sparse_attention(q, kv_pages, slots, scale, v_dim, splits=None, floats=FLOATS) -> None:
    """Arguments of `paged_sparse_attention`: kv_pages of uint8 hold FP8 rows, others rows of q's dtype."""
    check_shapes(q=(q, "B N H D"), kv_pages=(kv_pages, "pages page row"), slots=(slots, "B N k"))
    check_dtype("q", q, floats)
    check_dtype("kv_pages", kv_pages, (q.dtype, torch.uint8))
    check_queries("q", q)
    check_scale(scale, q.dtype)
    D = q.shape[-1]
    check_row_width("kv_pages", kv_pages, D, v_dim)
    if splits is not None:
        check_count("splits", splits)
    pages, page, _ = kv_pages.shape
    check_slots_fit("kv_pages", pages, page)
    check_indices(slots, pages * page, "slots")
    check_distinct(slots.flatten(0, 1), "slots")


def check_merge_parts(outs, lses) -> None:
    """Arguments of `merge_parts`."""
    check_shapes(outs=(outs, "*... v"), lses=(lses, "*... last"))
    if outs.dim() < 2 or lses.shape != outs.shape[:-1] or not len(outs):
        raise ValueError(
            f"lses must have shape [splits, ...] as outs has [splits, ..., v] with splits > 0, "
            f"got {list(lses.shape)} and {list(outs.shape)}"
        )
    check_dtype("outs", outs, (torch.float32, torch.float64))
    check_dtype("lses", lses, (outs.dtype,))


# Appending ------------------------------------------------------------------------------------------------------------


def check_rms_norm(x, weight, eps, floats=FLOATS) -> None:
    """Arguments of `rms_norm`."""
    check_shapes(x=(x, "T dim"), weight=(weight, "dim"))
    check_dtype("x", x, floats)
    check_dtype("weight", weight, floats)
    check_eps(eps)


def check_append_index(
    index_pages, slots, k, weight, bias, eps, positions, freqs, layout="half", floats=FLOATS
) -> None:
    """Arguments of `append_index`."""
    check_shapes(k=(k, "T Di"), slots=(slots, "T"), weight=(weight, "Di"), bias=(bias, "Di"))
    check_shapes(k=(k, "T Di"), index_pages=(index_pages, "P bytes"))
    check_rope(k, positions, freqs, layout, floats)
    check_vectors(k, floats, power_of_two=True)
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_dtype(name, tensor, floats)
    check_eps(eps)
    check_index_pages(index_pages, k.shape[1])
    check_own_places("index_pages", index_pages)
    check_slots(slots, len(index_pages) * page_tokens(index_pages, k.shape[1]))


def check_append_latents(kv_pages, slots, rows, weight, eps, positions, freqs, floats=FLOATS) -> None:
    """Arguments of `append_latents`."""
    check_shapes(rows=(rows, "T D"), slots=(slots, "T"), positions=(positions, "T"), freqs=(freqs, "R/2"))
    check_shapes(rows=(rows, "T D"), weight=(weight, "v_dim"), kv_pages=(kv_pages, "P page row"))
    D, v_dim = rows.shape[1], len(weight)
    if v_dim + 2 * len(freqs) != D:
        raise ValueError(f"rows must have D = v_dim + R = {v_dim} + {2 * len(freqs)} columns, got {D}")
    check_rope(rows, positions, freqs, floats=floats)
    check_dtype("weight", weight, floats)
    check_eps(eps)
    check_dtype("kv_pages", kv_pages, (rows.dtype, torch.uint8))
    check_row_width("kv_pages", kv_pages, D, v_dim if kv_pages.dtype == torch.uint8 else 1)
    check_own_places("kv_pages", kv_pages)
    check_slots(slots, kv_pages.shape[0] * kv_pages.shape[1])


def check_head_weights(x, weight, floats=FLOATS) -> None:
    """Arguments of `head_weights`."""
    check_shapes(x=(x, "T dim"), weight=(weight, "Hi dim"))
    check_dtype("x", x, floats)
    check_dtype("weight", weight, floats)


def check_index_queries(q, w, positions, freqs, layout="half", floats=FLOATS) -> None:
    """Arguments of `index_queries`."""
    check_shapes(q=(q, "T Hi Di"), w=(w, "T Hi"))
    check_dtype("w", w, (torch.float32,))
    check_rope(q, positions, freqs, layout, floats)
    check_vectors(q, floats, power_of_two=True)


def check_turn_into(out, x, positions, freqs, layout, floats=FLOATS) -> None:
    """Arguments of `turn_into`."""
    check_shapes(x=(x, "T heads R"), out=(out, "T heads R"))
    check_dtype("out", out, floats)
    check_own_places("out", out)
    check_rope(x, positions, freqs, layout, floats)
    if 2 * len(freqs) != x.shape[2]:
        raise ValueError(f"freqs must have R/2 = {x.shape[2] // 2} entries, got {len(freqs)}")


def check_place_tokens(table, lengths, sequences, N, page_size) -> None:
    """Arguments of `place_tokens`."""
    check_shapes(table=(table, "rows P"), lengths=(lengths, "rows"))
    check_shapes(table=(table, "rows P"), sequences=(sequences, "B"))
    check_dtype("table", table, (torch.int32,))
    check_dtype("lengths", lengths, (torch.int32,))
    check_dtype("sequences", sequences, (torch.int64,))
    check_count("page_size", page_size)
    check_int("N", N, 1, table.shape[1] * page_size)
    if not values_readable(sequences):
        return
    low, high = (int(value) for value in torch.aminmax(sequences))
    if low < 0 or high >= len(table):
        raise ValueError(f"sequences must lie in [0, {len(table)}), got {low if low < 0 else high}")
    low, high = (int(value) for value in torch.aminmax(lengths[sequences]))
    if low < 0 or high + N > table.shape[1] * page_size:
        places = table.shape[1] * page_size
        raise ValueError(f"lengths must lie in [0, {places - N}] for N = {N} more, got {low if low < 0 else high}")
    first = lengths[sequences].long()[:, None] + torch.arange(N, device=table.device)
    if (table[sequences].gather(1, first // page_size) < 0).any():
        raise ValueError("table must have pages for the next N tokens, got -1")
