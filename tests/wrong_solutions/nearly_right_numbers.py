"""Notebooks 08, 10 to 12: right but for rounding, dtypes, large numbers, or arguments that are changed."""

import heapq

import torch

from dsa_course.serving.check_pages import page_of

from . import wrong
from ._changed import changed


def nearly(exercise, property, name, *changes):
    wrong(exercise, property)(changed(exercise, name, *changes))


nearly("tile_cost", "flops", "flops_as_a_float", ("flops = 2 *", "flops = 2.0 *"))
nearly(
    "tile_cost",
    "flops",
    "flops_of_32_bits",
    ("flops = 2 * BK * Di * BQ * Hi", "flops = (2 * BK * Di * BQ * Hi + 2**31) % 2**32 - 2**31"),
)
nearly(
    "lower_bound",
    "never above",
    "reads_what_lies_between",
    ("    padded =", "    scores = torch.as_strided(scores, scores.shape, (1,))\n    padded ="),
)

BITS = "x.view(torch.int32).long()"
nearly(
    "ordered_bits",
    "positive numbers",
    "infinity_is_the_largest_float",
    (BITS, f"x.clamp(-{torch.finfo().max}, {torch.finfo().max}).view(torch.int32).long()"),
)
nearly(
    "ordered_bits",
    "negative numbers",
    "minus_infinity_is_the_smallest_float",
    (BITS, f"x.clamp(min=-{torch.finfo().max}).view(torch.int32).long()"),
)
nearly("ordered_bits", "negative numbers", "last_bit_of_negative_numbers_lost", ("~bits", "~bits // 2"))


@wrong("threshold_select", "few sorted")
def a_heap_of_the_row(scores, k):
    row = scores.tolist()
    best = sorted(heapq.nsmallest(k, range(len(row)), key=lambda s: (-row[s], s)))
    return torch.tensor(best + [-1] * (k - len(best)), dtype=torch.int32)


# --------------------------------------------------------------------------------------------------------------- 11

BOUND = '"computing" if computing > moving'
nearly("roofline", "bound", "every_card_is_an_h200", (BOUND, '"computing" if not bytes or flops / bytes > 412'))
nearly(
    "roofline",
    "runs",
    "always_divides_by_the_bytes",
    (BOUND, '"computing" if flops / bytes > flops_per_second / bytes_per_second'),
)
nearly("programs_that_fit", "rounded up", "registers_four_at_a_time", ("// 8) * 8", "// 4) * 4"))
nearly("programs_that_fit", "registers", "programs_as_a_float", ("return min(", "return 1.0 * min("))
nearly(
    "time_after", "one after another", "nothing_becomes_slower", ("faster.get(name, 1)", "max(1, faster.get(name, 1))")
)
nearly(
    "time_after",
    "share saved",
    "nothing_lost",
    ("return new, 1 - new / total(parts.values())", "return new, max(0.0, 1 - new / total(parts.values()))"),
)
nearly("programs_that_fit", "shared memory", "a_byte_too_few", ("+ 1024", "+ 1023"))
nearly("programs_that_fit", "registers", "at_most_168_registers", ("-registers //", "-min(registers, 168) //"))


@wrong("time_after", "inputs")
def parts_used_up(parts, faster, side_by_side):
    total = max if side_by_side else sum
    before = total(parts.values())
    for name, factor in faster.items():
        parts[name] /= factor
    return total(parts.values()), 1 - total(parts.values()) / before


# --------------------------------------------------------------------------------------------------------------- 12

nearly("step_bytes", "dense", "bytes_as_floats", ("dense = sum(", "dense = 1.0 * sum("))


@wrong("step_bytes", "batch")
def bytes_in_fp32(lengths, k, index_bytes, kv_bytes):
    tokens = torch.tensor(lengths, dtype=torch.float32)
    dsa, dense = index_bytes * tokens + kv_bytes * tokens.clamp(max=k), kv_bytes * tokens
    return int(dsa.sum()), int(dense.sum())


@wrong("step_bytes", "inputs")
def lengths_used_up(lengths, k, index_bytes, kv_bytes):
    dsa = dense = 0
    while lengths:
        tokens = lengths.pop()
        dsa, dense = dsa + index_bytes * tokens + kv_bytes * min(k, tokens), dense + kv_bytes * tokens
    return dsa, dense


@wrong("pack_page", "values first")
def reads_memory_not_the_tensor(k_idx, k_scale, page_size):
    """The rows of k_idx may lie further apart than they are long."""
    in_memory = torch.as_strided(k_idx.view(torch.uint8), k_idx.shape, (k_idx.shape[1], 1))
    return page_of(in_memory.view(torch.float8_e4m3fn), k_scale, page_size)


nearly(
    "paged_scores",
    "one page",
    "scales_in_bf16",
    (".reshape(-1)\n    dots", ".reshape(-1).bfloat16().float()\n    dots"),
)
nearly("paged_scores", "one page", "scores_in_float64", ("return result", "return result.double()"))
nearly(
    "merge_splits",
    "weights",
    "small_parts_left_out",
    ("shares = (lses - shift).exp()", "shares = (lses - shift).exp() * (lses - shift > -10)"),
)
nearly(
    "merge_splits",
    "lse",
    "merged_in_fp32",
    ("largest = lses", "outs, lses = outs.float(), lses.float()\n    largest = lses"),
)
