"""Notebook 01: causal attention without loops, and what it costs in FLOPs and bytes."""

import math

import torch

from dsa_ref.cost import causal_pairs
from dsa_ref.dense_attention import mha_attention
from dsa_ref.testing import Failed

from ..checking import (
    FORGOTTEN,
    Check,
    expect,
    expect_close,
    expect_int,
    expect_number,
    expect_shape,
    normal,
    strided,
    tensor,
    unequal,
)
from ..watching import expect_no_loop

dense_attention = Check("dense_attention")  # my_dense_attention(q, k, v) -> out, all [T, H, D]
attention_flops = Check("attention_flops")  # my_attention_flops(T, H, D) -> FLOPs of the two products
attention_bytes = Check("attention_bytes")  # my_attention_bytes(T, H, D, number_bytes) -> cache, scores
bill_growth = Check("bill_growth")  # my_bill_growth(short, long) -> {bill: factor}

CASES = (  # seed, T, H, D: none a round size, one head, one token, one number
    (1, 37, 3, 5),
    (2, 8, 1, 16),
    (3, 1, 2, 4),
    (4, 5, 2, 1),
)
LONG = (6, 1100, 1, 2)  # longer than a mask or a block that someone may have fixed


def _qkv(seed, T, H, D):
    return tuple(normal(T, H, D, seed=seed + 10 * i) for i in range(3))


def _reference(q, k, v, scale=None):
    return mha_attention(q, k, v, q.shape[2] ** -0.5 if scale is None else scale, None)[0]


@dense_attention.property("shape")
def dense_attention_shape(solution):
    for case in CASES:
        q, k, v = _qkv(*case)
        expect_shape(solution(q, k, v), q.shape, torch.float32)


@dense_attention.property("weights sum to 1")
def dense_attention_weights_sum_to_1(solution):
    for seed, T, H, D in CASES[:2]:
        q, k, _ = _qkv(seed, T, H, D)
        scores = torch.einsum("thd,shd->ths", q, k) * D**-0.5
        future = torch.ones(T, T, dtype=torch.bool).triu(1)[:, None]
        suspects = {
            "weights were set to 0 after the softmax, so the rest no longer sums to 1: set scores to -inf before it": (
                scores.softmax(2).masked_fill(future, 0.0)
            ),
            "the softmax ran over the queries: it belongs on the axis of the keys": (
                scores.masked_fill(future, -torch.inf).softmax(0)
            ),
            "exp without the division by the sum": scores.exp().masked_fill(future, 0.0),
        }
        suspects = {cause: weights.sum(2, keepdim=True).expand(T, H, D).clone() for cause, weights in suspects.items()}
        heads = "the heads' outputs were added up: the letter h must stand in both factors and in the result"
        suspects[heads] = torch.full((T, H, D), float(H))
        got = tensor(solution(q, k, torch.ones_like(q))).clone()
        for answer in (got, *suspects.values()):
            answer[0] = 1.0  # token 0 is judged by "sees itself"
        cause = "values that are all 1 must average to 1: each query's weights over its keys sum to 1"
        expect_close(got, torch.ones_like(got), 1e-5, "t h d", cause, suspects)


@dense_attention.property("heads apart")
def dense_attention_heads_apart(solution):
    q, k, v = _qkv(4, 11, 3, 4)
    before = tensor(solution(q, k, v)).clone()
    k[:, 2], v[:, 2] = -1.0, 9.0
    after = tensor(solution(q, k, v)).clone()
    before[0] = after[0] = 0.0  # token 0 is judged by "sees itself"
    cause = (
        "it changed with the keys and values of head 2: the letter h must stand in both factors and in the result "
        "(and transpose, do not reshape)"
    )
    expect_close(after[:, :2], before[:, :2], 1e-5, "t h d", cause)


@dense_attention.property("future hidden")
def dense_attention_future_hidden(solution):
    for seed, T, H, D in CASES[:2]:
        q, k, v = _qkv(seed, T, H, D)
        before = tensor(solution(q, k, v))
        for t in (0, T // 2, T - 2):
            later_k, later_v = k.clone(), v.clone()
            later_k[t + 1 :], later_v[t + 1 :] = 2.0, 50.0
            after = solution(q, later_k, later_v)
            expect_shape(after, before.shape, before.dtype)
            changed = ~torch.isclose(before, tensor(after), 1e-4, 1e-4, equal_nan=True)
            rows = changed[: t + 1].flatten(1).any(dim=1).nonzero().flatten().tolist()
            expect(
                not rows,
                f"out[{rows[0] if rows else 0}] changed when keys and values from {t + 1} on were changed, expected "
                "it to stay",
                "your query saw the future: token t may use keys s <= t only",
            )


@dense_attention.property("sees itself")
def dense_attention_sees_itself(solution):
    for case in CASES:
        q, k, v = _qkv(*case)
        cause = (
            "token 0 sees only itself, so its output is its own value: keep the diagonal s = t (an empty row gives NaN)"
        )
        got = tensor(solution(q, k, v))[0]
        expect(not got.isnan().any(), "got NaN for token 0, expected its own value", cause)
        expect_close(got, v[0], 1e-5, "h d", cause)


@dense_attention.property("values")
def dense_attention_values(solution):
    for seed, T, H, D in CASES:
        q, k, v = _qkv(seed, T, H, D)
        suspects = {
            "the scores were not scaled by D^-0.5": _reference(q, k, v, 1.0),
            "the scores were divided by D, not by its root": _reference(q, k, v, 1 / D),
            "the scores were multiplied by the root of D": _reference(q, k, v, D**0.5),
            "the scores were scaled by H^-0.5, not by D^-0.5": _reference(q, k, v, H**-0.5),
        }
        cause = "not softmax(q·k / sqrt(D)) times the values: look at scale, mask and axes one by one"
        expected = _reference(q, k, v)
        expect_close(solution(q, k, v), expected, 1e-5, "t h d", cause, suspects)
        cause = "wrong for tensors that are not contiguous, as after a transpose: reshape them, do not view them"
        expect_close(solution(*map(strided, (q, k, v))), expected, 1e-5, "t h d", cause)
        q[::2] = 0.0
        cause = "a visible score may be 0: hide keys by where they stand, not by what they score"
        got = tensor(solution(q, k, v))
        expect(not got.isnan().any(), "got NaN where all scores of a row are 0, expected the mean of its values", cause)
        expect_close(got, _reference(q, k, v), 1e-5, "t h d", cause)
    q, k, v = _qkv(*LONG)
    cause = f"right for short texts, wrong for {LONG[1]} tokens: is a length written into the code?"
    expect_close(solution(q, k, v), _reference(q, k, v), 1e-5, "t h d", cause)


@dense_attention.property("large scores")
def dense_attention_large_scores(solution):
    for seed, T, H, D in CASES:
        q, k, v = _qkv(seed, T, H, D)
        cause = (
            "exp overflows fp32 above 88 (or all of a row falls to 0): subtract the row's largest visible score first"
        )
        got = tensor(solution(q * 300, k, v))
        bad = (~got.isfinite()).nonzero()
        where = f"t={int(bad[0, 0])}: " if len(bad) else ""
        expect(not len(bad), f"{where}got NaN or infinity for scores in the hundreds, expected a weighted mean", cause)
        low = q * 300
        low[0] = -995 * D**0.5 * k[0] / k[0].square().sum(dim=1, keepdim=True)  # token 0 scores itself at -995
        first = tensor(solution(low, k, v))[0]
        finite = "the future was hidden by a number that scores in the hundreds come near: hide it with -inf"
        expect_close(first, v[0], 1e-5, "h d", f"{finite} (this is token 0, whose own score is -995)")
        expect_close(got, _reference(q * 300, k, v), 1e-3, "t h d", cause)


@dense_attention.property("no loop over tokens")
def dense_attention_no_loop_over_tokens(solution):
    cause = "right, but there is still a loop over t or s: let one einsum make all scores at once"
    called = expect_no_loop(solution, _qkv(5, 5, 2, 4), {"45 tokens instead of 5": _qkv(5, 45, 2, 4)}, cause)
    whole = [name for name in sorted(called) if "attention" in name.lower()]
    expect(
        not whole,
        f"torch's {whole[0] if whole else ''} was called, expected your own",
        "right, but then there is nothing to learn: scores, mask, softmax, mean of the values",
    )


OVERFLOWED = "it overflowed: fp16 ends at 65504, a float of Python at 10^308"


def _close(got, expected, what, cause, suspects=None, tolerance=0.01):
    """A number within `tolerance` of the expected one; suspects: {cause: the number that this mistake gives}."""
    got = expect_number(got, what)
    if abs(got - expected) <= tolerance * expected:
        return
    cause = cause if math.isfinite(got) else OVERFLOWED
    for suspicion, answer in (suspects or {}).items():
        if abs(got - answer) <= 1e-3 * abs(answer):
            cause = suspicion
            break
    raise Failed(f"{what}: {unequal(got, expected)}", cause)


def _wrapped(count):
    """What is left of a whole number in int32."""
    return (count + 2**31) % 2**32 - 2**31


WRAPPED = "a count went round in 32 bits: int32 ends at 2^31, Python's own int does not"
FLOPS = ((4096, 8, 64), (1000, 1, 128), (3001, 5, 32))  # T, H, D


@attention_flops.property("growth with T")
def attention_flops_growth_with_t(solution):
    for T, H, D in FLOPS:
        small, large = (expect_number(solution(n, H, D), f"T={n}") for n in (T, 2 * T))
        cause = "twice the tokens see twice as many keys each: the bill must grow fourfold (T·T pairs, not T)"
        for n, count in ((T, small), (2 * T, large)):
            right = 4 * H * D * causal_pairs(n, n)
            cause = WRAPPED if count == _wrapped(right) != right else cause
            expect(math.isfinite(count), f"T={n}, H={H}, D={D}: got {count:.6g}, expected a count", OVERFLOWED)
        _close(large / max(small, 1e-9), 4.0, f"H={H}, D={D}: from T={T} to {2 * T} it grows by the factor", cause)


@attention_flops.property("heads and width")
def attention_flops_heads_and_width(solution):
    for T, H, D in FLOPS:
        once = expect_number(solution(T, H, D))
        for name, other in (("H", (T, 2 * H, D)), ("D", (T, H, 2 * D))):
            cause = f"every head works on vectors of D numbers: the bill is proportional to {name}"
            factor = expect_number(solution(*other)) / max(once, 1e-9)
            _close(factor, 2.0, f"T={T}, H={H}, D={D}: {name} doubled, the factor is", cause, tolerance=0.02)


@attention_flops.property("amount")
def attention_flops_amount(solution):
    for T, H, D in FLOPS:
        pairs = causal_pairs(T, T)
        suspects = {
            "the future was counted too: token t sees t + 1 keys, not T": 4 * H * D * T * T,
            "multiplications only, or only one of the two products: each of q·k and weight·v has a multiply and an "
            "add for each of D numbers": 2 * H * D * pairs,
            "one product, multiplications only: count q·k and weight·v, a multiply and an add each": H * D * pairs,
            "half of the whole square, but neither the second product nor the add": H * D * T * T / 2,
        }
        cause = "H heads · visible pairs · 2 products · D numbers · 2 FLOPs"
        _close(solution(T, H, D), 4 * H * D * pairs, f"T={T}, H={H}, D={D}", cause, suspects)


@attention_flops.property("short texts")
def attention_flops_short_texts(solution):
    for T in (1, 2, 3, 7):
        pairs = causal_pairs(T, T)
        suspects = {
            "T²/2 leaves out half of the diagonal: 1 + 2 + ... + T is T(T+1)/2": 2 * 6 * 16 * T * T,
            "a token sees itself as well: 1 + 2 + ... + T, not 0 + 1 + ... + (T-1)": 2 * 6 * 16 * T * (T - 1),
        }
        cause = "right for long texts only: count the pairs of three tokens with a pencil"
        _close(solution(T, 6, 16), 4 * 6 * 16 * pairs, f"T={T}, H=6, D=16", cause, suspects)


BYTES = (  # T, H, D, bytes a number; the last is no sum of few powers of two: no float holds its scores' bytes exactly
    (1000, 8, 64, 4),
    (37, 3, 5, 4),
    (131_072, 128, 128, 2),
    (10_000_019, 127, 127, 2),
)


def _two_numbers(solution, case):
    got = solution(*case)
    pair = (
        list(got) if hasattr(got, "__len__") and hasattr(got, "__iter__") and not isinstance(got, (str, dict)) else []
    )
    if len(pair) != 2:
        cause = FORGOTTEN if got is None else "return cache, scores: two numbers"
        raise Failed(f"got {type(got).__name__}, expected two ints", cause)
    return [expect_int(x, name) for x, name in zip(pair, ("cache", "scores"), strict=True)]


def _exact(got, expected, what, suspects):
    if got != expected:
        found = [suspicion for suspicion, answer in suspects.items() if got == answer]
        if not found and abs(got - expected) < 1e-6 * expected:
            found = ["rounded: fp32 holds 24 binary digits, fp64 holds 53; compute with ints"]
        cause = found[0] if found else "a tensor is stored: multiply its sizes, then by number_bytes"
        raise Failed(f"{what}: got {got}, expected {expected}", cause)


@attention_bytes.property("two ints")
def attention_bytes_two_numbers(solution):
    for case in BYTES:
        _two_numbers(solution, case)


@attention_bytes.property("cache")
def attention_bytes_cache(solution):
    for T, H, D, n in BYTES:
        suspects = {
            "the two are in the wrong order: return cache, scores": H * T * T * n,
            "keys or values alone: the cache holds both": T * H * D * n,
            "one head only: every head has keys and values of its own": 2 * T * D * n,
            "numbers, not bytes: multiply by number_bytes": 2 * T * H * D,
            "queries are not kept: nobody asks for an old query again": 3 * T * H * D * n,
        }
        suspects |= {WRAPPED: _wrapped(2 * T * H * D * n)}
        _exact(_two_numbers(solution, (T, H, D, n))[0], 2 * T * H * D * n, f"cache for T={T}, H={H}, D={D}", suspects)


@attention_bytes.property("score matrix")
def attention_bytes_score_matrix(solution):
    for T, H, D, n in BYTES:
        suspects = {
            "half of it is masked, but a matrix stores both halves": H * (T * (T + 1) // 2) * n,
            "half of it is masked, but a matrix stores both halves: T · T numbers a head": H * T * T * n / 2,
            "half of it is masked, but a matrix stores both halves, and the diagonal": H * (T * (T - 1) // 2) * n,
            "multiply by number_bytes, whatever it is": H * T * T * 4,
            "one head only: every head has a score matrix": T * T * n,
            "a score is one number for a pair: D is summed away": H * T * T * D * n,
            "numbers, not bytes: multiply by number_bytes": H * T * T,
        }
        suspects |= {WRAPPED: _wrapped(H * T * T * n)}
        _exact(_two_numbers(solution, (T, H, D, n))[1], H * T * T * n, f"score matrix for T={T}, H={H}", suspects)


SPANS = ((32_768, 1_048_576), (1000, 2500), (4096, 4096), (1000, 1_000_000))  # short, long
FACTORS = {
    "whole text": (lambda a, b: b * (b + 1) / (a * (a + 1)), "twice the text, four times the pairs"),
    "next token": (lambda a, b: b / a, "one new query looks at all keys once: proportional to the context"),
    "cache": (lambda a, b: b / a, "one key and one value a token: proportional to the context"),
    "score matrix": (lambda a, b: (b / a) ** 2, "a number for every pair of tokens: it grows with the square"),
}


def _growth(solution, name):
    factor, cause = FACTORS[name]
    for short, long in SPANS:
        got = solution(short, long)
        if not isinstance(got, dict) or name not in got:
            cause = FORGOTTEN if got is None else "one entry for each of the bills, by the name on the card"
            raise Failed(f"got {type(got).__name__}, expected a dict with the entry {name!r}", cause)
        suspects = {
            "the factor is upside down: long over short": factor(long, short),
            "// drops what is behind the point: use /": factor(short, long // short * short),
            "rounded: a factor need not be a whole number": math.floor(factor(short, long)),
            "rounded up: a factor need not be a whole number": math.ceil(factor(short, long)),
            "by how much more, which is one less: the factor itself is asked for": factor(short, long) - 1,
        }
        _close(got[name], factor(short, long), f"from {short} to {long} tokens", cause, suspects)


@bill_growth.property("whole text")
def bill_growth_whole_text(solution):
    _growth(solution, "whole text")


@bill_growth.property("next token")
def bill_growth_next_token(solution):
    _growth(solution, "next token")


@bill_growth.property("cache")
def bill_growth_cache(solution):
    _growth(solution, "cache")


@bill_growth.property("score matrix")
def bill_growth_score_matrix(solution):
    _growth(solution, "score matrix")
