"""The steps as operators of torch.library: what tracing needs of them, derivatives against the reference's, refusals,
and when a public function goes through its operator.

torch.compile runs with backend="aot_eager", which traces forward and backward pass as inductor has them traced, and
compiles no C++ on a CPU.
"""

import pytest
import rungs
import torch
from conftest import NEEDS_TRITON
from inputs import assert_close, index_inputs, normal, packed, random_indices
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import dsa_ref

if rungs.has_triton():
    import dsa_kernels

    OPERATORS = torch.ops.dsa_kernels

pytestmark = pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)

T, S, HI, DI, H, D, V, K = 6, 11, 3, 16, 2, 40, 24, 5
SCALE = 0.2


def attention_inputs(device):
    """q, kv, indices, probe; a row with nothing selected and gaps among them."""
    q, kv = (normal(*shape, seed=i, device=device).requires_grad_() for i, shape in enumerate(((T, H, D), (S, D))))
    return q, kv, random_indices(T, S, K, device=device), torch.zeros(T, K, device=device, requires_grad=True)


def head_inputs(device, Dv=12):
    """q, k, v and the start of packed sequences."""
    q, k, v = (normal(T, H, d, seed=i, device=device).requires_grad_() for i, d in enumerate((16, 16, Dv)))
    return q, k, v, packed(2, 3, 1, device=device)[0]


def turning(device):
    return (
        normal(T, H, DI, seed=5, device=device).requires_grad_(),
        torch.arange(T, device=device),
        torch.rand(4, device=device),
    )


def index_side(device):
    q_idx, k_idx, w, _ = index_inputs(normal, T, S, HI, DI, seed=7, device=device)
    return [x.requires_grad_() for x in (q_idx, k_idx, w)]


def loss_inputs(device, wanted=True):
    """Of the sparse stage, as the operator takes them."""
    q, kv, indices, _ = attention_inputs(device)
    sides = *(x.requires_grad_(wanted) for x in index_side(device)), q.detach(), kv.detach(), SCALE
    return *sides, indices, None, None, None, None, wanted, "mean"


CALLS = {  # operator: its arguments
    "rope": lambda d: (*turning(d), "interleaved"),
    "hadamard": lambda d: turning(d)[:1],
    "quantize": lambda d: (turning(d)[0].detach(),),
    "rotate_quantize": lambda d: (turning(d)[0].detach(), *turning(d)[1:]),
    "lightning_select": lambda d: (*(x.detach() for x in index_side(d)), K, None, None, None, None),
    "sparse_attention": lambda d: (*attention_inputs(d)[:3], SCALE, V, attention_inputs(d)[3], None),
    "mha_attention": lambda d: (*head_inputs(d)[:3], SCALE, None, head_inputs(d)[3], None),
    "indexer_loss": loss_inputs,
    "indexer_loss, unwanted": lambda d: loss_inputs(d, False),
}


@pytest.mark.parametrize("name", CALLS)
def test_operators_are_what_tracing_takes_them_for(name, device):
    """Schema, shapes and strides of the fake implementation, autograd's registration, a traced gradient."""
    torch.library.opcheck(getattr(OPERATORS, name.split(",")[0]).default, CALLS[name](device))


def test_a_wrong_shape_is_noticed(device):
    """The check above rejects what it should."""

    def total(x: torch.Tensor) -> torch.Tensor:
        return x.sum(dim=1)

    wrong = torch.library.custom_op("dsa_kernels_test::total", total, mutates_args=())
    wrong.register_fake(lambda x: x.new_empty(x.shape))
    with pytest.raises(Exception, match="Shapes"):
        torch.library.opcheck(wrong, (normal(3, 4, device=device),))


def weighted(outputs):
    """A scalar whose gradient differs from place to place, in every float output."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum((x * torch.arange(x.numel(), device=x.device).sin().view(x.shape)).sum() for x in outputs)


STEPS = {  # differentiable step: (what it is called with, as a function of its package; its inputs)
    "rope": lambda d: (lambda ops, x, *more: ops.rope(x, *more, "half"), turning(d)),
    "hadamard": lambda d: (lambda ops, x: ops.hadamard(x), turning(d)[:1]),
    "sparse_attention": lambda d: (
        lambda ops, q, kv, indices, probe: ops.sparse_attention(q, kv, indices, SCALE, V, probe), attention_inputs(d),
    ),
    "mha_attention": lambda d: (
        lambda ops, q, k, v, start: ops.mha_attention(q, k, v, SCALE, None, start), head_inputs(d),
    ),
    "indexer_loss": lambda d: (
        lambda ops, *sides: ops.indexer_loss(*sides[:5], SCALE, *sides[5:]),
        (*index_side(d), *(x.detach() for x in attention_inputs(d)[:2]), attention_inputs(d)[2]),
    ),
    "mha_attention, selected": lambda d: (
        lambda ops, q, k, v, indices: ops.mha_attention(q, k, v, SCALE, indices),
        (*head_inputs(d)[:3], random_indices(T, T, 3, device=d)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_gradients_are_the_references(step, device):
    """Of out and lse."""
    call, inputs = STEPS[step](device)
    learning = [x for x in inputs if x.requires_grad]
    got, wanted = (torch.autograd.grad(weighted(call(ops, *inputs)), learning) for ops in (dsa_kernels, dsa_ref))
    for one, other in zip(got, wanted, strict=True):
        assert_close(one, other, 2e-5)


@pytest.mark.parametrize("step", STEPS)
def test_only_what_asks_gets_a_gradient(step, device):
    """Each input alone, as a frozen trunk or a frozen cache has it."""
    call, inputs = STEPS[step](device)
    for i, x in enumerate(inputs):
        if x.requires_grad:
            alone = [y.detach().requires_grad_(y is x) for y in inputs]
            all_of_them = torch.autograd.grad(weighted(call(dsa_kernels, *inputs)), x)
            assert torch.equal(torch.autograd.grad(weighted(call(dsa_kernels, *alone)), alone[i])[0], all_of_them[0])


@pytest.mark.parametrize("step", ("rope", "hadamard"))
def test_linear_steps_are_differentiable_again(step, device):
    call, inputs = STEPS[step](device)
    x, *more = inputs

    def curvature(ops):
        (first,) = torch.autograd.grad(weighted(call(ops, x, *more).square()), x, create_graph=True)
        return torch.autograd.grad(weighted(first), x)[0]

    assert_close(curvature(dsa_kernels), curvature(dsa_ref), 1e-5)


@pytest.mark.parametrize("step", ("sparse_attention", "mha_attention", "indexer_loss"))
def test_second_derivatives_are_refused(step, device):
    call, inputs = STEPS[step](device)
    with pytest.raises(ValueError, match=f"create_graph must be False for {step}.*only dsa_ref"):
        torch.autograd.grad(weighted(call(dsa_kernels, *inputs)), inputs[0], create_graph=True)


@pytest.mark.parametrize("step", STEPS)
def test_forward_mode_and_functorch_are_refused(step, device):
    call, (x, *more) = STEPS[step](device)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="must not carry a tangent, which only dsa_ref"):
        call(dsa_kernels, forward_ad.make_dual(x.detach(), torch.ones_like(x)), *more)
    with pytest.raises(ValueError, match="must not be wrapped by torch.func"):
        torch.func.grad(lambda x: weighted(call(dsa_kernels, x, *more)))(x.detach())


@pytest.mark.parametrize("name", CALLS)
def test_the_operator_runs_only_where_somebody_needs_it(name, device, monkeypatch):
    """Serving goes straight to the kernels; gradients, and modes that look at operators, do not."""
    seen = []

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **kwargs or {})

    arguments, (name, *_) = CALLS[name](device), name.split(",")
    names = [a.name for a in getattr(OPERATORS, name).default._schema.arguments]
    options = dict(zip(names, arguments, strict=True))
    options.pop("wanted", None)
    with Watching():
        getattr(dsa_kernels, name)(**options)
    assert f"dsa_kernels.{name}.default" in seen

    def refuse(*args):
        raise AssertionError("operator")

    learns = any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments)
    monkeypatch.setattr(OPERATORS, name, refuse)
    with torch.no_grad():
        getattr(dsa_kernels, name)(**options)
    if learns:
        with pytest.raises(AssertionError, match="operator"):
            getattr(dsa_kernels, name)(**options)


def attend_and_teach(ops, q_idx, k_idx, w, q, kv):
    """What a sparse step does: select, attend, and the indexer's loss beside the language loss."""
    indices = ops.lightning_select(q_idx, k_idx, w, K)
    out, lse = ops.sparse_attention(q, kv, indices, SCALE, V)
    loss = ops.indexer_loss(q_idx, k_idx, w, q, kv, SCALE, indices, lse=lse)
    return weighted((out, lse)) + loss, indices


def test_compiled_whole_and_equal(device):
    """Three steps without a break in the graph, and the bits of the uncompiled ones in both directions."""
    inputs = [*index_side(device), *attention_inputs(device)[:2]]
    results = []
    for function in (attend_and_teach, torch.compile(attend_and_teach, fullgraph=True, backend="aot_eager")):
        loss, indices = function(dsa_kernels, *inputs)
        results.append((loss.detach(), indices, *torch.autograd.grad(loss, inputs)))
    assert all(map(torch.equal, *results))


def test_compiled_small_steps(device):
    def small(x, positions, freqs):
        x = dsa_kernels.hadamard(dsa_kernels.rope(x, positions, freqs, "half"))
        return weighted(x), *dsa_kernels.rotate_quantize(x, positions, freqs), *dsa_kernels.quantize(x)

    def heads(q, k, v, start):
        return weighted(dsa_kernels.mha_attention(q, k, v, SCALE, None, start))

    for function, inputs in ((small, turning(device)), (heads, head_inputs(device))):
        results = []
        for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            found = run(*inputs)
            loss, *others = found if isinstance(found, tuple) else (found,)
            found = [loss, *others, *torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])]
            results.append([x.detach().float() for x in found])
        assert all(map(torch.equal, *results))


def test_selective_checkpointing_saves_the_selection(device, monkeypatch):
    """By its operator, in code that is no layer: not-reentrant checkpointing with a policy."""
    calls, q_idx, k_idx, w = [], *index_side(device)
    q, kv, *_ = attention_inputs(device)
    module = __import__("sys").modules["dsa_kernels.lightning_select"]
    launch = module.launch_scores
    monkeypatch.setattr(module, "launch_scores", lambda *args: calls.append(1) or launch(*args))

    def policy(context, function, *args, **options):
        saved = function is OPERATORS.lightning_select.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    def step(*inputs):
        return attend_and_teach(dsa_kernels, *inputs)[0]

    def gradients(contexts):
        del calls[:]
        loss = checkpoint(step, q_idx, k_idx, w, q, kv, use_reentrant=False, **contexts)
        return torch.autograd.grad(loss, (q_idx, k_idx, w, q, kv)), len(calls)

    plain, twice = gradients({})
    saved, once = gradients({"context_fn": lambda: create_selective_checkpoint_contexts(policy)})
    assert (twice, once) == (2, 1) and all(map(torch.equal, plain, saved))
