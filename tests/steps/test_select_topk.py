"""The selection contract: which indices, how many, which of equal scores, and at which length of row."""

import numpy as np
import pytest
import torch
from inputs import best, normal, packed, ragged, selected, small_integers, strided

MANY = 2048


def spread(*shape, seed=0):
    """Scores over the whole range of fp32, negative and positive, denormals too."""
    return normal(*shape, seed=seed) * torch.exp2(normal(*shape, seed=seed + 1) * 40)


DISTRIBUTIONS = {
    "normal": normal,
    "spread": spread,
    "all tied": lambda *shape: torch.full(shape, 1.5),
    "few values": small_integers,
    "zeros of both signs": lambda *shape: small_integers(*shape, largest=1) * 0.0,
    "last bit": lambda *shape: torch.exp2(torch.tensor(-23.0)) * small_integers(*shape, largest=50) + 1.0,
    "minus infinity": lambda *shape: torch.where(normal(*shape) > 1.0, normal(*shape, seed=1), -torch.inf),
    "plus infinity": lambda *shape: torch.where(normal(*shape) > 1.0, torch.inf, normal(*shape, seed=1)),
    "rising": lambda T, S: torch.arange(S, dtype=torch.float32).expand(T, S).clone(),
    "falling": lambda T, S: -torch.arange(S, dtype=torch.float32).expand(T, S).clone(),
}


def check(ops, scores, k, *ranges):
    before = scores.clone()
    indices = ops.select_topk(scores, k, *ranges)
    assert indices.shape == (scores.shape[0], k)
    assert selected(indices) == best(before.double().cpu().numpy(), k, *(r.cpu() for r in ranges))
    assert torch.equal(scores.nan_to_num(), before.nan_to_num()), "the scores must not be written to"
    return indices


@pytest.mark.parametrize("T, S, k", [(1, 1, 1), (1, 37, 5), (37, 37, 16), (5, 257, 64), (4, 9, 20)])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_contract(ops, device, poisoned, kind, T, S, k):
    check(ops, DISTRIBUTIONS[kind](T, S).to(device), k)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", (1, 7, 60))
def test_ranges(ops, device, poisoned, small_blocks, k, seed):
    """Empty rows, ranges in no order; what lies outside a range is NaN or infinite and must not be looked at."""
    scores = small_integers(37, 50, seed=seed, device=device)
    start, end = ragged(37, 50, seed=seed, device=device)
    s = torch.arange(50, device=device)
    outside = (s < start[:, None]) | (s >= end[:, None])
    for poison in (torch.nan, torch.inf):
        check(ops, scores.masked_fill(outside, poison), k, start, end)


@pytest.mark.parametrize("kind", ("minus infinity", "zeros of both signs", "spread"))
def test_odd_scores_in_ranges(ops, device, poisoned, small_blocks, kind):
    """A visible -inf may be selected, a hidden place never, whichever comes first."""
    check(ops, DISTRIBUTIONS[kind](37, 50).to(device), 12, *ragged(37, 50, device=device))


def test_packed(ops, device, small_blocks):
    start, end, _ = packed(5, 1, 13, 40, device=device)
    check(ops, normal(59, 59, device=device), 8, start, end)


def test_zeros_of_both_signs_tie(ops, device):
    """-0.0 before 0.0: were they told apart, the later key would win."""
    scores = torch.tensor([[-0.0, 0.0, -1.0, 0.0, -0.0]], device=device)
    assert selected(ops.select_topk(scores, 1)) == [[0]]
    assert selected(ops.select_topk(scores, 3)) == [[0, 1, 3]]


def test_smallest_index_wins_a_tie(ops, device):
    scores = torch.tensor([[1.0, 7.0, 5.0, 5.0, 9.0, 5.0]], device=device)
    assert selected(ops.select_topk(scores, 4)) == [[1, 2, 3, 4]]


@pytest.mark.rungs("loops", "reference")
def test_reference_rows_ascend(ops, device):
    rows = ops.select_topk(normal(37, 37, device=device), 9).tolist()
    assert all([s for s in row if s >= 0] == sorted(s for s in row if s >= 0) for row in rows)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_narrow_scores(ops, device, dtype):
    """bf16 makes false ties at the threshold; they are ties like any other."""
    check(ops, normal(9, 300, device=device).to(dtype), 40)


@pytest.mark.rungs("loops", "reference")
def test_double_scores(ops, device):
    check(ops, 1.0 + 1e-12 * normal(9, 60, device=device).double(), 8)


def test_strided_input(ops, device):
    scores, (start, end) = normal(9, 60, device=device), ragged(9, 60, device=device)
    wanted = ops.select_topk(scores, 8, start, end)
    assert torch.equal(ops.select_topk(strided(scores), 8, strided(start), strided(end)), wanted)
    assert torch.equal(ops.select_topk(scores.T.contiguous().T, 8, start, end), wanted)


@pytest.mark.rungs("reference", "kernels")
def test_gradient_stops_and_no_queries(ops, device):
    indices = ops.select_topk(normal(5, 9, device=device).requires_grad_(), 3)
    assert not indices.requires_grad
    assert ops.select_topk(normal(0, 9, device=device), 3).shape == (0, 3)


@pytest.mark.rungs("reference", "kernels")
@pytest.mark.parametrize("sign", (1.0, -1.0))
def test_visible_nan_is_refused(ops, device, sign):
    scores = normal(9, 40, device=device)
    scores[4, 30] = torch.nan * sign
    with pytest.raises(ValueError, match="scores must not be NaN"):
        ops.select_topk(scores, 3, end=torch.full((9,), 40, dtype=torch.int32, device=device))
    scores[4, 35], scores[4, 30] = torch.nan, 0.0
    check(ops, scores, 3, torch.zeros(9, dtype=torch.int32, device=device), torch.arange(27, 36, device=device).int())


@pytest.mark.parametrize("kind", ("normal", "few values"))
def test_a_million(ops, device, kind):
    """Ties beyond position 2^16 and 2^20, where 16-bit counters and 20-bit packed indices give up."""
    check(ops, DISTRIBUTIONS[kind](1, 1 << 20).to(device), MANY)


@pytest.mark.rungs("reference", "kernels")
def test_four_million(ops, device):
    """All but the last thousand keys tie below the threshold, so the winners sit at the very end."""
    scores = torch.zeros(1, 4 << 20)
    scores[0, -1000:] = normal(1000).abs() + 1
    indices = selected(ops.select_topk(scores.to(device), MANY))
    assert indices == [[*range(MANY - 1000), *range((4 << 20) - 1000, 4 << 20)]]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ("normal", "spread", "few values", "last bit"))
def test_many_rows_of_a_million(device, kind):
    """3000 rows of 2^20 and more: offsets pass 2^31."""
    import dsa_kernels

    scores = DISTRIBUTIONS[kind](8, (1 << 20) + 5).to(device).repeat(375, 1)
    ends = torch.full((3000,), scores.shape[1], dtype=torch.int32, device=device)
    indices = dsa_kernels.select_topk(scores, MANY, end=ends)
    wanted = torch.tensor(best(scores[:8].cpu().numpy(), MANY, end=ends[:8].cpu()), dtype=torch.int32, device=device)
    assert torch.equal(indices.sort(dim=1).values, wanted.repeat(375, 1))


def test_the_oracle_itself():
    """`best` on a row small enough to do by hand."""
    scores = np.array([[3.0, -0.0, 3.0, 0.0, 5.0]])
    assert best(scores, 2) == [[0, 4]] and best(scores, 4) == [[0, 1, 2, 4]] and best(scores, 9) == [[0, 1, 2, 3, 4]]
