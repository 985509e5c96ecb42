"""Notebooks 08 to 10: kernels that are right for short tensors of usual numbers only. Each is the notebook's solution
with a few words changed."""

from . import wrong
from ._changed import changed


def nearly(exercise, property, name, *changes):
    wrong(exercise, property)(changed(exercise, name, *changes))


# --------------------------------------------------------------------------------------------------------------- 08

LOADED = "tl.load(x_ptr + i, mask=inside)"
nearly("copy_kernel", "bit by bit", "all_as_fp32", (LOADED, f"{LOADED}.to(tl.float32)"))
nearly("copy_kernel", "bounds", "places_of_16_bits", ("    inside", "    i = i.to(tl.int16)\n    inside"))

SUM = "tl.sum(tl.load(x_ptr + r * row_stride + c * col_stride, mask=c < C, other=0.0))"
nearly(
    "row_sum_kernel",
    "all tiles",
    "columns_of_16_bits",
    ("c = first + tl.arange(0, BLOCK)", "c = (first + tl.arange(0, BLOCK)).to(tl.int16)"),
)
nearly(
    "row_sum_kernel",
    "full precision",
    "hides_nan",
    (f"total += {SUM}", f"x = {SUM[7:-1]}\n        total += tl.sum(tl.where(x == x, x, 0.0))"),
)

nearly("planted_bug_kernel", "last keys", "keys_of_8_bits", ("s[:, None] * row", "s.to(tl.int8)[:, None] * row"))
KEY_MASK = "(d < Di)[None, :], other=0.0)"
nearly(
    "planted_bug_kernel",
    "bounds",
    "whole_groups_of_four",
    (KEY_MASK, "(d < (Di + 3) // 4 * 4)[None, :], other=0.0)\n    k = tl.where((d < Di)[None, :], k, 0.0)"),
)
nearly(
    "index_scores_kernel",
    "larger tiles",
    "key_offsets_of_16_bits",
    ("s[:, None] * k_row", "(s[:, None] * k_row).to(tl.int16)"),
)

# --------------------------------------------------------------------------------------------------------------- 09

WIDE = "s.to(tl.int64)"
nearly("gather_kernel", "rows", "indices_of_16_bits", (WIDE, "s.to(tl.int16).to(tl.int64)"))
nearly("gather_kernel", "rows", "adds_zero_to_rows", ("(d < D)[None, :], 0.0)\n", "(d < D)[None, :], 0.0) + 0.0\n"))
NO_NAN = "(d < D)[None, :], 0.0)\n    rows = tl.where(rows == rows, rows, 0.0)\n"
nearly("gather_kernel", "rows", "cleans_rows_of_nan", ("(d < D)[None, :], 0.0)\n", NO_NAN))

nearly(
    "row_lse_kernel",
    "large logits",
    "first_maximum_for_good",
    ("tl.maximum(m, tl.max(x, axis=0))", 'tl.where(m == float("-inf"), tl.max(x, axis=0), m)'),
)
nearly("row_lse_kernel", "tail", "one_key_is_none", ("tl.where(l > 0, m +", "tl.where(l > 1, m +"))

nearly(
    "sparse_attention_kernel",
    "few heads, odd sizes",
    "keys_of_16_bits",
    (WIDE, "s.to(tl.int16).to(tl.int64)"),
)
nearly(
    "sparse_attention_kernel",
    "padding",
    "a_tile_ends_where_padding_begins_it",
    ("there = s >= 0", "there = (s >= 0) & (tl.max(tl.where(j == j0, s, -1), axis=0) >= 0)"),
)

# --------------------------------------------------------------------------------------------------------------- 10

for name, index in {
    "indices_of_16_bits": "s.to(tl.int16).to(tl.int32)",
    "indices_cut_to_16_bits": "s & 0xFFFF",
    "indices_through_fp16": "s.to(tl.float16).to(tl.int32)",
}.items():
    nearly("selection_kernel", "long row", name, ("place, s, kept", f"place, {index}, kept"))
for kind in ("int16", "float16"):
    counted = "written += tl.sum(kept, axis=0)"
    narrow = f"written = (written + tl.sum(kept, axis=0)).to(tl.{kind}).to(tl.int32)"
    fails = "bounds" if kind == "int16" else "long row"  # negative counts lead in front of out
    nearly("selection_kernel", fails, f"counts_in_{kind}", (counted, narrow))
