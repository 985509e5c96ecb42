"""Argument checks, which return nothing, and the per-row ranges: both packages refuse the same inputs alike.

First the step functions' own checks, then the pieces they are made of. `floats` is what a package computes in: the
reference takes fp64 too. Every check raises TypeError for a wrong type or dtype and ValueError for a wrong shape,
device or value; the message names the argument, what was wanted and what was got.

Checks that need a tensor's *values* (ranges, indices, NaN) make the host wait for the GPU. While a CUDA graph is being
captured that is impossible, and inside `unchecked_values` it is not wanted: those checks alone are left out there.
Validate once before.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
Bound = Tensor | Array | None  # a `start` or `end`: int32 [T], or None for the causal default (see `row_ranges`)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
E4M3 = torch.float8_e4m3fn
LAYOUTS = ("interleaved", "half")
MAX_QUERIES = 4  # N, query tokens a sequence in a decode step
FP8_TILE = 128  # latent dims that share a scale in an FP8 row
_unchecked = contextvars.ContextVar("unchecked values", default=False)  # of this thread, or asynchronous task, alone


def check_rope(x, positions, freqs, layout="half", floats=FLOATS) -> None:
    """Arguments of `rope` and `rotate_quantize`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor of shape [T, D] or [T, heads, D], got {_kind(x)}")
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


def check_sparse_attention(q, kv, indices, scale, v_dim, floats=FLOATS) -> None:
    """Arguments of `sparse_attention`."""
    check_shapes(q=(q, "T H D"), kv=(kv, "S D"), indices=(indices, "T k"))
    check_attention(q, kv, scale, v_dim, floats)
    check_indices(indices, len(kv))
    check_distinct(indices)


def check_dense_attention(q, kv, scale, v_dim, start, end) -> None:
    """Arguments of `dense_attention`."""
    check_shapes(q=(q, "T H D"), kv=(kv, "S D"))
    check_attention(q, kv, scale, v_dim)
    check_ranges(len(q), len(kv), q.device, start, end)


def check_mha_attention(q, k, v, scale, indices, start, end) -> None:
    """Arguments of `mha_attention`."""
    check_shapes(q=(q, "T H Dq"), k=(k, "S H Dq"), v=(v, "S H Dv"), indices=(indices, "T k | None"))
    check_dtype("k", k, (q.dtype,))
    check_dtype("v", v, (q.dtype,))
    check_dtype("q", q, FLOATS)
    check_scale(scale)
    if indices is not None:
        check_indices(indices, len(k))
        check_distinct(indices)
    check_ranges(len(q), len(k), q.device, start, end)


def check_indexer_loss(q_idx, k_idx, w, q, kv, scale, indices, start, end) -> None:
    """Arguments of `indexer_loss`."""
    check_index_scores(q_idx, k_idx, w, None, start, end)
    both = {"q_idx": (q_idx, "T Hi Di"), "k_idx": (k_idx, "S Di")}
    check_shapes(**both, q=(q, "T H D"), kv=(kv, "S D"), indices=(indices, "T k | None"))
    check_dtype("q_idx", q_idx, FLOATS)  # FP8 values have a scale, for which there is no argument
    check_attention(q, kv, scale, v_dim=1)
    if indices is not None:
        check_indices(indices, len(kv))
        check_distinct(indices)


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
    check_scale(scale)
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


def check_queries(name: str, tensor: Tensor) -> None:
    """``tensor`` [B, N, ...] must have at most MAX_QUERIES query tokens a sequence."""
    if tensor.shape[1] > MAX_QUERIES:
        raise ValueError(f"{name} must have at most N = {MAX_QUERIES} query tokens a sequence, got {tensor.shape[1]}")


def check_index_pages(index_pages: Tensor, index_dim: int) -> None:
    """``index_pages`` must be bytes, and its pages whole tokens of ``index_dim`` values and a scale."""
    check_dtype("index_pages", index_pages, (torch.uint8,))
    token, width = index_dim + 4, index_pages.shape[1]
    if width % token:
        raise ValueError(f"index_pages must have pages of a multiple of Di + 4 = {token} bytes, got {width}")
    check_slots_fit("index_pages", len(index_pages), width // token)


def check_row_width(name: str, kv_pages: Tensor, D: int, v_dim: int) -> None:
    """The rows of ``kv_pages`` must be FP8 rows where its dtype is uint8, else D numbers; v_dim in [1, D]."""
    check_count("v_dim", v_dim)
    if v_dim > D:
        raise ValueError(f"v_dim must be at most D = {D}, got {v_dim}")
    wanted, kind = D, f"D = {D} numbers"
    if kv_pages.dtype == torch.uint8:
        check_fp8_v_dim(v_dim)
        wanted = fp8_row_bytes(D, v_dim)
        kind = f"{wanted} bytes (FP8, D = {D}, v_dim = {v_dim})"
    if kv_pages.shape[-1] != wanted:
        raise ValueError(f"{name} must have rows of {kind}, got {kv_pages.shape[-1]}")


def check_fp8_v_dim(v_dim: int, name: str = "v_dim") -> None:
    """The latent of an FP8 row: below one tile, or whole tiles."""
    check_count(name, v_dim)
    if v_dim > FP8_TILE and v_dim % FP8_TILE:
        raise ValueError(f"{name} must be below {FP8_TILE} or a multiple of it in FP8 rows, got {v_dim}")


def check_slots_fit(name: str, pages: int, page: int) -> None:
    """Physical slots are int32."""
    if pages * page >= 1 << 31:
        raise ValueError(f"{name} must hold fewer than 2^31 tokens, got {pages} pages of {page}")


def check_page_table(page_table: Tensor, lengths: Tensor, pages: int, page: int) -> None:
    """page_table int32 [B, P], lengths int32 [B] in [0, P · page]; what a length uses of its row: distinct pages."""
    check_dtype("page_table", page_table, (torch.int32,))
    check_dtype("lengths", lengths, (torch.int32,))
    if not values_readable(lengths):
        return
    B, P = page_table.shape
    bad = (lengths < 0) | (lengths > P * page)
    if bad.any():
        b = int(bad.nonzero()[0])
        raise ValueError(f"lengths must lie in [0, {P * page}], {P} pages of {page}, got {int(lengths[b])} in row {b}")
    used = torch.arange(P, device=lengths.device) * page < lengths[:, None]
    bad = used & ((page_table < 0) | (page_table >= pages))
    if bad.any():
        b, p = bad.nonzero()[0].tolist()
        raise ValueError(
            f"page_table must name pages in [0, {pages}), got {int(page_table[b, p])} in row {b}, page {p}"
        )
    ordered = page_table.masked_fill(~used, -1).sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        b, p = twice.nonzero()[0].tolist()
        raise ValueError(f"page_table must name a page once in a sequence, got {int(ordered[b, p])} twice in row {b}")


def page_tokens(index_pages: Tensor, index_dim: int) -> int:
    """Tokens a page of an index cache."""
    return index_pages.shape[1] // (index_dim + 4)


def fp8_row_bytes(D: int, v_dim: int) -> int:
    """Bytes of an FP8 row: v_dim e4m3 values, an fp32 scale for each tile of them, D - v_dim values of bf16."""
    return v_dim + 4 * -(-v_dim // FP8_TILE) + 2 * (D - v_dim)


def default_splits(k: int) -> int:
    """Into how many parts a list of k places is cut, where the caller does not say: a function of k alone."""
    return min(16, -(-k // 128))


def part_length(k: int, splits: int) -> int:
    """Places of a part: a multiple of 64. The last parts may be short, or empty."""
    tiles = -(-k // 64)
    return -(-tiles // splits) * 64


def check_attention(q, kv, scale, v_dim, floats=FLOATS) -> None:
    """What the attention steps share."""
    check_dtype("q", q, floats)
    check_dtype("kv", kv, (q.dtype,))
    check_scale(scale)
    check_count("v_dim", v_dim)
    if v_dim > kv.shape[-1]:
        raise ValueError(f"v_dim must be at most D = {kv.shape[-1]}, got {v_dim}")


def check_shapes(**arguments) -> None:
    """Check tensors against symbolic shapes: ``check_shapes(q=(q, "T H D"), kv=(kv, "S D"))``.

    A symbol has one size wherever it occurs, and only T may be 0. A leading ``*`` stands for any dims; what ends in
    ``| None`` may be None. All tensors must be on one device.
    """
    sizes, origin, first = {}, {}, None
    for name, (tensor, spec) in arguments.items():
        if tensor is None and spec.endswith(" | None"):
            continue
        symbols = spec.removesuffix(" | None").split()
        wanted = f"shape [{', '.join(symbols)}]"
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor of {wanted}, got {_kind(tensor)}")
        shape = list(tensor.shape)
        if symbols[0].startswith("*"):
            symbols, shape = symbols[1:], shape[1 - len(symbols) :]
        if len(shape) != len(symbols):
            raise ValueError(f"{name} must have {wanted}, got {list(tensor.shape)}")
        for symbol, size in zip(symbols, shape, strict=True):
            same, source = sizes.setdefault(symbol, size), origin.setdefault(symbol, name)
            if size != same:
                raise ValueError(f"{name} must have {wanted} with {symbol} = {same} (as in {source}), got {shape}")
            if size == 0 and symbol != "T":
                raise ValueError(f"{name} must have {wanted} with {symbol} > 0, got {shape}")
        first = first or (name, tensor)
        if tensor.device != first[1].device:
            raise ValueError(f"{name} must be on {first[1].device} like {first[0]}, got {tensor.device}")


def check_dtype(name: str, tensor: Tensor, allowed) -> None:
    """``tensor.dtype`` must be one of ``allowed``."""
    if tensor.dtype not in allowed:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name} must have dtype {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_count(name: str, value) -> None:
    """``value`` must be an int of at least 1."""
    check_int(name, value, 1)


def check_int(name: str, value, low: int, high: int | None = None) -> None:
    """``value`` must be an int in [low, high], of at least ``low`` where high is None."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {_kind(value)}")
    if value < low or high is not None and value > high:
        wanted = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {wanted}, got {value}")


def check_scale(value) -> None:
    """The softmax scale must be a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"scale must be a float, got {_kind(value)}")
    if not 0.0 < value < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {value}")


def check_ranges(T: int, S: int, device, start, end) -> None:
    """start, end: int32 [T] with 0 <= start <= end <= S, or None for the causal default, which needs T <= S."""
    if end is None and T > S:
        raise ValueError(f"T = {T} queries cannot be the last of S = {S} positions: pass start and end")
    given = {name: value for name, value in (("start", start), ("end", end)) if value is not None}
    for name, value in given.items():
        check_shapes(**{name: (value, "T")})
        check_dtype(name, value, (torch.int32,))
        if len(value) != T:
            raise ValueError(f"{name} must have shape [T] with T = {T}, got {list(value.shape)}")
        if value.device != torch.device(device):
            raise ValueError(f"{name} must be on {device}, got {value.device}")
    if given and T and values_readable(start if end is None else end):
        start, end = row_ranges(T, S, device, start, end)
        bad = (start < 0) | (end > S) | (start > end)
        if bad.any():
            t = int(bad.nonzero()[0])
            raise ValueError(
                f"{'end' if end[t] > S else 'start'} must keep 0 <= start <= end <= S = {S} in every row, "
                f"got [{int(start[t])}, {int(end[t])}) in row {t}"
            )


def row_ranges(T: int, S: int, device, start: Bound = None, end: Bound = None) -> tuple[Tensor, Tensor]:
    """The half-open key range [start[t], end[t]) of each query row, as two int32 tensors [T] on `device`.

    None is the causal default with the queries being the last T of S positions: start = 0, end[t] = S - T + t + 1.
    """
    if start is None:
        start = torch.zeros(T, dtype=torch.int32, device=device)
    if end is None:
        end = torch.arange(S - T + 1, S + 1, dtype=torch.int32, device=device)
    return start, end


def check_indices(indices: Tensor, S: int, name: str = "indices") -> None:
    """``indices`` must be int32, and every entry -1 (nothing) or a row of a table of S rows."""
    check_dtype(name, indices, (torch.int32,))
    if indices.numel() and values_readable(indices):
        low, high = (int(value) for value in torch.aminmax(indices))
        if low < -1 or high >= S:
            raise ValueError(f"{name} must lie in [-1, S) with S = {S}, got {low if low < -1 else high}")


def check_distinct(indices: Tensor, name: str = "indices") -> None:
    """No index may stand twice in a row of ``indices`` [T, k], but for -1: a row's selection is a set."""
    if not indices.numel() or not values_readable(indices):
        return
    indices = in_use(indices)
    earlier, later = indices[:, :-1], indices[:, 1:]
    if ((later < 0) | (earlier >= 0) & (later > earlier)).all():
        return  # they ascend, as the reference's do: no need to sort
    ordered = indices.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        t, place = twice.nonzero()[0].tolist()
        raise ValueError(f"{name} must be distinct within a row, got {int(ordered[t, place])} twice in row {t}")


def in_use(indices: Tensor) -> Tensor:
    """Index lists [T, k] up to the last column, but at least one, that holds an index: k may be far above it."""
    columns = (indices.amax(dim=0) >= 0).nonzero() if len(indices) else indices
    return indices[:, : int(columns[-1]) + 1 if len(columns) else 1]


@contextlib.contextmanager
def unchecked_values() -> Iterator[None]:
    """Inside, this thread's steps leave out the checks that need a tensor's values, which make the host wait for a GPU.

    For values known to be good, as a selection that `lightning_select` has just made: there bad ranges, an index that
    names no key or a key twice, NaN and infinity give undefined results, or read outside a tensor, where they would
    raise. Shapes, dtypes and devices are checked as ever. (The reference's own selection always looks for NaN.)
    """
    token = _unchecked.set(True)
    try:
        yield
    finally:
        _unchecked.reset(token)


def values_readable(tensor: Tensor) -> bool:
    """Whether the host may wait for a value: not while a CUDA graph is being captured, nor in `unchecked_values`."""
    return not (_unchecked.get() or tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _kind(value) -> str:
    return f"{type(value).__name__} {value!r}" if isinstance(value, (bool, int, float, str)) else type(value).__name__


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
    check_count("N", N)
    check_count("page_size", page_size)
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


def check_eps(eps) -> None:
    """A norm's eps must be a positive finite number."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a float, got {_kind(eps)}")
    if not 0.0 < eps < float("inf"):
        raise ValueError(f"eps must be positive and finite, got {eps}")


def check_slots(slots: Tensor, places: int) -> None:
    """slots int32 or int64 [T]: where to write, so each in [0, places) and none twice."""
    check_dtype("slots", slots, (torch.int32, torch.int64))
    if not len(slots) or not values_readable(slots):
        return
    low, high = (int(value) for value in torch.aminmax(slots))
    if low < 0 or high >= places:
        raise ValueError(f"slots must lie in [0, {places}) to be written to, got {low if low < 0 else high}")
    ordered = slots.sort().values
    twice = ordered[1:] == ordered[:-1]
    if twice.any():
        raise ValueError(f"slots must be distinct to be written to, got {int(ordered[1:][twice][0])} twice")
