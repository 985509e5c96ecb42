"""Notebook 14: how many tokens fit in memory, and how many keys hold most of a trained model's attention."""

import numpy as np
import torch

from dsa_ref import V32, cost

from ..checking import Check, expect
from .keys import attention_of, needed

most_tokens = Check("most_tokens")  # (free_bytes, layers, cache_bytes, work_bytes) -> int
needed_keys = Check("needed_keys")  # (weights [n], share) -> int


def _expect_count(got, expected, what, cause, suspects=None):
    expect(
        isinstance(got, (int, np.integer)) and not isinstance(got, bool)
        or isinstance(got, torch.Tensor) and got.numel() == 1 and not got.is_floating_point(),
        f"{what}: got {got!r}, expected a whole number",
        "did you forget the return, or divide with / instead of //?",
    )  # fmt: skip
    near = [why for why, wrong in (suspects or {}).items() if wrong != expected and int(got) == wrong]
    expect(int(got) == expected, f"{what}: got {int(got):,}, expected {expected:,}", near[0] if near else cause)


# ------------------------------------------------------------------------------------------------------- most_tokens


def _expect_tokens(solution, free, layers, cache, work, cause):
    a_token = layers * cache + work
    suspects = {
        "every layer keeps its own cache": free // (cache + work),
        "the layers work one after another: only one needs its working memory at a time": (
            free // (layers * (cache + work))
        ),
        "the layer that works needs memory besides the caches": free // (layers * cache),
        "the last token has to fit as a whole: round down": -(-free // a_token),
    }
    what = f"{free:,} bytes free, {layers} layers, {cache} bytes a token in each cache, {work} more in the one at work"
    _expect_count(solution(free, layers, cache, work), max(0, free // a_token), what, cause, suspects)


@most_tokens.property("one layer")
def most_tokens_one_layer(solution):
    for free, cache in ((12_840_000, 1284), (10_000, 100)):
        _expect_tokens(solution, free, 1, cache, 0, "free_bytes / bytes of a token")


@most_tokens.property("all layers")
def most_tokens_all_layers(solution):
    for free, layers in ((61_000_000, 61), (8_000_000, 4)):
        _expect_tokens(solution, free, layers, 1000, 0, "every layer keeps its own cache")


@most_tokens.property("one works")
def most_tokens_one_works(solution):
    heads, row = cost.head_bytes_per_token(V32), cost.bf16_kv_bytes_per_token(V32)
    for free, layers, cache, work in ((998_000 * (61 * row + heads), 61, row, heads), (30_000_000, 5, 100, 500)):
        _expect_tokens(solution, free, layers, cache, work, "layers · cache_bytes + work_bytes for each token")


@most_tokens.property("whole tokens")
def most_tokens_whole_tokens(solution):
    for free in (1999, 2999, 10_000_001, 10**18 - 1):
        _expect_tokens(solution, free, 2, 400, 200, "a whole number, rounded down, and exact: // on ints")


@most_tokens.property("nothing fits")
def most_tokens_nothing_fits(solution):
    for free in (0, 999, -5_000_000):
        _expect_tokens(solution, free, 2, 400, 200, "what is free may be less than nothing when the weights are in: 0")


# ------------------------------------------------------------------------------------------------------- needed_keys


def _expect_needed(solution, weights, share, cause):
    weights = torch.as_tensor(weights, dtype=torch.float64)
    ordered = weights.cumsum(0)
    smallest = weights.sort().values.cumsum(0)
    expected = needed(weights, share)
    suspects = {
        "one key too few: the sum has to reach the share": expected - 1,
        "one key too many: at least the share is enough": expected + 1,
        "the keys were taken in their order: take the largest weights first": int((ordered < share).sum()) + 1,
        "the smallest weights were taken first: sort descending": int((smallest < share).sum()) + 1,
    }
    shown = weights.tolist() if len(weights) <= 6 else f"{len(weights)} weights"
    got = solution(weights, share)
    if isinstance(got, (float, np.floating)) and float(got).is_integer():
        got = int(got)
    _expect_count(got, expected, f"{shown}, share {share}", cause, suspects)


@needed_keys.property("one key")
def needed_keys_one_key(solution):
    for weights in ([0.75, 0.125, 0.125], [1.0]):
        _expect_needed(solution, weights, 0.5, "the largest weight alone reaches the share")


@needed_keys.property("largest first")
def needed_keys_largest_first(solution):
    for weights, share in (([0.125, 0.25, 0.0625, 0.5, 0.0625], 0.7), ([0.25, 0.0, 0.75], 0.8)):
        _expect_needed(solution, weights, share, "the fewest keys: take the largest weights first")


@needed_keys.property("exactly the share")
def needed_keys_exactly_the_share(solution):
    for weights, share in (([0.5, 0.25, 0.25], 0.75), ([0.25, 0.25, 0.25, 0.25], 0.5)):
        _expect_needed(solution, weights, share, "a sum that is the share has reached it")


@needed_keys.property("all of it")
def needed_keys_all_of_it(solution):
    for weights in ([0.5, 0.5, 0.0], [0.25, 0.0, 0.5, 0.0, 0.25]):
        _expect_needed(solution, weights, 1.0, "keys of weight 0 hold nothing: not all are needed")


@needed_keys.property("a trained model")
def needed_keys_a_trained_model(solution):
    for layer, t in ((1, 200), (3, 255)):
        weights = attention_of(256)[layer][t, : t + 1].double()
        for share in (0.5, 0.9):
            _expect_needed(solution, weights / weights.sum(), share, "a real row, hundreds of weights: look at all")
    cause = "the weights are float64, and so is their sum: in fp32 a small one is lost"
    _expect_needed(solution, [0.5, 0.5 - 2.0**-30, 2.0**-30], 1.0, cause)
    _expect_needed(solution, [2.0**-13] * 2**13, 0.75, "6,144 of 8,192 equal weights: the row decides, not k")
