"""Notebooks 08 to 10: kernels that compute the right thing but round, reach for others' places, or spoil their inputs.

Each is the notebook's solution with a few words changed.
"""

from . import wrong
from ._changed import changed


def nearly(exercise, property, name, *changes):
    wrong(exercise, property)(changed(exercise, name, *changes))


BF16, FP16 = ".to(tl.bfloat16).to(tl.float32)", ".to(tl.float16).to(tl.float32)"

# --------------------------------------------------------------------------------------------------------------- 08

COPY = "tl.store(out_ptr + i, tl.load(x_ptr + i, mask=inside), mask=inside)"
COPY_LOADED = "x = tl.load(x_ptr + i, mask=inside)\n    tl.store(out_ptr + i, x, mask=inside)"
MINE = "tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)"
EVERY_PTH = "tl.program_id(0) + tl.arange(0, BLOCK) * tl.num_programs(0)"
nearly("copy_kernel", "own block only", "every_pth_element", (MINE, EVERY_PTH))
nearly(
    "copy_kernel",
    "own block only",
    "blocks_backwards",
    ("tl.program_id(0)", "(tl.num_programs(0) - 1 - tl.program_id(0))"),
)
nearly(
    "copy_kernel", "inputs", "moved_not_copied", (COPY, COPY_LOADED + "\n    tl.store(x_ptr + i, x * 0.0, mask=inside)")
)
nearly("copy_kernel", "bit by bit", "adds_zero", (COPY, COPY_LOADED.replace("i, x,", "i, x + 0.0,")))
nearly("copy_kernel", "bit by bit", "cleans_nan", (COPY, COPY_LOADED.replace("i, x,", "i, tl.where(x == x, x, 0.0),")))

SUM = "tl.sum(tl.load(x_ptr + r * row_stride + c * col_stride, mask=c < C, other=0.0))"
nearly("row_sum_kernel", "full precision", "values_in_fp16", (SUM, SUM[:-1] + FP16 + ")"))
nearly(
    "row_sum_kernel",
    "sum of a row",
    "sum_in_fp16",
    ("tl.store(out_ptr + r, total)", f"tl.store(out_ptr + r, total{FP16})"),
)
STORE_SUM = "    tl.store(out_ptr + r, total)\n"
NEXT_TOO = STORE_SUM + "    if r + 1 < tl.num_programs(0):\n        tl.store(out_ptr + r + 1, total)\n"
nearly("row_sum_kernel", "own row only", "a_guess_for_the_next_row", (STORE_SUM, NEXT_TOO))
nearly(
    "row_sum_kernel",
    "own row only",
    "rows_backwards",
    ("r = tl.program_id(0)", "r = tl.num_programs(0) - 1 - tl.program_id(0)"),
)
nearly(
    "row_sum_kernel",
    "inputs",
    "sum_kept_in_x_too",
    (STORE_SUM, STORE_SUM + "    tl.store(x_ptr + r * row_stride, total)\n"),
)

SQUARES, KEYS = "tl.sum(k * k, axis=1)", "tl.program_id(0) * BK + tl.arange(0, BK)"
nearly("planted_bug_kernel", "full precision", "squares_in_fp16", (SQUARES, f"tl.sum((k * k){FP16}, axis=1)"))
nearly("planted_bug_kernel", "full precision", "keys_in_bf16", (SQUARES, f"tl.sum(k{BF16} * k{BF16}, axis=1)"))
nearly(
    "planted_bug_kernel",
    "same tiles",
    "every_pth_key",
    (KEYS, "tl.program_id(0) + tl.arange(0, BK) * tl.num_programs(0)"),
)
AT = "k_ptr + s[:, None] * row_stride + d[None, :]"
IN_PLACE = f"    tl.store({AT}, k * k, mask=(s < S)[:, None] & (d < Di)[None, :])\n    tl.store(out_ptr"
nearly("planted_bug_kernel", "inputs", "squared_in_place", ("    tl.store(out_ptr", IN_PLACE))

I_KEYS, DOT = "tl.program_id(1) * BK + tl.arange(0, BK)", 'tl.dot(k, tl.trans(q), input_precision="ieee")'
nearly(
    "index_scores_kernel",
    "own tile only",
    "every_jth_key",
    (I_KEYS, "tl.program_id(1) + tl.arange(0, BK) * tl.num_programs(1)"),
)
nearly("index_scores_kernel", "full precision", "tf32_in_a_helper", (DOT, "product_in_tf32(k, tl.trans(q))"))
nearly(
    "index_scores_kernel",
    "full precision",
    "relu_not_at_0",
    ("tl.maximum(dots, 0.0)", "tl.where(dots > -0.01, dots, 0.0)"),
)
nearly(
    "index_scores_kernel",
    "full precision",
    "relu_cut_above",
    ("tl.maximum(dots, 0.0)", "tl.minimum(tl.maximum(dots, 0.0), 1000.0)"),
)
nearly("index_scores_kernel", "larger tiles", "at_most_32_dims", ("d < Di", "d < tl.minimum(Di, 32)"))
nearly(
    "index_scores_kernel",
    "inputs",
    "weights_written_back",
    ("    seen =", "    tl.store(w_ptr + t * w_row + h, w * 0.5, mask=h < Hi)\n    seen ="),
)

# --------------------------------------------------------------------------------------------------------------- 09

nearly(
    "gather_kernel", "every tile", "every_pth_place", (KEYS, "tl.program_id(0) + tl.arange(0, BK) * tl.num_programs(0)")
)
nearly("gather_kernel", "rows", "rows_in_bf16", ("[None, :], rows,", f"[None, :], rows{BF16},"))
nearly(
    "gather_kernel",
    "inputs",
    "indices_used_up",
    ("    tl.store(", "    tl.store(indices_ptr + j, s * 0 - 1, j < k)\n    tl.store("),
)

D_16 = ("(d < D)[None, :], 0.0)", "(d < 16)[None, :] & (d < D)[None, :], 0.0)")
nearly("gather_kernel", "narrow rows", "at_most_16_numbers_a_row", D_16)
CUT = ("tl.exp(x - finite_m)", "tl.where(x - finite_m > -15, tl.exp(x - finite_m), 0.0)")
nearly("row_lse_kernel", "long row", "small_numbers_left_out", CUT)
BLOCKS_OWN = 'new_m = tl.max(x, axis=0)\n        new_m = tl.where(new_m == float("-inf"), m, new_m)'
nearly(
    "row_lse_kernel", "falling blocks", "a_blocks_own_maximum", ("new_m = tl.maximum(m, tl.max(x, axis=0))", BLOCKS_OWN)
)
nearly(
    "row_lse_kernel", "one block", "exp_in_bf16", ("tl.sum(tl.exp(x - finite_m)", f"tl.sum(tl.exp(x - finite_m){BF16}")
)
nearly(
    "row_lse_kernel",
    "inputs",
    "x_shifted_in_place",
    ("        new_m =", "        tl.store(x_ptr + r * x_row + i, x - m, i < n)\n        new_m ="),
)

A, RUNNING = "sparse_attention_kernel", "tl.maximum(m, tl.max(logits, axis=1))"
OWN = 'tl.max(logits, axis=1)\n        new_m = tl.where(new_m == float("-inf"), m, new_m)'
nearly(A, "empty tile", "a_tiles_own_maximum", (RUNNING, "tl.max(logits, axis=1)"))
nearly(A, "large logits", "a_tiles_own_maximum_unless_empty", (RUNNING, OWN))
nearly(
    A,
    "empty tile",
    "m_forgotten_on_an_empty_tile",
    ("        m = new_m", '        m = tl.where(tl.max(logits, axis=1) == float("-inf"), float("-inf"), new_m)'),
)
nearly(
    A,
    "empty tile",
    "m_0_after_an_empty_tile",
    ("        m = new_m", '        m = tl.where(tl.max(logits, axis=1) == float("-inf"), 0.0, new_m)'),
)
nearly(
    A,
    "empty tile",
    "an_empty_tile_starts_anew",
    ("        m = new_m", "        m = new_m\n        l = tl.where(tl.max(s, axis=0) < 0, 0.0, l)"),
)
nearly(
    A,
    "full precision",
    "tf32_in_a_helper_of_attention",
    ('tl.dot(p, rows, input_precision="ieee")', "product_in_tf32(p, rows)"),
)
nearly(A, "one tile", "p_in_bf16", ("tl.dot(p, rows,", f"tl.dot(p{BF16}, rows,"))
Q = "q_ptr + (t * H + h)[:, None] * D + d[None, :]"
SCALED = f"    tl.store({Q}, q * scale, (h < H)[:, None] & (d < D)[None, :])\n    safe_l ="
nearly(A, "inputs", "q_scaled_in_place", ("    safe_l =", SCALED))
nearly(
    A,
    "inputs",
    "indices_of_attention_used_up",
    ("        there =", "        tl.store(indices_ptr + t * k + j, s * 0, j < k)\n        there ="),
)

nearly(
    "merge_kernel",
    "many parts",
    "small_parts_left_out",
    ("p = tl.exp(logit - finite_m)", "p = tl.where(logit < finite_m - 10, 0.0, tl.exp(logit - finite_m))"),
)
nearly("merge_kernel", "large lse", "m_starts_at_minus_10000", ('m = float("-inf")', "m = -10000.0"))
nearly(
    "merge_kernel",
    "inputs",
    "lses_shifted_in_place",
    ("        m = new_m", "        m = new_m\n        tl.store(lses_ptr + part * R + r, logit - m)"),
)

# --------------------------------------------------------------------------------------------------------------- 10

S, LOAD, WRITE = "selection_kernel", "tl.load(scores_ptr + s, s < S, 0.0)", "tl.store(out_ptr + place, s, kept != 0)"
FILL = "tl.full([BLOCK], -1, tl.int32)"
nearly(S, "inputs", "scores_used_up", (WRITE, WRITE + "\n        tl.store(scores_ptr + s, x * 0.0, s < S)"))
nearly(S, "inputs", "ties_counted_down", (WRITE, WRITE + "\n        tl.store(ties_ptr, ties - tied)"))
nearly(S, "smallest index", "all_that_reach_the_threshold", ("x > threshold", "x >= threshold"))
nearly(S, "infinities", "minus_infinity_is_nothing", ("x == threshold", '(x == threshold) & (x > float("-inf"))'))
nearly(S, "infinities", "infinity_is_nothing", ("x > threshold", '(x > threshold) & (x < float("inf"))'))
nearly(
    S,
    "each place once",
    "minus_1_everywhere_first",
    (
        "    for s0",
        f"    for p0 in range(0, k, BLOCK):\n        tl.store(out_ptr + p0 + lane, {FILL}, p0 + lane < k)\n    for s0",
    ),
    ("range(written, k,", "range(k, k,"),
)
nearly(
    S, "one block", "scores_in_fp16", (LOAD, LOAD + FP16), ("tl.load(threshold_ptr),", f"tl.load(threshold_ptr){FP16},")
)
