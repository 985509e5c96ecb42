"""The small steps around a decode step's selection and attention, one launch each: see `dsa_ref.append`.

Schedule: one program a token (`index_queries` and `turn_into`: a few heads of one), which reads its numbers once into
registers, its RoPE partner from cache, and writes bytes where they stay. A step moves some hundred bytes a token: what
counts is one launch for what were five to twelve. In the interpreter, where a program takes as long whatever its size,
it has TOKENS of them.

Bit for bit the reference where fp32 sums allow: rounded to the input's dtype after each of its steps, no multiplication
fused with an addition, e4m3 rounded in integers. Sums over a row (mean, variance, dot product) have another order.
Angles are turned into cos and sin here: compiled, by the function that torch calls on the card; interpreted, by
NumPy's, which differs from torch's on a CPU in the last bit.

Scales and bf16 values are stored byte by byte: a page begins at any address.
"""

import torch
import triton
import triton.language as tl

from dsa_ref.contracts import (
    check_append_index,
    check_append_latents,
    check_index_queries,
    check_place_tokens,
    check_rms_norm,
    check_turn_into,
    page_tokens,
    values_readable,
)

from .rotate_quantize import NO_FUSION, rotated
from .rounding import quantized, round_to
from .runtime import FLOATS, INTERPRETED, cdiv, check_runnable, next_power_of_2

TILE = 128  # values that share a scale in an FP8 row
TOKENS = 64 if INTERPRETED else 1  # of a program


@triton.jit
def _partner(d, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Of dim d: its pair, whether it is the first of it, and the other one."""
    if INTERLEAVED:
        return d // 2, d % 2 == 0, d ^ 1
    else:
        first = d < R // 2
        return d % (R // 2), first, tl.where(first, d + R // 2, d - R // 2)


@triton.jit
def _turned(x, other, position, freqs_ptr, d, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """x after RoPE on the first R dims, fp32, not yet rounded; other: the partners' values where d < R."""
    pair, _, _ = _partner(d, R, INTERLEAVED)
    angle = position.to(tl.float32) * tl.load(freqs_ptr + pair, d < R, 0.0)
    return _turned_by(x, other, tl.cos(angle), tl.sin(angle), d, R, INTERLEAVED)


@triton.jit
def _turned_by(x, other, cos, sin, d, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The same from the cosine and the sine of each dim's angle."""
    _, first, _ = _partner(d, R, INTERLEAVED)
    return tl.where(d < R, tl.where(first, x * cos - other * sin, x * cos + other * sin), x)


@triton.jit
def _store_fp32(bytes_ptr, value, mask):
    """fp32 numbers as four bytes each, from any address."""
    bits = value.to(tl.uint32, bitcast=True)
    for i in tl.static_range(4):
        tl.store(bytes_ptr + i, (bits >> (8 * i)).to(tl.uint8), mask)


@triton.jit(do_not_specialize=["T"])
def _rms_norm(out_ptr, x_ptr, weight_ptr, eps, T, D, DP: tl.constexpr, TOKENS: tl.constexpr):
    t = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    d = tl.arange(0, DP)[None, :]
    mask = (t < T) & (d < D)
    x = tl.load(x_ptr + t * D + d, mask, 0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, d < D, 0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + eps) * weight
    tl.store(out_ptr + t * D + d, round_to(normed, out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["T"])
def _append_index(
    pages_ptr, slots_ptr, k_ptr, weight_ptr, bias_ptr, positions_ptr, freqs_ptr, eps, T, page, page_bytes, scales_at,
    D: tl.constexpr, STEPS: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, D)[None, :]
    there = (t < T)[:, None]
    _, _, partner = _partner(d, R, INTERLEAVED)
    partner = tl.where(d < R, partner, d)
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    x = tl.load(k_ptr + t[:, None] * D + d, there, 0.0).to(tl.float32)
    other = tl.load(k_ptr + t[:, None] * D + partner, there, 0.0).to(tl.float32)
    mean = tl.sum(x, axis=1, keep_dims=True) / D
    rstd = tl.rsqrt(tl.sum((x - mean) * (x - mean), axis=1, keep_dims=True) / D + eps)
    x = (x - mean) * rstd * tl.load(weight_ptr + d).to(tl.float32) + tl.load(bias_ptr + d).to(tl.float32)
    weight, bias = tl.load(weight_ptr + partner).to(tl.float32), tl.load(bias_ptr + partner).to(tl.float32)
    other = (other - mean) * rstd * weight + bias
    x, other = round_to(x, dtype).to(tl.float32), round_to(other, dtype).to(tl.float32)
    x = _turned(x, other, tl.load(positions_ptr + t, t < T, 0)[:, None], freqs_ptr, d, R, INTERLEAVED)
    x = round_to(rotated(round_to(x, dtype).to(tl.float32), D, STEPS, TOKENS), dtype).to(tl.float32)
    codes, scale = quantized(x)
    slot = tl.load(slots_ptr + t, t < T, 0).to(tl.int64)
    first, place = slot // page * page_bytes, slot % page
    tl.store(pages_ptr + (first + place * D)[:, None] + d, codes.to(tl.uint8), there)
    _store_fp32(pages_ptr + first + scales_at + 4 * place, scale, t < T)


@triton.jit(do_not_specialize=["T"])
def _append_latents(
    pages_ptr, slots_ptr, rows_ptr, weight_ptr, positions_ptr, freqs_ptr, eps, T, D, v_dim, row_size,
    TILE: tl.constexpr, TILES: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, FP8: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    # Tiles are rows here, TILES of each token, so that each has a scale.
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS * TILES) // TILES
    tile = tl.arange(0, TOKENS * TILES) % TILES
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    out_ptr = pages_ptr + tl.load(slots_ptr + t, t < T, 0).to(tl.int64) * row_size
    c = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    mask = (t < T)[:, None] & (c < v_dim)
    x = tl.load((rows_ptr + t * D)[:, None] + c, mask, 0.0).to(tl.float32)
    weight = tl.load(weight_ptr + c, c < v_dim, 0.0).to(tl.float32)
    squares = tl.sum(tl.reshape(tl.sum(x * x, axis=1), [TOKENS, TILES]), axis=1, keep_dims=True)
    rstd = tl.rsqrt(squares / v_dim + eps) + tl.zeros([TOKENS, TILES], tl.float32)
    latent = round_to(x * tl.reshape(rstd, [TOKENS * TILES])[:, None] * weight, dtype)
    tiles = (v_dim + TILE - 1) // TILE
    if FP8:
        codes, scale = quantized(latent.to(tl.float32))
        tl.store(out_ptr[:, None] + c, codes.to(tl.uint8), mask)
        _store_fp32(out_ptr + v_dim + 4 * tile, scale, (t < T) & (tile < tiles))
    else:
        tl.store(out_ptr[:, None] + c, latent, mask)

    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, RP)[None, :]
    _, _, partner = _partner(d, R, True)
    mask = (t < T)[:, None] & (d < R)
    row_ptr = (rows_ptr + t * D + v_dim)[:, None]
    turning = tl.load(row_ptr + d, mask, 0.0).to(tl.float32)
    other = tl.load(row_ptr + partner, mask, 0.0).to(tl.float32)
    position = tl.load(positions_ptr + t, t < T, 0)[:, None]
    turned = round_to(_turned(turning, other, position, freqs_ptr, d, R, True), dtype)
    out_ptr = (pages_ptr + tl.load(slots_ptr + t, t < T, 0).to(tl.int64) * row_size + v_dim)[:, None]
    if FP8:
        bits = round_to(turned.to(tl.float32), tl.bfloat16).to(tl.uint16, bitcast=True)
        rest_ptr = out_ptr + 4 * tiles + 2 * d
        tl.store(rest_ptr, bits.to(tl.uint8), mask)
        tl.store(rest_ptr + 1, (bits >> 8).to(tl.uint8), mask)
    else:
        tl.store(out_ptr + d, turned, mask)


@triton.jit
def _index_queries(
    out_ptr, w_out_ptr, q_ptr, w_ptr, positions_ptr, freqs_ptr, rows, by_heads, by_dim,
    HEADS: tl.constexpr, D: tl.constexpr, STEPS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = first + tl.arange(0, BLOCK)
    d = tl.arange(0, D)[None, :]
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    _, _, partner = _partner(d, R, INTERLEAVED)
    there = row < rows
    row_ptr = q_ptr + row[:, None] * D
    x = tl.load(row_ptr + d, there[:, None], 0.0).to(tl.float32)
    other = tl.load(row_ptr + partner, there[:, None] & (d < R), 0.0).to(tl.float32)
    if HEADS % BLOCK == 0:  # one token's heads: each angle is turned into cos and sin once
        i = tl.arange(0, RP // 2)
        freq = tl.load(freqs_ptr + i, i < R // 2, 0.0)
        angle = tl.load(positions_ptr + first // HEADS).to(tl.float32) * freq
        pair, _, _ = _partner(tl.arange(0, D), R, INTERLEAVED)
        pair = tl.minimum(pair, RP // 2 - 1)
        cos, sin = tl.gather(tl.cos(angle), pair, 0), tl.gather(tl.sin(angle), pair, 0)
        x = _turned_by(x, other, cos[None, :], sin[None, :], d, R, INTERLEAVED)
    else:
        position = tl.load(positions_ptr + row // HEADS, there, 0)[:, None]
        x = _turned(x, other, position, freqs_ptr, d, R, INTERLEAVED)
    x = round_to(x, dtype).to(tl.float32)
    codes, scale = quantized(round_to(rotated(x, D, STEPS, BLOCK), dtype).to(tl.float32))
    tl.store(out_ptr + row[:, None] * D + d, codes.to(tl.uint8), there[:, None])
    w = tl.load(w_ptr + row, there, 0.0)
    tl.store(w_out_ptr + row, w * by_heads * by_dim * scale, there)


@triton.jit(do_not_specialize=["T"])
def _turn_into(
    out_ptr, x_ptr, positions_ptr, freqs_ptr, T, heads, out_t, out_h, x_t, x_h,
    R: tl.constexpr, RP: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    h = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :, None]
    i = tl.arange(0, RP // 2)[None, None, :]  # of a pair; no number is loaded twice, so that out may be x
    if INTERLEAVED:
        one, two = 2 * i, 2 * i + 1
    else:
        one, two = i, i + R // 2
    mask = (t < T) & (h < heads) & (i < R // 2)
    row_ptr, out_row = x_ptr + t * x_t + h * x_h, out_ptr + t * out_t + h * out_h
    a, b = tl.load(row_ptr + one, mask, 0.0).to(tl.float32), tl.load(row_ptr + two, mask, 0.0).to(tl.float32)
    angle = tl.load(positions_ptr + t, t < T, 0).to(tl.float32) * tl.load(freqs_ptr + i, i < R // 2, 0.0)
    cos, sin = tl.cos(angle), tl.sin(angle)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    a, b = round_to(a * cos - b * sin, dtype).to(tl.float32), round_to(b * cos + a * sin, dtype).to(tl.float32)
    tl.store(out_row + one, round_to(a, out_ptr.dtype.element_ty), mask)
    tl.store(out_row + two, round_to(b, out_ptr.dtype.element_ty), mask)


@triton.jit
def _place_tokens(
    page_table_ptr, totals_ptr, positions_ptr, slots_ptr, table_ptr, lengths_ptr, sequences_ptr, P, page,
    N: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    row_ptr = table_ptr + tl.load(sequences_ptr + b) * P
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(page_table_ptr + b * P + p, tl.load(row_ptr + p, p < P), p < P)
    if tl.program_id(0) == 0:
        before = tl.load(lengths_ptr + tl.load(sequences_ptr + b)).to(tl.int64)
        tl.store(totals_ptr + b, (before + N).to(tl.int32))
        n = tl.arange(0, NP)
        position = before + n
        pages = tl.load(row_ptr + position // page, (n < N) & (position // page < P), -1).to(tl.int64)
        tl.store(positions_ptr + b * N + n, position, n < N)
        tl.store(slots_ptr + b * N + n, pages * page + position % page, n < N)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`dsa_ref.rms_norm` in one launch: x / rms(x) · weight in fp32, rounded to x.dtype. No gradient.

    x: bf16, fp16 or fp32 [T, dim]; weight: float [dim].

    Raises: as the reference does (fp64 is a TypeError here); ValueError as `runtime.check_runnable` does.
    """
    check_rms_norm(x, weight, eps, FLOATS)
    check_runnable(x=x, weight=weight)
    x, weight = x.contiguous(), weight.detach().contiguous()
    (T, D), out = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if T:
        DP = next_power_of_2(D)
        _rms_norm[(cdiv(T, TOKENS),)](out, x, weight, eps, T, D, DP=DP, TOKENS=TOKENS, **NO_FUSION)
    return out


def append_index(
    index_pages: torch.Tensor,
    slots: torch.Tensor,
    k: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    positions: torch.Tensor,
    freqs: torch.Tensor,
    layout: str = "half",
) -> None:
    """`dsa_ref.append_index` in one launch: LayerNorm, RoPE, Hadamard, FP8, into the index pages in place.

    index_pages: uint8 [pages, page · (Di + 4)]; slots: int [T]; k: bf16, fp16 or fp32 [T, Di]; weight, bias: float
    [Di]; positions: int [T]; freqs: fp32 [R/2].

    Raises: as the reference does (fp64 is a TypeError here), NaN and infinity where values are read; ValueError as
    `runtime.check_runnable` does and for pages that are not contiguous. Source: SPEC section 2, steps 2 to 5.
    """
    check_append_index(index_pages, slots, k, weight, bias, eps, positions, freqs, layout, FLOATS)
    check_runnable(k=k.detach())
    _check_contiguous("index_pages", index_pages)
    T, D = k.shape
    if not T:
        return
    k, weight, bias = (tensor.detach().contiguous() for tensor in (k, weight, bias))
    slots, positions, freqs = slots.contiguous(), positions.contiguous(), freqs.contiguous()

    def launch(pages, slots, page):
        _append_index[(cdiv(T, TOKENS),)](
            pages, slots, k, weight, bias, positions, freqs, eps, T, page, page * (D + 4), page * D,
            D=D, STEPS=D.bit_length() - 1, R=2 * len(freqs), INTERLEAVED=layout == "interleaved", TOKENS=TOKENS,
            **NO_FUSION,
        )  # fmt: skip

    if values_readable(k):  # first beside the pages, to see that there is nothing that no scale can hold
        tried = torch.empty(T * (D + 4), dtype=torch.uint8, device=k.device)
        launch(tried, torch.arange(T, device=k.device), T)
        _check_scales("k", tried[T * D :])
    launch(index_pages, slots, page_tokens(index_pages, D))


def append_latents(
    kv_pages: torch.Tensor,
    slots: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    positions: torch.Tensor,
    freqs: torch.Tensor,
) -> None:
    """`dsa_ref.append_latents` in one launch: RMSNorm, interleaved RoPE, into the KV pages in place.

    kv_pages: uint8 [pages, page, row] for FP8 rows, or [pages, page, D] in rows' dtype; slots: int [T]; rows: bf16,
    fp16 or fp32 [T, D]; weight: float [v_dim]; positions: int [T]; freqs: fp32 [R/2], D = v_dim + R.

    Raises: as the reference does (fp64 is a TypeError here), NaN and infinity where values are read; ValueError as
    `runtime.check_runnable` does and for pages that are not contiguous. Source: SPEC sections 3 and 6.
    """
    check_append_latents(kv_pages, slots, rows, weight, eps, positions, freqs, FLOATS)
    check_runnable(rows=rows.detach())
    _check_contiguous("kv_pages", kv_pages)
    (T, D), v_dim, fp8 = rows.shape, len(weight), kv_pages.dtype == torch.uint8
    if not T:
        return
    rows, weight = rows.detach().contiguous(), weight.detach().contiguous()
    slots, positions, freqs = slots.contiguous(), positions.contiguous(), freqs.contiguous()
    row, tile = kv_pages.shape[2], min(TILE, next_power_of_2(v_dim))
    tiles = cdiv(v_dim, tile)

    def launch(pages, slots):
        _append_latents[(cdiv(T, TOKENS),)](
            pages, slots, rows, weight, positions, freqs, eps, T, D, v_dim, row,
            TILE=tile, TILES=next_power_of_2(tiles), R=D - v_dim, RP=next_power_of_2(D - v_dim),
            FP8=fp8, TOKENS=TOKENS, **NO_FUSION,
        )  # fmt: skip

    if fp8 and values_readable(rows):  # first beside the pages, to see that there is nothing that no scale can hold
        tried = torch.empty(T, row, dtype=torch.uint8, device=rows.device)
        launch(tried, torch.arange(T, device=rows.device))
        _check_scales("rows", tried[:, v_dim : v_dim + 4 * tiles])
    launch(kv_pages, slots)


def index_queries(
    q: torch.Tensor, w: torch.Tensor, positions: torch.Tensor, freqs: torch.Tensor, layout: str = "half"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dsa_ref.index_queries` in one launch: (q_idx float8_e4m3fn [T, Hi, Di], w fp32 [T, Hi] with all factors).

    q: bf16, fp16 or fp32 [T, Hi, Di]; w: fp32 [T, Hi]; positions: int [T]; freqs: fp32 [R/2]. No gradient.

    Raises: as the reference does (fp64 is a TypeError here), NaN and infinity where values are read; ValueError as
    `runtime.check_runnable` does. Source: SPEC section 2, steps 3 to 6.
    """
    check_index_queries(q, w, positions, freqs, layout, FLOATS)
    check_runnable(q=q.detach())
    q, w = q.detach().contiguous(), w.detach().contiguous()
    T, heads, D = q.shape
    q_idx = torch.empty(q.shape, dtype=torch.uint8, device=q.device)
    out = torch.empty(w.shape, dtype=torch.float32, device=q.device)
    if T:
        rows = T * heads
        block = 2 if rows <= 1024 else max(2, 2048 // D)
        block = max(2, 65536 // D) if INTERPRETED else block
        _index_queries[(cdiv(rows, block),)](
            q_idx, out, q, w, positions.contiguous(), freqs.contiguous(), rows, heads**-0.5, D**-0.5,
            HEADS=heads, D=D, STEPS=D.bit_length() - 1, R=2 * len(freqs), RP=next_power_of_2(2 * len(freqs)),
            INTERLEAVED=layout == "interleaved",
            BLOCK=min(next_power_of_2(block), next_power_of_2(rows)), **NO_FUSION,
        )  # fmt: skip
    if values_readable(q) and (w.isfinite() & ~out.isfinite()).any():  # a scale was no number
        raise ValueError("q must be finite, got NaN or infinity")
    return q_idx.view(torch.float8_e4m3fn), out


def turn_into(out: torch.Tensor, x: torch.Tensor, positions: torch.Tensor, freqs: torch.Tensor, layout: str) -> None:
    """`dsa_ref.turn_into` in one launch: RoPE of x [T, heads, R], written into out [T, heads, R], parts of wider rows.
    out may be x.

    x, out: bf16, fp16 or fp32, with numbers of a head side by side; positions: int [T]; freqs: fp32 [R/2].

    Raises: as the reference does (fp64 is a TypeError here); ValueError as `runtime.check_runnable` does and for an out
    whose last dim is not contiguous. Source: SPEC section 2, step 3.
    """
    check_turn_into(out, x, positions, freqs, layout, FLOATS)
    check_runnable(x=x.detach())
    if out.stride(2) != 1:
        raise ValueError(f"out must hold a head's numbers side by side, got strides {out.stride()}")
    x = x.detach() if x.stride(2) == 1 else x.detach().contiguous()
    T, heads, R = x.shape
    RP = next_power_of_2(R)
    block = min(next_power_of_2(heads), max(1, (256 if T * heads <= 1024 and not INTERPRETED else 2048) // RP))
    if T:
        _turn_into[(cdiv(heads, block), cdiv(T, TOKENS))](
            out, x, positions.contiguous(), freqs.contiguous(), T, heads, *out.stride()[:2], *x.stride()[:2],
            R=R, RP=RP, INTERLEAVED=layout == "interleaved", BLOCK=block, TOKENS=TOKENS, **NO_FUSION,
        )  # fmt: skip


def place_tokens(
    table: torch.Tensor, lengths: torch.Tensor, sequences: torch.Tensor, N: int, page_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`dsa_ref.place_tokens` in one launch: (page_table int32 [B, P], lengths int32 [B], positions and slots int64).

    table: int32 [rows, P]; lengths: int32 [rows]; sequences: int64 [B].

    Raises: as the reference does; ValueError as `runtime.check_runnable` does.
    """
    check_place_tokens(table, lengths, sequences, N, page_size)
    check_runnable(table=table)
    table, B, P = table.contiguous(), len(sequences), table.shape[1]
    page_table = torch.empty(B, P, dtype=torch.int32, device=table.device)
    totals = torch.empty(B, dtype=torch.int32, device=table.device)
    positions = torch.empty(B, N, dtype=torch.int64, device=table.device)
    slots = torch.empty(B * N, dtype=torch.int64, device=table.device)
    _place_tokens[(cdiv(P, 1024), B)](
        page_table, totals, positions, slots, table, lengths.contiguous(), sequences.contiguous(), P, page_size,
        N=N, NP=next_power_of_2(N), BLOCK=1024,
    )  # fmt: skip
    return page_table, totals, positions, slots


def _check_contiguous(name, pages):
    if not pages.is_contiguous():
        raise ValueError(f"{name} must be contiguous to be written to, got strides {pages.stride()}")


def _check_scales(name, scales):
    """scales: uint8 [..., 4 · n], fp32 numbers; one that is not finite stands for NaN or infinity in what it scales."""
    if not scales.contiguous().view(-1).clone().view(torch.float32).isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
