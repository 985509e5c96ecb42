"""MHA mode for rows that are a part of the tokens: flash attention over runs, each with its own keys.

On a CPU, flash attention is replaced by what it is documented to compute; on a GPU it is itself.
"""

import importlib
import itertools

import pytest
import rungs
import torch
from conftest import NEEDS_TRITON
from inputs import assert_close, normal

import dsa_ref
from dsa_ref.parallel import Zigzag

pytestmark = pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)
if rungs.has_triton():
    import dsa_kernels

    module = importlib.import_module("dsa_kernels.mha_attention")  # its name in the package is the function's
    Run, runs_of = module.Run, module.runs_of

H, D, V = 3, 12, 8
SCALE = 0.3
SHARES = {  # lengths of packed sequences, ranks
    "one sequence on two": ([37], 2),
    "one sequence on three": ([37], 3),
    "packed, chunks that end inside of one": ([9, 20, 8], 2),
    "packed, chunks that end with one": ([8, 8, 8, 8], 2),
    "a rank with a single row": ([5], 3),
    "packed, many of a few tokens": ([2, 3] * 7, 2),
}


def shares_of(lengths, size):
    """For each rank that has rows: (rows, start, end), as a GatheredLayer gives them."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    for rank in range(size):
        rows = Zigzag(sum(lengths), size).rows(rank)
        if len(rows):
            yield rows, (rows - positions[rows]).int(), (rows + 1).int()


def inputs_of(T, S, dtype=torch.float32, device="cpu", heads=H, width=D, v_dim=V):
    shapes = (T, heads, width), (S, heads, width), (S, heads, v_dim)
    tensors = [normal(*shape, seed=i).to(device, dtype) for i, shape in enumerate(shapes)]
    return [x.requires_grad_() for x in tensors]


def results(ops, inputs, start, end, scale):
    """out, lse, and the gradients of q, k and v, of a sum that weighs every number of both."""
    out, lse = ops.mha_attention(*inputs, scale, None, start, end)
    weighed = [(x.double() * normal(*x.shape, seed=9 + i).to(x.device)).sum() for i, x in enumerate((out, lse))]
    return out, lse, *torch.autograd.grad(sum(weighed), inputs)


def probabilities(q, k, scale, lower_right):
    """[H, T, S] of one run, and its log-sum-exp [H, T]."""
    logits, (T, S) = torch.einsum("thd,shd->hts", q, k) * scale, (len(q), len(k))
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T if lower_right else 0)
    logits = logits.masked_fill(~seen, -torch.inf)
    return logits.softmax(dim=2), logits.logsumexp(dim=2)


def flash(lower_right):
    """(forward, backward) of torch's flash attention over runs, in fp64."""

    def parts(bounds_q, bounds_k):
        for bounds in zip(itertools.pairwise(bounds_q.tolist()), itertools.pairwise(bounds_k.tolist()), strict=True):
            yield [slice(*pair) for pair in bounds]

    def forward(q, k, v, bounds_q, bounds_k, longest_q, longest_k, dropout, causal, debug, scale):
        assert causal and not dropout and not debug and q.shape[2] == k.shape[2] == v.shape[2]
        assert (longest_q, longest_k) == (int(bounds_q.diff().max()), int(bounds_k.diff().max()))
        assert int(bounds_q[-1]) == len(q) and int(bounds_k[-1]) == len(k)
        out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q))
        for rows, keys in parts(bounds_q, bounds_k):
            p, lse[:, rows] = probabilities(q[rows].double(), k[keys].double(), scale, lower_right)
            out[rows] = torch.einsum("hts,shd->thd", p, v[keys].double()).to(q.dtype)
        return out, lse, None, None, None

    def backward(dout, q, k, v, out, lse, bounds_q, bounds_k, longest_q, longest_k, dropout, causal, *_, scale):
        dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float64) for x in (q, k, v))
        delta = (dout.double() * out.double()).sum(dim=2)
        for rows, keys in parts(bounds_q, bounds_k):
            p, _ = probabilities(q[rows].double(), k[keys].double(), scale, lower_right)
            of_p = torch.einsum("thd,shd->hts", dout[rows].double(), v[keys].double()) - delta[rows].T[..., None]
            dv[keys] = torch.einsum("hts,thd->shd", p, dout[rows].double())
            dq[rows] = torch.einsum("hts,shd->thd", p * of_p, k[keys].double()) * scale
            dk[keys] = torch.einsum("hts,thd->shd", p * of_p, q[rows].double()) * scale
        return tuple(x.to(q.dtype) for x in (dq, dk, dv))

    return forward, backward


@pytest.fixture
def flash_attention(monkeypatch):
    """Puts such a flash attention in the place of torch's, and returns the lists of runs that it is called for."""

    def put(lower_right=True):
        called, (forward, backward) = [], flash(lower_right)
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
        bounds_of = module.bounds_of
        monkeypatch.setattr(module, "bounds_of", lambda runs, device: called.append(runs) or bounds_of(runs, device))
        aligned = module.aligned_to_the_last_key.__wrapped__
        monkeypatch.setattr(
            module, "served_by_flash", lambda q, v, runs, S: module.on_themselves(runs, S) or aligned(q.device)
        )
        return called

    return put


@pytest.mark.parametrize("name", SHARES)
def test_rows_of_a_share_are_the_references(name, flash_attention):
    lengths, size = SHARES[name]
    called, probe = flash_attention(), [Run(0, 1, 0, 2)]
    for rows, start, end in shares_of(lengths, size):
        inputs = inputs_of(len(rows), sum(lengths))
        called.clear()
        got = results(dsa_kernels, inputs, start, end, SCALE)
        wanted = results(dsa_ref, inputs, start, end, SCALE)
        for one, other in zip(got, wanted, strict=True):
            assert_close(one, other, 1e-5)
        assert [runs for runs in called if runs != probe]  # by flash attention


@pytest.mark.parametrize("fault", ["bounds of rows alone", "the last copy's gradient", "upper left"])
def test_a_wrong_variant_is_found(fault, flash_attention, monkeypatch):
    flash_attention(lower_right=fault != "upper left")
    if fault == "upper left":
        monkeypatch.setattr(module, "served_by_flash", lambda *_: True)
    if fault == "the last copy's gradient":

        def written(dx, runs, like):
            total, first = torch.zeros_like(like), 0
            for run in runs:
                total[run.start : run.end] = dx[first : first + run.end - run.start]
                first += run.end - run.start
            return total

        monkeypatch.setattr(module, "added", written)
    if fault == "bounds of rows alone":
        monkeypatch.setattr(module, "keys_of", lambda x, runs: torch.cat([x[run.first : run.last] for run in runs]))
    rows, start, end = next(shares_of([37], 2))
    inputs = inputs_of(len(rows), 37)
    with pytest.raises(AssertionError):
        for one, other in zip(
            results(dsa_kernels, inputs, start, end, SCALE), results(dsa_ref, inputs, start, end, SCALE), strict=True
        ):
            assert_close(one, other, 1e-5)


def test_a_flash_attention_that_is_aligned_otherwise_is_not_taken(flash_attention):
    """Its own answer for one row and two keys tells."""
    called = flash_attention(lower_right=False)
    rows, start, end = next(shares_of([37], 2))
    inputs = inputs_of(len(rows), 37)
    for one, other in zip(
        results(dsa_kernels, inputs, start, end, SCALE), results(dsa_ref, inputs, start, end, SCALE), strict=True
    ):
        assert_close(one, other, 1e-5)
    assert called and all(runs == [Run(0, 1, 0, 2)] for runs in called)


@pytest.mark.parametrize("fault", [None, "keys that no row sees are forgotten"])
def test_rows_on_themselves_leave_keys_that_no_row_sees(fault, flash_attention, monkeypatch):
    """The first rows of a longer sequence, and two of one length, which would be a batch of half the keys each."""
    called = flash_attention()
    if fault:
        monkeypatch.setattr(module, "on_themselves", lambda runs, S: all(run[:2] == run[2:] for run in runs))
    for start, end in (([0, 0, 0], [1, 2, 3]), ([0, 0, 2, 2], [1, 2, 3, 4])):
        seen = torch.tensor(start, dtype=torch.int32), torch.tensor(end, dtype=torch.int32)
        inputs, runs = inputs_of(len(start), 8), runs_of(len(start), 8, *seen, True)
        called.clear()
        if fault:
            assert module.batch_of(runs, 8) > 0
            with pytest.raises(AssertionError):
                results(dsa_kernels, inputs, *seen, SCALE)
            continue
        assert module.batch_of(runs, 8) == 0
        for one, other in zip(
            results(dsa_kernels, inputs, *seen, SCALE), results(dsa_ref, inputs, *seen, SCALE), strict=True
        ):
            assert_close(one, other, 1e-5)
        assert runs in called


def test_keys_of_many_runs_are_few_copies():
    """One of each stretch of keys: a copy for each of thousands of short sequences would be as many launches."""
    runs = [Run(i, i + 2, 100 + i, 102 + i) for i in range(0, 50, 2)] + [Run(50, 52, 0, 9), Run(52, 60, 0, 17)]
    assert module.stretches_of(runs) == [(100, 150), (0, 9), (0, 17)]
    x = normal(200, 3, seed=0)
    assert torch.equal(module.keys_of(x, runs), torch.cat([x[run.start : run.end] for run in runs]))


def test_runs_are_found_in_ranges():
    def of(start, end, S=9, T=None):
        start, end = (None if bound is None else torch.tensor(bound, dtype=torch.int32) for bound in (start, end))
        return runs_of(T or len(start), S, start, end, True)

    assert of(None, None, S=5, T=5) == [Run(0, 5, 0, 5)] and of(None, None, T=5) is None
    assert of([0, 0, 0, 3, 3], None, S=5) == [Run(0, 3, 0, 3), Run(3, 5, 3, 5)]
    assert of([0, 0, 0, 0], [2, 3, 8, 9]) == [Run(0, 2, 0, 3), Run(2, 4, 0, 9)]
    assert of([0, 0, 4], [2, 3, 5]) == [Run(0, 2, 0, 3), Run(2, 3, 4, 5)]
    assert of([0, 3], [1, 3]) is None  # a row that sees nothing
    assert of([0] * 5, [9, 9, 9, 9, 9]) is None  # five copies of each key
    assert runs_of(2, 9, torch.zeros(2, dtype=torch.int32), None, True) is None
    assert runs_of(2, 2, torch.zeros(2, dtype=torch.int32), None, False) is None  # which may not be read


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attention_is_the_reference(device, name, deterministic):
    """V3.2's widths in bf16, and the small model's, in runs of hundreds of rows."""
    lengths, size = SHARES[name]
    lengths = [16 * length for length in lengths]
    torch.use_deterministic_algorithms(deterministic)
    try:
        for width, v_dim in ((192, 128), (48, 32)):
            for rows, start, end in shares_of(lengths, size):
                seen = start.to(device), end.to(device)
                inputs = inputs_of(len(rows), sum(lengths), torch.bfloat16, device, 4, width, v_dim)
                assert module.served_by_flash(
                    inputs[0], inputs[2], runs_of(len(rows), sum(lengths), *seen, True), sum(lengths)
                )
                got = results(dsa_kernels, inputs, *seen, width**-0.5)
                wide = [x.detach().float().requires_grad_() for x in inputs]
                wanted = results(dsa_ref, wide, *seen, width**-0.5)
                for one, other in zip(got, wanted, strict=True):
                    assert_close(one.float(), other, 3e-2)
    finally:
        torch.use_deterministic_algorithms(False)
