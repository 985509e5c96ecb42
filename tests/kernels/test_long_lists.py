"""k beyond what is there: k above S, or lists that end early. The same results, and no work for empty places."""

import time

import pytest
import torch
from inputs import normal

import dsa_kernels
import dsa_ref
from dsa_kernels import sparse_attention as public

T, S, HUGE = 5, 37, 32768


def lists(device, k=HUGE):
    """Five index lists of k places: packed, with -1 between, at the very end, one index, none."""
    indices = torch.full((T, k), -1, dtype=torch.int32)
    indices[0, :S] = torch.arange(S)
    indices[1, 0 : 3 * S : 3] = torch.arange(S - 1, -1, -1)
    indices[2, -2:] = torch.tensor([36, 4])
    indices[3, k // 2] = 17
    return indices.to(device)


@pytest.fixture
def qkv(device):
    return normal(T, 3, 40, device=device), normal(S, 40, seed=1, device=device)


@pytest.mark.parametrize("k", (38, 2048, HUGE))
def test_selection_with_k_above_s(k, device, poisoned):
    scores = normal(T, S, device=device)
    got = dsa_kernels.select_topk(scores, k)
    assert got.shape == (T, k) and got.dtype == torch.int32
    assert torch.equal(got[:, S:], torch.full_like(got[:, S:], -1))
    want = dsa_ref.select_topk(scores.cpu(), k)
    assert torch.equal(got.sort(dim=1).values.cpu(), want.sort(dim=1).values)
    q_idx, k_idx, w = normal(T, 2, 32, device=device), normal(S, 32, seed=1, device=device), normal(T, 2, device=device)
    got = dsa_kernels.lightning_select(q_idx, k_idx, w, k)
    want = dsa_ref.select_topk(dsa_kernels.index_scores(q_idx, k_idx, w).cpu(), k)
    assert torch.equal(got.sort(dim=1).values.cpu(), want.sort(dim=1).values)


@pytest.mark.parametrize("k", (120, 2048, HUGE))
def test_attention_with_lists_longer_than_s(k, qkv, device, poisoned):
    """Wherever a list's indices stand, each counts."""
    got = dsa_kernels.sparse_attention(*qkv, lists(device, k), 0.3, 24)
    want = dsa_ref.sparse_attention(*(x.cpu() for x in qkv), lists("cpu", k), 0.3, 24)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)


def test_lists_that_end_early_below_s(device, poisoned):
    q, kv = normal(2, 3, 40, device=device), normal(900, 40, seed=1, device=device)
    indices = torch.full((2, 800), -1, dtype=torch.int32)
    indices[0, 799], indices[1, :3] = 899, torch.tensor([5, 0, 700])
    got = dsa_kernels.sparse_attention(q, kv, indices.to(device), 0.3, 24)
    want = dsa_ref.sparse_attention(q.cpu(), kv.cpu(), indices, 0.3, 24)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)


def test_packed_keeps_order_and_every_index(device):
    module = __import__("sys").modules[public.__module__]
    got = module.packed(lists(device), S).cpu()
    assert got.shape == (T, S)
    assert got[1].tolist() == list(range(S - 1, -1, -1))
    assert got[2, :3].tolist() == [36, 4, -1] and got[3, :2].tolist() == [17, -1] and (got[4] == -1).all()


def test_limits_of_variants_count_what_can_be_selected(device):
    """k = 32768 of 37 keys is no more than 37."""
    scores = normal(T, S, device=device)
    assert dsa_kernels.select_topk(scores, HUGE, variant="portable").shape == (T, HUGE)
    if dsa_kernels.mode() == "compiled":  # the interpreter runs "radix" alone
        for variant in ("listed", "sampled"):
            got = dsa_kernels.select_topk(scores, HUGE, variant=variant)
            assert torch.equal(got.cpu().sort(dim=1).values, dsa_ref.select_topk(scores.cpu(), HUGE).sort(dim=1).values)


def test_time_does_not_follow_k(qkv, device):
    """512 times as many places took 20 times as long; now they are read once, and that is all."""

    def seconds(k):
        scores = normal(T, S, device=device)
        indices = dsa_kernels.select_topk(scores, k)
        best = float("inf")
        for _ in range(3):
            began = time.perf_counter()
            dsa_kernels.sparse_attention(*qkv, indices, 0.3, 24)
            dsa_kernels.select_topk(scores, k)
            best = min(best, time.perf_counter() - began)
        return best

    assert seconds(HUGE) < 5 * seconds(S)
