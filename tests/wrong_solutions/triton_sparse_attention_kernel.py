"""Notebook 09's largest kernel, written out once, right but for the one FAULT that its wrong answers name."""

from . import wrong
from ._triton import INTERPRETED, jit, tl


@jit
def _attention(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr, FAULT: tl.constexpr,
):  # fmt: skip
    t, h, d = tl.program_id(0).to(tl.int64), tl.arange(0, BH), tl.arange(0, DP)
    in_h, in_d, read_d, row, q_t, indices_t = h < H, d < D, d < D, kv_row, t, t
    if FAULT == "heads not masked":
        in_h = h < BH
    if FAULT == "dense rows":
        row = D
    if FAULT == "query 0":
        q_t = t * 0
    if FAULT == "indices of query 0":
        indices_t = t * 0
    if FAULT == "stray lanes read":
        read_d = d < DP
    q = tl.load(q_ptr + (q_t * H + h)[:, None] * D + d[None, :], (h < H)[:, None] & read_d[None, :], 0.0)
    q = tl.where(in_d[None, :], q, 0.0)
    if FAULT == "unscaled":
        scale = 1.0
    m = tl.full([BH], float("-inf"), tl.float32)
    if FAULT == "m starts at 0":
        m = tl.zeros([BH], tl.float32)
    l = tl.zeros([BH], tl.float32)  # noqa: E741 (l is the field's name for it)
    acc = tl.zeros([BH, DP], tl.float32)
    stop = k
    if FAULT == "first tile alone":
        stop = tl.minimum(k, BK)
    if FAULT == "whole tiles only":
        stop = tl.maximum(k // BK * BK, tl.minimum(k, BK))
    for j0 in range(0, stop, BK):
        j = j0 + tl.arange(0, BK)
        s = tl.load(indices_ptr + indices_t * k + j, j < k, -1)
        if FAULT == "tail not masked":
            s = tl.load(indices_ptr + indices_t * k + j)
        there = s >= 0
        load_j, load_d, wide = there, in_d, s.to(tl.int64)
        if FAULT == "clamped":
            there = j < k
            wide = tl.maximum(wide, 0)
        if FAULT == "gather unmasked" or FAULT == "clamped" or FAULT == "masked too late":
            load_j = j < k
        if FAULT == "lanes past D not masked":
            load_d = d < DP
        offsets = wide[:, None] * row + d[None, :]
        if FAULT == "32 bits":
            offsets = s[:, None] * row + d[None, :]
        rows = tl.load(kv_ptr + offsets, load_j[:, None] & load_d[None, :], 0.0)
        if FAULT == "masked too late":
            rows = tl.where(there[:, None], rows, 0.0)
        if FAULT == "fp16":
            logits = tl.dot(q.to(tl.float16), tl.trans(rows).to(tl.float16)) * scale
        else:
            logits = tl.dot(q, tl.trans(rows), input_precision="ieee") * scale
        if FAULT == "padding with logit 0":
            there = j < k
        if FAULT == "tail with logit 0":
            there = there | (j >= k)
        logits = tl.where(there[None, :], logits, float("-inf"))
        new_m = tl.maximum(m, tl.max(logits, axis=1))
        if FAULT == "no shift":
            new_m = tl.where(new_m == float("-inf"), new_m, 0.0)
        finite_m = tl.where(new_m == float("-inf"), 0.0, new_m)
        if FAULT == "NaN of an empty tile":
            finite_m = new_m
        rescale = tl.exp(m - finite_m)
        p = tl.exp(logits - finite_m[:, None])
        if FAULT == "l not rescaled":
            l += tl.sum(p, axis=1)  # noqa: E741
        else:
            l = l * rescale + tl.sum(p, axis=1)  # noqa: E741
        if FAULT == "acc not rescaled":
            rescale = tl.full([BH], 1.0, tl.float32)
        if FAULT == "last tile alone":
            rescale = tl.zeros([BH], tl.float32)
        acc = acc * rescale[:, None] + tl.dot(p, rows, input_precision="ieee")
        m = new_m
    safe_l = tl.where(l > 0, l, 1.0)
    out, lse = acc / safe_l[:, None], tl.where(l > 0, m + tl.log(safe_l), float("-inf"))
    if FAULT == "not divided":
        out = acc
    if FAULT == "NaN of an empty row":
        out = acc / l[:, None]
    if FAULT == "lse in base 2":
        lse = lse * 1.4426950408889634
    if FAULT == "lse without m":
        lse = tl.log(safe_l)
    in_v, width, first = d < V, V, 0
    if FAULT == "whole row stored":
        in_v = d < D
    if FAULT == "whole row stored" or FAULT == "output rows D apart":
        width = D
    if FAULT == "last V columns":
        first, in_v = D - V, (d >= D - V) & (d < D)
    tl.store(out_ptr + (t * H + h)[:, None] * width + d[None, :] - first, out, in_h[:, None] & in_v[None, :])
    tl.store(lse_ptr + t * H + h, lse, in_h)


@wrong("sparse_attention_kernel", "one tile")
@jit
def unscaled(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "unscaled")


@wrong("sparse_attention_kernel", "one tile")
@jit
def everyone_takes_query_0(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "query 0")


@wrong("sparse_attention_kernel", "one tile")
@jit
def everyone_takes_the_indices_of_query_0(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(
        q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "indices of query 0"
    )


@wrong("sparse_attention_kernel", "one tile")
@jit
def not_divided_by_l(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "not divided")


@wrong("sparse_attention_kernel", "natural lse")
@jit
def lse_in_base_2(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "lse in base 2")


@wrong("sparse_attention_kernel", "natural lse")
@jit
def lse_without_m(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "lse without m")


@wrong("sparse_attention_kernel", "bounds")
@jit
def whole_row_stored_as_value(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "whole row stored")


@wrong("sparse_attention_kernel", "bounds")
@jit
def output_rows_D_apart(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(
        q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "output rows D apart"
    )


@wrong("sparse_attention_kernel", "value columns")
@jit
def last_columns_as_value(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "last V columns")


@wrong("sparse_attention_kernel", "several tiles")
@jit
def acc_not_rescaled(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "acc not rescaled")


@wrong("sparse_attention_kernel", "several tiles")
@jit
def l_not_rescaled(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "l not rescaled")


@wrong("sparse_attention_kernel", "several tiles")
@jit
def first_tile_alone(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "first tile alone")


@wrong("sparse_attention_kernel", "several tiles")
@jit
def last_tile_alone(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "last tile alone")


@wrong("sparse_attention_kernel", "tail")
@jit
def tail_not_masked(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "tail not masked")


@wrong("sparse_attention_kernel", "tail")
@jit
def tail_with_logit_0(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "tail with logit 0")


@wrong("sparse_attention_kernel", "tail")
@jit
def whole_tiles_only(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "whole tiles only")


@wrong("sparse_attention_kernel", "padding")
@jit
def gather_unmasked(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "gather unmasked")


@wrong("sparse_attention_kernel", "padding")
@jit
def padding_as_token_0(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "clamped")


@wrong("sparse_attention_kernel", "padding")
@jit
def padding_with_logit_0(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(
        q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "padding with logit 0"
    )


@wrong("sparse_attention_kernel", "empty row")
@jit
def nan_of_an_empty_tile(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(
        q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "NaN of an empty tile"
    )


@wrong("sparse_attention_kernel", "empty row")
@jit
def nan_of_an_empty_row(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(
        q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "NaN of an empty row"
    )


@wrong("sparse_attention_kernel", "few heads, odd sizes")
@jit
def lanes_past_D_not_masked(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(
        q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "lanes past D not masked"
    )


@wrong("sparse_attention_kernel", "few heads, odd sizes")
@jit
def rows_taken_for_dense(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "dense rows")


@wrong("sparse_attention_kernel", "bounds")
@jit
def padded_heads_stored(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "heads not masked")


@wrong("sparse_attention_kernel", "large logits")
@jit
def no_shift(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "no shift")


@wrong("sparse_attention_kernel", "full precision")
@jit
def products_in_fp16(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "fp16")


@wrong("sparse_attention_kernel", "full precision")
@jit
def rounded_to_tf32(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "")
    tl.dot(tl.zeros([16, 16], tl.float32), tl.zeros([16, 16], tl.float32))


@wrong("sparse_attention_kernel", "large logits")
@jit
def m_starts_at_0(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "m starts at 0")


@wrong("sparse_attention_kernel", "wide offsets")
@jit
def offsets_in_32_bits(
    q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
    BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    _attention(q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "32 bits")


if INTERPRETED:  # a read that no result shows is seen by the interpreter alone

    @wrong("sparse_attention_kernel", "bounds")
    @jit
    def stray_lanes_of_q_read(
        q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
        BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
    ):  # fmt: skip
        _attention(
            q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "stray lanes read"
        )

    @wrong("sparse_attention_kernel", "bounds")
    @jit
    def masked_after_the_load(
        q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row,
        BH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
    ):  # fmt: skip
        _attention(
            q_ptr, kv_ptr, indices_ptr, out_ptr, lse_ptr, scale, H, D, V, k, kv_row, BH, BK, DP, "masked too late"
        )
