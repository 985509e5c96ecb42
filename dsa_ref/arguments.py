"""The pieces of argument checks, the per-row ranges, and what pages and lists measure. `contracts` has the steps' own.

Every check returns nothing and raises TypeError for a wrong type or dtype and ValueError for a wrong shape, device or
value; the message names the argument, what was wanted and what was got.

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
INT64, FLOAT64 = torch.iinfo(torch.int64), torch.finfo(torch.float64)
MAX_QUERIES = 4  # N, query tokens a sequence in a decode step
FP8_TILE = 128  # latent dims that share a scale in an FP8 row
_unchecked = contextvars.ContextVar("unchecked values", default=False)  # of this thread, or asynchronous task, alone


def check_shapes(**arguments) -> None:
    """Check tensors against symbolic shapes: ``check_shapes(q=(q, "T H D"), kv=(kv, "S D"))``.

    A symbol has one size wherever it occurs, and only T may be 0. A leading ``*`` stands for any dims; what ends in
    ``| None`` may be None. All tensors must be on one device.
    """
    sizes, first, device = {}, None, None
    for name, (tensor, spec) in arguments.items():
        optional, symbols, wanted, open_ended = _PARSED.get(spec) or _parse(spec)
        if tensor is None and optional:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor of {wanted}, got {kind_of(tensor)}")
        shape = list(tensor.shape)
        if open_ended:
            shape = shape[-len(symbols) :]
        if len(shape) != len(symbols):
            raise ValueError(f"{name} must have {wanted}, got {list(tensor.shape)}")
        for symbol, size in zip(symbols, shape, strict=True):
            same, source = sizes.setdefault(symbol, (size, name))
            if size != same:
                raise ValueError(f"{name} must have {wanted} with {symbol} = {same} (as in {source}), got {shape}")
            if size == 0 and symbol != "T":
                raise ValueError(f"{name} must have {wanted} with {symbol} > 0, got {shape}")
        if first is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{name} must be on {device} like {first}, got {tensor.device}")


_PARSED = {}  # {spec: what `_parse` made of it}: a call of a layer has some fifty


def _parse(spec: str) -> tuple[bool, list[str], str, bool]:
    """(may be None, symbols, what a message wants, whether any dims may come first) of what `check_shapes` is told."""
    symbols = spec.removesuffix(" | None").split()
    open_ended = symbols[0].startswith("*")
    wanted = f"shape [{', '.join(symbols)}]"
    _PARSED[spec] = spec.endswith(" | None"), symbols[1:] if open_ended else symbols, wanted, open_ended
    return _PARSED[spec]


def check_dtype(name: str, tensor: Tensor, allowed) -> None:
    """``tensor.dtype`` must be one of ``allowed``."""
    if tensor.dtype not in allowed:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name} must have dtype {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_count(name: str, value) -> None:
    """``value`` must be an int of at least 1."""
    check_int(name, value, 1)


def check_int(name: str, value, low: int, high: int | None = None) -> None:
    """``value`` must be an int in [low, high], of at least ``low``, and an int64, where high is None."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {kind_of(value)}")
    if value < low or value > (INT64.max if high is None else high):
        wanted = f"in [{low}, {high}]" if high is not None else f"at least {low}" if value < low else "an int64"
        raise ValueError(f"{name} must be {wanted}, got {value}")


def check_scale(value, dtype: torch.dtype) -> None:
    """The softmax scale must be a positive number, finite in what inputs of `dtype` are computed in."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"scale must be a float, got {kind_of(value)}")
    if not 0.0 < value <= FLOAT64.max:  # an int may be larger than any float
        raise ValueError(f"scale must be positive and finite, got {value}")
    if dtype != torch.float64 and value > torch.finfo(torch.float32).max:
        raise ValueError(f"scale must be finite in fp32, got {value}")


def check_eps(eps) -> None:
    """A norm's eps must be a positive finite number."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a float, got {kind_of(eps)}")
    if not 0.0 < eps <= FLOAT64.max:
        raise ValueError(f"eps must be positive and finite, got {eps}")


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


def check_finite(where: str = "", **tensors: Tensor | None) -> None:
    """No NaN or infinity in any of these, None left out. On a GPU the host waits once for all."""
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.numel()}
    if not tensors or not values_readable(next(iter(tensors.values()))):
        return
    finite = torch.stack([(x.float() if x.dtype == E4M3 else x).isfinite().all() for x in tensors.values()])
    if not finite.all():
        name = list(tensors)[finite.tolist().index(False)]
        raise ValueError(f"{name} must be finite, got NaN or infinity{where}")


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


# Pages and slots ------------------------------------------------------------------------------------------------------


def check_queries(name: str, tensor: Tensor) -> None:
    """``tensor`` [B, N, ...] must have at most MAX_QUERIES query tokens a sequence."""
    if tensor.shape[1] > MAX_QUERIES:
        raise ValueError(f"{name} must have at most N = {MAX_QUERIES} query tokens a sequence, got {tensor.shape[1]}")


def check_own_places(name: str, tensor: Tensor) -> None:
    """A tensor that is written to may not have places that lie on each other, as an expanded one's do."""
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(f"{name} must have memory of its own for each place, got strides {tuple(tensor.stride())}")


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


def page_tokens(index_pages: Tensor, index_dim: int) -> int:
    """Tokens a page of an index cache."""
    return index_pages.shape[1] // (index_dim + 4)


def fp8_row_bytes(D: int, v_dim: int) -> int:
    """Bytes of an FP8 row: v_dim e4m3 values, an fp32 scale for each tile of them, D - v_dim values of bf16."""
    return v_dim + 4 * -(-v_dim // FP8_TILE) + 2 * (D - v_dim)


def default_splits(k: int) -> int:
    """Into how many parts a list of k places is cut, where the caller does not say: a function of k alone."""
    return min(16, -(-k // 128))


def splits_of(k: int, splits: int | None) -> int:
    """Into how many parts a list of k places is cut; parts beyond the last 64 places are empty, and left out."""
    return default_splits(k) if splits is None else min(splits, -(-k // 64))


def part_length(k: int, splits: int) -> int:
    """Places of a part: a multiple of 64. The last parts may be short, or empty."""
    tiles = -(-k // 64)
    return -(-tiles // splits) * 64


# Values ---------------------------------------------------------------------------------------------------------------


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
    """Whether the host may wait for a value: not while a CUDA graph is captured, torch.compile traces, nor in
    `unchecked_values`."""
    if torch.compiler.is_compiling():
        return False
    return not (_unchecked.get() or tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def kind_of(value) -> str:
    """What a message says was got, where a type is wrong."""
    return f"{type(value).__name__} {value!r}" if isinstance(value, (bool, int, float, str)) else type(value).__name__
