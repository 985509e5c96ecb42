"""Cut [T, S] work into blocks, so that no full [T, heads, S] tensor is ever held (unless autograd keeps the blocks)."""

import torch


def pairs_at_once(tensor) -> int:
    """Elements of the largest temporary: 64 MB in fp32 on a CPU; 1 GB on a GPU, which small pieces would starve."""
    return 1 << 28 if tensor.is_cuda else 1 << 24


def row_blocks(start, end, per_pair: int):
    """Yield (rows, keys) slices that cover every visible (query, key) pair of the ranges ``start``, ``end`` [T].

    ``per_pair`` is how many numbers the caller holds for each pair. A block reaches from its rows' smallest start to
    their largest end, ends before rows · keys · per_pair passes `pairs_at_once` (a single row always fits), and ends
    where a new packed sequence begins, since rows of two sequences would pay for both spans.
    """
    limit, starts, ends = pairs_at_once(start), start.tolist(), end.tolist()
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


def at_least_one(keys: slice, S: int) -> slice:
    """The same keys, or one (which the mask then hides) where a block of empty ranges has none: reductions need one."""
    if keys.stop > keys.start:
        return keys
    first = min(keys.start, S - 1)
    return slice(first, first + 1)


def visible(start, end, rows: slice, keys: slice):
    """The boolean mask [rows, keys] of the pairs that the ranges allow."""
    s = torch.arange(keys.start, keys.stop, device=start.device)
    return (s >= start[rows, None]) & (s < end[rows, None])


def join(outs, lses, nothing):
    """The blocks' outputs and log-sum-exps, each as one tensor; `nothing` [0, H, v] where T = 0 made no block."""
    if not outs:
        return nothing, nothing[..., 0].to(torch.promote_types(nothing.dtype, torch.float32))
    return torch.cat(outs), torch.cat(lses)
