"""A layer trains through the kernels as through the reference: gradients, the target that its backward pass hands out,
what must stay detached, and activation checkpointing, under which keys are selected once."""

import dataclasses
import types

import pytest
import rungs
import torch
from conftest import NEEDS_TRITON
from inputs import assert_close, normal, packed, selected
from torch.utils.checkpoint import checkpoint

import dsa_ref
from dsa_ref import TINY, DSALayer, indexer_loss

if rungs.has_triton():
    import dsa_kernels

pytestmark = pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)

LENGTHS = 9, 9, 6
T = sum(LENGTHS)
BOTH = pytest.mark.rungs("reference", "kernels")
MODES = pytest.mark.parametrize("attention", ("sparse", "dense"))


def make_layer(ops, device="cpu", dtype=torch.float32, **changes):
    layer = DSALayer(dataclasses.replace(TINY, index_fp8=False, **changes), ops)
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=i) * 0.3)
    return layer.to(device, dtype)


def tokens(layer):
    weight = layer.o_proj.weight
    _, _, positions = packed(*LENGTHS, device=weight.device)
    return normal(T, TINY.dim, seed=50).to(weight).requires_grad_(), positions


def language_loss(y):
    """Some loss whose gradient differs from place to place."""
    return (y.float() * normal(*y.shape, seed=60, device=y.device)).square().mean()


def kl(step, **more):
    sides = (step[name] for name in ("q_idx", "k_idx", "w", "q", "kv"))
    return indexer_loss(*sides, TINY.softmax_scale, step.get("indices"), step["start"], **more)


def gradients(layer, attention, run=None, record=None):
    """{name: gradient} after the language loss."""
    x, positions = tokens(layer)
    call = run or (lambda function, *args: function(*args))
    y = call(layer, x, positions, None, attention, record)
    language_loss(y).backward()
    found = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return found | {"x": x.grad, "y": y.detach()}


@MODES
def test_gradients_are_the_references(attention, device):
    wanted = gradients(make_layer(dsa_ref, device), attention)
    got = gradients(make_layer(dsa_kernels, device), attention)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert_close(got[name], wanted[name], 2e-5 * wanted[name].abs().max().item())


@pytest.mark.gpu
@MODES
@pytest.mark.parametrize("autocast", (False, True))
def test_gradients_in_bf16(attention, autocast, device):
    """Against fp32's. One product of kernels is rounded more than the reference's, hence the room."""
    wanted = gradients(make_layer(dsa_ref, device, index_topk=T), attention)  # all keys: no selection that could differ
    layer = make_layer(dsa_kernels, device, torch.float32 if autocast else torch.bfloat16, index_topk=T)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        got = gradients(layer, attention)
    for name in wanted:
        error = (got[name].float() - wanted[name]).norm() / wanted[name].norm()
        assert error < 0.05, (name, error)


def test_the_target_comes_out_of_the_backward_pass(device):
    """The probe's gradient is attention's mean probability: with it, the KL and its gradients are those of q and kv."""
    layer, record = make_layer(dsa_kernels, device), []
    gradients(layer, "sparse", record=record)
    (step,) = record
    assert list(step)[-1] == "probe" and step["probe"].shape == step["indices"].shape
    target = step["probe"].grad
    assert_close(target.sum(dim=1), torch.ones(T, device=device), 1e-5)
    rows = step["kv"].detach()[step["indices"].clamp(min=0).long()]
    logits = torch.einsum("thd,tkd->thk", step["q"].detach(), rows) * TINY.softmax_scale
    logits = logits.masked_fill((step["indices"] < 0)[:, None], -torch.inf)
    assert_close(target, logits.softmax(dim=2).mean(dim=1), 1e-5)
    weights = list(layer.indexer.parameters())
    wanted = torch.autograd.grad(kl(step), weights, retain_graph=True)
    sides = (step[name] for name in ("q_idx", "k_idx", "w"))
    from_target = indexer_loss(*sides, None, None, None, step["indices"], step["start"], target=target)
    for one, other in zip(torch.autograd.grad(from_target, weights), wanted, strict=True):
        assert_close(one, other, 1e-5)


def test_a_probe_is_recorded_where_gradients_pass(device):
    layer = make_layer(dsa_kernels, device)
    x, positions = tokens(layer)
    for enabled, ops, attention in (
        (False, dsa_kernels, "sparse"),
        (True, dsa_kernels, "dense"),
        (True, NO_PROBE, "sparse"),
    ):
        layer.ops, record = ops, []
        with torch.set_grad_enabled(enabled):
            layer(x, positions, attention=attention, record=record)
        assert "probe" not in record[0]
    layer.requires_grad_(False).indexer.requires_grad_(True)  # no gradient reaches attention
    layer.ops, record = dsa_kernels, []
    layer(x.detach(), positions, record=record)
    assert "probe" not in record[0] and record[0]["w"].requires_grad


def without_probe(q, kv, indices, scale, v_dim):
    return dsa_ref.sparse_attention(q, kv, indices, scale, v_dim)


NO_PROBE = types.SimpleNamespace(
    rope=dsa_ref.rope, rotate_quantize=dsa_ref.rotate_quantize, lightning_select=dsa_ref.lightning_select,
    sparse_attention=without_probe,
)  # fmt: skip


@MODES
@BOTH
def test_each_loss_moves_its_own_side(ops, attention, device):
    """The KL nothing in the trunk, the language loss nothing in the indexer; and each moves all of its own."""
    layer, record = make_layer(ops, device), []
    x, positions = tokens(layer)
    y = layer(x, positions, attention=attention, record=record)
    own = set(layer.indexer.parameters())
    trunk = [p for p in layer.parameters() if p not in own]
    for loss, moved, still in ((kl(record[0]), [*own], [*trunk, x]), (language_loss(y), [*trunk, x], [*own])):
        found = torch.autograd.grad(loss, moved + still, retain_graph=True, allow_unused=True)
        assert all(g is not None and g.any() for g in found[: len(moved)])
        assert all(g is None or not g.any() for g in found[len(moved) :])


def counted(layer):
    """The layer's selections from now on, in a list: one entry a call."""
    calls, select = [], layer.ops.lightning_select

    def counting(*args, **options):
        calls.append(select(*args, **options))
        return calls[-1]

    names = [name for name in dir(layer.ops) if not name.startswith("__")]
    layer.ops = types.SimpleNamespace(
        **{name: getattr(layer.ops, name) for name in names} | {"lightning_select": counting}
    )
    return calls


@BOTH
@pytest.mark.parametrize("reentrant", (True, False))
def test_checkpointing_selects_once(ops, reentrant, device):
    """And gives the gradients of a pass without it."""
    results = []
    for run in (None, lambda function, *args: checkpoint(function, *args, use_reentrant=reentrant)):
        layer = make_layer(ops, device)
        calls = counted(layer)
        results.append(gradients(layer, "sparse", run))
        assert len(calls) == 1
    assert results[0].keys() == results[1].keys()
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


@pytest.mark.parametrize("reentrant", (True, False))
def test_a_repeated_pass_takes_the_selection_of_its_own_pass(reentrant, device):
    """Two layers in one checkpoint, two passes before the first backward pass, which comes for the later one first."""
    layers = [make_layer(dsa_ref, device), make_layer(dsa_ref, device, index_topk=3)]
    calls = [counted(layer) for layer in layers]
    seen = []
    for layer in layers:  # what attention was given, pass by pass
        attend = layer.ops.sparse_attention

        def spy(q, kv, indices, *args, attend=attend, layer=layer):
            seen.append(indices)
            return attend(q, kv, indices, *args)

        layer.ops.sparse_attention = spy

    def both(x, positions):
        return layers[1](layers[0](x, positions), positions)

    losses = []
    for seed in (1, 2):
        _, positions = tokens(layers[0])
        x = normal(T, TINY.dim, seed=seed, device=device).requires_grad_()
        losses.append(language_loss(checkpoint(both, x, positions, use_reentrant=reentrant)))
    first, second = seen[:2], seen[2:4]
    assert selected(first[0]) != selected(second[0])
    losses[1].backward(retain_graph=True)
    losses[0].backward()
    losses[1].backward()
    assert [len(one) for one in calls] == [2, 2]
    repeats = [*second, *first, *second]
    assert all(one is other for one, other in zip(seen[4:], repeats, strict=True))


def test_nested_checkpoints_select_once(device):
    layer = make_layer(dsa_ref, device)
    calls = counted(layer)
    inner = lambda *args: checkpoint(layer, *args, use_reentrant=False)  # noqa: E731
    gradients(layer, "sparse", lambda _, *args: checkpoint(inner, *args, use_reentrant=False))
    assert len(calls) == 1
