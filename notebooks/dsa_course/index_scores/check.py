"""Notebook 02: equation 1, its head weights, what they decide, and how often a score is exactly zero."""

import math

import torch

from dsa_ref.index_scores import index_scores as reference

from ..checking import (
    Check,
    expect,
    expect_close,
    expect_number,
    expect_shape,
    normal,
    strided,
    tensor,
    unequal,
    whole,
)
from ..watching import expect_no_loop

index_scores = Check("index_scores")  # (q_idx [T, Hi, Di], k_idx [S, Di], w [T, Hi]) -> scores [T, S]
head_weights = Check("head_weights")  # (x [T, dim], W_w [dim, Hi], q_scale [T, Hi], Hi, Di) -> w fp32 [T, Hi]
counterexample = Check("counterexample")  # () -> (q_idx [1, Hi, Di], k_idx [S, Di], w_a [1, Hi], w_b [1, Hi])
zero_probability = Check("zero_probability")  # (Hi) -> float


# ------------------------------------------------------------------------------------------------------ index_scores


def _numbers(T, S, Hi, Di, seed, positive_dots=False, weights="positive"):
    """Whole numbers, so that every order of summing gives the same score to the last bit."""
    q, k, w = (whole(*shape, seed=seed + i) for i, shape in enumerate(((T, Hi, Di), (S, Di), (T, Hi))))
    if positive_dots:
        q, k = q.abs() + 1, k.abs() + 1
    w = {"one": torch.ones_like(w), "positive": w.abs() + 1, "any": w}[weights]
    return q, k, w


def _judge(solution, given, cause, suspects=None):
    """Compare all scores. suspects: {cause: a wrong formula of (dots [T, Hi, S], w [T, Hi, 1])}."""
    expected = reference(*given)
    dots, w = torch.einsum("thd,sd->ths", *given[:2]), given[2][:, :, None]
    hidden = expected == -torch.inf
    answers = {why: wrong(dots, w).masked_fill(hidden, -torch.inf) for why, wrong in (suspects or {}).items()}
    got = solution(*given)
    expect_shape(got, expected.shape)
    where = (tensor(got).isneginf() != hidden).nonzero()
    what = "t={}, s={}: got a score where -inf is expected, or the reverse".format(*where[0]) if len(where) else ""
    expect(not len(where), what, "row t sees keys 0 to S - T + t: not of these shapes, or of an earlier call?")
    expect_close(got, expected, 1e-6, "t s", cause, answers)


def _hidden(solution, T, S, seed, cause):
    """-inf exactly where key s comes after query t; the other values do not matter here."""
    got = solution(*_numbers(T, S, 2, 3, seed))
    expect_shape(got, (T, S))
    for t, row in enumerate(tensor(got).tolist()):
        last = S - T + t
        for s, score in enumerate(row):
            if not (score == -math.inf if s > last else math.isfinite(score)):
                expected = "-inf, the future" if s > last else f"a score (row t sees keys 0 to {last})"
                if score == -math.inf:
                    cause = "a key that row t sees was hidden: only later ones are, and a score of 0 is a score"
                if math.isnan(score):
                    cause = "0 · -inf and inf - inf are NaN: fill the hidden places, do not multiply them away"
                expect(False, f"t={t}, s={s}: got {score:.6g}, expected {expected}", cause)


@index_scores.property("shape")
def index_scores_shape(solution):
    for T, S in ((5, 9), (7, 7)):
        for dtype in (torch.float32, torch.bfloat16):
            q, k, w = _numbers(T, S, 3, 4, seed=T)
            expect_shape(solution(q.to(dtype), k.to(dtype), w), (T, S), torch.float32)


@index_scores.property("future hidden")
def index_scores_future_hidden(solution):
    for seed in (1, 2):
        _hidden(solution, 6, 6, seed, "your scores show the future: where s > t there must be -inf, and only there")


@index_scores.property("queries last")
def index_scores_queries_last(solution):
    for T, S, seed in ((3, 8, 1), (2, 5, 2)):
        cause = "with T < S the queries are the *last* T positions: row t is position S - T + t"
        _hidden(solution, T, S, seed, cause)


@index_scores.property("dot product")
def index_scores_dot_product(solution):
    for T, S, seed in ((5, 5, 1), (4, 9, 2)):  # one head of weight 1 and positive dots: nothing else has an effect
        cause = "not the plain dot product over d: another sum, another axis, or a scale (w already holds them all)"
        _judge(solution, _numbers(T, S, 1, 4, seed, positive_dots=True, weights="one"), cause)


@index_scores.property("weights")
def index_scores_weights(solution):
    suspects = {
        "the weights were left out": lambda dots, w: dots.sum(1),
        "the weights were softmaxed: w is used as it is": lambda dots, w: (dots * w.softmax(1)).sum(1),
        "the mean over heads was taken: equation 1 has a sum": lambda dots, w: (dots * w).mean(1),
    }
    for T, S, seed in ((6, 6, 1), (3, 7, 2)):
        given = _numbers(T, S, 3, 4, seed, positive_dots=True)
        _judge(solution, given, "weight w[t, h] belongs to query t and head h: its match counts w times", suspects)


@index_scores.property("relu per head")
def index_scores_relu_per_head(solution):
    suspects = {
        "the relu came after the sum over heads: rectify each head alone": lambda dots, w: (dots * w).sum(1).relu(),
        "there is no relu: a negative match must count nothing": lambda dots, w: (dots * w).sum(1),
        "abs instead of relu: a negative match must count nothing": lambda dots, w: (dots.abs() * w).sum(1),
    }
    for T, S, seed in ((6, 6, 1), (3, 7, 2)):
        cause = "relu belongs around each head's dot product, before the weight and the sum"
        _judge(solution, _numbers(T, S, 3, 4, seed), cause, suspects)


@index_scores.property("negative weights")
def index_scores_negative_weights(solution):
    suspects = {
        "weight and match were multiplied before the relu": lambda dots, w: (dots * w).relu().sum(1),
        "the sign of the weights got lost": lambda dots, w: (dots.relu() * w.abs()).sum(1),
        "negative weights were cut to 0": lambda dots, w: (dots.relu() * w.relu()).sum(1),
        "the sum was rectified: scores may be negative": lambda dots, w: (dots.relu() * w).sum(1).relu(),
    }
    for T, S, seed in ((6, 6, 1), (3, 7, 2)):
        cause = "right for positive weights, wrong for negative ones: they subtract"
        _judge(solution, _numbers(T, S, 3, 4, seed, weights="any"), cause, suspects)


@index_scores.property("fp32 throughout")
def index_scores_fp32_throughout(solution):
    for dtype in (torch.float32, torch.bfloat16):
        for T, S, seed in ((5, 5, 1), (3, 7, 2)):
            q, k = (normal(*shape, seed=seed, dtype=dtype) for shape in ((T, 16, 64), (S, 64)))
            w = normal(T, 16, seed=seed + 5)
            cause = (
                f"inputs in {str(dtype).removeprefix('torch.')} were rounded, multiplied or summed in fewer bits: "
                + (
                    "convert them to float32 first"
                    if dtype == torch.bfloat16
                    else "float32 is exact enough, bf16 is not"
                )
            )
            expected = reference(q.double(), k.double(), w.double())
            expect_close(solution(q, k, w), expected, 1e-5, "t s", cause)
            tiny = solution(q * 2**-20, k, w)
            expect_shape(tiny, expected.shape)
            cause = "right for numbers near 1: relu cuts at 0, and at no other number"
            expect_close(tensor(tiny) * 2**20, expected, 1e-5, "t s", cause)
            q, k = q * 1000, k * 1000
            cause = "right for small numbers: fp16 ends at 65504, float32 does not"
            expect_close(solution(q, k, w), reference(q.double(), k.double(), w.double()), 1e-5, "t s", cause)


@index_scores.property("any size")
def index_scores_any_size(solution):
    sizes = ((1, 1, 1, 1), (37, 37, 1, 5), (2, 37, 5, 1), (1, 6, 6, 6), (6, 6, 6, 6))
    for T, S, Hi, Di in (*sizes, (3, 7, 130, 2), (3, 7, 2, 300), (300, 300, 1, 2), (1, 5000, 2, 3)):
        given = _numbers(T, S, Hi, Di, seed=T, weights="any")
        _judge(solution, given, f"wrong for T={T}, S={S}, Hi={Hi}, Di={Di}: is a size written into the code?")
    given = tuple(strided(x) for x in _numbers(5, 9, 3, 4, seed=8, weights="any"))
    _judge(solution, given, "wrong for tensors that are not contiguous, as after a transpose: reshape, do not view")


@index_scores.property("no loops")
def index_scores_no_loops(solution):
    larger = {
        "30 more queries": (35, 39, 3, 4), "30 more keys": (5, 39, 3, 4),
        "30 more heads": (5, 9, 33, 4), "30 more numbers a head": (5, 9, 3, 34),
    }  # fmt: skip
    larger = {what: _numbers(*sizes, seed=1) for what, sizes in larger.items()}
    cause = "right, but it loops: the first einsum makes all [T, Hi, S] dot products, the second sums over all heads"
    expect_no_loop(solution, _numbers(5, 9, 3, 4, seed=1), larger, cause)


# ------------------------------------------------------------------------------------------------------ head_weights


ROUNDED = 1e-2  # lets bf16's rounding pass where another fault is looked for: "fp32 throughout" finds it


def _ones(T, Hi):
    return torch.ones(T, Hi)


def _product(T, dim, Hi, seed):
    """bf16 whole numbers and their exact product, in fp32."""
    x, W_w = whole(T, dim, seed=seed, dtype=torch.bfloat16), whole(dim, Hi, seed=seed + 1, dtype=torch.bfloat16)
    return x, W_w, x.float() @ W_w.float()


@head_weights.property("shape")
def head_weights_shape(solution):
    x, W_w, product = _product(5, 7, 3, seed=1)
    for dtype in (torch.bfloat16, torch.float32):
        expect_shape(solution(x.to(dtype), W_w.to(dtype), _ones(5, 3), 3, 4), product.shape, torch.float32)


@head_weights.property("product")
def head_weights_product(solution):
    for T, Hi, seed in ((37, 1, 1), (6, 3, 2)):  # the factor is left out: only the share of each weight is compared
        x, W_w, product = _product(T, 5, Hi, seed)
        got = tensor(solution(x, W_w, _ones(T, Hi), Hi, 4)).double()
        expect_shape(got, product.shape)
        suspects = {
            "a softmax: the weights are used as they are, negative ones too": (product * 0.5 * Hi**-0.5).softmax(1),
            "the sign got lost: a head may count against a key": product.abs(),
        }
        norm = {why: a / a.double().norm() for why, a in suspects.items()}
        cause = "x W_w, plain: no softmax, no sigmoid, no abs, so weights may be negative"
        expect_close(got / got.norm(), product / product.double().norm(), ROUNDED, "t h", cause, norm)


@head_weights.property("q_scale")
def head_weights_q_scale(solution):
    for T, Hi, seed in ((37, 1, 1), (6, 3, 2)):
        x, W_w, product = _product(T, 5, Hi, seed)
        x, W_w = x.abs() + 1, W_w.abs() + 1  # no zeros to divide by
        q_scale = 2.0 ** whole(T, Hi, seed=seed + 2)
        plain = tensor(solution(x, W_w, _ones(T, Hi), Hi, 4)).double()
        ratio = tensor(solution(x, W_w, q_scale, Hi, 4)).double() / plain
        suspects = {
            "divided by q_scale: the stored values were divided, so w multiplies": 1 / q_scale,
            "q_scale was not used": _ones(T, Hi),
        }
        expect_close(
            ratio, q_scale, ROUNDED, "t h", "each weight [t, h] is multiplied by its own q_scale[t, h]", suspects
        )


@head_weights.property("Hi factor")
def head_weights_hi_factor(solution):
    for Hi in (4, 64, 1):
        x, W_w, product = _product(6, 5, Hi, seed=Hi)
        suspects = {
            "no Hi^-0.5": product, "Hi^-1 instead of Hi^-0.5": product / Hi, "times Hi^0.5": product * Hi**0.5,
            "the width of x was taken for Di, the width of a head": product * (Hi * 5) ** -0.5,
        }  # fmt: skip
        suspects = {why: answer for why, answer in suspects.items() if Hi > 1}
        got = solution(x, W_w, _ones(6, Hi), Hi, 1)
        expect_close(got, product * Hi**-0.5, ROUNDED, "t h", "the factor of Hi heads is Hi^-0.5", suspects)


@head_weights.property("Di factor")
def head_weights_di_factor(solution):
    for Di in (16, 128):
        x, W_w, product = _product(6, 5, 3, seed=Di)
        product = product * 3**-0.5
        suspects = {
            "no Di^-0.5": product, "Di^-1 instead of Di^-0.5": product / Di, "times Di^0.5": product * Di**0.5,
            "the width of x was taken for Di, the width of a head": product * 5**-0.5,
        }  # fmt: skip
        got = solution(x, W_w, _ones(6, 3), 3, Di)
        expect_close(got, product * Di**-0.5, ROUNDED, "t h", "the factor of a head of width Di is Di^-0.5", suspects)


@head_weights.property("fp32 throughout")
def head_weights_fp32_throughout(solution):
    bf16, fp32 = torch.bfloat16, torch.float32
    for T, dim, Hi, seed in ((37, 96, 3, 1), (6, 1100, 70, 2)):
        for x_dtype, W_dtype in ((bf16, bf16), (fp32, fp32), (bf16, fp32), (fp32, bf16)):
            x, W_w = normal(T, dim, seed=seed, dtype=x_dtype), normal(dim, Hi, seed=seed + 1, dtype=W_dtype)
            q_scale = normal(T, Hi, seed=seed + 2).abs() + 0.1
            expected = x.double() @ W_w.double() * q_scale * Hi**-0.5 * 32**-0.5
            kinds = " and ".join(str(dtype).removeprefix("torch.") for dtype in (x_dtype, W_dtype))
            cause = f"x and W_w in {kinds}: something was rounded below fp32. Convert x and W_w to float32 first"
            cause += f" (or a size is written into the code: here dim = {dim}, Hi = {Hi})"
            expect_close(solution(x, W_w, q_scale, Hi, 32), expected, 1e-5, "t h", cause)
    for size in (1e-6, 1e6):
        cause = "right for numbers of usual size only: nothing is rounded to 0, cut off or infinite in float32"
        expect_close(tensor(solution(x * size, W_w, q_scale, Hi, 32)) / size, expected, 1e-5, "t h", cause)
    given = (strided(x) for x in (x, W_w, q_scale))
    cause = "wrong for tensors that are not contiguous, as after a transpose: reshape, do not view"
    expect_close(solution(*given, Hi, 32), expected, 1e-5, "t h", cause)


# ---------------------------------------------------------------------------------------------------- counterexample


def _example(solution):
    got, names = solution(), ("q_idx", "k_idx", "w_a", "w_b")
    cause = "return q_idx, k_idx, w_a, w_b"
    expect(isinstance(got, (tuple, list)), f"got {type(got).__name__}, expected four tensors {names}", cause)
    expect(len(got) == 4, f"got {len(got)} results, expected four tensors {names}", cause)
    return [tensor(x, name).double() for x, name in zip(got, names, strict=True)]


@counterexample.property("shapes")
def counterexample_shapes(solution):
    q_idx, k_idx, w_a, w_b = _example(solution)
    shapes = ", ".join(str(list(x.shape)) for x in (q_idx, k_idx, w_a, w_b))
    expect(
        q_idx.dim() == 3 and k_idx.dim() == 2 and q_idx.shape[2] == k_idx.shape[1] and len(q_idx) == 1
        and len(k_idx) >= 2 and q_idx.numel() > 0 and list(w_a.shape) == list(w_b.shape) == list(q_idx.shape[:2]),
        f"got shapes {shapes}, expected [1, Hi, Di], [S, Di], [1, Hi], [1, Hi] with S >= 2",
        "one query, two keys or more, and two weights of one shape",
    )  # fmt: skip
    expect(all(x.isfinite().all() for x in (q_idx, k_idx, w_a, w_b)), "got inf or NaN", "only finite numbers count")


@counterexample.property("positive weights")
def counterexample_positive_weights(solution):
    _, _, w_a, w_b = _example(solution)
    for name, w in (("w_a", w_a), ("w_b", w_b)):
        cause = "negative weights make it easy, and prove less: all weights must be above 0"
        expect((w > 0).all(), f"{name}: got {w.min():.6g} as the smallest weight, expected > 0", cause)


@counterexample.property("two heads")
def counterexample_two_heads(solution):
    q_idx, *_ = _example(solution)
    cause = "with one head, w is only a positive factor: no ranking can change"
    expect(q_idx.shape[1] >= 2, f"got Hi = {q_idx.shape[1]}, expected at least 2", cause)


@counterexample.property("not a rescale")
def counterexample_not_a_rescale(solution):
    _, _, w_a, w_b = _example(solution)
    ratio = (w_b / w_a).flatten()
    cause = "w_b is w_a times one number: that leaves every ranking as it is"
    expect(ratio.max() > ratio.min() * (1 + 1e-6), f"got w_b / w_a = {ratio[0]:.6g} for every head", cause)


@counterexample.property("another winner")
def counterexample_another_winner(solution):
    q_idx, k_idx, w_a, w_b = _example(solution)
    a, b = (reference(q_idx, k_idx, w)[0] for w in (w_a, w_b))
    what = f"got scores up to {max(a.abs().max(), b.abs().max()):.1g}, which float32 cannot hold"
    expect(a.float().isfinite().all() and b.float().isfinite().all(), what, "the indexer computes in float32")
    cause = "the scores differ, the best key does not: give each head another favourite key"
    if not a.any():
        cause = "no head matches any key, so every score is 0: each head needs a key with a positive dot product"
    # a key that both weights put on top is no counterexample, whichever of several equals argmax returns
    both = (a == a.max()) & (b == b.max())
    expect(
        not both.any(),
        f"got key {int(both.int().argmax())} as a best key under w_a and under w_b, expected another",
        cause,
    )


@counterexample.property("no tie")
def counterexample_no_tie(solution):
    q_idx, k_idx, w_a, w_b = _example(solution)
    for name, w in (("w_a", w_a), ("w_b", w_b)):
        first, second = reference(q_idx, k_idx, w)[0].topk(2).values
        margin = 1e-3 * float(first.abs().clamp(min=1e-30))
        what = f"under {name} the two best scores are {first:.6g} and {second:.6g}, expected a clear winner"
        expect(first - second > margin, what, "a tie, or a difference that rounding could make: then nothing is shown")


# -------------------------------------------------------------------------------------------------- zero_probability


def _probability(solution, Hi):
    return expect_number(solution(Hi), f"Hi={Hi}")


def measured_zeros(Hi, seed, T=768, Di=32):
    """The share of scores that are exactly 0, among the causal pairs of T normal random queries and keys."""
    scores = reference(normal(T, Hi, Di, seed=seed), normal(T, Di, seed=seed + 1), normal(T, Hi, seed=seed + 2))
    return float((scores[scores.isfinite()] == 0).double().mean())


@zero_probability.property("a probability")
def zero_probability_a_probability(solution):
    for Hi in (1, 2, 37):
        got = _probability(solution, Hi)
        expect(
            0 < got < 1,
            f"Hi={Hi}: got {got:.6g}, expected a number between 0 and 1",
            "some scores are 0 and some are not, with any number of heads: no rounding",
        )


@zero_probability.property("one head")
def zero_probability_one_head(solution):
    got, share = _probability(solution, 1), measured_zeros(1, seed=1)
    cause = "a dot product of random vectors is as often negative as positive, and relu turns all negative ones into 0"
    expect(abs(got - share) < 0.05 * share, f"Hi=1: got {got:.6g}, the reference measures {share:.3f}", cause)


@zero_probability.property("more heads")
def zero_probability_more_heads(solution):
    for Hi in (2, 3, 5):
        got, share = _probability(solution, Hi), measured_zeros(Hi, seed=10 * Hi)
        cause = "the sum is 0 only where *every* head is silent: independent events multiply"
        if abs(1 - got - share) < 0.1 * share:
            cause = "that is the probability that at least one head fires: the score is then not 0"
        expect(abs(got - share) < 0.1 * share, f"Hi={Hi}: got {got:.6g}, the reference measures {share:.4f}", cause)


@zero_probability.property("exact")
def zero_probability_exact(solution):
    for Hi in (16, 64, 126):
        got, expected = _probability(solution, Hi), 0.5**Hi
        cause = "a simulation, or a rounded number: give the formula"
        expect(math.isclose(got, expected, rel_tol=1e-9), f"Hi={Hi}: {unequal(got, expected)}", cause)
