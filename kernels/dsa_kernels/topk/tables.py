"""Tables of some thousand numbers in a program's registers, [ROWS, 4]: thresholds, choice, places, scattered stores.

A thread has whole rows of four, which it loads at once. Sums first go along the rows, which costs no exchange, then
across the threads, for which these wait for each other twice. So what counts is how often they do.
"""

import triton
import triton.language as tl


@triton.jit
def total(x):
    """The sum of a table."""
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def threshold_in(keys, reached, wanted, enough, floor):
    """A key that at least `wanted` of the keys reach, not more than `enough` unless equal ones force it; and how many.

    keys: unsigned, fewer than 2^15, 0 is nobody's. floor: a key above 0, which `reached` of them reach, and reached >=
    wanted. A round takes about as long as the threads wait for each other, so it tries two thresholds, which cut what
    is left into thirds; their counts share one number.
    """
    threshold = floor
    left = tl.max(tl.max(keys, 1), 0) - floor  # what is sought is at most so far above
    while (left != 0) & (reached > enough):
        step = (left - 1) // 3 + 1
        two = tl.minimum(2 * step, left)
        low, high = (keys >= threshold + step).to(tl.int32), (keys >= threshold + two).to(tl.int32)
        counts = total(low + (high << 16))
        of_low, of_high = counts & 0xFFFF, counts >> 16
        up = tl.where(of_high >= wanted, two, tl.where(of_low >= wanted, step, tl.zeros_like(step)))
        reached = tl.where(of_high >= wanted, of_high, tl.where(of_low >= wanted, of_low, reached))
        left = tl.where(of_high >= wanted, left - two, tl.where(of_low >= wanted, two - step, step) - 1)
        threshold += up
    return threshold, reached


@triton.jit
def places(kept):
    """The number, from 0 on, of each kept element of a table in its order, and how many there are."""
    kept = kept.to(tl.int32)
    of_row = tl.sum(kept, 1)
    upto = tl.cumsum(of_row, 0)
    return (upto - of_row)[:, None] + tl.cumsum(kept, 1) - kept, tl.sum(of_row, 0)


@triton.jit
def largest(keys, s, count, wanted, floor):
    """Which `wanted` of the keys of positions s are largest; of equal ones those of the smallest positions.

    count >= wanted of the keys reach floor > 0.
    """
    threshold, reached = threshold_in(keys, count, wanted, wanted, floor)
    kept = keys >= threshold
    if reached > wanted:
        tied = keys == threshold
        ties = total(tied.to(tl.int32))
        room = wanted - (reached - ties)
        early = tl.where(tied, (0x7FFFFFFF - s).to(tl.uint32), tl.zeros_like(keys))  # the smallest position is largest
        latest, _ = threshold_in(early, ties, room, room, tl.full([], 1, tl.uint32))
        kept = (keys > threshold) | (tied & (early >= latest))
    return kept & (wanted > 0)


@triton.jit
def columns(x):
    """The four columns of a table, each as it lies in the threads' registers.

    Who stores a table at places of no order column by column leaves Triton no layout to choose: 3.7.1 would take one
    for which pointers and masks go through shared memory, with spills.
    """
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def scatter(ptr, place, value, mask):
    """Store a table's values at the places where mask holds."""
    places, values, masks = columns(place), columns(value), columns(mask)
    for i in tl.static_range(4):
        tl.store(ptr + places[i], values[i], masks[i])
