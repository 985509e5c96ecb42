"""Scores as integers of the same order, and the exact choice among scores that are in registers.

A float's bits, read as an unsigned integer, ascend with the float once the sign bit of the positive ones is set and
all bits of the negative ones are flipped. So a threshold can be found bit by bit, in at most 32 counts, and NaN has a
place too: above +inf, or below -inf if its sign bit is set.
"""

import triton
import triton.language as tl


@triton.jit
def ordered(x):
    """fp32 to uint32 such that a < b as floats means a < b as integers; -0.0 first becomes 0.0."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def from_ordered(key):
    """What `ordered` was made from."""
    bits = key.to(tl.int32, bitcast=True)
    return (bits ^ (((bits ^ -2147483648) >> 31) | -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def threshold_of(keys, wanted):
    """A key that just `wanted` of the keys reach, or with ties more; keys are uint32 of any shape, 0 is nobody's.

    Found bit by bit from the first one in which the keys differ, until the count fits. 0 where there are too few keys.
    """
    largest = tl.max(keys)
    smallest = tl.min(tl.where(keys == 0, largest, keys))
    below = largest ^ smallest  # becomes a mask: its highest bit and all below
    for i in tl.static_range(5):
        below |= below >> (1 << i)
    threshold = largest ^ (largest & below)
    bit = (below >> 1) + (below & 1)
    reached = tl.sum((keys >= tl.maximum(threshold, 1)).to(tl.int32))
    threshold = tl.where(reached >= wanted, threshold, 0)
    bit = tl.where(reached >= wanted, bit, 0)
    while (bit != 0) & (reached != wanted):
        more = tl.sum((keys >= (threshold | bit)).to(tl.int32))
        threshold = tl.where(more >= wanted, threshold | bit, threshold)
        reached = tl.where(more >= wanted, more, reached)
        bit >>= 1
    return threshold


@triton.jit
def keep_largest(x, s, used, wanted, k, offset, out_ptr, nan_ptr):
    """Write offset + s of the `wanted` largest of the used scores x, of equal ones the smallest s, then -1 up to k.

    x, s, used: one block of a list, in any order. *nan_ptr becomes 1 if a used score is NaN, else 0.
    """
    tl.store(nan_ptr, tl.max(((x != x) & used).to(tl.int32), axis=0))
    key = tl.where(used, ordered(x), tl.zeros_like(s).to(tl.uint32))
    threshold = threshold_of(key, wanted)
    above, tied = key > threshold, (key == threshold) & used
    room = wanted - tl.sum(above.to(tl.int32), axis=0)
    if tl.sum(tied.to(tl.int32), axis=0) > room:
        early = tl.where(tied, (0x7FFFFFFF - s).to(tl.uint32), tl.zeros_like(key))  # the smallest s is largest
        tied = tied & (early >= threshold_of(early, room)) & (room > 0)
    kept = above | tied
    place = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(out_ptr + place, offset + s, kept)
    for place0 in range(wanted, k, 1024):
        rest = place0 + tl.arange(0, 1024)
        tl.store(out_ptr + rest, tl.full([1024], -1, tl.int32), rest < k)
