"""Notebooks 10 to 14: right on usual numbers, wrong for many, very small or very large ones, or in a second call."""

import re

import torch

from dsa_course.ladder.profile import shares
from dsa_course.serving.check_pages import page_of

from . import wrong
from ._changed import changed


def nearly(exercise, property, name, *changes):
    wrong(exercise, property)(changed(exercise, name, *changes))


# --------------------------------------------------------------------------------------------------------------- 10

LOWEST = "value=torch.finfo(torch.float32).min"
nearly("lower_bound", "ragged end", "fills_with_the_lowest_finite_number", ("value=-torch.inf", LOWEST))
LIFTED = "    scores[scores == -torch.inf] = -1e30\n    padded ="
nearly("lower_bound", "inputs", "lifts_minus_infinity_in_place", ("    padded =", LIFTED))
nearly(
    "ordered_bits",
    "both signs",
    "turned_round_from_a_thousand_on",
    (
        "torch.where(bits < 0, ~bits, bits + 2**31)",
        "torch.where(bits < 0, ~bits, bits + 2**31) * (-1) ** (len(x) > 999)",
    ),
)


def order(scores):
    """Integers in the order of scores, 0.0 for -0.0."""
    bits = torch.where(scores == 0, 0.0, scores).view(torch.int32).long()
    return torch.where(bits < 0, ~bits, bits + 2**31)


def selected(scores, k):
    """A right selection by halving the range of the ordered integers."""
    keys, low, high, wanted = order(scores), 0, 2**32 - 1, min(k, len(scores))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int((keys >= middle).sum()) >= wanted else (low, middle - 1)
    ties = keys == low
    chosen = ((keys > low) | ties & (ties.cumsum(0) <= wanted - (keys > low).sum())).nonzero().flatten()
    return torch.nn.functional.pad(chosen, (0, k - len(chosen)), value=-1).to(torch.int32)


@wrong("threshold_select", "largest")
def indices_of_16_bits(scores, k):
    return selected(scores, k).to(torch.int16).to(torch.int32)


@wrong("threshold_select", "minus infinity")
def a_low_number_for_minus_infinity(scores, k):
    return selected(scores.masked_fill(scores == -torch.inf, -1e30), k)


# --------------------------------------------------------------------------------------------------------------- 11


@wrong("ring_waits", "many rounds")
def stuck_from_round_8_on(i, places):
    turn = i // places
    return i % places, (turn + 1) % 2, 0 if i % places == 0 and turn >= 8 else turn % 2


nearly(
    "time_after",
    "one after another",
    "nothing_where_nothing_is_faster",
    ("    total =", "    if not faster:\n        return 0.0, 0.0\n    total ="),
)
nearly("measure", "odd calls", "the_median_of_three", ("range(51)", "range(3)"), ("[25]", "[1]"))


@wrong("read_profile", "first part that fits")
def texts_as_regular_expressions(kernels, whole_us, parts):
    names = {
        part: tuple(name for name, *_ in kernels if any(re.search(text, name) for text in texts))
        for part, texts in parts.items()
    }
    return shares(kernels, whole_us, names)


@wrong("read_profile", "first part that fits")
def capitals_are_small_letters(kernels, whole_us, parts):
    small = {part: tuple(text.lower() for text in texts) for part, texts in parts.items()}
    return shares([(name.lower(), n, us) for name, n, us in kernels], whole_us, small)


@wrong("read_profile", "inputs")
def sorts_the_callers_kernels(kernels, whole_us, parts):
    kernels.sort(key=lambda kernel: -kernel[2])
    return shares(kernels, whole_us, parts)


# --------------------------------------------------------------------------------------------------------------- 12


@wrong("pack_page", "short page")
def one_page_for_all_calls(k_idx, k_scale, page_size, pages={}):  # noqa: B006 (the fault)
    page = page_of(k_idx, k_scale, page_size)
    return pages.setdefault(len(page), page).copy_(page)


@wrong("pack_page", "short page")
def nan_becomes_zero(k_idx, k_scale, page_size):
    return page_of(k_idx.float().nan_to_num().to(k_idx.dtype), k_scale, page_size)


@wrong("pack_page", "short page")
def scales_taken_for_neighbours(k_idx, k_scale, page_size):
    return page_of(k_idx, torch.as_strided(k_scale, k_scale.shape, (1,)), page_size)


nearly(
    "merge_splits",
    "empty part",
    "only_nan_is_garbage",
    ("outs.masked_fill((lses == -torch.inf)[..., None], 0.0)", "outs.masked_fill(outs.isnan(), 0.0)"),
)

# --------------------------------------------------------------------------------------------------------------- 14

nearly("dollars", "a chunk", "a_million_tokens_at_most", ("1_000_000 / tokens", "1_000_000 / min(tokens, 1_000_000)"))
ENOUGH = "int((largest_first.cumsum(0) < share).sum()) + 1"
nearly("needed_keys", "a trained model", "sums_in_fp32", ("first.cumsum", "first.float().cumsum"))
nearly("needed_keys", "a trained model", "at_most_v32s_k", (ENOUGH, f"min(2048, {ENOUGH})"))
