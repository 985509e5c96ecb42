"""Cut [T, S] work into blocks, so that no full [T, heads, S] tensor is ever held (unless autograd keeps the blocks)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .contracts import in_use


def pairs_at_once(tensor: Tensor) -> int:
    """Elements of the largest temporary: 64 MB in fp32 on a CPU; 1 GB on a GPU, which small pieces would starve."""
    return 1 << 28 if tensor.is_cuda else 1 << 24


def row_blocks(start: Tensor, end: Tensor, per_pair: int) -> Iterator[tuple[slice, slice]]:
    """Yield (rows, keys) slices that cover every visible (query, key) pair of the ranges ``start``, ``end`` [T].

    ``per_pair`` is how many numbers the caller holds for each pair. A block reaches from its rows' smallest start to
    their largest end, ends before rows · keys · per_pair passes `pairs_at_once` (a single row always fits), and ends
    where a new packed sequence begins, since rows of two sequences would pay for both spans. T = 0 is one empty block.
    """
    limit, starts, ends = pairs_at_once(start), start.tolist(), end.tolist()
    if not starts:
        yield slice(0, 0), slice(0, 0)
    first = 0
    while first < len(starts):
        low, high, last = starts[first], ends[first], first + 1
        while last < len(starts):
            new_low, new_high = min(low, starts[last]), max(high, ends[last])
            too_big = (last + 1 - first) * (new_high - new_low) * per_pair > limit
            new_sequence = starts[last] >= high and last - first >= 32
            if too_big or new_sequence:
                break
            low, high, last = new_low, new_high, last + 1
        yield slice(first, last), slice(low, max(low, high))
        first = last


def list_blocks(indices: Tensor, per_index: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, lists): index lists [T, k] in blocks of rows, and those rows' lists, cut to the longest of them.

    ``per_index`` is how many numbers the caller holds for each entry of a list. k may be far above the number of keys:
    what is not there costs nothing.
    """
    lists = compact(indices)
    lengths = (lists >= 0).sum(dim=1, dtype=torch.int32)
    for rows, columns in row_blocks(torch.zeros_like(lengths), lengths, per_index):
        yield rows, lists[rows, : max(1, columns.stop)]


def compact(indices: Tensor) -> Tensor:
    """Index lists [T, k] with -1 nowhere but at the end, cut to the longest list: [T, width] with width >= 1."""
    indices = in_use(indices)
    used = indices >= 0
    if (used[:, 1:] > used[:, :-1]).any():  # an index after a -1
        indices = indices.gather(1, used.byte().argsort(dim=1, descending=True, stable=True))
    longest = int(used.sum(dim=1).max()) if len(indices) else 0
    return indices[:, : max(1, longest)]


def masked_blocks(start: Tensor, end: Tensor, S: int, per_pair: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """`row_blocks` with the mask of each: (rows, keys, mask [rows, keys]). `keys` has at least one of the S keys, which
    the mask hides where a block of empty ranges has none: a softmax needs one."""
    for rows, keys in row_blocks(start, end, per_pair):
        first = min(keys.start, S - 1)
        keys = slice(first, max(keys.stop, first + 1))
        yield rows, keys, visible(start, end, rows, keys)


def visible(start: Tensor, end: Tensor, rows: slice, keys: slice) -> Tensor:
    """The boolean mask [rows, keys] of the pairs that the ranges allow."""
    s = torch.arange(keys.start, keys.stop, device=start.device)
    return (s >= start[rows, None]) & (s < end[rows, None])
