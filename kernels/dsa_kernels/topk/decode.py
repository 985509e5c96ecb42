"""Few rows of any length, as a decode step has them: one launch selects, a second one redoes what was unlucky.

Rows are the queries of B sequences; row t sees the first `visible` scores. What is kept is written as positions, in
ascending order, and as physical slots of a paged cache; -1 stands in the places that are left.

`_select`, schedule. A row is cut into chunks, and as many programs share it as the card has room for:
1. Each makes the same bound of the same sample of the row, while the scores of its first chunk are on their way.
2. Chunk by chunk it appends what reaches the bound, score and position, to the row's list: one atomic addition a chunk
   says where.
3. The last program to finish takes the list into registers: a threshold in some rounds of counting, among equals the
   smallest positions. Where a chunk's entries stand in the list was chance, but they stand together and ascend: so the
   kept ones of each chunk are counted, and go behind those of the chunks before it. Two calls give the same bits, in
   any batch.
A row of one chunk stays in registers and needs no list. A list that holds fewer than k, or was too small, sets the
row's flag.

`_tournament`, the second launch, looks at the flags and ends if there is none. It needs no luck, see
`topk.tournament`. Where k is above LARGEST_LISTED_K all rows take this way, and above LARGEST_K `radix` selects.

Bytes: 4 a score, read once, and the sample's sectors once a program; some 3000 to 7000 entries of 8 bytes written and
read, which stay in L2. NaN counts as larger than +inf, or smaller than -inf if its sign bit is set.
"""

import torch
import triton
import triton.language as tl

from ..runtime import multiprocessors
from . import radix
from .bound import LONG, safe_rank, sampled_place
from .tables import largest, places, scatter, threshold_in, total
from .tournament import keys_of, play, read, store, store_nothing

LARGEST_LISTED_K = 2048
LARGEST_K = 8192
LIST = 8192  # entries of a row's list
FLAGGED = 16384  # scores of a chunk in the second launch, and entries of the lists that are merged at once


@triton.jit
def seen_by(len_ptr, t, N, S):
    """How many positions row t sees: query t % N of sequence t // N, whose length counts the N new tokens."""
    length = tl.minimum(tl.load(len_ptr + t // N), S)
    return tl.maximum(length - N + 1 + (t % N).to(tl.int32), 0)


@triton.jit
def _select(
    scores_ptr, len_ptr, table_ptr, positions_ptr, slots_ptr, list_ptr, work_ptr, count_ptr, flag_ptr,
    N, S, stride, P, k, width,
    ROWS: tl.constexpr, EACH: tl.constexpr, SAMPLE: tl.constexpr, CAP: tl.constexpr, CHUNKS: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    n = seen_by(len_ptr, t, N, S)
    CHUNK: tl.constexpr = ROWS * EACH
    chunks = tl.maximum(tl.cdiv(n, CHUNK), 1)
    parts = tl.minimum(chunks, tl.num_programs(1))
    if part < parts:
        wanted = tl.minimum(k, n)
        row = scores_ptr + t * stride
        positions, slots = positions_ptr + t * width, slots_ptr + t * width
        table = table_ptr + t // N * P
        offset = tl.arange(0, ROWS)[:, None] * EACH + tl.arange(0, EACH)[None, :]
        x = read(row, part * CHUNK + offset, n)
        one = tl.full([], 1, tl.uint32)
        if chunks == 1:
            kept = largest(keys_of(x, offset, n), offset, n, wanted, one)
            place, _ = places(kept)
            store(offset, place, kept, positions, slots, table, PAGE)
            store_nothing(wanted, width, positions, slots, PAGE)
            tl.store(flag_ptr + t, 0)
        else:
            keys_ptr = list_ptr + t * (2 * CAP)  # keys, then positions
            work = work_ptr + t * (2 * CHUNKS)  # of each chunk: its first entry in the list, then how many
            bound = one
            if n > CAP:
                run = sampled_place(tl.arange(0, SAMPLE // EACH) * EACH, n, SAMPLE, EACH) // EACH * EACH
                at = run[:, None] + tl.arange(0, EACH)[None, :]
                sample = keys_of(read(row, at, n), at, n)
                rank = safe_rank(1.0 * k * SAMPLE / n)
                real = total((sample != 0).to(tl.int32))
                bound, _ = threshold_in(sample, real, rank, rank + rank // 8, one)
            for chunk in range(part, chunks, parts):
                s = chunk * CHUNK + offset
                ahead = read(row, s + parts * CHUNK, n)
                keys = keys_of(x, s, n)
                kept = keys >= bound
                place, number = places(kept)
                first = tl.atomic_add(count_ptr + 2 * t, number, sem="relaxed")
                tl.store(work + chunk, first)
                tl.store(work + CHUNKS + chunk, number)
                place += first
                kept &= place < CAP
                scatter(keys_ptr, place, keys.to(tl.int32, bitcast=True), kept)
                scatter(keys_ptr + CAP, place, s, kept)
                x = ahead
            tl.debug_barrier()  # all threads' entries are on their way before the program says that it is done
            if tl.atomic_add(count_ptr + 2 * t + 1, 1, sem="acq_rel") == parts - 1:
                count = tl.atomic_add(count_ptr + 2 * t, 0, sem="acquire")
                tl.debug_barrier()
                tl.store(count_ptr + 2 * t, 0)  # for the next call
                tl.store(count_ptr + 2 * t + 1, 0)
                flag = (count < wanted) | (count > CAP)
                tl.store(flag_ptr + t, flag.to(tl.int32))
                if flag == 0:
                    if count <= CAP // 2:
                        _choose(
                            keys_ptr, work, chunks, count, wanted, bound, positions, slots, table,
                            CAP // 2, EACH, CAP, CHUNK, CHUNKS, PAGE,
                        )  # fmt: skip
                    else:
                        _choose(
                            keys_ptr, work, chunks, count, wanted, bound, positions, slots, table,
                            CAP, EACH, CAP, CHUNK, CHUNKS, PAGE,
                        )  # fmt: skip
                    store_nothing(wanted, width, positions, slots, PAGE)


@triton.jit
def _choose(
    keys_ptr, work, chunks, count, wanted, bound, positions_ptr, slots_ptr, table_ptr,
    SIZE: tl.constexpr, EACH: tl.constexpr, CAP: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """Write the positions of a list's `wanted` largest entries in ascending order, and their slots. count <= SIZE."""
    i = tl.arange(0, SIZE // EACH)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    c = tl.arange(0, CHUNKS)
    keys = tl.load(keys_ptr + i, i < count, 0, cache_modifier=".cg").to(tl.uint32, bitcast=True)
    s = tl.load(keys_ptr + CAP + i, i < count, 0, cache_modifier=".cg")
    first = tl.load(work + c, c < chunks, 0, cache_modifier=".cg")
    end = first + tl.load(work + CHUNKS + c, c < chunks, 0, cache_modifier=".cg")
    kept = largest(keys, s, count, wanted, bound)
    place, _ = places(kept)  # in the order of the list
    flat = tl.reshape(place, [SIZE])
    before = tl.where(first < count, tl.gather(flat, tl.minimum(first, SIZE - 1), 0), wanted)
    upto = tl.where(end < count, tl.gather(flat, tl.minimum(end, SIZE - 1), 0), wanted)
    mine = tl.where(c < chunks, upto - before, 0)
    moves = tl.cumsum(mine, 0) - mine - before
    place += tl.reshape(tl.gather(moves, tl.reshape(s // CHUNK, [SIZE]), 0), [SIZE // EACH, EACH])
    store(s, place, kept, positions_ptr, slots_ptr, table_ptr, PAGE)


@triton.jit
def _tournament(
    scores_ptr, pair_ptr, len_ptr, table_ptr, positions_ptr, slots_ptr, arrived_ptr, flag_ptr,
    T, N, S, stride, P, k, width,
    ALL: tl.constexpr, TP: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr, KP: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Select in the flagged rows, or in all. pair_ptr: the scores' memory, as numbers of 8 bytes.

    arrived_ptr: int32 [T, 2 · chunks + 2], zeros before and after.
    """
    some = ALL
    if not ALL:
        every = tl.arange(0, TP)
        some = tl.max(tl.load(flag_ptr + every, every < T, 0), 0) != 0
    if some:
        SIZE: tl.constexpr = ROWS * EACH
        programs = tl.num_programs(0)
        turn = tl.program_id(0)  # how many chunks go to other programs before the next one of this
        for row_number in range(0, T):
            t = row_number + tl.zeros([], tl.int64)  # the interpreter's row is a plain int
            flag = 1 if ALL else tl.load(flag_ptr + t)
            n = seen_by(len_ptr, t, N, S)
            chunks = tl.maximum(tl.cdiv(n, SIZE), 1) * flag
            chunk = turn
            while chunk < chunks:
                play(
                    chunk, n, 0, scores_ptr + t * stride, pair_ptr + t * (stride // 2),
                    arrived_ptr + t * (2 * (stride // SIZE) + 2), positions_ptr + t * width, slots_ptr + t * width,
                    table_ptr + t // N * P, k, width, ROWS, EACH, KP, PAGE,
                )  # fmt: skip
                chunk += programs
            turn = chunk - chunks


@triton.jit
def _translate(
    chosen_ptr, table_ptr, positions_ptr, slots_ptr, N, P, k, width, PAGE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Positions [T, k] with -1 at the end as positions and slots [T, width]."""
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(chosen_ptr + t * k + i, i < k, -1)
    page = tl.load(table_ptr + t // N * P + position // PAGE, position >= 0, 0)
    tl.store(positions_ptr + t * width + i, position, i < width)
    tl.store(slots_ptr + t * width + i, tl.where(position >= 0, page * PAGE + position % PAGE, -1), i < width)


def row_stride(S):
    """How far apart rows of S scores must lie: whole chunks of the second launch, which keeps lists in them."""
    return triton.cdiv(S, 16) * 16 if S <= FLAGGED else triton.cdiv(S, FLAGGED) * FLAGGED


def counters(T, S):
    """How many int32 zeros `launch` needs for T rows of S scores."""
    return T * (2 * triton.cdiv(S, FLAGGED) + 4)


def shape_of(T, S, multiprocessors):
    """(scores of a chunk, warps, programs that share a row) for `_select`."""
    if S <= 4096:
        chunk, warps = 4096, 8
    elif S <= 8192 or S > 500_000 or T > 16:
        chunk, warps = 8192, 16 if T == 1 else 8
    else:
        chunk, warps = 4096, 8
    return chunk, warps, min(triton.cdiv(S, chunk), max(1, multiprocessors // T))


def sample_of(S):
    """How many scores of a row are looked at for its bound: in each so many that some 3000 should reach it."""
    return 2048 if S <= 32768 else 4096 if S <= 2 * LONG else 8192


def launch(scores, page_table, lengths, N, S, page, k, positions, slots, zeros):
    """Write the selection of T rows to positions and slots, int32 [T, width], both contiguous. scores are lost.

    scores: fp32 [T, `row_stride(S)`], of which row t sees the first lengths[t // N] - N + 1 + t % N; page_table: int32
    [T / N, P], lengths: int32 [T / N], both contiguous; k: at most S and width; zeros: int32 [`counters(T, S)`], zeros
    before and after. T > 0.
    """
    T, stride = scores.shape
    P, width = page_table.shape[1], positions.shape[1]
    if k > LARGEST_K:
        launch_radix(scores, page_table, lengths, N, S, page, k, positions, slots)
        return
    device, many = scores.device, multiprocessors(scores)
    flags = torch.empty(T, dtype=torch.int32, device=device)
    KP = max(16, triton.next_power_of_2(k))
    listed = k <= LARGEST_LISTED_K
    if listed:
        chunk, warps, programs = shape_of(T, S, many)
        chunks = max(2, triton.next_power_of_2(triton.cdiv(S, chunk)))
        lists = torch.empty(T, 2, LIST, dtype=torch.int32, device=device)
        work = torch.empty(T, 2, chunks, dtype=torch.int32, device=device)
        _select[(T, programs)](
            scores, lengths, page_table, positions, slots, lists, work, zeros, flags, N, S, stride, P, k, width,
            ROWS=chunk // 4, EACH=4, SAMPLE=sample_of(S), CAP=LIST, CHUNKS=chunks, PAGE=page,
            num_warps=warps,
        )  # fmt: skip
        if S <= chunk:
            return  # every row stayed in registers
    _tournament[(min(T * triton.cdiv(S, FLAGGED), many),)](
        scores, scores.view(torch.int64), lengths, page_table, positions, slots, zeros[2 * T :], flags,
        T, N, S, stride, P, k, width,
        ALL=not listed, TP=max(2, triton.next_power_of_2(T)), ROWS=FLAGGED // 4, EACH=4, KP=KP, PAGE=page,
        num_warps=16, maxnreg=128,  # left to itself, ptxas takes 32 and spills the rest
    )  # fmt: skip


def launch_radix(scores, page_table, lengths, N, S, page, k, positions, slots):
    """The same for any k."""
    T, width = positions.shape
    new = torch.arange(1 - N, 1, dtype=torch.int32, device=scores.device)
    ends = (lengths.clamp(max=S)[:, None] + new).clamp(min=0).flatten()
    chosen, nan = torch.empty(T, k, dtype=torch.int32, device=scores.device), torch.empty_like(ends)
    radix.launch(scores, k, torch.zeros_like(ends), ends, chosen, nan)
    _translate[(T, triton.cdiv(width, 1024))](
        chosen, page_table, positions, slots, N, page_table.shape[1], k, width, PAGE=page, BLOCK=1024, num_warps=4
    )
