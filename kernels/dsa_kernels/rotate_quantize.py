"""RoPE, Hadamard rotation and FP8 quantisation of the indexer's vectors in one pass, and each of the three alone.

Schedule: one program takes BLOCK vectors of D numbers, reads each once (its RoPE partner comes from cache), keeps it in
registers through all steps and writes D bytes and one scale. For V3.2's q of T tokens that moves T · 64 · (256 + 132)
bytes instead of T · 64 · (256 · 5 + 132) in three kernels; the arithmetic is negligible.

Bit for bit the reference: each step is rounded to the input's dtype, no multiplication is fused with an addition, the
butterflies go in the same order, and e4m3 is rounded in integers, so that a card without FP8 and the interpreter (whose
cast loses the mantissa's carry) give the same bytes.
"""

import torch
import triton
import triton.language as tl

from dsa_ref.contracts import check_rope, check_vectors, values_readable

from .rounding import quantized, round_to
from .runtime import FLOATS, INTERPRETED, cdiv, check_runnable, dispatched, next_power_of_2, wants_gradient

NO_FUSION = {"enable_fp_fusion": False, "num_warps": 4}


@triton.jit
def _turn(x_ptr, cos_ptr, sin_ptr, row, d, mask, heads, D, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Rows of x after RoPE on the first R dims, fp32, not yet rounded."""
    if INTERLEAVED:
        pair, first, partner = d // 2, d % 2 == 0, d ^ 1
    else:
        pair, first = d % (R // 2), d < R // 2
        partner = tl.where(first, d + R // 2, d - R // 2)
    turning = mask & (d < R)[None, :]
    x = tl.load(x_ptr + row[:, None] * D + d[None, :], mask, 0.0).to(tl.float32)
    other = tl.load(x_ptr + row[:, None] * D + partner[None, :], turning, 0.0).to(tl.float32)
    table = (row // heads)[:, None] * (R // 2) + pair[None, :]
    cos, sin = tl.load(cos_ptr + table, turning, 1.0), tl.load(sin_ptr + table, turning, 0.0)
    return tl.where(turning, tl.where(first[None, :], x * cos - other * sin, x * cos + other * sin), x)


@triton.jit
def rotated(x, D: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """The Walsh-Hadamard butterflies on [BLOCK, D]: at distance 1, 2, 4, ... (a, b) -> (a + b, a - b)."""
    for i in tl.static_range(STEPS):
        pairs = tl.permute(tl.reshape(x, [BLOCK, D // (2 << i), 2, 1 << i]), (0, 1, 3, 2))
        a, b = tl.split(pairs)
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), [BLOCK, D])
    return x * (D**-0.5)


@triton.jit
def _fused(
    x_ptr, cos_ptr, sin_ptr, out_ptr, scale_ptr, rows, heads, D,
    R: tl.constexpr, INTERLEAVED: tl.constexpr, STEPS: tl.constexpr, QUANTIZE: tl.constexpr,
    DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DP)
    mask = (row < rows)[:, None] & (d < D)[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if R > 0:
        x = _turn(x_ptr, cos_ptr, sin_ptr, row, d, mask, heads, D, R, INTERLEAVED)
        x = round_to(x, dtype).to(tl.float32)
    else:
        x = tl.load(x_ptr + row[:, None] * D + d[None, :], mask, 0.0).to(tl.float32)
    if STEPS > 0:
        x = round_to(rotated(x, DP, STEPS, BLOCK), dtype).to(tl.float32)
    if QUANTIZE:
        x, scale = quantized(x)
        tl.store(scale_ptr + row, scale, row < rows)
        tl.store(out_ptr + row[:, None] * D + d[None, :], x.to(tl.uint8), mask)
    else:
        tl.store(out_ptr + row[:, None] * D + d[None, :], x.to(dtype), mask)


def _launch(x, positions=None, freqs=None, layout="half", rotate=False, fp8=False):
    """Run the chosen steps over all vectors of x; returns out like x, or (x8, scale)."""
    D = x.shape[-1]
    x = x.detach().contiguous()
    rows = x.numel() // D
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) if fp8 else x
    out = torch.empty(x.shape, dtype=torch.uint8 if fp8 else x.dtype, device=x.device)
    cos = sin = x
    if freqs is not None:
        angles = positions.to(torch.float32)[:, None] * freqs
        cos, sin = angles.cos(), angles.sin()
    DP = next_power_of_2(D)
    block = next_power_of_2(max(1, (65536 if INTERPRETED else 2048) // DP))
    block = min(block, next_power_of_2(rows)) if INTERPRETED else block
    if rows:
        _fused[(cdiv(rows, block),)](
            x, cos, sin, out, scale, rows, rows // x.shape[0], D,
            R=0 if freqs is None else 2 * freqs.shape[0], INTERLEAVED=layout == "interleaved",
            STEPS=D.bit_length() - 1 if rotate else 0, QUANTIZE=fp8, DP=DP, BLOCK=block, **NO_FUSION,
        )  # fmt: skip
    if not fp8:
        return out
    if values_readable(scale) and not torch.isfinite(scale).all():
        raise ValueError("x must be finite, got NaN or infinity")
    return out.view(torch.float8_e4m3fn), scale


def rope(x: torch.Tensor, positions: torch.Tensor, freqs: torch.Tensor, layout: str) -> torch.Tensor:
    """`dsa_ref.rope` in one pass: x with its first R dims turned, in x's shape and dtype. Differentiable in x.

    x: bf16, fp16 or fp32 [T, D] or [T, heads, D]; positions: int32 or int64 [T]; freqs: fp32 [R/2], radians a position;
    layout: "interleaved" (pairs 2i, 2i + 1) or "half" (pairs i, i + R/2).

    Raises: as the reference does (fp64 is a TypeError here); ValueError as `runtime.check_runnable` does. Source: SPEC
    section 2, step 3.
    """
    if dispatched():
        return torch.ops.dsa_kernels.rope(x, positions, freqs, layout)
    check_rope(x, positions, freqs, layout, FLOATS)
    check_runnable(True, x=x)
    check_runnable(freqs=freqs)
    if wants_gradient(x):
        return torch.ops.dsa_kernels.rope(x, positions, freqs, layout)
    return _launch(x, positions, freqs, layout)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """`dsa_ref.hadamard` in one pass: x times the orthonormal Walsh-Hadamard matrix, in x's dtype. Differentiable.

    x: bf16, fp16 or fp32 [..., D], D a power of two.

    Raises: as the reference does (fp64 is a TypeError here); ValueError as `runtime.check_runnable` does. Source: SPEC
    section 2, step 4.
    """
    if dispatched():
        return torch.ops.dsa_kernels.hadamard(x)
    check_vectors(x, FLOATS, power_of_two=True)
    check_runnable(True, x=x)
    return torch.ops.dsa_kernels.hadamard(x) if wants_gradient(x) else _launch(x, rotate=True)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`dsa_ref.quantize` in one pass, bit for bit: (float8_e4m3fn like x, fp32 scale [...]), x ~ values * scale.

    x: bf16, fp16 or fp32 [..., D]; a scale is a power of two. No gradient: rounding has none.

    Raises: as the reference does (fp64 is a TypeError here), ValueError for NaN or infinity in x (not while a CUDA
    graph is captured) and as `runtime.check_runnable` does. Source: SPEC section 2, step 5.
    """
    if dispatched():
        return torch.ops.dsa_kernels.quantize(x.detach())
    check_vectors(x, FLOATS)
    check_runnable(x=x.detach())  # rounding has no gradient, here as in the reference
    return _launch(x, fp8=True)


def rotate_quantize(x: torch.Tensor, positions: torch.Tensor, freqs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`dsa_ref.rotate_quantize` in one pass, bit for bit: `quantize(hadamard(rope(x, positions, freqs, "half")))`.

    x: bf16, fp16 or fp32 [T, D] or [T, heads, D], D a power of two; positions: int32 or int64 [T]; freqs: fp32 [R/2].
    Returns (float8_e4m3fn like x, fp32 scale in x's shape without D). No gradient.

    Raises: as `rope`, `hadamard` and `quantize` do. Source: SPEC section 2, steps 3 to 5.
    """
    if dispatched():
        return torch.ops.dsa_kernels.rotate_quantize(x.detach(), positions, freqs)
    check_rope(x, positions, freqs, floats=FLOATS)
    check_vectors(x, FLOATS, power_of_two=True)
    check_runnable(x=x.detach())
    return _launch(x, positions, freqs, rotate=True, fp8=True)
