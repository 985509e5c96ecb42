"""Derivatives in forward mode, and second ones: each against reverse mode or finite differences, by both of torch's
interfaces."""

import pytest
import rungs
import torch
from inputs import assert_close, index_inputs, normal, ragged, random_indices
from torch.autograd import forward_ad

import dsa_ref

T, S, V = 7, 11, 5
START, END = ragged(T, S)
INDICES = random_indices(T, S, 4)
INDEX = [x.double() for x in index_inputs(normal, T, S, 3, 8)]
ATTENTION = [normal(T, 2, 8, seed=5).double(), normal(S, 8, seed=6).double()]


def of_attention(out, lse):
    return out.sin().sum() + lse.masked_fill(lse.isinf(), 0.0).sin().sum()


def of_scores(scores):
    return (0.1 * scores.masked_fill(scores.isinf(), 0.0)).sin().sum()


def loss(indices):
    return lambda *indexer: dsa_ref.indexer_loss(*indexer, *ATTENTION, 0.3, indices, START, END)


# name: (a number made of what a step returns, the step's differentiable arguments)
STEPS = {
    "index_scores": (lambda *x: of_scores(dsa_ref.index_scores(*x, START, END)), *INDEX),
    "sparse_attention": (lambda *x: of_attention(*dsa_ref.sparse_attention(*x, INDICES, 0.3, V)), *ATTENTION),
    "dense_attention": (lambda *x: of_attention(*dsa_ref.dense_attention(*x, 0.3, V, START, END)), *ATTENTION),
    "mha_attention": (
        lambda *x: of_attention(*dsa_ref.mha_attention(*x, 0.3, INDICES, START, END)),
        ATTENTION[0],
        normal(S, 2, 8, seed=7).double(),
        normal(S, 2, V, seed=8).double(),
    ),
    "indexer_loss": (loss(None), *INDEX[:3]),
    "indexer_loss, sparse": (loss(INDICES), *INDEX[:3]),
}
ALL = pytest.mark.parametrize("step", STEPS)


def gradients(function, inputs, **options):
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, **options), leaves


def directions(inputs):
    return [normal(*x.shape, seed=20 + i).double() for i, x in enumerate(inputs)]


def inner(a, b):
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


@ALL
def test_forward_mode_is_reverse_mode(small_blocks, step):
    function, *inputs = STEPS[step]
    along = directions(inputs)
    grown, _ = gradients(function, inputs)
    assert min(x.abs().max() for x in grown) > 1e-3
    wanted = inner(grown, along)
    assert_close(torch.func.jvp(function, tuple(inputs), tuple(along))[1], wanted, 1e-5)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, d) for x, d in zip(inputs, along, strict=True)]
        assert_close(forward_ad.unpack_dual(function(*duals)).tangent, wanted, 1e-5)
        for i, one in enumerate(duals):  # where the other arguments are constants
            out = function(*inputs[:i], one, *inputs[i + 1 :])
            assert_close(forward_ad.unpack_dual(out).tangent, (grown[i] * along[i]).sum(), 1e-5)


@ALL
def test_second_derivatives(small_blocks, step):
    """The Hessian times a direction: forward over reverse, reverse over reverse, and by differences of gradients."""
    function, *inputs = STEPS[step]
    along, width = directions(inputs), 1e-2 if "loss" in step else 1e-4  # the loss is computed in fp32
    moved = [[x + side * width * d for x, d in zip(inputs, along, strict=True)] for side in (1, -1)]
    sides = [gradients(function, x)[0] for x in moved]
    wanted = [(a - b) / (2 * width) for a, b in zip(*sides, strict=True)]
    gradient = torch.func.grad(function, tuple(range(len(inputs))))
    forward = torch.func.jvp(gradient, tuple(inputs), tuple(along))[1]
    grown, leaves = gradients(function, inputs, create_graph=True)
    reverse = torch.autograd.grad(inner(grown, along), leaves)
    for a, b, by_differences in zip(forward, reverse, wanted, strict=True):
        assert_close(a, b, 1e-5)
        assert_close(a, by_differences, 0.02)


@pytest.mark.parametrize("sparse", (False, True))
def test_the_losss_target_is_a_constant_in_forward_mode_too(sparse):
    def of_target(q, kv):
        return dsa_ref.indexer_loss(*INDEX[:3], q, kv, 0.3, INDICES if sparse else None)

    assert torch.func.jvp(of_target, tuple(ATTENTION), tuple(directions(ATTENTION)))[1] == 0


@pytest.mark.parametrize("step", ("index_scores", "sparse_attention", "dense_attention"))
def test_hidden_nan_does_not_reach_the_tangents_of_others(step):
    """As for gradients: a key's NaN is in the tangents of the rows that see it, and in no other."""
    q, kv = (x.clone() for x in ATTENTION)
    bad = torch.zeros(S, 1, dtype=torch.bool)
    bad[-1] = True
    lists = torch.where(INDICES == S - 1, -1, INDICES)
    end = END.clamp(max=S - 1)
    run = {
        "index_scores": lambda q, kv: dsa_ref.index_scores(q, kv, INDEX[2][:, :2], None, START.clamp(max=S - 1), end),
        "sparse_attention": lambda q, kv: dsa_ref.sparse_attention(q, kv, lists, 0.3, V)[0],
        "dense_attention": lambda q, kv: dsa_ref.dense_attention(q, kv, 0.3, V, START.clamp(max=S - 1), end)[0],
    }[step]
    along = tuple(directions((q, kv)))
    wanted = torch.func.jvp(run, (q, kv), along)[1]
    got = torch.func.jvp(run, (q, kv.masked_fill(bad, torch.nan)), along)[1]
    assert torch.equal(got, wanted)


def kernel_calls(device):
    """name of a kernel and of an argument: (the kernel as a function of that argument, its value)."""
    kernels, (start, end) = rungs.load("kernels"), (x.to(device) for x in (START, END))
    q_idx, k_idx, w, k_scale = (x.to(device) for x in index_inputs(normal, T, S, 3, 16))
    index = {"q_idx": q_idx, "k_idx": k_idx, "w": w, "k_scale": k_scale, "start": start, "end": end}
    turning = {"x": normal(T, 2, 8).to(device), "positions": torch.arange(T, device=device), "layout": "half"}
    turning["freqs"] = torch.ones(4, device=device)
    attention = {"q": normal(T, 2, 8).to(device), "kv": normal(S, 8).to(device), "indices": INDICES.to(device)}
    calls = {
        "rope": (turning, ("x", "freqs")),
        "hadamard": ({"x": normal(T, 8).to(device)}, ("x",)),
        "index_scores": (index, ("q_idx", "k_idx", "w", "k_scale")),
        "sparse_attention": (attention | {"scale": 0.3, "v_dim": 5}, ("q", "kv")),
    }
    for step, (arguments, names) in calls.items():
        for name in names:

            def run(x, step=step, arguments=arguments, name=name):
                return getattr(kernels, step)(**arguments | {name: x})

            yield name, run, arguments[name]


@pytest.mark.rungs("kernels")
def test_kernels_refuse_a_tangent(ops, device):
    """It would be lost without a word, also where gradients are off; a plain tensor passes inside a dual level."""
    for name, run, x in kernel_calls(device):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            with torch.no_grad(), pytest.raises(ValueError, match=f"^{name} must not carry a tangent, .* only dsa_ref"):
                run(dual)
            run(forward_ad.unpack_dual(dual).primal), run(dual.detach())


@pytest.mark.rungs("kernels")
def test_kernels_refuse_tensors_of_torch_func(ops, device):
    for name, run, x in kernel_calls(device):
        with pytest.raises(ValueError, match=f"^{name} must not be wrapped by torch.func"):
            torch.func.jvp(run, (x,), (torch.ones_like(x),))


@pytest.mark.rungs("reference", "kernels")
def test_a_choice_and_a_rounding_have_no_tangent_on_either_rung(ops, device):
    q_idx, k_idx, w, k_scale = (x.to(device) for x in index_inputs(normal, T, S, 3, 16))
    with forward_ad.dual_level():
        q_idx, k_idx, w, k_scale = (forward_ad.make_dual(x, torch.ones_like(x)) for x in (q_idx, k_idx, w, k_scale))
        results = [ops.lightning_select(q_idx, k_idx, w, 3, k_scale), ops.select_topk(w.T, 2)]
        results += [*ops.quantize(k_idx), *ops.rotate_quantize(k_idx, torch.arange(S, device=device), w.new_ones(4))]
        assert all(forward_ad.unpack_dual(x).tangent is None for x in results)


@pytest.mark.rungs("kernels")
@pytest.mark.parametrize("attention", ("sparse", "mha", "dense"))
def test_a_layer_on_kernels_refuses_a_tangent(ops, device, attention):
    layer = dsa_ref.DSALayer(dsa_ref.TINY, ops).requires_grad_(False).to(device)
    x, positions = normal(T, dsa_ref.TINY.dim).to(device), torch.arange(T, device=device)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="must not carry a tangent"):
        layer(forward_ad.make_dual(x, x), positions, attention=attention)
