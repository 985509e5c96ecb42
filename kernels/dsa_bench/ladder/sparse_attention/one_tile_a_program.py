"""Version "one tile a program": one warpgroup gathers, two multiply, and a program ends with its tile.

History: the first version of the Hopper kernel. Predicted 548 TFLOP/s; what was measured stands in figures/ladder.json,
step sparse_attention. It was measured with the next version's kernel and as many programs as tiles: each computes one,
asks the counter for another, and finds that there is none. So it is written here.
"""

from triton import cdiv

from . import persistent


def sparse_attention(q, kv, indices, scale, v_dim):
    """As `dsa_kernels.sparse_attention`, for bf16 and V3.2's sizes, on a GPU of compute capability 9.0."""
    T, H, _ = q.shape
    return persistent.sparse_attention(q, kv, indices, scale, v_dim, programs=T * cdiv(H, 64))
