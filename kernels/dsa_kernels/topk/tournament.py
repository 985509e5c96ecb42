"""The k largest of a row without luck: each chunk's k largest, then those of some chunks' lists together, and so on.

Schedule: a program plays a chunk. It reads the chunk's scores into registers, finds what the k-th largest is, and
writes the list of the k largest into the memory of the scores that it was made of, which are lost. The last of the
programs whose lists are merged goes on with these; the others are done. Of equal scores the smallest positions are
kept, and lists stay in ascending order of position.

`topk.decode` plays the rows that its first launch has flagged, `flagged` those of a fused kernel.
"""

import triton
import triton.language as tl

from .ordering import ordered
from .tables import columns, largest, places, scatter, total


@triton.jit
def read(row_ptr, s, n):
    """Scores at s, in whole groups of four, so that a thread can load four at once; behind n comes what is there."""
    return tl.load(row_ptr + s, s // 4 < (n + 3) // 4, 0.0)


@triton.jit
def keys_of(x, s, n):
    """Scores as integers of their order, from 1 on; 0 from the end n of the row on."""
    return tl.where(s < n, tl.maximum(ordered(x), 1), 0)


@triton.jit
def store(position, place, mask, positions_ptr, slots_ptr, table_ptr, PAGE: tl.constexpr):
    """Write positions, and where PAGE is not 0 their slots, at the places where mask holds."""
    all_positions, places_, masks = columns(position), columns(place), columns(mask)
    for i in tl.static_range(4):
        s = all_positions[i]
        tl.store(positions_ptr + places_[i], s, masks[i])
        if PAGE != 0:
            page = tl.load(table_ptr + s // PAGE, masks[i], 0)
            tl.store(slots_ptr + places_[i], page * PAGE + s % PAGE, masks[i])


@triton.jit
def store_nothing(wanted, width, positions_ptr, slots_ptr, PAGE: tl.constexpr):
    """-1 in the places from `wanted` to `width`."""
    for place0 in range(wanted, width, 1024):
        place = place0 + tl.arange(0, 1024)
        nothing = tl.full([1024], -1, tl.int32)
        tl.store(positions_ptr + place, nothing, place < width)
        if PAGE != 0:
            tl.store(slots_ptr + place, nothing, place < width)


@triton.jit
def play(
    chunk, n, first, row_ptr, pairs_ptr, arrived_ptr, positions_ptr, slots_ptr, table_ptr, k, width,
    ROWS: tl.constexpr, EACH: tl.constexpr, KP: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One chunk of a row of n scores, and as many merges as this program is the last to arrive at.

    first: what is added to positions. pairs_ptr: the row's memory as numbers of 8 bytes. arrived_ptr: zeros before and
    after the row, two for each chunk that a row can have, and two more. KP: a power of two, at least k.
    """
    SIZE: tl.constexpr = ROWS * EACH
    FAN: tl.constexpr = SIZE // KP
    offset = tl.arange(0, ROWS)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    one = tl.full([], 1, tl.uint32)
    # The chunk's k largest. Each list is made of `span` scores; the row has `lists`.
    s = chunk * SIZE + offset
    keys = keys_of(read(row_ptr, s, n), s, n)
    node, lists = chunk, tl.maximum(tl.cdiv(n, SIZE), 1)
    made = tl.minimum(n - chunk * SIZE, SIZE)
    span = tl.full([], SIZE, tl.int32)
    going = tl.full([], 1, tl.int32)
    while going != 0:
        wanted = tl.minimum(k, made)
        kept = largest(keys, s, made, wanted, one)
        place, _ = places(kept)
        tl.debug_barrier()  # all have read what is overwritten now
        going = (lists > 1).to(tl.int32)
        if lists == 1:
            store(s + first, place, kept, positions_ptr, slots_ptr, table_ptr, PAGE)
            store_nothing(wanted, width, positions_ptr, slots_ptr, PAGE)
        else:
            begin_list = node.to(tl.int64) * (span // 2)
            entry = (keys.to(tl.uint64) << 32) | s.to(tl.uint64)
            scatter(pairs_ptr + begin_list, place, entry.to(tl.int64, bitcast=True), kept)
            tl.debug_barrier()
            group = node // FAN
            members = tl.minimum(lists - group * FAN, FAN)
            if tl.atomic_add(arrived_ptr + group, 1, sem="acq_rel") == members - 1:
                tl.store(arrived_ptr + group, 0)
                member, i = offset // KP, offset % KP
                begin = (group * FAN + member) * span
                size = tl.minimum(tl.minimum(n - begin, span), k)
                there = (member < members) & (i < size)
                at = begin.to(tl.int64) // 2 + i
                loaded = tl.load(pairs_ptr + at, there, 0, cache_modifier=".cg")
                keys, s = (loaded.to(tl.uint64, bitcast=True) >> 32).to(tl.uint32), loaded.to(tl.int32)
                made = total(there.to(tl.int32))
                lists = tl.cdiv(lists, FAN)
                arrived_ptr += lists
                node, span = group, span * FAN
            else:
                going = going * 0
