"""The Walsh-Hadamard rotation: spreads an outlier over all dims before eight bits have to hold it.

H[i, j] = (-1)^popcount(i & j) / sqrt(D) is orthonormal and its own inverse, so rotating q *and* k leaves q·k as it was.
It costs D · log2(D) additions by butterflies, no multiplication but the last.

Source: SPEC section 2 step 4; Sylvester order, as in the fast-hadamard-transform package that V3.2 calls.
"""

import numpy as np
import torch
from torch import Tensor

from .contracts import Array, check_vectors


def hadamard_loops(x: Array) -> Array:
    """The rotation as a matrix product in loops, float64. x [rows, D] array -> array like x."""
    x = np.asarray(x, dtype=np.float64)
    rows, D = x.shape
    out = np.zeros_like(x)
    for r in range(rows):
        for i in range(D):
            for j in range(D):
                sign = -1.0 if bin(i & j).count("1") % 2 else 1.0
                out[r, i] += sign * x[r, j]
    return out / np.sqrt(D)


def hadamard(x: Tensor) -> Tensor:
    """Rotate the last dim of x [..., D], D a power of two. Differentiable.

    Sums in fp32 (fp64 for fp64), rounded to x.dtype once.

    Raises: ValueError if D is no power of two, TypeError for a dtype that is not floating point.
    """
    check_vectors(x, power_of_two=True)
    D = x.shape[-1]
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    width = 1
    while width < D:  # a butterfly joins neighbours at distance `width`: (a, b) -> (a + b, a - b)
        a, b = y.reshape(*x.shape[:-1], D // (2 * width), 2, width).unbind(-2)
        y = torch.stack((a + b, a - b), dim=-2).reshape(x.shape)
        width *= 2
    return (y * D**-0.5).to(x.dtype)
