"""Notebook 09's gather, written out once, right but for the one FAULT that its wrong answers name."""

from . import wrong
from ._triton import INTERPRETED, jit, tl


@jit
def _gather(
    kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr, FAULT: tl.constexpr
):  # fmt: skip
    j, d = tl.program_id(0) * BK + tl.arange(0, BK), tl.arange(0, DP)
    if FAULT == "one place apart":
        j = tl.program_id(0) + tl.arange(0, BK)
    in_k, in_d = j < k, d < D
    if FAULT == "last place missed":
        in_k = j < k - 1
    if FAULT == "lanes past D read":
        in_d = d < DP
    if FAULT == "tail read":
        s = tl.load(indices_ptr + j)
    else:
        s = tl.load(indices_ptr + j, in_k, -1)
    there = s >= 0
    if FAULT == "clamped":
        s = tl.maximum(s, 0)
        there = in_k
    if FAULT == "unmasked":
        there = in_k
    if FAULT == "token 0 dropped":
        there = s > 0
    if FAULT == "not looked up":
        s = tl.where(there, j, -1)
    row = kv_row
    if FAULT == "dense rows":
        row = D
    mask = there[:, None] & in_d[None, :]
    other = 0.0
    if FAULT == "ones for padding":
        other = 1.0
    if FAULT == "no other":
        rows = tl.load(kv_ptr + s.to(tl.int64)[:, None] * row + d[None, :], mask)
    elif FAULT == "masked too late":
        rows = tl.load(kv_ptr + s.to(tl.int64)[:, None] * row + d[None, :], in_k[:, None] & in_d[None, :], 0.0)
        rows = tl.where(there[:, None], rows, 0.0)
    elif FAULT == "index without other":
        s = tl.load(indices_ptr + j, in_k)
        mask = (s >= 0)[:, None] & in_d[None, :]
        rows = tl.load(kv_ptr + s.to(tl.int64)[:, None] * row + d[None, :], mask, 0.0)
    elif FAULT == "int32":
        rows = tl.load(kv_ptr + s[:, None] * row + d[None, :], mask, other)
    else:
        rows = tl.load(kv_ptr + s.to(tl.int64)[:, None] * row + d[None, :], mask, other)
    if FAULT == "padding not stored":
        in_k = in_k & there
    if FAULT == "tail stored":
        in_k = j >= 0
    if FAULT == "padded output rows":
        tl.store(out_ptr + j[:, None] * DP + d[None, :], rows, in_k[:, None] & (d < D)[None, :])
    elif FAULT == "lanes past D stored":
        tl.store(out_ptr + j[:, None] * D + d[None, :], rows, in_k[:, None] & (d < DP)[None, :])
    else:
        tl.store(out_ptr + j[:, None] * D + d[None, :], rows, in_k[:, None] & (d < D)[None, :])


@wrong("gather_kernel", "rows")
@jit
def first_rows(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
    _gather(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK, DP, "not looked up")


@wrong("gather_kernel", "rows")
@jit
def token_0_taken_for_padding(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
    _gather(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK, DP, "token 0 dropped")


@wrong("gather_kernel", "rows")
@jit
def last_place_missed(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
    _gather(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK, DP, "last place missed")


@wrong("gather_kernel", "every tile")
@jit
def tiles_one_place_apart(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
    _gather(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK, DP, "one place apart")


@wrong("gather_kernel", "every tile")
@jit
def every_program_copies_all(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
    d = tl.arange(0, DP)
    for j0 in range(0, k, BK):
        j = j0 + tl.arange(0, BK)
        s = tl.load(indices_ptr + j, j < k, -1)
        rows = tl.load(
            kv_ptr + s.to(tl.int64)[:, None] * kv_row + d[None, :], (s >= 0)[:, None] & (d < D)[None, :], 0.0
        )
        tl.store(out_ptr + j[:, None] * D + d[None, :], rows, (j < k)[:, None] & (d < D)[None, :])


@wrong("gather_kernel", "padding")
@jit
def gather_unmasked(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
    _gather(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK, DP, "unmasked")


@wrong("gather_kernel", "padding")
@jit
def padding_as_token_0(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
    _gather(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK, DP, "clamped")


@wrong("gather_kernel", "padding")
@jit
def padding_left_as_it_was(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
    _gather(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK, DP, "padding not stored")


@wrong("gather_kernel", "padding")
@jit
def padding_as_ones(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
    _gather(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK, DP, "ones for padding")


@wrong("gather_kernel", "row stride")
@jit
def kv_taken_for_dense(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
    _gather(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK, DP, "dense rows")


@wrong("gather_kernel", "bounds")
@jit
def output_rows_padded(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
    _gather(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK, DP, "padded output rows")


@wrong("gather_kernel", "bounds")
@jit
def lanes_past_D_stored(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
    _gather(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK, DP, "lanes past D stored")


@wrong("gather_kernel", "bounds")
@jit
def tail_stored(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
    _gather(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK, DP, "tail stored")


@wrong("gather_kernel", "tail")
@jit
def whole_tiles_only(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
    if tl.program_id(0) < k // BK:
        _gather(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK, DP, "")


@wrong("gather_kernel", "narrow rows")
@jit
def width_guessed_from_the_tile(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
    _gather(kv_ptr, indices_ptr, out_ptr, k, tl.minimum(D, DP // 2 if D < DP else DP), kv_row, BK, DP, "")


@wrong("gather_kernel", "wide offsets")
@jit
def offsets_in_32_bits(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
    j, d = tl.program_id(0) * BK + tl.arange(0, BK), tl.arange(0, DP)
    s = tl.load(indices_ptr + j, j < k, -1)
    rows = tl.load(kv_ptr + s[:, None] * kv_row + d[None, :], (s >= 0)[:, None] & (d < D)[None, :], 0.0)
    tl.store(out_ptr + j[:, None] * D + d[None, :], rows, (j < k)[:, None] & (d < D)[None, :])


if INTERPRETED:  # a read that no result shows is seen by the interpreter alone, and so are undefined lanes and int32

    @wrong("gather_kernel", "wide offsets")
    @jit
    def widened_after_the_product(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
        j, d = tl.program_id(0) * BK + tl.arange(0, BK), tl.arange(0, DP)
        s = tl.load(indices_ptr + j, j < k, -1)
        offsets = (s[:, None] * kv_row + d[None, :]).to(tl.int64)
        rows = tl.load(kv_ptr + offsets, (s >= 0)[:, None] & (d < D)[None, :], 0.0)
        tl.store(out_ptr + j[:, None] * D + d[None, :], rows, (j < k)[:, None] & (d < D)[None, :])

    @wrong("gather_kernel", "padding")
    @jit
    def no_other(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
        _gather(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK, DP, "no other")

    @wrong("gather_kernel", "bounds")
    @jit
    def index_without_other(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
        _gather(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK, DP, "index without other")

    @wrong("gather_kernel", "bounds")
    @jit
    def masked_after_the_load(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
        _gather(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK, DP, "masked too late")

    @wrong("gather_kernel", "bounds")
    @jit
    def tail_of_the_indices_read(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
        _gather(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK, DP, "tail read")

    @wrong("gather_kernel", "bounds")
    @jit
    def lanes_past_D_read(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
        _gather(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK, DP, "lanes past D read")
