"""Argument checks and the per-row ranges. Both packages use these, so both refuse the same inputs in the same words.

First the step functions' own checks, then the pieces they are made of. `floats` is what a package computes in: the
reference takes fp64 too.

Checks that need a tensor's *values* (ranges, indices, NaN) make the host wait for the GPU. While a CUDA graph is being
captured that is impossible, and those checks alone are left out: validate once before capturing.
"""

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
E4M3 = torch.float8_e4m3fn
LAYOUTS = ("interleaved", "half")


def check_rope(x, positions, freqs, layout="half", floats=FLOATS):
    """Arguments of `rope` and `rotate_quantize`."""
    if not isinstance(x, torch.Tensor):
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


def check_vectors(x, floats=FLOATS, power_of_two=False) -> int:
    """The argument x [..., D] of `hadamard` (D a power of two) and `quantize`; returns D."""
    D = check_shapes(x=(x, "*... D"))["D"]
    check_dtype("x", x, floats)
    if power_of_two and D & (D - 1):
        raise ValueError(f"x must have a last dim that is a power of two, got {D}")
    return D


def check_index_scores(q_idx, k_idx, w, k_scale, start, end, floats=FLOATS):
    """Arguments of `index_scores` and `lightning_select`; returns T, S, start, end."""
    arguments = {"q_idx": (q_idx, "T Hi Di"), "k_idx": (k_idx, "S Di"), "w": (w, "T Hi")}
    if k_scale is not None:
        arguments["k_scale"] = (k_scale, "S")
    sizes = check_shapes(**arguments)
    check_dtype("q_idx", q_idx, (*floats, E4M3))
    check_dtype("k_idx", k_idx, (q_idx.dtype,))
    check_dtype("w", w, floats)
    if k_scale is not None:
        check_dtype("k_scale", k_scale, floats)
    return sizes["T"], sizes["S"], *row_ranges(sizes["T"], sizes["S"], q_idx.device, start, end)


def check_select_topk(scores, k, start, end, floats=FLOATS):
    """Arguments of `select_topk`; returns T, S, start, end."""
    sizes = check_shapes(scores=(scores, "T S"))
    check_dtype("scores", scores, floats)
    check_count("k", k)
    return sizes["T"], sizes["S"], *row_ranges(sizes["T"], sizes["S"], scores.device, start, end)


def check_sparse_attention(q, kv, indices, scale, v_dim, floats=FLOATS):
    """Arguments of `sparse_attention`; returns T, H, D, k."""
    sizes = check_shapes(q=(q, "T H D"), kv=(kv, "S D"), indices=(indices, "T k"))
    check_attention(q, kv, scale, v_dim, floats)
    check_indices(indices, sizes["S"])
    return sizes["T"], sizes["H"], sizes["D"], sizes["k"]


def check_attention(q, kv, scale, v_dim, floats=FLOATS):
    """What sparse and dense attention share."""
    check_dtype("q", q, floats)
    check_dtype("kv", kv, (q.dtype,))
    check_scale(scale)
    if check_count("v_dim", v_dim) > kv.shape[-1]:
        raise ValueError(f"v_dim must be at most D = {kv.shape[-1]}, got {v_dim}")


def check_shapes(**arguments) -> dict:
    """Check tensors against symbolic shapes and return the sizes: ``check_shapes(q=(q, "T H D"), kv=(kv, "S D"))``.

    A symbol has one size wherever it occurs, and only T may be 0. A leading ``*`` stands for any
    dims. All tensors must be on one device.

    Raises: TypeError for a non-tensor, ValueError for a wrong rank, size or device. Both name the argument.
    """
    sizes, origin, first = {}, {}, None
    for name, (tensor, spec) in arguments.items():
        symbols = spec.split()
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor of shape [{', '.join(symbols)}], got {_kind(tensor)}")
        shape = list(tensor.shape)
        if symbols[0].startswith("*"):
            symbols = symbols[1:]
            shape = shape[-len(symbols) :]
        if len(shape) != len(symbols):
            raise ValueError(f"{name} must have shape [{', '.join(symbols)}], got {list(tensor.shape)}")
        for symbol, size in zip(symbols, shape, strict=True):
            wanted = sizes.setdefault(symbol, size)
            source = origin.setdefault(symbol, name)
            if size != wanted:
                raise ValueError(
                    f"{name} must have shape [{', '.join(symbols)}] with {symbol} = {wanted} "
                    f"(as in {source}), got {list(tensor.shape)}"
                )
            if size == 0 and symbol != "T":
                raise ValueError(f"{name} must have shape [{', '.join(symbols)}] with {symbol} > 0, got {shape}")
        first = first or (name, tensor)
        if tensor.device != first[1].device:
            raise ValueError(f"{name} must be on {first[1].device} like {first[0]}, got {tensor.device}")
    return sizes


def check_dtype(name: str, tensor: torch.Tensor, allowed) -> None:
    """Raise TypeError unless ``tensor.dtype`` is one of ``allowed``."""
    if tensor.dtype not in allowed:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name} must have dtype {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_count(name: str, value) -> int:
    """Return ``value`` if it is an int of at least 1; raise TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {_kind(value)}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def check_scale(value) -> float:
    """Return the softmax scale as a float; raise TypeError or ValueError unless it is a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"scale must be a float, got {_kind(value)}")
    if not 0.0 < value < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {value}")
    return float(value)


def row_ranges(T: int, S: int, device, start=None, end=None):
    """The half-open key range [start[t], end[t]) of each query row, as two int32 tensors [T].

    The default is causal with the queries being the last T of S positions: start = 0, end[t] = S - T + t + 1.

    Raises: TypeError for anything but int32 tensors, ValueError for a wrong shape or device, for a range that is not
    0 <= start <= end <= S, and for the default with T > S.
    """
    if end is None and T > S:
        raise ValueError(f"T = {T} queries cannot be the last of S = {S} positions: pass start and end")
    given = {name: value for name, value in (("start", start), ("end", end)) if value is not None}
    if start is None:
        start = torch.zeros(T, dtype=torch.int32, device=device)
    if end is None:
        end = torch.arange(S - T + 1, S + 1, dtype=torch.int32, device=device)
    for name, value in given.items():
        check_shapes(**{name: (value, "T")})
        check_dtype(name, value, (torch.int32,))
        if value.shape[0] != T:
            raise ValueError(f"{name} must have shape [T] with T = {T}, got {list(value.shape)}")
        if value.device != torch.device(device):
            raise ValueError(f"{name} must be on {device}, got {value.device}")
    if given and T and values_readable(start):
        _check_range_values(start, end, S)
    return start, end


def _check_range_values(start, end, S):
    bad = (start < 0) | (end > S) | (start > end)
    if bad.any():
        t = int(bad.nonzero()[0])
        name = "end" if end[t] > S else "start"
        raise ValueError(
            f"{name} must keep 0 <= start <= end <= S = {S} in every row, "
            f"got [{int(start[t])}, {int(end[t])}) in row {t}"
        )


def check_indices(indices: torch.Tensor, S: int) -> None:
    """Raise unless ``indices`` is int32 and every entry is -1 (nothing) or a row of a table of S rows."""
    check_dtype("indices", indices, (torch.int32,))
    if indices.numel() and values_readable(indices):
        low, high = (int(value) for value in torch.aminmax(indices))
        if low < -1 or high >= S:
            raise ValueError(f"indices must lie in [-1, S) with S = {S}, got {low if low < -1 else high}")


def values_readable(tensor: torch.Tensor) -> bool:
    """False only while a CUDA graph is being captured, when the host may not wait for a value."""
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _kind(value) -> str:
    return f"{type(value).__name__} {value!r}" if isinstance(value, (bool, int, float, str)) else type(value).__name__
