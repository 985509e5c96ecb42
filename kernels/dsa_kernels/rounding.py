"""Conversions that are right in the interpreter too, and on cards that do not know the type."""

import triton
import triton.language as tl

from .runtime import INTERPRETED

BY_HAND = tl.constexpr(INTERPRETED)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 to `dtype`, to nearest even. The interpreter's own cast to bf16 cuts the low bits off instead."""
    if BY_HAND and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True)  # NaN stays as it is
    return x.to(dtype)


@triton.jit
def from_e4m3(codes, dtype: tl.constexpr):
    """The numbers whose e4m3 bit patterns are `codes`, uint8, in fp16, bf16 or fp32, exactly.

    e4m3 is sign, 4 bits of exponent, 3 of mantissa. Put where `dtype` has these, the same bits mean the number times
    2^(7 - dtype's bias), subnormal numbers too: a multiplication by a power of two, which is exact, brings it back.
    """
    BITS: tl.constexpr = dtype.primitive_bitwidth
    wide = codes.to(tl.uint32 if BITS == 32 else tl.uint16)
    magnitude = wide & 0x7F
    moved = ((wide & 0x80) << (BITS - 8)) | (magnitude << (dtype.fp_mantissa_width - 3))
    value = moved.to(dtype, bitcast=True) * 2.0 ** (dtype.exponent_bias - 7)
    return tl.where(magnitude == 0x7F, float("nan"), value).to(dtype)  # the two codes that are no numbers


@triton.jit
def operand(x, dtype: tl.constexpr):
    """x in the type in which it is multiplied; uint8 stands for e4m3."""
    if x.dtype == tl.uint8:
        return from_e4m3(x, dtype)
    else:
        return x.to(dtype)
