"""The indexer's loss as kernels: types, blocks of rows, the same bits every time, and no memory of size [T, S]."""

import pytest
import torch
from inputs import causal, normal, packed, ragged, random_indices
from torch.utils._python_dispatch import TorchDispatchMode

import dsa_kernels
import dsa_ref
from dsa_kernels import runtime
from dsa_kernels.indexer_loss import loss_and_gradients
from dsa_kernels.teach import kl, listed

SCALE = 0.1
SMALL = (16, 32, 8, 80)  # index heads, their dims, heads, their dims
V32 = (64, 128, 128, 576)


def inputs(T, S, sizes, dtype=torch.float32, seed=0, device="cpu"):
    Hi, Di, H, D = sizes
    q_idx, k_idx = normal(T, Hi, Di, seed=seed, dtype=dtype), normal(S, Di, seed=seed + 1, dtype=dtype)
    w = normal(T, Hi, seed=seed + 2) * (Hi * Di) ** -0.5
    q, kv = normal(T, H, D, seed=seed + 3, dtype=dtype), normal(S, D, seed=seed + 4, dtype=dtype)
    return [x.to(device) for x in (q_idx, k_idx, w, q, kv)]


def run(ops, args, *others, **named):
    """(the loss, its gradients with respect to q_idx, k_idx and w)."""
    leaves = [x.detach().clone().requires_grad_() for x in args[:3]]
    loss = ops.indexer_loss(*leaves, *args[3:], SCALE, *others, **named)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def assert_near(got, wanted, tolerance):
    """The largest error is at most `tolerance` of the largest number."""
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = a.double(), b.double()
        assert a.isfinite().all() and float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def assert_same(got, wanted):
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("sparse", (False, True))
def test_narrow_types(dtype, sparse, device, poisoned):
    args = inputs(9, 70, SMALL, dtype, device=device)
    lists = random_indices(9, 70, 20, device=device) if sparse else None
    assert_near(run(dsa_kernels, args, lists), run(dsa_ref, args, lists), 1e-2)


def test_one_type_a_side(device):
    """The indexer's side may be of another type than attention's, and w of a third."""
    q_idx, k_idx, w, q, kv = inputs(5, 20, SMALL, torch.bfloat16, device=device)
    args = q_idx, k_idx, w.bfloat16(), q.half(), kv.half()
    assert_near(run(dsa_kernels, args), run(dsa_ref, args), 1e-2)


@pytest.mark.parametrize("sparse", (False, True))
@pytest.mark.parametrize("most", (1, 64 * 3))
def test_blocks_of_rows(monkeypatch, sparse, most, device, poisoned):
    """One row at a time, a few, a few more: what a row gets is the same, what keys get adds up.

    To the bit over lists. Over ranges, a tile's rows share the key at which they begin, and on some processors a sum
    of 30 numbers depends on where in the tile they stand.
    """
    args, (start, end) = inputs(8, 30, (3, 8, 2, 12), device=device), ragged(8, 30, device=device)
    lists = random_indices(8, 30, 7, device=device) if sparse else None
    wanted = run(dsa_kernels, args, lists, start, end)
    monkeypatch.setattr(runtime, "PAIRS_AT_ONCE", most)
    monkeypatch.setattr(runtime, "SHARES_AT_ONCE", most)
    got = run(dsa_kernels, args, lists, start, end)
    assert_near(got, wanted, 1e-6)
    if sparse:
        assert_same((got[1], got[3]), (wanted[1], wanted[3]))


@pytest.mark.parametrize("sparse", (False, True))
def test_the_same_bits_every_time(sparse, device, poisoned):
    args = inputs(4, 40, SMALL, torch.bfloat16, device=device)
    lists = random_indices(4, 40, 9, device=device) if sparse else None
    first = run(dsa_kernels, args, lists)
    assert_same(run(dsa_kernels, args, lists), first)


@pytest.mark.parametrize("sparse", (False, True))
def test_without_gradients_nothing_is_computed_for_them(monkeypatch, sparse, device):
    args = inputs(4, 9, (3, 8, 2, 12), device=device)
    lists = random_indices(4, 9, 5, device=device) if sparse else None
    loss = run(dsa_kernels, args, lists)[0]

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(kl, "queries", never)
    monkeypatch.setattr(listed, "gradients", never)
    with torch.no_grad():
        assert torch.equal(dsa_kernels.indexer_loss(*args, SCALE, lists), loss)
    leaf = args[2].requires_grad_()
    with pytest.raises(AssertionError):
        dsa_kernels.indexer_loss(*args[:2], leaf, *args[3:], SCALE, lists)


@pytest.mark.parametrize("S, counted", ((40, True), (300, False)))
def test_each_key_gets_its_shares_in_the_order_of_the_queries(S, counted, device, poisoned):
    """Over several words of 32 queries, by marks where lists are long and by a sort where keys are many."""
    T, k, Di = 70, 7, SMALL[1]
    q_idx, k_idx, w, *_ = inputs(T, S, SMALL, device=device)
    lists, (start, end) = random_indices(T, S, k, device=device), ragged(T, S, device=device)
    shares, dq, dw = torch.full((T * k, Di), torch.nan, device=device), torch.empty_like(q_idx), torch.empty_like(w)
    of_rows = q_idx, k_idx, w, lists, start, end
    *_, of_scores, marks = listed.rows(*of_rows, torch.rand(T, k, device=device), True)
    order, bounds = listed.gradients(*of_rows, of_scores, marks, dq, dw, shares)
    assert (order is None) == counted
    wanted, begins = [], [0]
    for s in range(S):
        for t, j in (lists == s).nonzero().tolist():
            if start[t] <= s < end[t]:
                gates = (q_idx[t] @ k_idx[s] > 0) * w[t]
                wanted.append(of_scores[t, j] * (gates @ q_idx[t]))
        begins.append(len(wanted))
    assert (bounds - bounds[0]).tolist() == begins
    got = shares[bounds[0] : bounds[-1]] if counted else shares[order[bounds[0] : bounds[-1]]]
    assert_near([got], [torch.stack(wanted)], 1e-5)
    assert int(shares[:, 0].isfinite().sum()) == len(wanted)  # and nothing else is written


def test_padding_that_no_row_sees_may_hold_anything(device):
    """Keys outside of all ranges, or in no list, and rows that see nothing."""
    args, (start, end) = inputs(6, 12, (3, 8, 2, 12), device=device), ragged(6, 9, device=device)
    for lists in (None, random_indices(6, 9, 4, device=device)):
        wanted = run(dsa_kernels, args, lists, start, end)
        spoilt = [x.clone() for x in args]
        nothing = start >= end
        assert nothing.any()
        for i, rows in enumerate((nothing, slice(9, 12), nothing, nothing, slice(9, 12))):
            spoilt[i][rows] = torch.nan
        assert_same(run(dsa_kernels, spoilt, lists, start, end), wanted)


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that an operator returned. It does not see into operators of our own."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.dtype != torch.uint8:  # the interpreter copies bytes
                self.numbers = max(self.numbers, x.numel())
        return out


@pytest.mark.parametrize("most, whole", ((1500, False), (1 << 26, True)))
def test_no_tensor_of_all_pairs(monkeypatch, most, whole, device):
    """Whatever is allocated is as large as an input or a block of rows; the count does find one of all pairs."""
    T, S = 12, 448
    monkeypatch.setattr(runtime, "PAIRS_AT_ONCE", most)
    args = inputs(T, S, (1, 8, 1, 8), device=device)
    with Largest() as largest:
        loss_and_gradients(*args, SCALE, None, *causal(T, S, device), None, None, True)
    assert max(x.numel() for x in args) < T * S
    assert (largest.numbers >= T * S) == whole


def test_packed_rows_take_the_memory_of_their_own_keys(device):
    """The buffer is as wide as the longest range, wherever it begins."""
    T = 256
    args, (start, end, _) = inputs(T, T, (1, 8, 1, 8), device=device), packed(*[32] * 8, device=device)
    with Largest() as largest:
        loss_and_gradients(*args, SCALE, None, start, end, None, None, True)
    assert largest.numbers >= T * 64
    assert largest.numbers < T * T / 2


def test_ranges_that_may_not_be_read(device):
    """As while a CUDA graph is captured: the buffer is then as wide as all keys, and the results are the same."""
    args, (start, end) = inputs(6, 90, (3, 8, 2, 12), device=device), ragged(6, 90, device=device)
    read = loss_and_gradients(*args, SCALE, None, start, end, None, None, True)
    with dsa_ref.contracts.unchecked_values(), Largest() as largest:
        unread = loss_and_gradients(*args, SCALE, None, start, end, None, None, True)
    assert_same(unread, read)
    assert largest.numbers >= 6 * 128


# Full size ------------------------------------------------------------------------------------------------------------


def causal_lists(T, S, k, device):
    """Random index lists below each query's own place, the queries last."""
    places = torch.arange(S - T, S, device=device)[:, None]
    lots = torch.rand(T, S, device=device).masked_fill_(torch.arange(S, device=device) > places, -1.0)
    best = lots.topk(k, dim=1)
    return best.indices.masked_fill(best.values < 0, -1).int()


@pytest.mark.gpu
@pytest.mark.parametrize("sparse", (False, True))
def test_full_size(sparse, poisoned):
    """V3.2's sizes in bf16 against the reference, some rows of them; then the same bits 20 times, and memory."""
    T, S, k = 2048, 8192, 2048
    args = inputs(T, S, V32, torch.bfloat16, device="cuda")
    lists = causal_lists(T, S, k, "cuda") if sparse else None
    few = slice(T - 24, T)
    part = [x[few] if len(x) == T else x for x in args]
    end = torch.arange(S - 24, S, dtype=torch.int32, device="cuda") + 1
    some = lists[few] if sparse else None
    start = torch.zeros_like(end)
    assert_near(run(dsa_kernels, part, some, start, end), run(dsa_ref, part, some, start, end), 2e-2)
    first = run(dsa_kernels, args, lists)
    for _ in range(20):
        assert_same(run(dsa_kernels, args, lists), first)


@pytest.mark.gpu
@pytest.mark.parametrize("sparse", (False, True))
def test_memory_at_full_size(sparse):
    """[T, S] of the warm-up alone would take 4 GiB in fp32; the sparse stage's rows of keys 16 GiB."""
    T, S, k = 32768, 32768, 2048
    args = inputs(T, S, SMALL, torch.bfloat16, device="cuda")
    lists = torch.arange(k, dtype=torch.int32, device="cuda").expand(T, k).contiguous() if sparse else None
    target = torch.full((T, k), 1 / k, device="cuda") if sparse else None
    run(dsa_kernels, inputs(64, 64, SMALL, torch.bfloat16, device="cuda"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side = [*args[:3], None, None, None] if sparse else [*args, SCALE]
    leaves = [x.requires_grad_() for x in side[:3]]
    dsa_kernels.indexer_loss(*leaves, *side[3:], lists, target=target).backward()
    assert torch.cuda.max_memory_allocated() - before < 2.5 * 2**30
