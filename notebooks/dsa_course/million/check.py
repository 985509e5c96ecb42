"""Notebook 14: money, a model of a chunk, and where half the cost is reached. `check_limits` has memory and k."""

import functools
import math

import numpy as np

from dsa_ref import V32, bill, cost

from ..checking import Check, expect
from .record import points, step

dollars = Check("dollars")  # (ms, tokens, layers, price) -> dollars per million tokens
chunk_ms = Check("chunk_ms")  # (T, S, speed, rest_ms) -> (DSA's ms, dense ms)
half_from = Check("half_from")  # (tokens, dsa, dense) -> (marginal, whole)


def expect_pair(got, names):
    """Two results."""
    expect(
        isinstance(got, (tuple, list)) and len(got) == 2, f"got {got!r}, expected the pair ({names})", f"return {names}"
    )
    return got


def expect_number(got, expected, what, cause, suspects=None, tolerance=1e-9):
    """One number, to a relative tolerance. suspects: {cause: the number that this mistake gives}."""
    expect(
        isinstance(got, (int, float, np.number)) and not isinstance(got, bool),
        f"{what}: got {got!r}, expected a number",
        "did you forget the return?",
    )
    if math.isclose(got, expected, rel_tol=tolerance, abs_tol=1e-12):
        return
    near = [name for name, wrong in (suspects or {}).items() if math.isclose(got, wrong, rel_tol=tolerance)]
    expect(False, f"{what}: got {float(got):.6g}, expected {expected:.6g}", near[0] if near else cause)


# ----------------------------------------------------------------------------------------------------------- dollars


def _expect_dollars(solution, ms, tokens, layers, price, cause, suspects=None):
    expected = cost.dollars_per_million(1e3 * ms / tokens, layers, price)
    suspects = {
        "an hour has 3600 seconds": 3600 * expected,
        "ms are thousandths of a second": 1e3 * expected,
        "that is for a thousand tokens": expected / 1e3,
        "that is for the tokens of the call, not for a million": expected * tokens / 1e6,
    } | (suspects or {})
    what = f"{ms} ms for {tokens} tokens in each of {layers} layers, at {price} an hour"
    expect_number(solution(ms, tokens, layers, price), expected, what, cause, suspects)


@dollars.property("a chunk")
def dollars_a_chunk(solution):
    for ms, tokens in ((9.0, 4096), (80.0, 4096), (4.5, 1000), (9000.0, 3_000_000)):
        _expect_dollars(solution, ms, tokens, 1, 2.0, "a call takes ms; a million tokens take 1e6 / tokens such calls")


@dollars.property("layers")
def dollars_layers(solution):
    for layers in (2, 61):
        cause = "every layer takes ms, one after another, on the same GPU"
        _expect_dollars(solution, 9.0, 4096, layers, 2.0, cause)


@dollars.property("price")
def dollars_price(solution):
    for price in (0.5, 3.25, 0.0):
        _expect_dollars(solution, 9.0, 4096, 61, price, "the price of an hour comes from the argument")


@dollars.property("a step")
def dollars_a_step(solution):
    for ms, batch in ((0.25, 8), (0.2, 1)):
        cause = "a decode step makes one token a sequence: `tokens` is the batch, and smaller than a chunk"
        _expect_dollars(solution, ms, batch, 61, 2.0, cause)


# ---------------------------------------------------------------------------------------------------------- chunk_ms

INFINITE = dict.fromkeys(("products", "scores", "sparse", "heads"), math.inf)
CHUNKS = ((4096, 8192), (4096, 1 << 20), (1000, 50_000))  # T, S: every row sees more than k keys
NAMES = "dsa_ms, dense_ms"
CLOSE = 1e-3  # the mean of a row's keys may be taken as S - T / 2


def expected_chunk(T, S, speed, rest_ms):
    """(DSA's ms, dense ms) of the exercise's model, V3.2's sizes."""
    sizes = cost.matrices(V32)
    indexer = sum(size for name, size in sizes.items() if name.startswith("index_"))
    work = cost.prefill_cost(V32, T, S)
    products = 2 * T * sum(sizes.values())
    dsa = products / speed["products"] + work.indexer / speed["scores"] + work.sparse / speed["sparse"]
    dense = (products - 2 * T * indexer) / speed["products"] + work.dense / speed["heads"]
    return 1e3 * dsa + rest_ms, 1e3 * dense + rest_ms


def _expect_chunk(solution, which, only, cause, suspects=lambda T, S: {}):
    """One of the two times, where every kind of work but `only` takes none. suspects: FLOPs that mistakes count."""
    for T, S in CHUNKS:
        for rate in (1e15, 4e14):
            speed = INFINITE | {only: rate}
            got = expect_pair(solution(T, S, dict(speed), 0.0), NAMES)[which]
            expected = expected_chunk(T, S, speed, 0.0)[which]
            wrong = {why: 1e3 * flops / rate for why, flops in suspects(T, S).items()}
            wrong["that is in seconds"] = expected / 1e3
            what = f"T={T}, S={S}, only {only} take time: {('DSA', 'dense')[which]}'s ms"
            expect_number(got, expected, what, cause, wrong, CLOSE)


@chunk_ms.property("products")
def chunk_ms_products(solution):
    every = cost.matrices(V32)

    def suspects(T, S):
        return {
            "a multiply and an add are two FLOPs": T * sum(every.values()),
            "only the new tokens go through the matrices": 2 * S * sum(every.values()),
            "DSA's layer has the indexer's matrices too": (
                2 * T * sum(size for name, size in every.items() if "index" not in name)
            ),
        }

    _expect_chunk(solution, 0, "products", "2 · T · the elements of all matrices", suspects)


@chunk_ms.property("scores")
def chunk_ms_scores(solution):
    flops = cost.index_flops_per_pair(V32)

    def suspects(T, S):
        return {
            "the indexer scores every earlier key, not k of them: L² stays": flops * T * V32.index_topk,
            "no row sees the keys behind it: row t sees S - T + t + 1": flops * T * S,
        }

    _expect_chunk(solution, 0, "scores", "index_flops_per_pair for each causal pair", suspects)


@chunk_ms.property("attention")
def chunk_ms_attention(solution):
    def suspects(T, S):
        return {
            "attention runs on k keys a row, not on all": cost.prefill_cost(V32, T, S).dense_mqa,
            "selected rows are read as latents, MQA mode: 278,528 FLOPs a pair": (
                cost.mha_flops_per_pair(V32) * T * V32.index_topk
            ),
        }

    _expect_chunk(solution, 0, "sparse", "mqa_flops_per_pair for k keys of each row", suspects)


@chunk_ms.property("dense")
def chunk_ms_dense(solution):
    def attention(T, S):
        return {
            "dense attention in a prefill has keys and values of each head, MHA mode: 81,920 FLOPs a pair": (
                cost.prefill_cost(V32, T, S).dense_mqa
            ),
            "no row sees the keys behind it": cost.mha_flops_per_pair(V32) * T * S,
        }

    def products(T, S):
        return {"a dense layer has no indexer: leave its matrices out": 2 * T * sum(cost.matrices(V32).values())}

    _expect_chunk(solution, 1, "heads", "mha_flops_per_pair for each causal pair", attention)
    _expect_chunk(solution, 1, "products", "2 · T · the elements of the matrices without the indexer's", products)


@chunk_ms.property("rest")
def chunk_ms_rest(solution):
    for which in (0, 1):
        got = expect_pair(solution(4096, 65_536, dict(INFINITE), 0.75), NAMES)[which]
        cause = "what is not counted, rest_ms, is added to both"
        expect_number(got, 0.75, f"no work takes time, rest_ms=0.75: {('DSA', 'dense')[which]}'s ms", cause)


SPEED = {name: getattr(bill.H200, name) for name in INFINITE}
REST_MS = 1.0


def recorded_chunks():
    """[(T, S, attention, ms)] of the record: DSA's, and dense where the heads are kept; all beyond k keys."""
    return [
        (point["tokens"], point["position"], point["attention"], point["ms"])
        for point in points("prefill")
        if point["attention"] in ("DSA", "dense, heads kept")
        and not point["extrapolated"]
        and point["position"] - point["tokens"] >= V32.index_topk
    ]


@chunk_ms.property("within 10 % of the record")
def chunk_ms_within_ten_percent_of_the_record(solution):
    for T, S, attention, ms in recorded_chunks():
        got = expect_pair(solution(T, S, dict(SPEED), REST_MS), NAMES)[attention != "DSA"]
        expect(
            abs(got / ms - 1) <= 0.1,
            f"{attention}, the chunk that ends at {S:,}: got {got:.2f} ms, recorded {ms:.2f}, and 10 % are allowed",
            "do not round; every number comes from the arguments",
        )


# --------------------------------------------------------------------------------------------------------- half_from


def expected_half(tokens, dsa, dense):
    """(marginal, whole): the first of `tokens` at which DSA takes at most half, or None."""
    marginal = [2 * a <= b for a, b in zip(dsa, dense, strict=True)]
    whole = [2 * a <= b for a, b in zip(np.cumsum(dsa), np.cumsum(dense), strict=True)]
    return tuple(
        next((n for n, reached in zip(tokens, each, strict=True) if reached), None) for each in (marginal, whole)
    )


GROWING = (  # tokens, dsa, dense
    ([4, 8, 12, 16, 20, 24], [5.0, 6.0, 7.0, 8.0, 9.0, 10.0], [3.0, 7.0, 15.0, 21.0, 27.0, 33.0]),
    ([100, 200, 300, 400], [2.0, 2.0, 2.0, 2.0], [1.0, 2.0, 5.0, 9.0]),
    ([1, 2, 3, 4, 5], [4.0, 1.0, 1.0, 1.0, 1.0], [4.0, 3.0, 3.0, 3.0, 4.0]),
)
EXACT = (([8, 16, 24, 32], [4.0, 4.0, 4.0, 4.0], [5.0, 8.0, 9.0, 10.0]), ([1, 2], [1.0, 3.0], [2.0, 4.0]))
NEVER = (([4, 8, 12], [3.0, 4.0, 5.0], [4.0, 6.0, 9.0]), ([4, 8], [3.0, 3.0], [3.0, 6.0]))


def _expect_half(solution, case, which, cause, suspects=None):
    tokens, dsa, dense = case
    got = expect_pair(solution(list(tokens), list(dsa), list(dense)), "marginal, whole")[which]
    expected = expected_half(tokens, dsa, dense)
    if got == expected[which] and (got is None) == (expected[which] is None):
        return
    other = expected[1 - which]
    suspects = {
        "that is where DSA's cost is at most that of dense attention, not half of it": next(
            (n for n, a, b in zip(tokens, dsa, dense, strict=True) if a <= b), None
        ),
        "that is a chunk's number: return how many tokens were read": (
            tokens.index(expected[which]) if expected[which] in tokens else None
        ),
        "that is the other one of the two": other if other != expected[which] else None,
    } | (suspects or {})
    near = [why for why, wrong in suspects.items() if wrong is not None and got == wrong]
    name = ("marginal", "whole")[which]
    what = f"tokens {tokens}, DSA {dsa}, dense {dense}: {name}: got {got!r}, expected {expected[which]!r}"
    expect(False, what, near[0] if near else cause)


@half_from.property("marginal")
def half_from_marginal(solution):
    for case in GROWING:
        _expect_half(solution, case, 0, "the first chunk that costs at most half of what it costs densely")


@half_from.property("whole prompt")
def half_from_whole_prompt(solution):
    for case in GROWING:
        tokens, dsa, dense = case
        ratios = np.cumsum([a / b for a, b in zip(dsa, dense, strict=True)]) / np.arange(1, len(dsa) + 1)
        suspects = {
            "the mean of ratios gives a cheap chunk the weight of a costly one: add up the costs, then divide": next(
                (n for n, ratio in zip(tokens, ratios, strict=True) if ratio <= 0.5), None
            )
        }
        _expect_half(solution, case, 1, "add up all chunks so far, of DSA and of dense attention", suspects)


@half_from.property("exactly half")
def half_from_exactly_half(solution):
    for case in EXACT:
        for which in (0, 1):
            _expect_half(solution, case, which, "at most half: exactly half is reached, so compare with <=")


@half_from.property("never")
def half_from_never(solution):
    for case in NEVER:
        for which in (0, 1):
            _expect_half(solution, case, which, "where half is not reached, return None")


@functools.cache
def recorded_prompt():
    """(tokens, DSA's ms, dense ms) of each chunk of the recorded prefill of a million tokens: DSA's as measured in one
    run, dense as the model says, with the heads kept."""
    made = step("prompt")
    chunk = made["chunk"]
    tokens = [chunk * (i + 1) for i in range(len(made["chunks_ms"]))]
    dense = [1e3 * sum(bill.prefill_seconds(V32, chunk, end, "dense, heads kept").values()) for end in tokens]
    return tokens, made["chunks_ms"], dense


@half_from.property("a recorded prompt")
def half_from_a_recorded_prompt(solution):
    tokens, dsa, dense = recorded_prompt()
    got = expect_pair(solution(list(tokens), list(dsa), list(dense)), "marginal, whole")
    expected = expected_half(tokens, dsa, dense)
    expect(
        tuple(got) == expected,
        f"{len(tokens)} chunks of the record: got {tuple(got)}, expected {expected}",
        "costs are floats, and there may be hundreds: round nothing, and look at all",
    )
