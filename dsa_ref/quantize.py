"""FP8 with a power-of-two scale: one e4m3 vector and one UE8M0 scale for each row.

    amax  = max(max |x|, 1e-4)
    scale = 2^ceil(log2(amax / 448))         448 is the largest e4m3 value
    x8    = e4m3(clamp(x / scale, -448, 448))

A power-of-two scale makes x / scale exact: the only error is e4m3's own rounding, to three mantissa bits.

Source: SPEC section 2 step 5; DeepSeek-V3.2-Exp inference/kernel.py (act_quant, scale_fmt "ue8m0").
"""

import math

import numpy as np
import torch
from torch import Tensor

from .contracts import Array, check_vectors, values_readable

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4


# What the bytes 0x00 to 0x7e stand for, 0 up to 448: 4 exponent bits (bias 7), 3 mantissa bits; 0x7f would be NaN.
MAGNITUDES = [m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)]
POSITIVE_CODES = np.array(MAGNITUDES[:0x7F])


def quantize_loops(x: Array) -> tuple[Array, Array]:
    """Quantise each row of x [rows, D] by searching all 127 magnitudes for the nearest; ties go to the even code.

    Returns (values float64 [rows, D], which e4m3 holds exactly, scale float64 [rows]).
    """
    x = np.asarray(x, dtype=np.float64)
    values, scales = np.zeros_like(x), np.zeros(x.shape[0])
    for r, row in enumerate(x):
        amax = max(np.abs(row).max(), np.float64(np.float32(AMAX_FLOOR)))
        scales[r] = 2.0 ** math.ceil(math.log2(amax / E4M3_MAX))
        for d, value in enumerate(row):
            magnitude = min(abs(value / scales[r]), E4M3_MAX)
            distance = np.abs(POSITIVE_CODES - magnitude)
            nearest = np.flatnonzero(distance == distance.min())
            code = next(c for c in nearest if len(nearest) == 1 or c % 2 == 0)
            values[r, d] = math.copysign(POSITIVE_CODES[code], value)
    return values, scales


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise x [..., D] to (x8 float8_e4m3fn [..., D], scale fp32 [...]), one scale for each vector of D.

    Raises: TypeError for a non-float dtype, ValueError for NaN or infinity, which no scale can hold (where
    values can be read: see `contracts`).
    """
    check_vectors(x)
    x = x.detach().to(torch.float32)
    amax = x.abs().amax(dim=-1).clamp(min=AMAX_FLOOR)
    if values_readable(amax) and not torch.isfinite(amax).all():
        raise ValueError("x must be finite, got NaN or infinity")
    scale = power_of_two_at_least(amax / E4M3_MAX)
    x8 = (x / scale[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return x8, scale


def power_of_two_at_least(x: Tensor) -> Tensor:
    """2^ceil(log2(x)) for positive fp32 x, exactly: read from the exponent bits, since log2 may round."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa · 2^exponent with mantissa in [0.5, 1)
    exponent = exponent - (mantissa == 0.5).int()
    return ((exponent + 127) << 23).to(torch.int32).view(torch.float32)


def dequantize(x8: Tensor, scale: Tensor) -> Tensor:
    """x8 [..., D] times its scale [...], in fp32."""
    return x8.to(torch.float32) * scale[..., None]
