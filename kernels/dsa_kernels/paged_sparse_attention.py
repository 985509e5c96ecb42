"""Equation 2 in a decode step: a few queries, each over the rows of a paged cache that its list of slots names.

Schedule: a list of k places is cut into parts, and one program takes one part of one query for up to 64 of its heads:
so that few queries keep the card busy. It keeps q, gathers BK rows at a time, and goes on as `sparse_attention` does:
logits, online softmax in base 2, values. The value's columns are processed in tiles of up to 128, each with a sum of
its own, since FP8 rows have a scale for each tile of 128. A scale is never multiplied into the 128 values of its tile:
it is multiplied into their dot product, and for the output into the row's probability, in fp32. So any scale is as
exact as a power of two, and e4m3 is widened to bf16 exactly: by the card where it knows the type, else from its bytes.

With more than one part, programs write fp32 parts, and `_merge` adds them up in ascending order, a program a head. How
many parts there are follows from k alone, tiles from the heads and the card: a row has the same bits in any batch.

Memory of the parts, which another kernel may fill (`hopper/paged_sparse_attention.py` and `paged_sparse_part.py` do):
    parts     fp32 [B · N, splits, H, v_dim], each part's own softmax times its values
    part_lse  fp32 [B · N, splits, H], its log-sum-exp, natural; -inf for a part without a row, whose `parts` are unread
With one part these are out and lse themselves, in out's dtype.

Bytes: 656 a selected row in V3.2's FP8 form, once for each 64 heads, mostly from memory; 4 · v_dim + 4 written and read
again for each part and head. FLOPs: 2 · 128 · (576 + 512) a selected row.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsa_ref.contracts import check_merge_parts, check_paged_sparse_attention, part_length, splits_of

from . import cards
from .index_scores import TRITON_NAMES
from .rounding import from_e4m3, round_to
from .runtime import FLOATS, INTERPRETED, check_runnable, dot_dtype, hopper_variant
from .sparse_attention import check_scale_in_base_2

FP8_TILE = 128  # columns of an FP8 row that share a scale
MERGED_AT_ONCE, MERGING_WARPS = 128, 1  # columns and warps of a program of `_merge`
LISTED_AT_ONCE = 512  # places of a part; longer ones are first searched for their last slot


@triton.jit
def _value_tile(
    kv_ptr, row, there, j,
    V: tl.constexpr, TILE: tl.constexpr, ROW: tl.constexpr, NATIVE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Columns j · TILE and on of the rows' values, [BK, TILE] in DOT; FP8 values without their scale."""
    column = j * TILE + tl.arange(0, TILE)
    mask = there[:, None] if V % TILE == 0 else there[:, None] & (column < V)[None, :]
    x = tl.load(kv_ptr + row[:, None] * ROW + column[None, :], mask, 0.0)
    if NATIVE:
        return x.to(tl.float8e4nv, bitcast=True).to(DOT)
    elif x.dtype == tl.uint8:
        return from_e4m3(x, DOT)
    else:
        return x.to(DOT)


@triton.jit
def _scale(word_ptr, kv_ptr, row, there, j, V: tl.constexpr, ROW: tl.constexpr, WORDS: tl.constexpr):
    """The fp32 scale of the rows' tile j, which lies behind V bytes of values; without WORDS put together of bytes."""
    if WORDS:
        return tl.load(word_ptr + row * (ROW // 4) + (V // 4 + j), there, 0.0)
    else:
        bits = tl.zeros_like(row).to(tl.uint32)
        for i in tl.static_range(4):
            bits |= tl.load(kv_ptr + row * ROW + (V + 4 * j + i), there, 0).to(tl.uint32) << (8 * i)
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _rest(
    half_ptr, kv_ptr, row, there, V: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, SCALES: tl.constexpr,
    ROW: tl.constexpr, FP8: tl.constexpr, WORDS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The R columns behind the value, [BK, RP] in DOT. In FP8 rows they are bf16, behind SCALES bytes of scales."""
    column = tl.arange(0, RP)
    mask = there[:, None] if R == RP else there[:, None] & (column < R)[None, :]
    if not FP8:
        return tl.load(kv_ptr + row[:, None] * ROW + (V + column)[None, :], mask, 0.0).to(DOT)
    elif WORDS:
        first: tl.constexpr = (V + SCALES) // 2
        return tl.load(half_ptr + row[:, None] * (ROW // 2) + (first + column)[None, :], mask, 0.0).to(DOT)
    else:
        at = kv_ptr + row[:, None] * ROW + (V + SCALES + 2 * column)[None, :]
        bits = tl.load(at, mask, 0).to(tl.uint16) | (tl.load(at + 1, mask, 0).to(tl.uint16) << 8)
        return bits.to(tl.bfloat16, bitcast=True).to(DOT)


@triton.jit
def _paged_sparse_attention(
    q_ptr, kv_ptr, word_ptr, half_ptr, slots_ptr, out_ptr, lse_ptr, scale, H, k, part,
    D: tl.constexpr, V: tl.constexpr, ROW: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, RP: tl.constexpr,
    BH: tl.constexpr, BK: tl.constexpr, LIST: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr,
    WORDS: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    z, splits = tl.program_id(2), tl.num_programs(2)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    real = (h < H)[:, None]
    q_row = q_ptr + (t * H + h)[:, None] * D
    qs = ()
    for j in tl.static_range(TILES):
        column = j * TILE + tl.arange(0, TILE)
        qs = qs + (tl.load(q_row + column[None, :], real & (column < V)[None, :], 0.0).to(DOT),)
    if RP > 0:
        column = V + tl.arange(0, RP)
        q_rest = tl.load(q_row + column[None, :], real & (column < D)[None, :], 0.0).to(DOT)

    first = z * part
    last = tl.minimum(first + part, k)
    slots_row = slots_ptr + t * k
    if LIST > 0:  # up to the last slot: what follows is -1, and changes no bit
        used = first
        for j0 in range(first, last, LIST):
            place = j0 + tl.arange(0, LIST)
            s = tl.load(slots_row + place, place < last, -1)
            used = tl.maximum(used, tl.max(tl.where(s >= 0, place + 1, 0), axis=0))
        last = used

    m = tl.full([BH], float("-inf"), tl.float32)
    l = tl.zeros([BH], tl.float32)  # noqa: E741 (l is the field's name for it)
    sums = ()
    for _ in tl.static_range(TILES):
        sums = sums + (tl.zeros([BH, TILE], tl.float32),)
    for j0 in tl.range(first, last, BK, num_stages=STAGES):
        place = j0 + tl.arange(0, BK)
        s = tl.load(slots_row + place, place < last, -1)
        there = s >= 0
        row = tl.maximum(s, 0).to(tl.int64)
        values = ()
        for j in tl.static_range(TILES):
            values = values + (_value_tile(kv_ptr, row, there, j, V, TILE, ROW, NATIVE, DOT),)
        logits = tl.zeros([BH, BK], tl.float32)
        if RP > 0:
            rest = _rest(half_ptr, kv_ptr, row, there, V, D - V, RP, 4 * TILES, ROW, FP8, WORDS, DOT)
            logits = tl.dot(q_rest, tl.trans(rest), input_precision="ieee")
        scales = ()
        for j in tl.static_range(TILES):
            if FP8:
                scales = scales + (_scale(word_ptr, kv_ptr, row, there, j, V, ROW, WORDS),)
                logits += tl.dot(qs[j], tl.trans(values[j]), input_precision="ieee") * scales[j][None, :]
            else:
                logits = tl.dot(qs[j], tl.trans(values[j]), logits, input_precision="ieee")
        logits = tl.where(there[None, :], logits * (scale * 1.4426950408889634), float("-inf"))  # in base 2
        new_m = tl.maximum(m, tl.max(logits, axis=1))
        finite_m = tl.where(new_m == float("-inf"), 0.0, new_m)  # nothing selected so far: keep NaN out
        rescale = tl.exp2(m - finite_m)
        p = tl.exp2(logits - finite_m[:, None])
        l = l * rescale + tl.sum(p, axis=1)  # noqa: E741
        new_sums = ()
        for j in tl.static_range(TILES):
            weights = p * scales[j][None, :] if FP8 else p
            product = tl.dot(round_to(weights, DOT), values[j], sums[j] * rescale[:, None], input_precision="ieee")
            new_sums = new_sums + (product,)
        sums = new_sums
        m = new_m

    at = (t * splits + z) * H + h
    divisor = tl.where(l == 0, 1.0, l)[:, None]
    for j in tl.static_range(TILES):
        column = j * TILE + tl.arange(0, TILE)
        out = tl.where((l == 0)[:, None], 0.0, sums[j] / divisor)  # the sum may hold 0 · infinity
        out = round_to(out, out_ptr.dtype.element_ty)
        tl.store(out_ptr + at[:, None] * V + column[None, :], out, real & (column < V)[None, :])
    lse = tl.where(l == 0, float("-inf"), (m + tl.log2(tl.where(l == 0, 1.0, l))) * 0.6931471805599453)  # NaN stays
    tl.store(lse_ptr + at, lse, h < H)


@triton.jit
def _merge(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, splits, H, V,
    SP: tl.constexpr, VP: tl.constexpr, AT_ONCE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """VP columns of out, and lse, of one head of one query from its parts, in ascending order."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    t, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0).to(tl.int64) % H
    first = t * splits * H + h
    v = tl.program_id(1) * VP + tl.arange(0, VP)
    z = tl.arange(0, SP)
    top = tl.max(tl.load(part_lse_ptr + first + z * H, z < splits, float("-inf")), axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)  # no part has a row: keep NaN out
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([VP], tl.float32)
    for z0 in range(0, splits, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            at, there = first + (z0 + i) * H, z0 + i < splits
            part_lse = tl.load(part_lse_ptr + at, there, float("-inf"))
            x = tl.load(part_ptr + at * V + v, there & (v < V), 0.0)
            share = tl.exp2((part_lse - top) * 1.4426950408889634)
            total += share
            acc += share * tl.where(part_lse == float("-inf"), 0.0, x)
    out = acc / tl.where(total == 0, 1.0, total)
    at = t * H + h
    tl.store(out_ptr + at * V + v, round_to(out, out_ptr.dtype.element_ty), v < V)
    lse = tl.where(total == 0, float("-inf"), top + tl.log2(tl.where(total == 0, 1.0, total)) * 0.6931471805599453)
    if tl.program_id(1) == 0:
        tl.store(lse_ptr + at, lse)


def paged_sparse_attention(
    q: torch.Tensor,
    kv_pages: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
    v_dim: int,
    splits: int | None = None,
    variant: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dsa_ref.paged_sparse_attention` on tensor cores: (out [B, N, H, v_dim] in q.dtype, lse fp32 [B, N, H]).

    q: bf16, fp16 or fp32 [B, N, H, D], N from 1 to 4; kv_pages: uint8 [pages, page, row] for FP8 rows (see
    `dsa_ref.paged`), else [pages, page, D] in q's dtype; slots: int32 [B, N, k], -1 for none, wherever it stands;
    scale: of the logits, up to 2.358e38; v_dim: how many of a row's first columns are the value. No gradient.
    lse is the natural logarithm. A row with nothing selected gives 0 and -inf. splits: how many parts a row's list is
    cut into, None for `default_splits(k)`. A row's bits follow from its q, its list, k, splits and the card.
    Products are of bf16 or fp16, fp32 without TF32; FP8 values are widened exactly and any fp32 scale is honoured, but
    their products with an fp16 q are of fp32. Probabilities are rounded to the products' type; sums are fp32.

    "hopper" differs beside NaN and infinity: there a row with nothing selected whose q holds NaN gives NaN, and one
    with logits of -inf alone gives NaN where its values are infinite.

    variant: "portable", "hopper" (compute capability 9.0, FP8 rows; `hopper.paged_sparse_attention` says for which
    sizes), "widened" (portable, and FP8 as older cards read it), or None for "hopper" where it can serve, else
    "portable".
    The grid is a function of the shapes, and nothing waits for the GPU while a CUDA graph is captured.

    Raises: as the reference does (fp64 is a TypeError here); ValueError as `runtime.check_runnable` does, and for a
    variant that is unknown or cannot serve these inputs. Source: SPEC sections 3, 6 and 10.
    """
    check_paged_sparse_attention(q, kv_pages, slots, scale, v_dim, splits, FLOATS)
    check_scale_in_base_2(scale)
    check_runnable(q=q, kv_pages=kv_pages)
    (B, N, H, _), k = q.shape, slots.shape[2]
    splits = splits_of(k, splits)
    hopper = hopper_variant("paged_sparse_attention", variant, "hopper", q, kv_pages, slots, v_dim, splits)
    out = torch.empty(B, N, H, v_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, N, H, dtype=torch.float32, device=q.device)
    if B * N == 0:
        return out, lse
    parts, part_lse = out.flatten(0, 1)[:, None], lse.flatten(0, 1)[:, None]
    if splits > 1:
        parts = torch.empty(B * N, splits, H, v_dim, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(B * N, splits, H, dtype=torch.float32, device=q.device)
    if hopper:
        rows_out, rows_lse = out.flatten(0, 1), lse.flatten(0, 1)
        q, slots = q.flatten(0, 1), slots.flatten(0, 1)
        hopper.launch(q, kv_pages, slots, scale, v_dim, splits, rows_out, rows_lse, parts, part_lse)
    else:
        launch_portable(q, kv_pages, slots, scale, v_dim, splits, parts, part_lse, widened=variant == "widened")
    if splits > 1:
        merge(parts, part_lse, out, lse)
    return out, lse


def tiles(card, H, columns, RP, loaded, multiplied, native):
    """(BH, BK, warps): the heads and the rows of a tile, as many as that card's shared memory holds.

    native: whether the card widens FP8. Then eight warps take 64 rows at once, so that many loads are under way; but
    not where wgmma multiplies them, which has too few registers for so many.

    columns, RP: the value's and the other columns, as the kernel pads them; loaded, multiplied: bytes of a number of
    the value in memory, and in the product. Raises ValueError if not even the smallest tile fits.
    """
    fp8, wgmma = loaded < multiplied, card.capability == cards.HOPPER
    # Blackwell's data-centre cards would keep 64 rows of each sum in tensor memory, of which there is not enough.
    most = 16 if multiplied == 4 else 32 if card.capability[0] in (10, 11) else 64
    BH = max(16, min(triton.next_power_of_2(H), most))
    wide = native and not (wgmma and BH == 64)
    BK = 64 if wide or loaded == multiplied == 2 else 32 if columns <= 128 or multiplied == 2 else 16

    def shared_memory():
        row = (columns + RP) * multiplied
        raw = columns + 2 * RP + 4 * triton.cdiv(columns, FP8_TILE) if fp8 else 0  # on its way, beside its wider form
        if wgmma and BH == 64:
            return BH * row + BK * (row + raw if fp8 else 2 * row) + 1024
        return (BH + BK) * row + BK * raw + 8 * BH * BK  # q goes to registers, and its place to the rows

    while shared_memory() > card.shared_memory:
        if BH == BK == 16:
            raise ValueError(cards.too_wide("q", f"16 heads and 16 rows of {columns + RP}", shared_memory(), card))
        BH, BK = (BH // 2, BK) if BH > BK else (BH, BK // 2)
    few = 16384 if card.capability == cards.HOPPER else 8192  # sums that four warps hold in registers
    return BH, BK, 8 if native or columns * BH > few else 4


def launch_portable(q, kv_pages, slots, scale, v_dim, splits, parts, part_lse, widened=False):
    """Fill parts and part_lse, laid out as this module's docstring says, from checked arguments. B · N > 0.

    widened: take FP8 as bytes also on a card that could widen it.
    """
    (B, N, H, D), k = q.shape, slots.shape[2]
    fp8 = kv_pages.dtype == torch.uint8
    rows = kv_pages.reshape(-1, kv_pages.shape[2])
    row = rows.shape[1]
    words = fp8 and row % 4 == 0 and v_dim % 4 == 0 and rows.data_ptr() % 4 == 0
    TILE = max(16, min(FP8_TILE, triton.next_power_of_2(v_dim)))
    TILES = triton.cdiv(v_dim, TILE)
    RP = max(16, triton.next_power_of_2(D - v_dim)) if D > v_dim else 0
    multiplied = torch.float32 if fp8 and q.dtype == torch.float16 else dot_dtype(q)
    native = False
    if INTERPRETED:  # each operation costs the same whatever its size: few large tiles
        BH, BK, warps = max(16, triton.next_power_of_2(H)), 64, 4
    else:
        card = cards.card_of(q)
        native = fp8 and multiplied == torch.bfloat16 and card.capability >= cards.NATIVE_FP8 and not widened
        BH, BK, warps = tiles(card, H, TILES * TILE, RP, rows.itemsize, multiplied.itemsize, native)
    part = part_length(k, splits)
    _paged_sparse_attention[(B * N, triton.cdiv(H, BH), splits)](
        q.contiguous(), rows, rows.view(torch.float32) if words else rows, rows.view(torch.bfloat16) if words else rows,
        slots.contiguous(), parts, part_lse, scale, H, k, part,
        D=D, V=v_dim, ROW=row, TILE=TILE, TILES=TILES, RP=RP, BH=BH, BK=BK,
        LIST=LISTED_AT_ONCE if part > LISTED_AT_ONCE else 0, FP8=fp8, NATIVE=native, WORDS=words,
        DOT=getattr(tl, TRITON_NAMES[multiplied]), STAGES=1 if native and BK == 64 else 2, num_warps=warps,
    )  # fmt: skip


def merge_parts(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`dsa_ref.merge_parts`: one softmax from those of disjoint parts, (out [..., v], lse [...]) in fp32. No gradient.

    outs: fp32 [splits, ..., v]; lses: fp32 [splits, ...], natural logarithm. Summed in ascending order; a part whose
    lse is -inf counts for nothing, whatever its out holds, and a row without another gives 0 and -inf.

    Raises: as the reference does (fp64 is a TypeError here), and ValueError as `runtime.check_runnable` does.
    """
    check_merge_parts(outs, lses)
    if outs.dtype != torch.float32:
        raise TypeError("outs must have dtype float32, got float64")
    check_runnable(outs=outs, lses=lses)
    out = torch.empty(outs.shape[1:], dtype=torch.float32, device=outs.device)
    lse = torch.empty(lses.shape[1:], dtype=torch.float32, device=outs.device)
    flat = outs.contiguous().view(1, len(outs), -1, outs.shape[-1])  # each row as a head of one query
    merge(flat, lses.contiguous().view(1, len(lses), -1), out, lse)
    return out, lse


def merge(parts, part_lse, out, lse):
    """Write out and lse from parts [queries, splits, H, v_dim] and part_lse [queries, splits, H]."""
    queries, splits, H, V = parts.shape
    if queries * H == 0:
        return
    # Programmatic dependent launch: it begins while the kernel in front of it ends, and waits in the kernel itself.
    dependent = not INTERPRETED and cards.card_of(parts).capability >= cards.HOPPER
    VP = triton.next_power_of_2(V) if INTERPRETED else MERGED_AT_ONCE
    _merge[(queries * H, triton.cdiv(V, VP))](
        parts, part_lse, out, lse, splits, H, V,
        SP=max(2, triton.next_power_of_2(splits)), VP=VP, AT_ONCE=min(16, splits),
        DEPENDENT=dependent, num_warps=MERGING_WARPS, launch_pdl=dependent,
    )  # fmt: skip
