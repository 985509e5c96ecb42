"""What happens to the indexer's q and k between projection and score: half-split RoPE, Hadamard rotation, FP8.

Source: SPEC section 2 steps 3 to 5. Each step rounds to the input's dtype, as V3.2's separate kernels do, so a fused
kernel has to round there as well.
"""

from torch import Tensor

from .contracts import Array
from .hadamard import hadamard, hadamard_loops
from .quantize import quantize, quantize_loops
from .rope import rope, rope_loops


def rotate_quantize_loops(x: Array, positions: Array, freqs: Array) -> tuple[Array, Array]:
    """The three loop forms in a row, float64: x [T, heads, D] -> (values [T, heads, D], scale [T, heads])."""
    turned = rope_loops(x, positions, freqs, "half")
    values, scale = quantize_loops(hadamard_loops(turned.reshape(-1, turned.shape[-1])))
    return values.reshape(turned.shape), scale.reshape(turned.shape[:-1])


def rotate_quantize(x: Tensor, positions: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE on the first R dims, Hadamard over all D, then FP8 with a power-of-two scale for each vector.

    x: [T, D] or [T, heads, D] float, D a power of two; positions: int [T]; freqs: fp32 [R/2].
    Returns (x8 float8_e4m3fn like x, scale fp32 of x's shape without D). Raises as `rope`, `hadamard`, `quantize` do.
    """
    return quantize(hadamard(rope(x, positions, freqs, "half")))
