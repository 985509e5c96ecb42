"""Attention over gathered rows: equation 2 with an online softmax, one query and up to 64 of its heads a program.

Schedule: the queries of BH heads stay in registers or shared memory, split into the value part (the first v_dim
columns) and the rest, so that a gathered row is loaded once and serves as key and as value. The program walks over the
k selected rows in tiles of BK: two products for the logits, the running (m, l, acc), one product for the values.

Cost at V3.2's sizes: 2 · 128 · (576 + 512) FLOPs a selected pair against 1152 bytes gathered for it, mostly from L2:
two programs (64 heads each) share them. `hopper/sparse_attention.py` is the faster variant for V3.2's sizes.
"""

import torch
import triton
import triton.language as tl

from dsa_ref.contracts import check_sparse_attention

from .index_scores import TRITON_NAMES
from .rounding import round_to
from .runtime import FLOATS, INTERPRETED, check_runnable, dot_dtype, hopper_variant


@triton.jit
def _sparse_attention(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, T, H, D, V, k,
    VP: tl.constexpr, RP: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    v = tl.arange(0, VP)
    q_row = q_ptr + (t * H + h)[:, None] * D
    q_v = tl.load(q_row + v[None, :], (h < H)[:, None] & (v < V)[None, :], 0.0).to(DOT)
    if RP > 0:
        r = V + tl.arange(0, RP)
        q_r = tl.load(q_row + r[None, :], (h < H)[:, None] & (r < D)[None, :], 0.0).to(DOT)

    m = tl.full([BH], float("-inf"), tl.float32)
    l = tl.zeros([BH], tl.float32)  # noqa: E741 (l is the field's name for it)
    acc = tl.zeros([BH, VP], tl.float32)
    for j0 in tl.range(0, k, BK, num_stages=STAGES):
        j = j0 + tl.arange(0, BK)
        s = tl.load(indices_ptr + t * k + j, j < k, -1)
        there = s >= 0
        kv_row = kv_ptr + s.to(tl.int64)[:, None] * D
        kv_v = tl.load(kv_row + v[None, :], there[:, None] & (v < V)[None, :], 0.0).to(DOT)
        logits = tl.dot(q_v, tl.trans(kv_v), input_precision="ieee")
        if RP > 0:
            kv_r = tl.load(kv_row + r[None, :], there[:, None] & (r < D)[None, :], 0.0).to(DOT)
            logits += tl.dot(q_r, tl.trans(kv_r), input_precision="ieee")
        logits = tl.where(there[None, :], logits * (scale * 1.4426950408889634), float("-inf"))  # in base 2
        new_m = tl.maximum(m, tl.max(logits, axis=1))
        finite_m = tl.where(new_m == float("-inf"), 0.0, new_m)  # nothing selected so far: keep NaN out
        rescale = tl.exp2(m - finite_m)
        p = tl.exp2(logits - finite_m[:, None])
        l = l * rescale + tl.sum(p, axis=1)  # noqa: E741
        acc = acc * rescale[:, None] + tl.dot(round_to(p, DOT), kv_v, input_precision="ieee")
        m = new_m

    out = acc / tl.where(l == 0, 1.0, l)[:, None]
    mask = (h < H)[:, None] & (v < V)[None, :]
    tl.store(out_ptr + (t * H + h)[:, None] * V + v[None, :], round_to(out, out_ptr.dtype.element_ty), mask)
    lse = tl.where(l == 0, float("-inf"), (m + tl.log2(tl.where(l == 0, 1.0, l))) * 0.6931471805599453)  # NaN stays
    tl.store(lse_ptr + t * H + h, lse, h < H)


def sparse_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
    v_dim: int,
    variant: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dsa_ref.sparse_attention` on tensor cores: (out [T, H, v_dim] in q.dtype, lse fp32 [T, H]). No gradient.

    q [T, H, D] and kv [S, D]: one dtype of bf16, fp16 and fp32; indices: int32 [T, k], -1 for none; scale: of the
    logits, a positive number; v_dim: how many of the first columns of kv are the value. lse is the natural logarithm.
    A query with nothing selected gives 0 and -inf.
    Products of bf16 and fp16 inputs use those types (probabilities are rounded to them too), fp32 goes without TF32;
    sums are fp32. NaN in a selected place gives NaN in out and lse.

    variant: "portable", "hopper" (compute capability 9.0, bf16, D = 576, v_dim = 512; `hopper/sparse_attention.py` says
    what it does with repeated indices and NaN where there are few heads), or None for "hopper" where it can serve, else
    "portable".

    Raises: as the reference does (fp64 is a TypeError here); ValueError as `runtime.check_runnable` does, and for a
    variant that is unknown or cannot serve these inputs. Source: SPEC section 3.
    """
    check_sparse_attention(q, kv, indices, scale, v_dim, FLOATS)
    (T, H, D), k = q.shape, indices.shape[1]
    check_runnable(q=q, kv=kv)
    hopper = hopper_variant("sparse_attention", variant, "hopper", q, v_dim)
    out = torch.empty(T, H, v_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(T, H, dtype=torch.float32, device=q.device)
    if T == 0:
        return out, lse
    if hopper:
        hopper.sparse_attention(q, kv, indices, scale, out, lse)
        return out, lse
    VP = max(16, triton.next_power_of_2(v_dim))
    RP = max(16, triton.next_power_of_2(D - v_dim)) if D > v_dim else 0
    wide = q.dtype == torch.float32
    BH = max(16, min(triton.next_power_of_2(H), 16 if wide else 64))
    BK = 64 if not wide else 32 if VP <= 128 else 16
    if INTERPRETED:  # each operation costs the same whatever its size: few large tiles
        BH, BK = max(16, triton.next_power_of_2(H)), max(16, min(512, triton.next_power_of_2(k)))
    _sparse_attention[(T, triton.cdiv(H, BH))](
        q.contiguous(), kv.contiguous(), indices.contiguous(), out, lse, scale, T, H, D, v_dim, k,
        VP=VP, RP=RP, BH=BH, BK=BK, DOT=getattr(tl, TRITON_NAMES[dot_dtype(q)]), STAGES=2,
        num_warps=8 if VP * BH > 16384 else 4,
    )  # fmt: skip
    return out, lse
