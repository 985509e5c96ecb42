"""Equation 1 on tensor cores: every query head against every visible key, relu, weight, sum over heads.

Schedule: one program owns BQ queries and walks over a chunk of the keys in tiles of BK. Keys lie on the *rows* of the
product, (query, head) pairs on its columns: [BK, Di] x [Di, BQ · Hi]. So the sum over heads stays inside a thread's own
registers; with heads on the rows it would cross warps. The queries stay put, key tiles stream through three stages.

Cost at V3.2's sizes: 16,384 FLOPs a pair. A key tile of 64 · 128 bytes serves 4 queries, so it does 512 FLOPs a byte
out of L2; the scores, 4 bytes a pair, are the only real traffic to memory. Tiles that no row may see are only filled
with -inf.
"""

import torch
import triton
import triton.language as tl

from dsa_ref.contracts import check_index_scores, row_ranges

from . import cards, runtime
from .rounding import operand
from .runtime import (
    FLOATS,
    INTERPRETED,
    cdiv,
    check_runnable,
    dot_dtype,
    hopper_variant,
    multiprocessors,
    next_power_of_2,
)

TRITON_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float8_e4m3fn: "float8e4nv",
}


@triton.jit
def _fill(out_ptr, t, first, last, T, S, BQ: tl.constexpr, BK: tl.constexpr):
    """Write -inf for the keys [first, last) of the queries t."""
    for s0 in range(first, last, BK):
        s = s0 + tl.arange(0, BK)
        nothing = tl.full([BK, BQ], float("-inf"), tl.float32)
        tl.store(out_ptr + t[None, :] * S + s[:, None], nothing, (t < T)[None, :] & (s < last)[:, None])


@triton.jit
def _index_scores(
    q_ptr, k_ptr, w_ptr, k_scale_ptr, start_ptr, end_ptr, out_ptr, T, S, Hi, Di, chunk,
    HP: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    DOT: tl.constexpr, SCALED: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BQ + tl.arange(0, BQ)
    d = tl.arange(0, DP)
    start = tl.load(start_ptr + t, t < T, S)
    end = tl.load(end_ptr + t, t < T, 0)

    # This program's share of the keys, and in it the tiles that some row can see.
    chunk_first = tl.program_id(1) * chunk
    chunk_last = tl.minimum(chunk_first + chunk, S)
    first = tl.maximum(tl.min(start, 0) // BK * BK, chunk_first)
    last = tl.maximum(tl.minimum(tl.max(end, 0), chunk_last), first)
    _fill(out_ptr, t, chunk_first, tl.minimum(first, chunk_last), T, S, BQ, BK)

    column = tl.arange(0, BQ * HP)  # (query, head) pairs
    h = column % HP
    row = tl.program_id(0).to(tl.int64) * BQ + column // HP
    real = (row < T) & (h < Hi)
    q = tl.load(q_ptr + (row * Hi + h)[:, None] * Di + d[None, :], real[:, None] & (d < Di)[None, :], 0.0)
    q = operand(q, DOT)
    w = tl.load(w_ptr + row * Hi + h, real, 0.0).to(tl.float32)
    q = tl.trans(q)
    # Tiles that every row sees whole need no mask; those before and after them do.
    whole = tl.minimum(tl.maximum(tl.cdiv(tl.max(start, 0), BK) * BK, first), last)
    whole_end = tl.maximum(tl.minimum(tl.min(tl.where(t < T, end, S), 0), chunk_last) // BK * BK, whole)
    for part in tl.static_range(3):
        part_first = first if part == 0 else whole if part == 1 else whole_end
        part_last = whole if part == 0 else whole_end if part == 1 else last
        for s0 in tl.range(part_first, part_last, BK, num_stages=STAGES):
            s = s0 + tl.arange(0, BK)
            k_ptrs = k_ptr + s[:, None].to(tl.int64) * Di + d[None, :]
            if part == 1 and WHOLE:
                k = tl.load(k_ptrs)
            else:
                k = tl.load(k_ptrs, (s < S)[:, None] & (d < Di)[None, :], 0.0)
            dots = tl.dot(operand(k, DOT), q, input_precision="ieee")
            weighted = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL) * w[None, :]
            scores = tl.sum(tl.reshape(weighted, [BK, BQ, HP]), axis=2)
            if SCALED:
                scores = scores * tl.load(k_scale_ptr + s, s < S, 0.0).to(tl.float32)[:, None]
            out = out_ptr + t[None, :] * S + s[:, None]
            if part == 1:
                tl.store(out, scores, (t < T)[None, :])
            else:
                seen = (s[:, None] >= start[None, :]) & (s[:, None] < end[None, :])
                tl.store(out, tl.where(seen, scores, float("-inf")), (t < T)[None, :] & (s < chunk_last)[:, None])
    covered = tl.minimum(first + tl.cdiv(last - first, BK) * BK, chunk_last)
    _fill(out_ptr, t, covered, chunk_last, T, S, BQ, BK)


def index_scores(
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    w: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
    variant: str | None = None,
) -> torch.Tensor:
    """`dsa_ref.index_scores` on tensor cores: fp32 [T, S], -inf where a row may not look. No gradient.

    q_idx [T, Hi, Di] and k_idx [S, Di], S > 0: one dtype of float8_e4m3fn, bf16, fp16 and fp32; w: float [T, Hi];
    k_scale: float [S] or None; start, end: int32 [T], default causal with the queries last.
    FP8 inputs are multiplied as FP8 where the GPU can (from compute capability 8.9 on), else read as bytes and widened
    to bf16, which holds them exactly, so that scores have the bits of the same inputs in bf16;
    bf16 and fp16 as they are; fp32 without TF32. Hopper's FP8 tensor cores add with fewer bits than fp32 has: expect
    relative errors of some 1e-4. NaN in q_idx, k_idx or w gives NaN scores, which a selection then refuses.
    variant: "portable", "hopper" (compute capability 9.0, FP8, 64 heads of 128), "widened" (portable, and FP8 as older
    cards read it), or None for "hopper" where it can serve and has `runtime.FEWEST_FOR_HOPPER` queries, else
    "portable". The first two give the same bits.

    Raises: as the reference does (fp64 is a TypeError here); ValueError as `runtime.check_runnable` does, and for a
    variant that is unknown or cannot serve these inputs. Source: SPEC section 2.
    """
    check_index_scores(q_idx, k_idx, w, k_scale, start, end, FLOATS)
    start, end = row_ranges(len(q_idx), len(k_idx), q_idx.device, start, end)
    check_runnable(q_idx=q_idx, k_idx=k_idx, w=w, k_scale=k_scale)
    return launch(q_idx, k_idx, w, k_scale, start, end, variant)


def launch(q_idx, k_idx, w, k_scale, start, end, variant=None):
    """Scores [T, S] from checked arguments, by the kernel that `variant` says."""
    T, S = len(q_idx), len(k_idx)
    default = "hopper" if T >= runtime.FEWEST_FOR_HOPPER else "portable"
    hopper = hopper_variant("index_scores", variant, default, q_idx, k_scale, S)
    if not hopper:
        return launch_portable(q_idx, k_idx, w, k_scale, start, end, widened=variant == "widened")
    out = torch.empty(T, S, dtype=torch.float32, device=q_idx.device)
    if T:
        hopper.index_scores(q_idx, k_idx, w, k_scale, start, end, out)
    return out


def tiles(card, HP, DP, loaded, multiplied):
    """(columns, BK, warps): how many (query, head) pairs, and keys, a program of that card multiplies at once.

    HP, DP: heads and dims, powers of two; loaded, multiplied: bytes of a number in memory, and in the product.
    Raises ValueError if the card has too little shared memory even for few. Hopper's tensor cores read tiles from
    shared memory; others take them from registers, which eight warps have more of.
    """
    columns, BK = (64, 16) if multiplied == 4 else (256, 64)

    def shared_memory():
        stages = 1 if multiplied == 4 else 3
        return columns * DP * multiplied + stages * BK * DP * loaded + columns * BK // 2 + 1024

    while shared_memory() > card.shared_memory:
        if columns > max(16, HP):
            columns //= 2
        elif BK > 16:
            BK //= 2
        else:
            raise ValueError(cards.too_wide("q_idx", f"{HP} heads of {DP} dims", shared_memory(), card))
    many = multiplied == 4 or (columns > 128 and card.capability != cards.HOPPER)
    return max(columns, HP), BK, 8 if many else 4


def launch_portable(q_idx, k_idx, w, k_scale, start, end, widened=False):
    """Scores [T, S] from checked arguments: pick tiles and run the kernel of this file.

    widened: take FP8 as bytes also on a card that could multiply it.
    """
    (T, Hi, Di), S = q_idx.shape, k_idx.shape[0]
    out = torch.empty(T, S, dtype=torch.float32, device=q_idx.device)
    if T == 0:
        return out
    HP, DP = next_power_of_2(Hi), max(32, next_power_of_2(Di))
    card = cards.card_of(q_idx)
    if widened or (q_idx.dtype == torch.float8_e4m3fn and card and card.capability < cards.NATIVE_FP8):
        q_idx, k_idx = q_idx.view(torch.uint8), k_idx.view(torch.uint8)
    if INTERPRETED:
        columns, BK, warps = 1024, max(16, min(512, next_power_of_2(S))), 4
    else:
        columns, BK, warps = tiles(card, HP, DP, q_idx.itemsize, dot_dtype(q_idx).itemsize)
    BQ = max(min(columns // HP, next_power_of_2(T)), cdiv(16, HP))  # tensor cores want 16 columns
    # Enough programs for a few waves, but chunks long enough to pay for loading the queries.
    chunks = max(1, min(cdiv(S, 8 * BK), 8 * multiprocessors(q_idx) // cdiv(T, BQ)))
    chunk = cdiv(cdiv(S, chunks), BK) * BK
    _index_scores[(cdiv(T, BQ), cdiv(S, chunk))](
        q_idx.contiguous(), k_idx.contiguous(), w.contiguous(), w if k_scale is None else k_scale.contiguous(),
        start.contiguous(), end.contiguous(), out, T, S, Hi, Di, chunk,
        HP=HP, DP=DP, BQ=BQ, BK=BK, DOT=getattr(tl, TRITON_NAMES[dot_dtype(q_idx)]),
        SCALED=k_scale is not None, WHOLE=DP == Di, STAGES=3, num_warps=warps,
    )  # fmt: skip
    return out
