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
    check_scale(scale, q.dtype)
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


def check_attention(q, kv, scale, v_dim, floats=FLOATS) -> None:
    """What the attention steps share."""
    check_dtype("q", q, floats)
    check_dtype("kv", kv, (q.dtype,))
    check_scale(scale, q.dtype)
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
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {_kind(value)}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_scale(value, dtype: torch.dtype) -> None:
    """The softmax scale must be a positive number, finite in what inputs of `dtype` are computed in."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"scale must be a float, got {_kind(value)}")
    if not 0.0 < value < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {value}")
    if dtype != torch.float64 and value > torch.finfo(torch.float32).max:
        raise ValueError(f"scale must be finite in fp32, got {value}")


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


def check_indices(indices: Tensor, S: int) -> None:
    """``indices`` must be int32, and every entry -1 (nothing) or a row of a table of S rows."""
    check_dtype("indices", indices, (torch.int32,))
    if indices.numel() and values_readable(indices):
        low, high = (int(value) for value in torch.aminmax(indices))
        if low < -1 or high >= S:
            raise ValueError(f"indices must lie in [-1, S) with S = {S}, got {low if low < -1 else high}")


def check_distinct(indices: Tensor) -> None:
    """No index may stand twice in a row of ``indices``, but for -1: a row's selection is a set."""
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
        raise ValueError(f"indices must be distinct within a row, got {int(ordered[t, place])} twice in row {t}")


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
