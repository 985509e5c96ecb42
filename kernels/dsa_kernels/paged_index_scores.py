"""Equation 1 in a decode step: a few queries of each sequence against all its keys, which lie in pages.

Schedule: the tiles of all sequences stand in one row, tile after tile, and every program takes an equal stretch of it.
Where a stretch begins follows from a running sum of the lengths, which each program makes for itself. So sequences of
any lengths keep all multiprocessors equally busy, the grid is a function of the shapes alone, and no kernel has to plan
first. A program loads q and w of a sequence once, then walks over tiles of BK keys, some stages of which are on their
way: page number from the table, BK · Di values (by TMA where `by_tma` says so), BK scales. For a sequence that is ALONE
in its batch there is nothing to search, and q and w are loaded while its length is. As in `index_scores`, keys lie on
the rows of the product and (query, head) pairs on its columns: the sum over heads stays in a thread's registers.

Bytes: 132 of the cache a key, read once for all N queries of the sequence, and 4 written a score. FLOPs: 16,384 a score
in V3.2, so that up to two queries a sequence are bound by memory.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from dsa_ref.contracts import check_paged_index_scores

from . import cards
from .index_scores import TRITON_NAMES
from .rounding import operand
from .runtime import INTERPRETED, check_runnable, dot_dtype, hopper_variant, multiprocessors

SIDE_BY_SIDE = {1: 4, 2: 3}  # programs on a multiprocessor at once, by their queries; 2 of more
SIDE_BY_SIDE_WITH_TMA = {1: 5, 2: 4}  # which needs fewer registers
REGISTERS = 65536  # of a multiprocessor
FEWEST_FOR_HOPPER = 256  # pages that the table has room for; below, Hopper's kernel takes too long to start


@triton.jit
def scales_of(word_ptr, byte_ptr, page, row, STRIDE: tl.constexpr, VALUES: tl.constexpr, WORDS: tl.constexpr):
    """The fp32 scales of keys: they lie behind the VALUES bytes of a page, which has STRIDE bytes.

    Without WORDS they do not begin at a multiple of four bytes, and are put together of bytes.
    """
    if WORDS:
        return tl.load(word_ptr + page * (STRIDE // 4) + (VALUES // 4 + row))
    else:
        at = byte_ptr + page * STRIDE + (VALUES + 4 * row)
        bits = tl.load(at).to(tl.uint32)
        for i in tl.static_range(1, 4):
            bits |= tl.load(at + i).to(tl.uint32) << (8 * i)
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def queries_of(b, of_query, h, q_ptr, w_ptr, Hi, Di, N: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr):
    """qᵀ [DP, (query, head) pairs] and w of sequence b; 0 for pairs that there are not."""
    real = (h < Hi) & (of_query < N)
    d = tl.arange(0, DP)
    pair = (b * N + of_query) * Hi + h
    q = tl.load(q_ptr + pair[:, None] * Di + d[None, :], real[:, None] & (d < Di)[None, :], 0.0)
    return tl.trans(operand(q, DOT)), tl.load(w_ptr + pair, real, 0.0)


@triton.jit
def stretch(total):
    """(first, last) of the tiles that belong to this program, of `total` in all."""
    tile = tl.program_id(0) * total.to(tl.int64) // tl.num_programs(0)
    last = (tl.program_id(0) + 1) * total.to(tl.int64) // tl.num_programs(0)
    return tile.to(tl.int32), last.to(tl.int32)


@triton.jit
def _paged_index_scores(
    q_ptr, w_ptr, values, word_ptr, byte_ptr, table_ptr, len_ptr, out_ptr, zero_ptr, B, P, stride, Hi, Di, zeros,
    N: tl.constexpr, NQ: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr,
    PAGE: tl.constexpr, STRIDE: tl.constexpr, VALUES: tl.constexpr, WORDS: tl.constexpr, WHOLE: tl.constexpr,
    TMA: tl.constexpr, ALONE: tl.constexpr, FILL: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    S = P * PAGE
    n0 = tl.program_id(1) * NQ
    n = n0 + tl.arange(0, NQ)
    column = tl.arange(0, NQ * HP)  # (query, head) pairs
    h, of_query = column % HP, n0 + column // HP
    d = tl.arange(0, DP)
    key = tl.arange(0, BK)
    each = tl.arange(0, BP)
    if ALONE:  # q, w and the length are on their way at once
        q, w = queries_of(0, of_query, h, q_ptr, w_ptr, Hi, Di, N, DP, DOT)
        length = tl.minimum(tl.load(len_ptr), S)
        tiles = (tl.maximum(length, 0) + (BK - 1)) // BK
        tile, last = stretch(tiles)
    else:
        lengths = tl.minimum(tl.load(len_ptr + each, each < B, 0), S)
        tiles = (tl.maximum(lengths, 0) + (BK - 1)) // BK
        ends = tl.cumsum(tiles, 0)
        tile, last = stretch(tl.sum(tiles, 0))
    if tl.program_id(1) == 0:  # counters of whoever comes next
        for i0 in range(tl.program_id(0) * 1024, zeros, tl.num_programs(0) * 1024):
            i = i0 + tl.arange(0, 1024)
            tl.store(zero_ptr + i, tl.zeros([1024], tl.int32), i < zeros)

    while tile < last:
        if ALONE:
            b, before, stop, out = 0, 0, last, out_ptr + n * stride
        else:  # the sequence this tile belongs to, its tiles in this program's stretch, and its queries
            b = tl.sum((ends <= tile).to(tl.int32), 0)
            before = tl.max(tl.where(ends <= tile, ends, 0), 0)
            stop = tl.minimum(last, tl.min(tl.where(ends > tile, ends, 2147483647), 0))
            length = tl.minimum(tl.load(len_ptr + b), S)
            q, w = queries_of(b.to(tl.int64), of_query, h, q_ptr, w_ptr, Hi, Di, N, DP, DOT)
            out = out_ptr + (b.to(tl.int64) * N + n) * stride
        for i in tl.range(tile - before, stop - before, num_stages=STAGES):
            s = i * BK + key
            if PAGE % BK == 0:  # a tile lies within a page
                page = tl.load(table_ptr + b * P + i * BK // PAGE)
                row = i * BK % PAGE + key
            else:
                page = tl.load(table_ptr + b * P + s // PAGE, s < length, 0)
                row = s % PAGE
            if TMA:
                k = tl.reshape(values.load([page, i * BK % PAGE, 0]), [BK, DP])
            else:
                k_ptrs = values + ((page.to(tl.int64) * STRIDE + row * Di)[:, None] + d[None, :])
                if WHOLE:
                    k = tl.load(k_ptrs)
                else:
                    k = tl.load(k_ptrs, (d < Di)[None, :], 0.0)
            scale = scales_of(word_ptr, byte_ptr, page.to(tl.int64), row, STRIDE, VALUES, WORDS)
            dots = tl.dot(operand(k, DOT), q, input_precision="ieee")
            weighted = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL) * w[None, :]
            scores = tl.sum(tl.reshape(weighted, [BK, NQ, HP]), axis=2) * scale[:, None]
            seen = s[:, None] < (length - N + 1 + n)[None, :]
            if FILL:
                scores = tl.where(seen, scores, float("-inf"))
                seen = s[:, None] < S
            tl.store(out[None, :] + s[:, None], scores, seen & (n < N)[None, :])
        tile = stop
    if FILL:  # what lies behind the last tile of each sequence, shared evenly too
        every = (S + (BK - 1)) // BK
        if ALONE:
            tile, last = stretch(every - tiles)
        else:
            behind = tl.where(each < B, every - tiles, 0)
            ends = tl.cumsum(behind, 0)
            tile, last = stretch(tl.sum(behind, 0))
        nothing = tl.full([BK, NQ], float("-inf"), tl.float32)
        while tile < last:
            if ALONE:
                s = (tiles + tile) * BK + key
                out = out_ptr + n * stride
            else:
                b = tl.sum((ends <= tile).to(tl.int32), 0)
                before = tl.max(tl.where(ends <= tile, ends, 0), 0)
                s = (tl.sum(tl.where(each == b, tiles, 0), 0) + tile - before) * BK + key
                out = out_ptr + (b.to(tl.int64) * N + n) * stride
            tl.store(out[None, :] + s[:, None], nothing, (s < S)[:, None] & (n < N)[None, :])
            tile += 1


def paged_index_scores(
    q_idx: torch.Tensor,
    index_pages: torch.Tensor,
    w: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    variant: str | None = None,
) -> torch.Tensor:
    """`dsa_ref.paged_index_scores` on tensor cores: fp32 [B, N, P · page], -inf where a query does not see.

    q_idx: float8_e4m3fn [B, N, Hi, Di], N from 1 to 4; index_pages: uint8 [pages, page · (Di + 4)], a page's values,
    then its fp32 scales; w: fp32 [B, N, Hi], with q_idx's scales in it; page_table: int32 [B, P], -1 for none; lengths:
    int32 [B], the N new tokens included. No gradient.
    Query n of sequence b sees the positions below lengths[b] - N + 1 + n. A score's bits depend on its query, its key,
    N and the card alone. NaN in what a score is made of makes it NaN; what lies behind a length does not matter.
    variant: "portable", "hopper" (compute capability 9.0; `hopper.paged_index_scores` says for which sizes), "widened"
    (portable, and FP8 as older cards read it), or None for "hopper" where it can serve and the table has room for many
    pages, else "portable". The first two give the same bits, unless w has numbers nearer to 0 than 2^-125.

    The grid is a function of the shapes, and nothing waits for the GPU while a CUDA graph is captured.
    Raises: as the reference does; ValueError as `runtime.check_runnable` does, and for a variant that is unknown
    or cannot serve these inputs. Source: SPEC sections 2 and 10.
    """
    check_paged_index_scores(q_idx, index_pages, w, page_table, lengths)
    check_runnable(q_idx=q_idx, index_pages=index_pages, w=w)
    hopper = choose(variant, q_idx, index_pages, page_table)
    (B, N), page = q_idx.shape[:2], index_pages.shape[1] // (q_idx.shape[3] + 4)
    shape = B, N, page_table.shape[1] * page
    out = torch.empty(shape, dtype=torch.float32, device=q_idx.device)
    launch(q_idx, index_pages, w, page_table, lengths, out, fill=True, widened=variant == "widened", hopper=hopper)
    return out


def choose(variant, q_idx, index_pages, page_table):
    """Hopper's module, or None for the portable kernel, for both steps on paged index caches."""
    default = "hopper" if page_table.numel() >= FEWEST_FOR_HOPPER else "portable"
    return hopper_variant("paged_index_scores", variant, default, q_idx, index_pages, page_table)


def tiles(card, N, HP, DP, loaded, multiplied):
    """(NQ, BK, warps, stages): queries and keys that a program of that card multiplies at once, and tiles on their way.

    HP, DP: heads and dims, powers of two; loaded, multiplied: bytes of a number in memory, and in the product.
    Raises ValueError if the card has too little shared memory even for few.
    """
    NQ, BK, stages = triton.next_power_of_2(N), 64, 6

    def shared_memory():
        columns = max(16, NQ * HP)
        return columns * DP * multiplied + stages * BK * DP * loaded + columns * BK // 2 + 1024

    while shared_memory() > card.shared_memory:
        if stages > 3:
            stages -= 1
        elif NQ > 1:
            NQ //= 2
        elif BK > 16:
            BK //= 2
        else:
            raise ValueError(cards.too_wide("q_idx", f"{HP} heads of {DP} dims", shared_memory(), card))
    return NQ, BK, 8 if NQ * HP > 128 and card.capability != cards.HOPPER else 4, stages


def by_tma(card, values, page, Di, BK):
    """Whether TMA brings the keys, BK of one page at a time: pages are as it needs them, and the card is a Hopper.

    What threads copy, asynchronously too, reaches shared memory by another path than the one by which Hopper's tensor
    cores read it. Triton 3.7 puts a fence between them into every turn of the loop, and that fence also waits until the
    last tile's scores are written. TMA takes the tensor cores' path, and no registers for pointers.
    """
    whole = page % BK == 0 and Di >= 32 and Di & (Di - 1) == 0
    placed = values.data_ptr() % 16 == 0 and page * (Di + 4) % 16 == 0
    here = INTERPRETED or (card.capability == cards.HOPPER and values.dtype == torch.float8_e4m3fn)
    return whole and placed and here


def launch(q_idx, index_pages, w, page_table, lengths, out, zeros=None, fill=False, widened=False, hopper=None):
    """Write the scores that are seen to out, fp32 [B, N, at least P · page], contiguous; with `fill`, -inf to the rest.

    From checked arguments. zeros: int32, contiguous, becomes zeros. B · N > 0 unless zeros is None.
    hopper: the module that `choose` gave.
    """
    (B, N, Hi, Di), P = q_idx.shape, page_table.shape[1]
    page = index_pages.shape[1] // (Di + 4)
    if B == 0:
        return
    if hopper:
        hopper.launch(q_idx, index_pages, w, page_table, lengths, out, zeros, fill)
        return
    HP, DP = triton.next_power_of_2(max(Hi, triton.cdiv(16, triton.next_power_of_2(N)))), triton.next_power_of_2(Di)
    DP = max(32, DP)
    card = cards.card_of(q_idx)
    bytes_ = index_pages.contiguous()
    widened = widened or (card is not None and card.capability < cards.NATIVE_FP8)
    q_idx, values = (x.view(torch.uint8 if widened else torch.float8_e4m3fn) for x in (q_idx.contiguous(), bytes_))
    if INTERPRETED:  # each operation costs the same whatever its size: few large tiles
        NQ, BK, warps, stages = triton.next_power_of_2(N), page if page & (page - 1) == 0 and page >= 64 else 64, 4, 1
    else:
        NQ, BK, warps, stages = tiles(card, N, HP, DP, 1, dot_dtype(q_idx).itemsize)
        HP = max(HP, triton.cdiv(16, NQ))
    tma = by_tma(card, values, page, Di, BK)
    if tma:
        values = TensorDescriptor(values, [len(values), page, Di], [page * (Di + 4), Di, 1], [1, BK, Di])
    words = page * Di % 4 == 0 and bytes_.data_ptr() % 4 == 0
    side_by_side = (SIDE_BY_SIDE_WITH_TMA if tma else SIDE_BY_SIDE).get(NQ, 2)
    if B == 1:
        side_by_side = min(side_by_side, 4)  # a fifth would do too little to pay for its start
    programs = min(side_by_side * multiprocessors(q_idx), triton.cdiv(B * P * page, BK))
    _paged_index_scores[(programs, triton.cdiv(N, NQ))](
        q_idx, w.contiguous(), values, bytes_.view(torch.float32) if words else bytes_, bytes_, page_table.contiguous(),
        lengths.contiguous(), out, lengths if zeros is None else zeros, B, P, out.shape[2], Hi, Di,
        0 if zeros is None else zeros.numel(),
        N=N, NQ=NQ, HP=HP, DP=DP, BK=BK, BP=max(2, triton.next_power_of_2(B)),
        PAGE=page, STRIDE=page * (Di + 4), VALUES=page * Di, WORDS=words, WHOLE=DP == Di,
        TMA=tma, ALONE=B == 1, FILL=fill, DOT=getattr(tl, TRITON_NAMES[dot_dtype(q_idx)]), STAGES=stages,
        num_warps=warps,
        maxnreg=min(255, REGISTERS // (32 * warps * side_by_side) // 8 * 8),
    )  # fmt: skip
