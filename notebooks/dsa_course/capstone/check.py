"""Notebook 16: one layer of the trained model as a plain function."""

import dataclasses
import functools
import types
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

import dsa_ref
from dsa_ref.config import DSAConfig
from dsa_ref.nn.layer import DSALayer
from dsa_ref.nn.model import load_small_model

from ..checking import NOT_WRITTEN, Check, Failed, expect, expect_shape, normal, tensor, unequal
from .layer import layer_inputs, unseen_text

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
    norm_eps=0.01,  # large, so that another one shows
)
TOLERANCE = 1e-4  # of the largest number of y
FLIPPED = 0.1  # of the rows may keep another key, where a sum in another order moved a score over the threshold


@functools.cache
def _trained():
    return load_small_model()


@functools.cache
def _text(seed, count):
    return layer_inputs(_trained(), unseen_text(700 * seed, count))


def trained_layer(seed, count, k=None):
    """(x [count, dim], weights, config) of a layer of the trained model on unseen text: the first, then the last."""
    number, config = (0, -1)[seed % 2], _trained().config.attention
    weights = {name: weight.clone() for name, weight in _trained().layers[number].self_attn.state_dict().items()}
    return (
        _text(seed, count)[number].clone(),
        weights,
        config if k is None else dataclasses.replace(config, index_topk=k),
    )


def odd_layer(seed, count):
    """(x, weights, config) of a layer with random weights, norms' weights and biases included, of odd sizes."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in DSALayer(ODD).state_dict().items()}
    weights = {}
    for i, (name, shape) in enumerate(shapes.items()):
        weights[name] = normal(*shape, seed=100 * seed + i) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.5)
        if "norm.weight" in name:
            weights[name] += 1.0
    weights["indexer.wk.weight"] *= 1e-3  # so that the LayerNorm's eps shows
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


def reference(x, weights, config, mistake=None):
    return _built(weights, config, mistake)(x, torch.arange(len(x)))


def expect_rows(got, expected, cause, suspects, flipped, first=0):
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


def _output(solution, x, weights, config):
    """What the solution gives, with the layer that the card forbids out of reach."""

    def refuse(*_, **__):
        raise Failed("DSALayer was called", "the card asks for its steps, one by one: call the functions of the table")

    with mock.patch.object(DSALayer, "forward", refuse):
        return solution(x, torch.arange(len(x)), weights, config)


def _judge_layer(solution, given, cause, mistakes, flipped=0.0):
    x, weights, config = given
    got = _output(solution, x, weights, config)
    suspects = {why: functools.partial(reference, x, weights, config, mistake) for why, mistake in mistakes.items()}
    expect_rows(got, reference(x, weights, config), cause, suspects, flipped)


@layer.property("shape")
def layer_shape(solution):
    for seed, T in ((1, 1), (2, 9)):
        x, weights, config = trained_layer(seed, T)
        expect_shape(_output(solution, x, weights, config), (T, config.dim), torch.float32)


@layer.property("future")
def layer_future(solution):
    for seed in (0, 1):
        x, weights, config = trained_layer(seed, 40, k=8)
        changed = x.clone()
        changed[30:] = x[:10]
        before, after = (tensor(_output(solution, given, weights, config)) for given in (x, changed))
        expect_shape(after, x.shape)
        moved = _differ(after[:30].double(), before[:30].double()).nonzero().flatten().tolist()
        what = f"t={min(moved, default=0)}: got another row after tokens 30 to 39 were changed, expected the same"
        expect(not moved, what, "your selection saw the future: hide keys s > t before you select")


@layer.property("attention")
def layer_attention(solution):
    for seed in (0, 1):  # at most k tokens: all are kept, so the indexer counts for nothing
        cause = "wrong where every key is kept, so look at MLA: norms, RoPE, W_UK and W_UV, scale, o_proj"
        _judge_layer(solution, trained_layer(seed, 48, k=64), cause, ATTENTION)


@layer.property("selection")
def layer_selection(solution):
    for seed in (0, 1):
        cause = "right where every key is kept, wrong where k are: look at the indexer, and at its FP8"
        _judge_layer(solution, trained_layer(seed, 160, k=64), cause, SELECTION | ATTENTION, FLIPPED)


@layer.property("other sizes")
def layer_other_sizes(solution):
    for seed, T in ((1, 200), (2, 23)):
        cause = "right for the small model alone: take sizes, k, norm_eps, the scale and RoPE's frequencies from config"
        plain = {
            "the softmax scale has a second factor under YaRN: take config.softmax_scale": lambda built, ops: (
                built.q_b_proj.weight.mul_((ODD.qk_nope_head_dim + ODD.qk_rope_head_dim) ** -0.5 / ODD.softmax_scale)
            ),
            "the two RMSNorms take config.norm_eps": lambda built, ops: (
                setattr(built.q_a_layernorm, "eps", 1e-6),
                setattr(built.kv_a_layernorm, "eps", 1e-6),
            ),
            "the LayerNorm's eps is 1e-6": lambda built, ops: setattr(built.indexer.k_norm, "eps", 1e-5),
        }
        _judge_layer(solution, odd_layer(seed, T), cause, plain | SELECTION | ATTENTION, FLIPPED)


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
