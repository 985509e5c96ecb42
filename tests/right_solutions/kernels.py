"""Notebooks 08 to 10: right kernels of another style than the notebooks' solutions."""

from wrong_solutions._changed import changed
from wrong_solutions._triton import jit, tl

from . import right


def other_style(exercise, name, *changes):
    right(exercise)(changed(exercise, name, *changes))


# A mask that mixes a tile's condition with a scalar's
other_style("copy_kernel", "scalar_in_the_mask", ("inside = i < n", "inside = (i < n) & (n > 0)"))
other_style("merge_kernel", "scalar_float_in_the_mask", ("v < V, 0.0)", '(v < V) & (logit > float("-inf")), 0.0)'))
other_style("selection_kernel", "scalars_in_both_masks", ("s < S, 0.0)", "(s < S) & (k > 0), 0.0)"))

# Full precision, said in other ways
PRECISE = 'input_precision="ieee"'
other_style(
    "index_scores_kernel", "ieee_by_position", (PRECISE, 'None, "ieee"'), ("mask=s < S)", "mask=(s < S) & (t < T))")
)
other_style(
    "index_scores_kernel", "a_helper_in_fp32", (f"tl.dot(k, tl.trans(q), {PRECISE})", "product_in_fp32(k, tl.trans(q))")
)
other_style(
    "sparse_attention_kernel", "q_scaled_first_and_base_2",
    ("    m = tl.full", "    q = q * (scale * 1.4426950408889634)\n    m = tl.full"), (") * scale\n", ")\n"),
    ("tl.exp(", "tl.exp2("), ("m + tl.log(safe_l)", "(m + tl.log2(safe_l)) * 0.6931471805599453"),
)  # fmt: skip
other_style(
    "sparse_attention_kernel", "acc_in_the_dot_and_a_low_start",
    ('acc = acc * rescale[:, None] + tl.dot(p, rows, input_precision="ieee")',
     "acc = tl.dot(p, rows, acc * rescale[:, None], allow_tf32=False)"),
    ('tl.full([BH], float("-inf"), tl.float32)', "tl.full([BH], -3.4e38, tl.float32)"),
)  # fmt: skip
other_style("row_lse_kernel", "a_low_start", ('m = float("-inf")', "m = -3.4e38"))


@right("row_sum_kernel")
@jit
def a_sum_a_lane(x_ptr, out_ptr, C, row_stride, col_stride, BLOCK: tl.constexpr):
    x_ptr += tl.program_id(0) * row_stride
    total = tl.zeros([BLOCK], tl.float32)
    for tile in range(tl.cdiv(C, BLOCK)):
        c = tile * BLOCK + tl.arange(0, BLOCK)
        inside = c < C
        total += tl.where(inside, tl.load(x_ptr + c * col_stride, inside), 0.0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


@right("planted_bug_kernel")
@jit
def dim_by_dim(k_ptr, out_ptr, S, Di, row_stride, BK: tl.constexpr, DP: tl.constexpr):
    s = tl.program_id(0) * BK + tl.arange(0, BK)
    total = tl.zeros([BK], tl.float32)
    for d in range(0, Di):
        k = tl.load(k_ptr + s * row_stride + d, s < S, 0.0)
        total += k * k
    tl.store(out_ptr + s, total, s < S)


@right("gather_kernel")
@jit
def row_by_row(kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK: tl.constexpr, DP: tl.constexpr):
    first, d = tl.program_id(0) * BK, tl.arange(0, DP)
    for j in range(first, min(first + BK, k)):
        s = tl.load(indices_ptr + j).to(tl.int64)
        row = tl.load(kv_ptr + s * kv_row + d, (d < D) & (s >= 0), 0.0)
        tl.store(out_ptr + j * D + d, row, d < D)


@right("merge_kernel")
@jit
def in_two_passes(outs_ptr, lses_ptr, out_ptr, lse_ptr, P, R, V, VP: tl.constexpr):
    r, v, m = tl.program_id(0), tl.arange(0, VP), float("-inf")
    for part in range(0, P):
        m = tl.maximum(m, tl.load(lses_ptr + part * R + r))
    shift = tl.where(m == float("-inf"), 0.0, m)
    total, acc = 0.0, tl.zeros([VP], tl.float32)
    for part in range(0, P):
        p = tl.exp(tl.load(lses_ptr + part * R + r) - shift)
        total += p
        acc += p * tl.load(outs_ptr + (part * R + r) * V + v, v < V, 0.0)
    safe = tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + r * V + v, acc / safe, v < V)
    tl.store(lse_ptr + r, tl.where(total > 0, shift + tl.log(safe), float("-inf")))
