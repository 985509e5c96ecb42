"""Notebook 16: one layer of the trained model as a plain function, and the same with a cache."""

import dataclasses
import functools
import types

import torch
from torch import nn
from torch.nn import functional as F

import dsa_ref
from dsa_ref.config import DSAConfig
from dsa_ref.nn.layer import DSALayer
from dsa_ref.nn.model import load_small_model

from ..checking import NOT_WRITTEN, Check, expect, expect_shape, normal, tensor, unequal
from .layer import attend, layer_inputs, project, unseen_text

layer = Check("layer")  # (x [T, dim], positions [T], weights, config) -> y [T, dim]

ODD = DSAConfig(  # no two sizes are equal, so none can stand for another; with YaRN, as V3.2 has it
    dim=44,
    n_heads=3,
    q_lora_rank=28,
    kv_lora_rank=20,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    index_n_heads=5,
    index_head_dim=16,
    index_topk=7,
    rope_factor=40.0,
)
TOLERANCE = 1e-4  # of the largest number of y
FLIPPED = 0.1  # of the rows may keep another key, where a sum in another order moved a score over the threshold


@functools.cache
def _trained():
    return load_small_model()


@functools.cache
def _text(seed, count):
    return layer_inputs(_trained(), unseen_text(700 * seed, count))


def _real(seed, count, k=None):
    """(x [count, dim], weights, config) of a layer of the trained model on unseen text: the first, then the last."""
    number, config = (0, -1)[seed % 2], _trained().config.attention
    weights = {name: weight.clone() for name, weight in _trained().layers[number].self_attn.state_dict().items()}
    return (
        _text(seed, count)[number].clone(),
        weights,
        config if k is None else dataclasses.replace(config, index_topk=k),
    )


def _odd(seed, count):
    """(x, weights, config) of a layer with random weights, norms' weights and biases included, of odd sizes."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in DSALayer(ODD).state_dict().items()}
    weights = {}
    for i, (name, shape) in enumerate(shapes.items()):
        weights[name] = normal(*shape, seed=100 * seed + i) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.5)
        if "norm.weight" in name:
            weights[name] += 1.0
    return normal(count, ODD.dim, seed=seed), weights, ODD


def _built(weights, config, mistake=None):
    """The reference's layer on these weights. mistake: function of (layer, ops) that spoils it, or None."""
    steps = ("rope", "rotate_quantize", "lightning_select", "sparse_attention")
    ops = types.SimpleNamespace(**{name: getattr(dsa_ref, name) for name in steps})
    built = DSALayer(config, ops).requires_grad_(False)
    built.load_state_dict(weights)
    if mistake is not None:
        mistake(built, ops)
    return built


def _expected(x, weights, config, mistake=None):
    return _built(weights, config, mistake)(x, torch.arange(len(x)))


def _expect_rows(got, expected, cause, suspects, flipped, first=0):
    """At most a share `flipped` of the rows differ. suspects: {cause: function that gives this mistake's answer}."""
    expect_shape(got, expected.shape)
    got = tensor(got).double()
    wrong = _differ(got, expected)
    if wrong.double().mean() <= flipped:
        return
    row = int(wrong.nonzero()[0])
    place = int((got[row] - expected[row]).abs().nan_to_num(torch.inf).argmax())
    if got.isnan().any():
        cause = NOT_WRITTEN
    for suspicion, answer in suspects.items():
        answer = answer()
        if answer.shape != expected.shape:
            continue
        told_apart = _differ(answer, expected).double().mean() > flipped
        if told_apart and _differ(got, answer).double().mean() <= flipped:
            cause = suspicion
            break
    what = f"t={first + row}, number {place}: {unequal(got[row, place], expected[row, place])}"
    expect(False, f"{what} ({int(wrong.sum())} of {len(wrong)} rows are wrong, first bad row named)", cause)


def _differ(got, expected):
    """bool [T]: the rows that are off by more than the tolerance, or NaN."""
    return ~((got - expected).abs().amax(dim=1) <= TOLERANCE * expected.abs().max())


# ------------------------------------------------------------------------------------------------------------- layer


def _transposed(built, ops):
    weight = built.o_proj.weight
    built.o_proj.weight = nn.Parameter(weight.T.contiguous() if len(weight) == weight.shape[1] else weight, False)


def _halves_swapped(built, ops):
    c = built.config
    both = built.kv_b_proj.weight.unflatten(0, (c.n_heads, -1))
    key, value = both.split((c.qk_nope_head_dim, c.v_head_dim), dim=1)
    if key.shape == value.shape:
        built.kv_b_proj.weight = nn.Parameter(torch.cat((value, key), dim=1).flatten(0, 1), False)


ATTENTION = {  # mistakes of MLA: they show even where every key is kept
    "scale · q · k: the softmax scale, config.softmax_scale, is missing": lambda built, ops: built.q_b_proj.weight.mul_(
        1 / built.config.softmax_scale
    ),
    "the key-value latent is stored without its RMSNorm, kv_a_layernorm": lambda built, ops: setattr(
        built, "kv_a_layernorm", nn.Identity()
    ),
    "the query latent went on without its RMSNorm, q_a_layernorm": lambda built, ops: setattr(
        built, "q_a_layernorm", nn.Identity()
    ),
    "MLA's RoPE is missing, on q and on the cached row": lambda built, ops: setattr(ops, "rope", lambda x, *_: x),
    "MLA's RoPE is interleaved, and only the indexer's is half-split (notebook 06)": lambda built, ops: setattr(
        ops, "rope", lambda x, positions, freqs, _: dsa_ref.rope(x, positions, freqs, "half")
    ),
    "o_proj is transposed: a weight [out, in] is used as x @ weight.T": _transposed,
    "W_UK and W_UV are swapped: in each head's rows of kv_b_proj the key's come first": _halves_swapped,
    "o_proj is missing": lambda built, ops: setattr(built, "o_proj", nn.Identity()),
}


def _rotated_and_quantized(turn):
    """`rotate_quantize` with another RoPE."""
    return lambda x, positions, freqs: dsa_ref.quantize(dsa_ref.hadamard(turn(x, positions, freqs)))


def _rms_norm(built, ops):
    weight, eps = built.indexer.k_norm.weight, 1e-6
    built.indexer.k_norm.forward = lambda k: F.rms_norm(k, weight.shape, weight, eps)


def _raw_latent(built, ops):
    original = built.indexer.forward
    built.indexer.forward = lambda x, _: original(x, built.q_a_proj(x))


def _unselected(select):
    """Another selection in place of the indexer's: select(T, k) -> int32 [T, k]."""
    return lambda built, ops: setattr(ops, "lightning_select", lambda q_idx, *given, **_: select(len(q_idx), given[2]))


def _rows(T):
    return torch.arange(T, dtype=torch.int32)


SELECTION = {  # mistakes of the indexer: they show only where keys are left out
    "the indexer has no RoPE: its q and k are turned too, half-split (rotate_quantize does it)": (
        lambda built, ops: setattr(ops, "rotate_quantize", _rotated_and_quantized(lambda x, *_: x))
    ),
    "the indexer's RoPE is half-split, not interleaved: that is MLA's (notebook 06)": lambda built, ops: setattr(
        ops, "rotate_quantize", _rotated_and_quantized(lambda x, p, f: dsa_ref.rope(x, p, f, "interleaved"))
    ),
    "k_norm is a LayerNorm: it subtracts the mean, and has a bias": _rms_norm,
    "k_norm is missing": lambda built, ops: setattr(built.indexer, "k_norm", nn.Identity()),
    "the indexer reads the query latent after its RMSNorm": _raw_latent,
    "the future was selected: score it -inf, or give end[t] = t + 1": lambda built, ops: setattr(
        ops,
        "lightning_select",
        lambda q_idx, k_idx, w, k, k_scale=None, start=None: dsa_ref.lightning_select(
            q_idx, k_idx, w, k, k_scale, start, torch.full_like(start, len(k_idx))
        ),
    ),
    "the key's FP8 scale is missing from the scores": lambda built, ops: setattr(
        ops,
        "lightning_select",
        lambda q_idx, k_idx, w, k, k_scale=None, start=None: dsa_ref.lightning_select(
            q_idx, k_idx, w, k, torch.ones_like(k_scale), start
        ),
    ),
    "nothing was left out: that is dense attention": _unselected(
        lambda T, k: torch.where(_rows(T) <= _rows(T)[:, None], _rows(T), -1)
    ),
    "the last k keys were kept, whatever their scores": _unselected(
        lambda T, k: dsa_ref.testing.window_selection(k, torch.zeros_like(_rows(T)), _rows(T) + 1)
    ),
}


def _judge_layer(solution, given, cause, mistakes, flipped=0.0):
    x, weights, config = given
    got = solution(x, torch.arange(len(x)), weights, config)
    suspects = {why: functools.partial(_expected, x, weights, config, mistake) for why, mistake in mistakes.items()}
    _expect_rows(got, _expected(x, weights, config), cause, suspects, flipped)


@layer.property("shape")
def layer_shape(solution):
    for seed, T in ((1, 1), (2, 9)):
        x, weights, config = _real(seed, T)
        expect_shape(solution(x, torch.arange(T), weights, config), (T, config.dim))


@layer.property("future")
def layer_future(solution):
    for seed in (0, 1):
        x, weights, config = _real(seed, 40, k=8)
        changed = x.clone()
        changed[30:] = x[:10]
        before, after = (tensor(solution(given, torch.arange(40), weights, config)) for given in (x, changed))
        expect_shape(after, x.shape)
        moved = _differ(after[:30].double(), before[:30].double()).nonzero().flatten().tolist()
        what = f"t={min(moved, default=0)}: got another row after tokens 30 to 39 were changed, expected the same"
        expect(not moved, what, "your selection saw the future: hide keys s > t before you select")


@layer.property("attention")
def layer_attention(solution):
    for seed in (0, 1):  # at most k tokens: all are kept, so the indexer counts for nothing
        cause = "wrong where every key is kept, so look at MLA: norms, RoPE, W_UK and W_UV, scale, o_proj"
        _judge_layer(solution, _real(seed, 48, k=64), cause, ATTENTION)


@layer.property("selection")
def layer_selection(solution):
    for seed in (0, 1):
        cause = "right where every key is kept, wrong where k are: look at the indexer, and at its FP8"
        _judge_layer(solution, _real(seed, 160, k=64), cause, SELECTION | ATTENTION, FLIPPED)


@layer.property("other sizes")
def layer_other_sizes(solution):
    for seed, T in ((1, 40), (2, 23)):
        cause = "right for the small model alone: take sizes, k, the scale and RoPE's frequencies from config"
        plain = {
            "the softmax scale has a second factor under YaRN: take config.softmax_scale": lambda built, ops: (
                built.q_b_proj.weight.mul_((ODD.qk_nope_head_dim + ODD.qk_rope_head_dim) ** -0.5 / ODD.softmax_scale)
            ),
        }
        _judge_layer(solution, _odd(seed, T), cause, plain | SELECTION | ATTENTION, FLIPPED)


class _Theirs(nn.Module):
    """The solution in the place of a layer."""

    def __init__(self, solution, weights, config):
        super().__init__()
        self.solution, self.weights, self.config = solution, weights, config

    def forward(self, x, positions, cache, attention, record):
        return tensor(self.solution(x, positions, self.weights, self.config)).to(x.dtype)


@layer.property("in the GPT")
def layer_in_the_gpt(solution):
    model = load_small_model()
    for block in model.layers:
        block.self_attn = _Theirs(solution, block.self_attn.state_dict(), model.config.attention)
    for seed in (0, 1):
        tokens = unseen_text(700 * seed, 160)
        with torch.no_grad():
            got, expected = model(tokens).argmax(dim=1), _trained()(tokens).argmax(dim=1)
        same = int((got == expected).sum())
        what = f"with your function in all layers: {same} of {len(tokens)} first guesses are the model's, expected 95 %"
        expect(
            same >= 0.95 * len(tokens), what, "right in the layers tried, not in the others: is anything written in?"
        )


# ------------------------------------------------------------------------------------------------------------ cached

cached = Check("cached")  # (x [T, dim], cache, weights, config) -> (y [T, dim], cache)


def _fed(solution, given, sizes, cache=None):
    """The rows of y, the tokens fed in parts of these sizes, and the last cache."""
    x, weights, config = given
    rows = []
    for part in x.split(sizes):
        got = solution(part, cache, weights, config)
        pair = isinstance(got, tuple) and len(got) == 2 and isinstance(got[1], tuple)
        kinds = ", ".join(type(item).__name__ for item in got) if isinstance(got, tuple) else type(got).__name__
        expect(pair, f"got {kinds}, expected a pair of y and a tuple", "return y, (kv, k_idx, k_scale)")
        y, cache = got
        expect_shape(y, part.shape, name="y")
        rows.append(tensor(y).double())
    return torch.cat(rows), cache


def _mistaken(given, sizes, restart=False, alone=False, early=False, peek=False, unturned=False):
    """`my_cached` with one mistake, as an answer to compare with."""
    x, weights, config = given
    kept, rows, before = None, [], 0
    for part in x.split(sizes):
        T = len(part)
        new = project(part, torch.arange(T) + (0 if restart else before), weights, config)
        names = ("kv", "k_idx", "k_scale")
        if unturned:  # stored as they were before RoPE, and used so
            still = project(part, torch.zeros(T, dtype=torch.int64), weights, config)
        old = (
            [torch.cat((held, new[n])) for held, n in zip(kept, names, strict=True)]
            if kept
            else [new[n] for n in names]
        )
        kv, k_idx, k_scale = [new[n] for n in names] if alone else old
        end = torch.full((T,), len(kv), dtype=torch.int32) if peek else None
        scores = dsa_ref.index_scores(new["q_idx"], k_idx, new["w"], k_scale, None, end)
        indices = dsa_ref.select_topk(scores, config.index_topk, None, end)
        rows.append(attend(new["q"], kv, indices, weights, config))
        if early:  # only what the last row selected is kept
            left = indices[-1][indices[-1] >= 0].long()
            old = [held[left] for held in old]
        elif unturned:
            old = (
                [torch.cat((held, still[n])) for held, n in zip(kept, names, strict=True)]
                if kept
                else [still[n] for n in names]
            )
        kept, before = old, before + T
    return torch.cat(rows).double()


CACHED = {  # cause: the mistake's name in `_mistaken`
    "only the new tokens were selected from: score all rows, the cache's and the new ones": "alone",
    "positions restart with each call: the first new token's position is the number of rows in the cache": "restart",
    "rows from before RoPE were stored: store them turned, since their positions never change": "unturned",
    "the future was visible within a call: row t of T new ones sees S - T + t + 1 of S rows": "peek",
    "what was not selected was thrown away: another query may need it, so store all and select anew": "early",
}


def _judge_cached(solution, given, sizes, cause, flipped=0.0):
    x, weights, config = given
    got, _ = _fed(solution, given, sizes)
    suspects = {why: functools.partial(_mistaken, given, sizes, **{mistake: True}) for why, mistake in CACHED.items()}
    first = sizes[0]  # the rows before are the first call's
    suspects = {why: lambda answer=answer: answer()[first:] for why, answer in suspects.items()}
    _expect_rows(got[first:], _expected(x, weights, config)[first:].double(), cause, suspects, flipped, first)


@cached.property("first call")
def cached_first_call(solution):
    for seed in (0, 1):
        x, weights, config = given = _real(seed, 60, k=16)
        got, _ = _fed(solution, given, [60])
        cause = "without a cache it is the layer of exercise 16.1"
        _expect_rows(got, _expected(x, weights, config).double(), cause, {}, FLIPPED)


@cached.property("positions")
def cached_positions(solution):
    for seed in (0, 1):  # at most k tokens: all are kept
        cause = "wrong where every key is kept: do all rows reach attention, each turned by its own position?"
        _judge_cached(solution, _real(seed, 40, k=64), [33, *[1] * 7], cause)


@cached.property("future")
def cached_future(solution):
    for seed in (0, 1):
        cause = "right for one new token a call, wrong for several: which rows may each of them see?"
        _judge_cached(solution, _real(seed, 48, k=64), [20, 13, 15], cause)


@cached.property("k < T")
def cached_k_below_t(solution):
    for seed in (0, 1):
        cause = "right where every key is kept, wrong where k are: select anew in each call, from all rows so far"
        _judge_cached(solution, _real(seed, 100, k=16), [84, *[1] * 12, 4], cause, FLIPPED)


@cached.property("branches")
def cached_branches(solution):
    for seed in (0, 1):
        x, weights, config = _real(seed, 40, k=64)
        _, cache = _fed(solution, (x[:35], weights, config), [35])
        for rest in (x[35:], x[35:].flip(0), x[35:]):  # three ways on from one cache
            got, _ = _fed(solution, (rest, weights, config), [1] * 5, cache)
            expected = _expected(torch.cat((x[:35], rest)), weights, config)[35:].double()
            cause = (
                "the cache that went in was changed, or something is kept elsewhere: return a new tuple of new tensors"
            )
            _expect_rows(got, expected, cause, {}, 0.0, 35)


@cached.property("other sizes")
def cached_other_sizes(solution):
    for seed in (1, 2):
        cause = "right for the small model alone: take sizes and k from config"
        _judge_cached(solution, _odd(seed, 40), [28, *[1] * 8, 4], cause, FLIPPED)
