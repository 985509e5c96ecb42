"""Attention over gathered rows: equation 2 with an online softmax, one query and up to 64 of its heads a program.

Schedule: the queries of BH heads stay in registers or shared memory, split into the value part (the first v_dim
columns) and the rest, so that a gathered row is loaded once and serves as key and as value. The program walks over the
k selected rows in tiles of BK: two products for the logits, the running (m, l, acc), one product for the values. It
ends with the list's last index, so that -1 in the places behind costs a glance at the list. Lists of more than S places
are first packed into S.

Cost at V3.2's sizes: 2 · 128 · (576 + 512) FLOPs a selected pair against 1152 bytes gathered for it, mostly from L2:
two programs (64 heads each) share them. `hopper/sparse_attention.py` is the faster variant for V3.2's sizes.
"""

import torch
import triton
import triton.language as tl

from dsa_ref.contracts import check_sparse_attention, unchecked_values

from . import cards
from .index_scores import TRITON_NAMES
from .rounding import round_to
from .runtime import (
    FLOATS,
    INTERPRETED,
    cdiv,
    check_runnable,
    dispatched,
    dot_dtype,
    hopper_variant,
    next_power_of_2,
    wants_gradient,
)

LARGEST_SCALE = 2.358e38  # times log2(e), as kernels take it, just below fp32's largest number


@triton.jit
def _pack(indices_ptr, out_ptr, k, width, BLOCK: tl.constexpr):
    """The indices of a row in their order, without the -1 between them; -1 after them, up to `width`."""
    t = tl.program_id(0).to(tl.int64)
    count = tl.zeros([], tl.int32)
    for j0 in range(0, k, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        s = tl.load(indices_ptr + t * k + j, j < k, -1)
        there = s >= 0
        place = count + tl.cumsum(there.to(tl.int32), axis=0) - 1
        tl.store(out_ptr + t * width + place, s, there & (place < width))
        count += tl.sum(there.to(tl.int32), axis=0)
    for j0 in range(0, width, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        tl.store(out_ptr + t * width + j, tl.full([BLOCK], -1, tl.int32), (j >= count) & (j < width))


def packed(indices, width):
    """indices [T, k], of which no row has more than `width` that are not -1, as [T, width]."""
    out = torch.empty(len(indices), width, dtype=torch.int32, device=indices.device)
    block = min(next_power_of_2(indices.shape[1]), 65536 if INTERPRETED else 1024)
    _pack[(len(indices),)](indices.contiguous(), out, indices.shape[1], width, BLOCK=block)
    return out


@triton.jit
def _sparse_attention(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, T, H, D, V, k, LIST: tl.constexpr,
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

    used = tl.zeros([], tl.int32)  # places up to the last index
    for j0 in range(0, k, LIST):
        j = j0 + tl.arange(0, LIST)
        s = tl.load(indices_ptr + t * k + j, j < k, -1)
        used = tl.maximum(used, tl.max(tl.where(s >= 0, j + 1, 0), axis=0))

    m = tl.full([BH], float("-inf"), tl.float32)
    l = tl.zeros([BH], tl.float32)  # noqa: E741 (l is the field's name for it)
    acc = tl.zeros([BH, VP], tl.float32)
    for j0 in tl.range(0, used, BK, num_stages=STAGES):
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

    out = tl.where((l == 0)[:, None], 0.0, acc / tl.where(l == 0, 1.0, l)[:, None])  # acc may hold 0 · infinity
    mask = (h < H)[:, None] & (v < V)[None, :]
    tl.store(out_ptr + (t * H + h)[:, None] * V + v[None, :], round_to(out, out_ptr.dtype.element_ty), mask)
    lse = tl.where(l == 0, float("-inf"), (m + tl.log2(tl.where(l == 0, 1.0, l))) * 0.6931471805599453)  # NaN stays
    tl.store(lse_ptr + t * H + h, lse, h < H)


def tiles(card, H, VP, RP, size):
    """(BH, BK, warps): the heads and the keys of a tile, as many as that card's shared memory holds.

    VP, RP: the value's and the other columns, as the kernel pads them; size: bytes of a number. Raises ValueError if
    not even the smallest tile fits.
    """
    BH = max(16, min(next_power_of_2(H), 16 if size == 4 else 64))
    BK = 64 if size == 2 else 32 if VP <= 128 else 16

    def shared_memory():
        row, generation = (VP + RP) * size, card.capability[0]
        if BH < 64 or generation not in (9, 10, 11):  # q goes to registers, and its place to the keys
            return (BH + BK) * row + 8 * BH * BK
        sums = 0 if generation == 9 else BH * VP * BK // 16  # on their way out of Blackwell's tensor memory
        return (BH + 2 * BK) * row + sums + 1024

    while shared_memory() > card.shared_memory:
        if BH == BK == 16:
            raise ValueError(cards.too_wide("q", f"16 heads and 16 keys of {VP + RP} columns", shared_memory(), card))
        BH, BK = (BH // 2, BK) if BH > BK else (BH, BK // 2)
    few = 16384 if card.capability == cards.HOPPER else 1024  # sums that four warps hold in registers
    return BH, BK, 8 if VP * BH > few else 4


def check_scale_in_base_2(scale):
    """Raise ValueError for a scale that overflows fp32 once it is multiplied by log2(e)."""
    if scale > LARGEST_SCALE:
        raise ValueError(
            f"scale must be at most {LARGEST_SCALE}, since scale · log2(e) must fit into fp32, got {scale}"
        )


def sparse_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
    v_dim: int,
    probe: torch.Tensor | None = None,
    variant: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dsa_ref.sparse_attention` on tensor cores: (out [T, H, v_dim] in q.dtype, lse fp32 [T, H]).

    Differentiable once in q and kv, by `sparse_attention_backward`. probe: fp32 [T, k] or None; in place of a gradient
    it receives that function's `target`, whatever the upstream gradients.

    q [T, H, D] and kv [S, D], S > 0: one dtype of bf16, fp16 and fp32; indices: int32 [T, k], k > 0, -1 for none,
    distinct within a row; scale: of the logits, a positive number up to 2.358e38; v_dim: how many of the first columns
    of kv are the value. lse is the natural logarithm. A query with nothing selected gives 0 and -inf.
    Products of bf16 and fp16 inputs use those types (probabilities are rounded to them too), fp32 goes without TF32;
    sums are fp32. NaN in a selected place gives NaN in out and lse.
    Time follows each list's last index, not k; where k > S, its number of indices.

    variant: "portable", "hopper" (compute capability 9.0, bf16, D = 576, v_dim = 512), or None for "hopper" where it
    can serve, else "portable".
    Beside infinities and NaN, "hopper" differs. With at most 32 heads, up to 64 / H queries next to each other may
    share the union of their lists: NaN or infinity in a row of kv that one of them selected then reaches the out of all
    of them, where the reference and "portable" keep it from those that did not select it. Padding that holds NaN must
    not be selected, or pass variant="portable". And a row with logits of -inf alone, which gives 0 and -inf, gives NaN
    and -inf in "hopper" where its values are infinite.
    Index lists that name a key twice, which raise where they can be read, are undefined while a CUDA graph is captured.

    Raises: as the reference does (fp64 is a TypeError here); ValueError as `runtime.check_runnable` does, and for a
    variant that is unknown or cannot serve these inputs. Source: SPEC section 3.
    """
    if dispatched():
        return torch.ops.dsa_kernels.sparse_attention(q, kv, indices, scale, v_dim, probe, variant)
    check_sparse_attention(q, kv, indices, scale, v_dim, FLOATS, probe)
    (T, H, D), k = q.shape, indices.shape[1]
    check_scale_in_base_2(scale)
    check_runnable(True, q=q, kv=kv)
    if wants_gradient(q, kv, probe):
        with unchecked_values():  # they are checked
            return torch.ops.dsa_kernels.sparse_attention(q, kv, indices, scale, v_dim, probe, variant)
    hopper = hopper_variant("sparse_attention", variant, "hopper", q, v_dim)
    out = torch.empty(T, H, v_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(T, H, dtype=torch.float32, device=q.device)
    if T == 0:
        return out, lse
    if k > len(kv):
        indices, k = packed(indices, len(kv)), len(kv)
    if hopper:
        hopper.sparse_attention(q, kv, indices, scale, out, lse)
        return out, lse
    VP = max(16, next_power_of_2(v_dim))
    RP = max(16, next_power_of_2(D - v_dim)) if D > v_dim else 0
    if INTERPRETED:  # each operation costs the same whatever its size: few large tiles
        BH, BK, warps = max(16, next_power_of_2(H)), max(16, min(512, next_power_of_2(k))), 4
    else:
        BH, BK, warps = tiles(cards.card_of(q), H, VP, RP, q.itemsize)
    _sparse_attention[(T, cdiv(H, BH))](
        q.contiguous(), kv.contiguous(), indices.contiguous(), out, lse, scale, T, H, D, v_dim, k,
        LIST=min(next_power_of_2(k), 65536 if INTERPRETED else 2048), VP=VP, RP=RP, BH=BH, BK=BK,
        DOT=getattr(tl, TRITON_NAMES[dot_dtype(q)]), STAGES=2, num_warps=warps,
    )  # fmt: skip
    return out, lse
