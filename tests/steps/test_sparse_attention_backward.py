"""The gradient of sparse attention against autograd and differences in float64, and what it may not depend on."""

import pytest
import torch
from inputs import assert_close, assert_same_bits, normal, random_indices, strided
from torch.utils.checkpoint import checkpoint

import dsa_ref
from dsa_ref.sparse_attention_backward import sparse_attention_backward_loops

# T, S, H, D, v_dim, k: no power of two, v_dim = D, one head, more places than keys, several tiles of keys and heads
SHAPES = [
    (1, 1, 1, 16, 16, 1),
    (37, 37, 3, 40, 24, 9),
    (5, 64, 4, 40, 40, 70),
    (3, 50, 17, 72, 64, 33),
    (1, 530, 1, 20, 12, 520),
]


def inputs(T, S, H, D, v_dim, k, seed=0, dtype=torch.float32, device="cpu", scale=None):
    """Arguments of the backward pass by name; out and lse are those of float64, rounded."""
    q, kv = normal(T, H, D, seed=seed, dtype=dtype), normal(S, D, seed=seed + 1, dtype=dtype)
    given = {"q": q, "kv": kv, "indices": random_indices(T, S, k, seed=seed), "scale": scale or D**-0.5, "v_dim": v_dim}
    out, lse = dsa_ref.sparse_attention(q.double(), kv.double(), given["indices"], given["scale"], v_dim)
    given |= {"out": out.to(dtype), "lse": lse.float()}
    given |= {"dout": normal(T, H, v_dim, seed=seed + 2, dtype=dtype), "dlse": normal(T, H, seed=seed + 3)}
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}


def written_out(given, without=""):
    """(dq, dkv, target) in float64 by autograd through a softmax written out, one row at a time.

    without: a part that is left out, as a mistake would.
    """
    given = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    q, kv = (given[name].double().requires_grad_() for name in ("q", "kv"))
    value = kv.detach() if without == "value" else kv
    target, total = torch.zeros(given["indices"].shape, dtype=torch.float64), (q.sum() + kv.sum()) * 0.0
    for t, row in enumerate(given["indices"].long()):
        there = row >= 0
        keys = row[there]
        if len(keys):
            logits = given["scale"] * q[t] @ kv[keys].T
            p = logits.softmax(dim=-1)
            if without == "delta":  # as if the softmax's sum were a constant
                used = (logits - logits.detach().logsumexp(dim=-1, keepdim=True)).exp()
            else:
                used = p
            total = total + (used @ value[keys, : given["v_dim"]] * given["dout"][t].double()).sum()
            if given["dlse"] is not None and without != "dlse":
                total = total + (logits.logsumexp(dim=-1) * given["dlse"][t].double()).sum()
            target[t, there] = p.detach().mean(dim=0)
    return *torch.autograd.grad(total, (q, kv)), target


def check(ops, given, tolerance, wanted=None, **options):
    results = ops.sparse_attention_backward(**given, **options)
    q, kv, indices = given["q"], given["kv"], given["indices"]
    for got, like in zip(results[:2], (q, kv), strict=True):
        assert got.dtype == like.dtype and got.shape == like.shape
    assert results[2].dtype == torch.float32 and results[2].shape == indices.shape
    assert (results[2][indices < 0] == 0).all()
    for got, value in zip(results, wanted or written_out(given), strict=True):
        assert_close(got, value, tolerance)
    assert_close(results[2].sum(dim=1), (indices >= 0).any(dim=1).double(), min(tolerance, 1e-4))
    return results


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed, sums", ((0, "sorted"), (1, "atomic")))
def test_against_autograd(ops, device, poisoned, small_blocks, shape, seed, sums):
    check(ops, inputs(*shape, seed, device=device), 5e-6, sums=sums)


@pytest.mark.parametrize("without", ("delta", "value", "dlse"))
def test_a_gradient_that_lacks_a_part_is_found(without):
    given = inputs(*SHAPES[1])
    check(dsa_ref, given, 1e-5)
    with pytest.raises(AssertionError, match="not close"):
        check(dsa_ref, given, 0.03, wanted=written_out(given, without))


@pytest.mark.parametrize("form", ("loops", "reference"))
def test_against_differences(form):
    """In float64, along random directions of q and of kv, by both results of the forward pass."""
    given = inputs(4, 9, 2, 10, 6, 5)
    given = {name: x.double() if name in ("q", "kv", "dout", "dlse") else x for name, x in given.items()}
    fixed = {name: given[name] for name in ("indices", "scale", "v_dim")}

    def loss(q, kv):
        out, lse = dsa_ref.sparse_attention(q, kv, **fixed)
        return float((out * given["dout"]).sum() + (lse * given["dlse"])[1:].sum())  # row 0 has no key

    q, kv = given["q"], given["kv"]
    given["out"], given["lse"] = dsa_ref.sparse_attention(q, kv, **fixed)
    if form == "loops":
        arrays = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        dq, dkv, _ = (torch.from_numpy(x) for x in sparse_attention_backward_loops(**arrays))
    else:
        dq, dkv, target = dsa_ref.sparse_attention_backward(**given)
        assert target.dtype == torch.float64
    for seed in range(3):
        a, b = normal(*q.shape, seed=seed + 10).double(), normal(*kv.shape, seed=seed + 20).double()
        for of_q, of_kv, wanted in ((1e-5, 0.0, (dq * a).sum()), (0.0, 1e-5, (dkv * b).sum())):
            sides = [loss(q + side * of_q * a, kv + side * of_kv * b) for side in (1, -1)]
            assert (sides[0] - sides[1]) / 2e-5 == pytest.approx(float(wanted), rel=1e-7)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_narrow_inputs(ops, device, poisoned, dtype, tolerance):
    check(ops, inputs(9, 64, 4, 72, 64, 33, dtype=dtype, device=device), tolerance)


def test_without_a_gradient_of_the_log_sum_exp(ops, device, poisoned):
    given = inputs(9, 20, 3, 40, 24, 9, device=device) | {"dlse": None}
    results = check(ops, given, 5e-6)
    zeros = ops.sparse_attention_backward(**given | {"dlse": torch.zeros_like(given["lse"])})
    for got, value in zip(results, zeros, strict=True):
        assert_same_bits(got, value)


def test_nothing_selected(ops, device, poisoned):
    given = inputs(3, 9, 2, 40, 24, 5, device=device)
    given["indices"].fill_(-1), given["out"].zero_(), given["lse"].fill_(-torch.inf)
    assert [float(x.abs().max()) for x in ops.sparse_attention_backward(**given)] == [0.0, 0.0, 0.0]


def test_every_query_selects_the_same_key(ops, device, poisoned):
    """One row of dkv takes all the sums; 1 is the probability of a key that is alone."""
    given = inputs(37, 9, 2, 40, 24, 5, device=device)
    given["indices"].fill_(-1)
    given["indices"][:, 3] = 4
    out, lse = dsa_ref.sparse_attention(*(given[name] for name in ("q", "kv", "indices", "scale", "v_dim")))
    _, dkv, target = check(ops, given | {"out": out, "lse": lse}, 1e-5)
    assert (dkv[:4] == 0).all() and (dkv[5:] == 0).all() and (dkv[4] != 0).all()
    assert_close(target[:, 3], torch.ones(37), 1e-5)


def test_unselected_rows_are_never_read(ops, device):
    given = inputs(3, 9, 2, 40, 24, 5, device=device)
    given["indices"] = torch.tensor([[3, -1, 5, -1, -1], [5, 6, 3, -1, -1], [-1] * 5], dtype=torch.int32, device=device)
    names = ("q", "kv", "indices", "scale", "v_dim")
    given["out"], given["lse"] = dsa_ref.sparse_attention(*(given[name] for name in names))
    wanted = ops.sparse_attention_backward(**given)
    given["kv"][[0, 1, 2, 4, 7, 8]] = torch.nan
    for got, value in zip(ops.sparse_attention_backward(**given), wanted, strict=True):
        assert_same_bits(got, value)


@pytest.mark.parametrize("name", ("q", "dout", "lse", "dlse"))
def test_nan_shows_in_its_own_row_and_its_keys_and_nowhere_else(ops, device, name):
    given = inputs(9, 64, 2, 40, 24, 5, device=device)
    wanted = ops.sparse_attention_backward(**given)
    given[name][4, 1] = torch.nan
    dq, dkv, target = ops.sparse_attention_backward(**given)
    assert dq[4, 1].isnan().all() and int(dq.isnan().any(dim=-1).sum()) == 1
    keys = {s for s in given["indices"][4].tolist() if s >= 0}
    assert set(dkv.isnan().any(dim=1).nonzero().flatten().tolist()) == keys
    others = [s for s in range(64) if s not in keys]
    assert_close(dkv[others], wanted[1][others], 1e-6)
    rows = [t for t in range(9) if t != 4 or name in ("dout", "dlse")]
    assert_same_bits(target[rows], wanted[2][rows])


@pytest.mark.parametrize("scale", (30.0, 1e-6))
def test_extreme_logits(ops, device, scale):
    """Logits in the thousands: P keeps the precision of the log-sum-exp, 2^-24 of it. A tiny scale: P is even."""
    given = inputs(9, 64, 2, 40, 24, 33, device=device, scale=scale)
    results = check(ops, given, 2e-3 if scale > 1 else 5e-6)
    assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize("k", (120, 2048))
def test_lists_longer_than_s(ops, device, poisoned, k):
    """Wherever a list's indices stand, each counts, and has its place in the target."""
    S = 37
    indices = torch.full((4, k), -1, dtype=torch.int32)
    indices[0, :S], indices[1, 0 : 3 * S : 3] = torch.arange(S), torch.arange(S - 1, -1, -1)
    indices[2, -2:] = torch.tensor([36, 4])
    given = inputs(4, S, 3, 40, 24, 5, device=device) | {"indices": indices.to(device)}
    names = ("q", "kv", "indices", "scale", "v_dim")
    given["out"], given["lse"] = dsa_ref.sparse_attention(*(given[name] for name in names))
    check(ops, given, 1e-5)


def test_strided_input(ops, device):
    given = inputs(9, 20, 2, 40, 24, 13, device=device)
    wanted = ops.sparse_attention_backward(**given)
    given = {name: strided(x) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    for got, value in zip(ops.sparse_attention_backward(**given), wanted, strict=True):
        assert_close(got, value, 1e-6)


@pytest.mark.rungs("reference", "kernels")
def test_no_queries(ops, device, poisoned):
    dq, dkv, target = ops.sparse_attention_backward(**inputs(0, 9, 2, 40, 24, 5, device=device))
    assert dq.shape == (0, 2, 40) and target.shape == (0, 5) and dkv.shape == (9, 40) and (dkv == 0).all()


@pytest.mark.rungs("reference", "kernels")
def test_the_same_bits_each_time(ops, device, poisoned, small_blocks):
    given = inputs(20, 20, 3, 40, 24, 9, device=device)
    first = ops.sparse_attention_backward(**given)
    for got, value in zip(ops.sparse_attention_backward(**given), first, strict=True):
        assert_same_bits(got, value)


@pytest.mark.rungs("kernels")
def test_variants(ops, device):
    given = inputs(5, 12, 3, 40, 24, 9, device=device)
    wanted = ops.sparse_attention_backward(**given)
    for got, value in zip(ops.sparse_attention_backward(**given, variant="portable"), wanted, strict=True):
        assert_same_bits(got, value)
    for variant in ("hopper", "fastest"):  # it wants bf16 and other sizes; there is no such thing
        with pytest.raises(ValueError, match="variant"):
            ops.sparse_attention_backward(**given, variant=variant)


# The probe ------------------------------------------------------------------------------------------------------------


def probed(given, probe, run=dsa_ref.sparse_attention, factor=1.0):
    """Gradients of q, kv and the probe, of `factor` times a loss of both results."""
    q, kv = (given[name].clone().requires_grad_() for name in ("q", "kv"))
    out, lse = run(q, kv, given["indices"], given["scale"], given["v_dim"], probe)
    loss = (out * given["dout"]).sum() + (lse * given["dlse"])[lse > -torch.inf].sum()
    (factor * loss).backward()
    return q.grad, kv.grad, None if probe is None else probe.grad


def checkpointed(*arguments):
    return checkpoint(dsa_ref.sparse_attention, *arguments, use_reentrant=False)


@pytest.mark.parametrize("run", (dsa_ref.sparse_attention, checkpointed))
def test_a_probe_receives_the_target_whatever_the_loss(device, small_blocks, run):
    given = inputs(*SHAPES[1], device=device)
    plain = probed(given, None)
    target = written_out(given)[2]
    for factor in (1.0, -3.0, 0.0):
        probe = torch.full(given["indices"].shape, torch.nan, device=device, requires_grad=True)
        dq, dkv, got = probed(given, probe, run, factor)
        assert_close(dq, factor * plain[0], 1e-5)
        assert_close(dkv, factor * plain[1], 1e-5)
        assert_close(got, target, 1e-6)


def test_a_probe_of_frozen_inputs_and_one_that_wants_nothing(device):
    given = inputs(*SHAPES[1], device=device)
    names = ("q", "kv", "indices", "scale", "v_dim")
    arguments = [given[name] for name in names]
    probe = torch.zeros(given["indices"].shape, device=device, requires_grad=True)
    dsa_ref.sparse_attention(*arguments, probe)[1][1:].sum().backward()
    assert_close(probe.grad, written_out(given)[2], 1e-6)
    with torch.no_grad():
        assert not dsa_ref.sparse_attention(*arguments, probe)[0].requires_grad
    q = given["q"].double().requires_grad_()  # still differentiable twice, as no gradient is asked of the probe
    out, _ = dsa_ref.sparse_attention(q, given["kv"].double(), *arguments[2:], probe.detach())
    (grown,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    assert torch.autograd.grad(grown.sum(), q)[0].abs().max() > 0


def test_gradients_beside_a_probe_are_not_differentiable_again(device):
    given = inputs(*SHAPES[1], device=device)
    probe = torch.zeros(given["indices"].shape, device=device, requires_grad=True)
    q = given["q"].requires_grad_()
    out, _ = dsa_ref.sparse_attention(q, given["kv"], given["indices"], given["scale"], given["v_dim"], probe)
    (grown,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grown.sum().backward()


@pytest.mark.parametrize("probe", (torch.zeros(37, 8), torch.zeros(36, 9), torch.zeros(37, 9).double(), 1.0))
def test_a_wrong_probe_is_named(probe):
    given = inputs(*SHAPES[1])
    with pytest.raises((TypeError, ValueError), match="probe must"):
        dsa_ref.sparse_attention(given["q"], given["kv"], given["indices"], 0.2, 24, probe)
