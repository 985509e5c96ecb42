"""The indexer's head weights: x [T, dim] times a few rows of weights, every product and sum in fp32.

Schedule: few tokens, as in a decode step: one program a token and head reads dim numbers of both; what counts is one
launch. Many tokens, as in a chunk of a prefill: one program BT tokens and all heads, over dim in steps of BK, so that x
is read once, 58 MB for 4096 tokens of V3.2, where the other form would read it for each head. Numbers of bf16 or fp16
on both sides go to tensor cores, whose products of those are exact and whose sums are fp32; others are widened, and
multiplied without TF32.

Which of the two runs follows from the number of tokens alone. Decode's batches stay below it: there a token's bits do
not depend on the tokens beside it.
"""

import torch
import triton
import triton.language as tl

from dsa_ref.contracts import check_head_weights

from .index_scores import TRITON_NAMES
from .runtime import FLOATS, INTERPRETED, cdiv, check_runnable, dot_dtype, next_power_of_2

MANY = 17 if INTERPRETED else 1024  # tokens; the interpreter takes as long for a program whatever its size


@triton.jit
def _head_weights(out_ptr, x_ptr, weight_ptr, heads, dim, DP: tl.constexpr):
    t, h = tl.program_id(1).to(tl.int64), tl.program_id(0)
    d = tl.arange(0, DP)
    x = tl.load(x_ptr + t * dim + d, d < dim, 0.0).to(tl.float32)
    weight = tl.load(weight_ptr + h * dim + d, d < dim, 0.0).to(tl.float32)
    tl.store(out_ptr + t * heads + h, tl.sum(x * weight, axis=0))


@triton.jit
def _head_weights_of_many(
    out_ptr, x_ptr, weight_ptr, T, heads, dim,
    HP: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    t, h = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.arange(0, HP)
    sums = tl.zeros([BT, HP], tl.float32)
    for d0 in range(0, dim, BK):
        d = d0 + tl.arange(0, BK)
        x = tl.load(x_ptr + t[:, None] * dim + d[None, :], (t < T)[:, None] & (d < dim)[None, :], 0.0)
        weight = tl.load(weight_ptr + h[:, None] * dim + d[None, :], (h < heads)[:, None] & (d < dim)[None, :], 0.0)
        sums += tl.dot(x.to(DOT), tl.trans(weight.to(DOT)), input_precision="ieee")
    tl.store(out_ptr + t[:, None] * heads + h[None, :], sums, (t < T)[:, None] & (h < heads)[None, :])


def head_weights(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`dsa_ref.head_weights`: x · weightᵀ, fp32 [T, Hi], in fp32, in one launch. No gradient.

    x: bf16, fp16 or fp32 [T, dim]; weight: float [Hi, dim].

    Raises: as the reference does (fp64 is a TypeError here); ValueError as `runtime.check_runnable` does. Source: SPEC
    section 2, step 6.
    """
    check_head_weights(x, weight, FLOATS)
    check_runnable(x=x.detach())
    x, weight = x.detach().contiguous(), weight.detach().contiguous()
    (T, dim), heads = x.shape, len(weight)
    out = torch.empty(T, heads, dtype=torch.float32, device=x.device)
    if T >= MANY:
        dtype = dot_dtype(x) if x.dtype == weight.dtype else torch.float32
        BT, BK = (16, 32) if dtype == torch.float32 else (64, 128)
        if INTERPRETED:
            BT, BK = 32, min(1024, next_power_of_2(dim))
        _head_weights_of_many[(cdiv(T, BT),)](
            out, x, weight, T, heads, dim, HP=max(16, next_power_of_2(heads)), BT=BT, BK=BK,
            DOT=getattr(tl, TRITON_NAMES[dtype]), num_stages=4,
        )  # fmt: skip
    elif T:
        DP = next_power_of_2(dim)
        _head_weights[(heads, T)](out, x, weight, heads, dim, DP=DP, num_warps=8 if DP > 2048 else 4)
    return out
