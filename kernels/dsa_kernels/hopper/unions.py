"""Neighbouring queries together: the union of their selected lists, and who selected each key.

With H heads only H rows of a 64-row tensor-core tile are filled, so G = 64 / H queries share one and walk over the
union of their lists. Each key of it carries G bits: bit g says that query g of the group selected it. Queries next to
each other select much the same keys, so the union is far shorter than G lists.

Schedule, a chunk of groups at a time so that memory stays bounded whatever S is:
1. `_mark` sets a bit for each selected pair in a table of S keys × G bits a group, by atomic OR: no order can show;
2. `_count` counts the keys with any bit in each segment of the table;
3. `_emit` adds up the counts before its segment, writes the segment's keys behind them in ascending order, and clears
   the table for the next chunk.
Bytes: the table, G · S / 8 a group, is read twice and cleared once, mostly in L2; an atomic for each selected pair; 8
bytes written for each key of the union.
"""

import torch
import triton
import triton.language as tl

TABLE_BYTES = 32 << 20  # of one chunk: stays in L2, and is enough to fill the card at S = 1M
SEGMENT = 1024  # words of the table a program scans


@triton.jit(do_not_specialize=["first", "T", "words"])
def _mark(indices_ptr, table_ptr, first, T, k, words, G: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Set the bits of query `first + program_id(0)`."""
    t = tl.program_id(0)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(indices_ptr + (first + t).to(tl.int64) * k + j, (j < k) & (first + t < T), -1)
    word = table_ptr + (t // G).to(tl.int64) * words + s // (32 // BITS)
    bit = tl.full([BLOCK], 1, tl.int32) << (s % (32 // BITS) * BITS + t % G)
    tl.atomic_or(word, bit, s >= 0, sem="relaxed")


@triton.jit
def _load(table_ptr, segment, words, BITS: tl.constexpr, SEGMENT: tl.constexpr):
    """The words of a segment of group program_id(0), their numbers and places, and how many keys each has."""
    stride = tl.num_programs(2)  # 1. Known to be 1, it would make a thread load 4 words and move them for every store
    w = segment * SEGMENT + tl.arange(0, SEGMENT) * stride
    place = table_ptr + tl.program_id(0).to(tl.int64) * words + w
    word = tl.load(place, w < words, 0)
    n = tl.zeros([SEGMENT], tl.int32)
    for i in tl.static_range(32 // BITS):
        n += ((word >> i * BITS & (-1 if BITS == 32 else (1 << BITS) - 1)) != 0).to(tl.int32)
    return word, w, place, n


@triton.jit(do_not_specialize=["words"])
def _count(table_ptr, counts_ptr, words, BITS: tl.constexpr, SEGMENT: tl.constexpr):
    segment = tl.program_id(1)
    _, _, _, n = _load(table_ptr, segment, words, BITS, SEGMENT)
    tl.store(counts_ptr + tl.program_id(0) * tl.num_programs(1) + segment, tl.sum(n))


@triton.jit(do_not_specialize=["words", "U"])
def _emit(
    table_ptr, counts_ptr, entries_ptr, length_ptr, words, U,
    BITS: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    group, segment = tl.program_id(0), tl.program_id(1)
    segments = tl.num_programs(1)
    c = tl.arange(0, SEGMENTS)
    before = tl.sum(tl.load(counts_ptr + group * segments + c, c < segment, 0))
    word, w, place, n = _load(table_ptr, segment, words, BITS, SEGMENT)
    tl.store(place, tl.zeros([SEGMENT], tl.int32), w < words)
    if segment == segments - 1:
        tl.store(length_ptr + group, before + tl.sum(n))
    entries_ptr += group.to(tl.int64) * U
    at = before + tl.cumsum(n) - n
    rounds = tl.max(n)
    while rounds > 0:  # the lowest key of each word that still has one
        lowest = word & -word
        shift = tl.zeros([SEGMENT], tl.int32)  # of that key's bits: where the lowest bit is, a multiple of BITS
        if BITS <= 16:
            shift += tl.where((lowest & 0xFFFF) == 0, 16, 0)
        if BITS <= 8:
            shift += tl.where((lowest & 0x00FF00FF) == 0, 8, 0)
        if BITS <= 4:
            shift += tl.where((lowest & 0x0F0F0F0F) == 0, 4, 0)
        if BITS <= 2:
            shift += tl.where((lowest & 0x33333333) == 0, 2, 0)
        if BITS <= 1:
            shift += tl.where((lowest & 0x55555555) == 0, 1, 0)
        field = (-1 if BITS == 32 else (1 << BITS) - 1) << shift
        bits = (word & field) >> shift & (-1 if BITS == 32 else (1 << BITS) - 1)
        key = w * (32 // BITS) + shift // BITS
        tl.store(entries_ptr + at, bits.to(tl.int64) << 32 | key.to(tl.int64), word != 0)
        at += 1
        word &= ~field
        rounds -= 1


def unions(indices, S, G):
    """The union of every G consecutive rows of indices [T, k], entries in [-1, S): (entries, length).

    entries: int64 [groups, U] with U = min(G · k, S), ascending. The low half is the key; in the high half bit g is set
    where row g of the group holds the key, once however often it does. length: int32 [groups]; what lies behind it is
    undefined. G is at most 32, and the last group may be short.
    """
    T, k = indices.shape
    groups, U = triton.cdiv(T, G), min(G * k, S)
    bits = triton.next_power_of_2(G)
    words = triton.cdiv(S, 32 // bits)
    segments = triton.cdiv(words, SEGMENT)
    chunk = max(1, min(groups, TABLE_BYTES // (4 * words)))
    device = indices.device
    table = torch.zeros(chunk, words, dtype=torch.int32, device=device)
    counts = torch.empty(chunk, segments, dtype=torch.int32, device=device)
    entries = torch.empty(groups, U, dtype=torch.int64, device=device)
    length = torch.empty(groups, dtype=torch.int32, device=device)
    block = min(1024, triton.next_power_of_2(k))
    for first in range(0, groups, chunk):
        n = min(chunk, groups - first)
        _mark[(n * G, triton.cdiv(k, block))](indices, table, first * G, T, k, words, G=G, BITS=bits, BLOCK=block)
        _count[(n, segments)](table, counts, words, BITS=bits, SEGMENT=SEGMENT)
        _emit[(n, segments)](
            table, counts, entries[first:], length[first:], words, U,
            BITS=bits, SEGMENT=SEGMENT, SEGMENTS=triton.next_power_of_2(segments), num_warps=8,
        )  # fmt: skip
    return entries, length
