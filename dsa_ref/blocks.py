"""Cut [T, S] work into blocks, so that no full [T, heads, S] tensor is ever held (unless autograd keeps the blocks)."""

from collections.abc import Iterator

import torch
from torch import Tensor


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


def list_blocks(indices: Tensor, per_index: int) -> Iterator[slice]:
    """Yield slices of the rows of index lists [T, k]; `per_index` numbers are held for each entry of a row."""
    size = max(1, pairs_at_once(indices) // (indices.shape[1] * per_index))
    for first in range(0, max(1, len(indices)), size):
        yield slice(first, first + size)


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
