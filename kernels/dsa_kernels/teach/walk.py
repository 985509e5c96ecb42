"""How the kernels of the indexer's loss walk over keys: a range of neighbours, or the places of an index list.

In the warm-up a block of queries walks from its smallest start to its largest end. A pair's number, p or its gradient,
lies at [t, s - base[t]] of a buffer, where base[t] is start[t] rounded down to a multiple of 64: so the buffer is as
wide as the longest range, not as all keys. In the sparse stage a program has one query, walks over the places j of its
list, and a pair's number lies at [t, j].
"""

import triton
import triton.language as tl

ALIGN = 64  # of a row's first column, so that loads and stores may be wide


@triton.jit
def span(start, end, S, k, LISTS: tl.constexpr):
    """(first, last) place of the walk of queries with these ranges, (low, high) keys that one of them may see."""
    low = tl.min(tl.where(start < end, start, S), 0)
    high = tl.max(tl.where(start < end, end, 0), 0)
    if LISTS:
        first, last = 0, tl.where(low < high, k, 0)
    else:
        first, last = low // 64 * 64, high
    return first, last, low, high


@triton.jit
def keys_at(places, indices_ptr, t, k, LISTS: tl.constexpr):
    """The keys in these places of the walk, -1 for none. t: the query, where it has a list."""
    if LISTS:
        return tl.load(indices_ptr + t * k + places, places < k, -1)
    else:
        return places


@triton.jit
def numbers_at(places, s, t, start, end, width, LISTS: tl.constexpr):
    """Of the pairs (places, queries): whether the query sees the key, and where their number lies."""
    seen = (s[:, None] >= start[None, :]) & (s[:, None] < end[None, :])
    if LISTS:
        where = t[None, :] * width + places[:, None]
    else:
        where = t[None, :] * width + (places[:, None] - (start // 64 * 64)[None, :])
    return seen, where
