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
def e4m3_bytes(x):
    """fp32 in [-448, 448] to e4m3 bit patterns, round to nearest even, in integers."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Normal numbers (from 2^-6 on): drop 20 of 23 mantissa bits, round half to even; a carry grows the exponent.
    rounded = magnitude + 0x7FFFF + ((magnitude >> 20) & 1)
    normal = (rounded >> 20) - ((127 - 7) << 3)
    # Below that, multiples of 2^-9: adding 2^14 leaves fp32 just that resolution, so the adder rounds.
    subnormal = (((tl.abs(x) + 16384.0) - 16384.0) * 512.0).to(tl.int32)
    return tl.where(magnitude < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)


@triton.jit
def quantized(x):
    """fp32 [BLOCK, D] to (e4m3 bit patterns, power-of-two scale [BLOCK]). NaN or infinity gives a non-finite scale."""
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)  # bit patterns of floats >= 0 are ordered
    amax = tl.maximum(largest, 0x38D1B717).to(tl.float32, bitcast=True)  # 1e-4
    bits = tl.div_rn(amax, 448.0).to(tl.int32, bitcast=True)
    exponent = tl.minimum((bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32), 255)  # 255: infinity, also for NaN
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    # Dividing by a power of two is multiplying by another, and its bits say by which; it is a finite one, as 1e-4 and
    # the largest finite number keep the exponent between 105 and 247. Of NaN and infinity the scale alone tells.
    inverse = (tl.maximum(254 - exponent, 0) << 23).to(tl.float32, bitcast=True)
    scaled = x * inverse[:, None]
    return e4m3_bytes(tl.minimum(tl.maximum(scaled, -448.0), 448.0)), scale


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
