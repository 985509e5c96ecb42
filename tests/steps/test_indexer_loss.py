"""The indexer's loss against `kl_div` in float64, its gradient softmax(I) - p, and what it must not touch."""

import pytest
import torch
from inputs import assert_close, in_range, index_inputs, normal, packed, ragged, random_indices

from dsa_ref import indexer_loss, indexer_loss_loops

pytestmark = pytest.mark.rungs("loops", "reference")
SCALE = 0.3


def inputs(T, S, seed=0, device="cpu"):
    """q_idx, k_idx, w, q, kv: 3 index heads of 8, 2 heads of 12."""
    q_idx, k_idx, w, _ = index_inputs(normal, T, S, 3, 8, seed=seed, device=device)
    return (
        q_idx,
        k_idx,
        w * 0.3,
        normal(T, 2, 12, seed=seed + 5, device=device),
        normal(S, 12, seed=seed + 6, device=device),
    )


def support(T, S, indices=None, start=None, end=None):
    mask = in_range(T, S, start, end)
    if indices is not None:
        picked = torch.zeros(T, S + 1, dtype=torch.bool).scatter_(1, indices.cpu().long() % (S + 1), True)
        mask &= picked[:, :S]
    return mask


def written_out(q_idx, k_idx, w, q, kv, indices=None, start=None, end=None):
    """The loss and its gradient with respect to I [T, S], float64, from masked softmaxes."""
    q_idx, k_idx, w, q, kv = (x.detach().cpu().double() for x in (q_idx, k_idx, w, q, kv))
    mask = support(len(q), len(kv), indices, start, end)
    scores = torch.einsum("ths,th->ts", torch.einsum("thd,sd->ths", q_idx, k_idx).relu(), w)
    logits = torch.einsum("thd,sd->ths", q, kv) * SCALE
    alive = mask.any(dim=1)
    p = logits.masked_fill(~mask[:, None], -torch.inf)[alive].softmax(dim=-1).sum(dim=1)
    p = p / p.sum(dim=1, keepdim=True)
    guess = scores.masked_fill(~mask, -torch.inf)[alive].softmax(dim=-1)
    terms = torch.where(p > 0, p * (p / guess).log(), 0.0)
    gradient = torch.zeros_like(scores)
    gradient[alive] = (guess - p) / alive.sum().clamp(min=1)
    return terms.sum() / alive.sum().clamp(min=1), gradient


@pytest.mark.parametrize("T, S", [(1, 1), (1, 20), (13, 13), (5, 30)])
@pytest.mark.parametrize("sparse", (False, True))
def test_against_the_definition(ops, device, small_blocks, T, S, sparse):
    args = inputs(T, S, device=device)
    indices = random_indices(T, S, 6, device=device) if sparse else None  # future keys in them do not count
    assert_close(ops.indexer_loss(*args, SCALE, indices), written_out(*args, indices)[0], 1e-6)


@pytest.mark.parametrize("sparse", (False, True))
@pytest.mark.parametrize("T, S", [(14, 14), (20, 9)])
def test_ranges(ops, device, small_blocks, T, S, sparse):
    """Rows without a key, by their range or by their selection, count neither above nor below the fraction line."""
    args, (start, end) = inputs(T, S, device=device), ragged(T, S, device=device)
    indices = random_indices(T, S, 6, device=device) if sparse else None
    loss = ops.indexer_loss(*args, SCALE, indices, start, end)
    assert_close(loss, written_out(*args, indices, start, end)[0], 1e-6)
    kept = support(T, S, indices, start, end).any(dim=1)
    rows = [x[kept] for x in (args[0], args[2], args[3])]
    picked = None if indices is None else indices[kept]
    assert_close(
        ops.indexer_loss(rows[0], args[1], *rows[1:], args[4], SCALE, picked, start[kept], end[kept]), loss, 1e-6
    )


def test_packed_is_the_mean_over_rows(ops, device):
    args, (start, end, _) = inputs(12, 12, device=device), packed(4, 8, device=device)
    parts = [ops.indexer_loss(*(x[rows] for x in args), SCALE) for rows in (slice(0, 4), slice(4, 12))]
    assert_close(ops.indexer_loss(*args, SCALE, None, start, end), (4 * parts[0] + 8 * parts[1]) / 12, 1e-6)


def test_selecting_everything_is_the_warm_up(ops, device):
    args = inputs(9, 9, device=device)
    everything = torch.arange(9, dtype=torch.int32, device=device).expand(9, 9)
    assert_close(ops.indexer_loss(*args, SCALE, everything), ops.indexer_loss(*args, SCALE), 1e-6)


def test_only_the_support_matters(ops, device):
    """Keys of the future, and in the sparse stage keys not selected, may change without a trace."""
    q_idx, k_idx, w, q, kv = inputs(6, 10, device=device)
    indices = torch.tensor([[1, 3, -1]] * 6, dtype=torch.int32, device=device)
    end = torch.full((6,), 7, dtype=torch.int32, device=device)
    for picked, rows in ((None, [7, 8, 9]), (indices, [0, 2, 4, 5, 6, 7, 8, 9])):
        before = ops.indexer_loss(q_idx, k_idx, w, q, kv, SCALE, picked, end=end)
        other_k_idx, other_kv = k_idx.clone(), kv.clone()
        other_k_idx[rows] += 3.0
        other_kv[rows] += 3.0
        assert_close(ops.indexer_loss(q_idx, other_k_idx, w, q, other_kv, SCALE, picked, end=end), before, 1e-6)
        other_kv[3] += 3.0
        assert abs(ops.indexer_loss(q_idx, k_idx, w, q, other_kv, SCALE, picked, end=end) - before) > 1e-3


def direct_scores(scores, device="cpu"):
    """Indexer inputs whose score is `scores` (positive) itself: unit keys, one head, weight 1."""
    T, S = scores.shape
    return scores[:, None, :], torch.eye(S, device=device), torch.ones(T, 1, device=device)


def test_a_perfect_indexer_has_no_loss(ops, device):
    """I = ln p plus any constant a row; with one head p is the attention itself. The reversed KL would not tell."""
    q, kv = normal(6, 1, 12, device=device), normal(6, 12, seed=1, device=device)
    logits = torch.einsum("thd,sd->ts", q, kv) * SCALE
    shift = 20 + normal(6, 1, seed=2, device=device)
    assert_close(ops.indexer_loss(*direct_scores(logits + shift, device), q, kv, SCALE), 0.0, 1e-6)
    assert ops.indexer_loss(*direct_scores(1.3 * logits + shift, device), q, kv, SCALE) > 1e-3


@pytest.mark.parametrize("sparse", (False, True))
def test_gradient_is_softmax_minus_target(device, small_blocks, sparse):
    """By autograd, and by finite differences of the loop form."""
    T, S, step = 5, 8, 1e-4
    scores = (normal(T, S, device=device) + 9).requires_grad_()
    q, kv = normal(T, 2, 12, device=device, seed=1), normal(S, 12, device=device, seed=2)
    indices = random_indices(T, S, 4, device=device) if sparse else None
    indexer_loss(*direct_scores(scores, device), q, kv, SCALE, indices).backward()
    _, wanted = written_out(*direct_scores(scores, device), q, kv, indices)
    assert_close(scores.grad, wanted, 1e-6)
    assert wanted.abs().max() > 0.01

    arrays = [x.detach().cpu().double().numpy() for x in (*direct_scores(scores, device), q, kv)]
    chosen = None if indices is None else indices.cpu().numpy()
    for t, s in ((0, 0), (4, 2), (4, 7), (2, 5)):
        values = []
        for sign in (1, -1):
            moved = arrays[0].copy()
            moved[t, 0, s] += sign * step
            values.append(indexer_loss_loops(moved, *arrays[1:], SCALE, chosen))
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(wanted[t, s]), abs=1e-6)


@pytest.mark.parametrize("sparse", (False, True))
def test_gradient_reaches_the_indexer_alone(device, sparse):
    args = [x.requires_grad_() for x in inputs(7, 7, device=device)]
    indices = random_indices(7, 7, 3, device=device) if sparse else None
    indexer_loss(*args, SCALE, indices).backward()
    q_idx, k_idx, w, q, kv = args
    assert q.grad is None and kv.grad is None
    for x in (q_idx, k_idx, w):
        assert x.grad.isfinite().all() and x.grad.abs().max() > 0


@pytest.mark.parametrize("sparse", (False, True))
def test_no_row_has_a_key(ops, device, sparse):
    args = [x.requires_grad_() for x in inputs(3, 4, device=device)]
    nothing = torch.zeros(3, dtype=torch.int32, device=device)
    indices = torch.tensor([[1, 2]] * 3, dtype=torch.int32, device=device) if sparse else None
    loss = ops.indexer_loss(*args, SCALE, indices, nothing, nothing)
    assert loss == 0
    if loss.requires_grad:
        loss.backward()
        assert all(x.grad is None or (x.grad == 0).all() for x in args)


@pytest.mark.parametrize("sparse", (False, True))
def test_bad_input(device, sparse):
    q_idx, k_idx, w, q, kv = inputs(4, 5, device=device)
    indices = random_indices(4, 5, 3, device=device) if sparse else None
    for error, name, args in (
        (ValueError, "scale must", (q_idx, k_idx, w, q, kv, float("nan"))),
        (ValueError, "scale must", (q_idx, k_idx, w, q, kv, -1.0)),
        (TypeError, "q must", (q_idx, k_idx, w, q.int(), kv, SCALE)),
        (TypeError, "kv must", (q_idx, k_idx, w, q, kv.half(), SCALE)),
        (TypeError, "q_idx must", (q_idx.to(torch.float8_e4m3fn), k_idx.to(torch.float8_e4m3fn), w, q, kv, SCALE)),
    ):
        with pytest.raises(error, match=name):
            indexer_loss(*args, indices)
