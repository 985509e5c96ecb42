"""Rounding that is right in the interpreter too."""

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
